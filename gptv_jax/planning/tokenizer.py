"""The training of a tokenizer, as the planner sees it."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.model import flops, lpips
from gptv_jax.planning import arrays
from gptv_jax.planning.arrays import Array
from gptv_jax.planning.topology import Topology
from gptv_jax.planning.training import WIDTHS, Call, Training
from gptv_jax.train import autoencoding, optimizer, step


@dataclasses.dataclass(frozen=True)
class TokenizerTraining(Training):
    """A tokenizer's training, for which only the mesh can be chosen: it has no remat."""

    network: config_lib.Autoencoder
    settings: config_lib.Tokenizer
    size: int  # pixels a side
    seed: int

    section = "tokenizer.train"
    sections = ("tokenizer",)
    unit = "image"
    units = heads = positions = 1
    remat = "none"
    policies = (remat,)
    splits_batches = False

    @classmethod
    def of(cls, config: config_lib.Config) -> "TokenizerTraining":
        if config.tokens.kind != "learned":
            raise InputError(
                f"--stage=tokenizer, but config.tokens.kind is {config.tokens.kind}, which has "
                "nothing to train; it takes learned."
            )
        network = config.tokens.autoencoder
        return cls(network, config.tokenizer, config.data.image_size, config.seed)

    @property
    def train(self) -> config_lib.Train:
        return self.settings.train

    @property
    def flops(self) -> flops.ImageFlops:
        """Of the encoder and decoder; the networks of the losses are not counted."""
        return flops.of_autoencoder(self.network, self.size).times(3)

    def executed(self, platform: str, sizes: dict[str, int]) -> int:
        """Products and convolutions of the real step, including the networks of the losses."""
        return _executed(self)

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        rows = NamedSharding(mesh, sharding.BATCH_FIRST)
        frozen = self._frozen(NamedSharding(mesh, P()))
        state = sharding.abstract(self._init())
        return self._step().lower(state, self.batch(self.train.batch_size, rows), frozen)

    def batch(self, rows: int, split: NamedSharding | None = None) -> dict:
        shape = (rows, self.size, self.size, self.network.channels)
        return {"image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=split)}

    def state(self, mesh: AbstractMesh) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """LPIPS's weights, which are not trained, count as state."""
        with jax.sharding.use_abstract_mesh(mesh):
            params, rest = arrays.of_state(self._init())
        return params, (*rest, *arrays.of_avals(jax.tree.leaves(self._frozen())))

    def activations(self, topology: Topology, sizes: dict[str, int], rows: int) -> int:
        dtype = arrays.stored_dtype(self.network.dtype, topology.platform)
        network = dataclasses.replace(self.network, dtype=dtype)
        mesh = topology.abstract_mesh(tuple(sizes.values()))
        widened = dataclasses.replace(self, network=network)
        return arrays.total_bytes(_residuals(widened, mesh, rows), sizes, topology)

    def collectives(self, sizes: dict[str, int]) -> Iterator[Call]:
        """Split weights are gathered once, and all gradients are summed whole."""
        params, _ = self.state(sharding.one_device())
        for each in params:
            if any("fsdp" in axes for axes in each.axes):
                size = math.prod(each.shape) * WIDTHS[self.network.dtype]
                yield Call("all-gather", ("fsdp",), 1, size)
            else:
                size = math.prod(each.shape) * WIDTHS["float32"]
            yield Call("all-reduce", ("data", "fsdp"), 1, size)

    def weights_read(self, sizes: dict[str, int]) -> float | int:
        """The weights are read by the forward and the backward pass; gradients are written."""
        params, _ = self.state(sharding.one_device())
        return 3 * sum(math.prod(each.shape) for each in params) * WIDTHS[self.network.dtype]

    def _update(self):
        return optimizer.make_optimizer(self.train.optimizer, self.train.steps)

    def _init(self):
        return autoencoding.make_init(self.network, self.settings, self._update()[0])

    def _step(self):
        return step.make_train_step(
            autoencoding.make_loss(self.network, self.settings),
            *self._update(),
            seed=self.seed,
            ema=self.train.ema,
            after=autoencoding.make_after(self.network, self.settings),
        )

    def _frozen(self, whole: NamedSharding | None = None) -> dict | None:
        """Shapes of LPIPS's weights, where it is part of the loss."""
        if not self.settings.lpips:
            return None
        shapes = lpips.shapes().items()
        weights = {n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=whole) for n, s in shapes}
        return {"vgg": weights}


@functools.cache
def _executed(training: TokenizerTraining) -> int:
    """FLOPs of the traced step, on one device, with attention in its plain form."""
    with jax.sharding.use_abstract_mesh(sharding.one_device()):
        state = jax.eval_shape(lambda: training._init()(jax.random.key(0)))
        batch = training.batch(training.train.batch_size)
        return flops.of_program(training._step(), state, batch, training._frozen())


@functools.cache
def _residuals(training: TokenizerTraining, mesh: AbstractMesh, rows: int) -> tuple[Array, ...]:
    loss = autoencoding.make_loss(training.network, training.settings)
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(lambda: training._init()(jax.random.key(0)))
        batch = training.batch(rows, NamedSharding(mesh, sharding.BATCH_FIRST))
        frozen = {**(training._frozen() or {}), "critic": state.get("critic")}

        def of_batch(params, frozen, batch):
            return loss(params, frozen, batch, None, jnp.int32(training.train.steps))

        return arrays.residuals(of_batch, state["params"], frozen, batch)
