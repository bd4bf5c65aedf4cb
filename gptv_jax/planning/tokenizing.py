"""A tokenizer's training, as its stage runs it and as the planner sees it."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.model import flops, lpips
from gptv_jax.planning.collectives import WIDTHS, Call
from gptv_jax.planning.memory import spec_of, stored_dtype, total_bytes
from gptv_jax.planning.training import Training, residuals, state_of
from gptv_jax.train import autoencoding


@dataclasses.dataclass(frozen=True)
class TokenizerTraining(Training):
    """A tokenizer's training, for which only the mesh can be chosen: it has no remat."""

    section, sections = "tokenizer.train", ("tokenizer",)
    unit = "image"
    units = heads = 1
    tunable = False

    def __post_init__(self):
        if self.config.tokens.kind != "learned":
            raise InputError(
                f"--stage=tokenizer, but config.tokens.kind is {self.config.tokens.kind}, which "
                "has nothing to train; it takes learned."
            )

    @property
    def network(self) -> config_lib.Autoencoder:
        return self.config.tokens.autoencoder

    @functools.cached_property
    def flops(self) -> flops.Flops:
        """Of the encoder and decoder; the networks of the losses are not counted."""
        data = self.config.data
        return flops.of_autoencoder(self.network, data.size, data.frames).times(3)

    @property
    def loss(self) -> Callable:
        return autoencoding.make_loss(self.network, self.config.tokenizer)

    @property
    def after(self) -> Callable:
        return autoencoding.make_after(self.network, self.config.tokenizer)

    @property
    def init(self) -> Callable:
        return autoencoding.make_init(self.network, self.config.tokenizer, self.optimizer[0])

    def batch(self, rows: int, split: jax.NamedSharding | None = None) -> dict:
        data = self.config.data
        shape = (rows, *(data.frames,) * (data.frames > 0), *data.size, self.network.channels)
        return {"image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=split)}

    def frozen(self, split: jax.NamedSharding | None = None) -> dict | None:
        """LPIPS's weights, where LPIPS is part of the loss; they count as state."""
        if not self.config.tokenizer.lpips:
            return None
        shapes = lpips.shapes().items()
        return {"vgg": {n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=split) for n, s in shapes}}

    def executed(self, mesh: AbstractMesh) -> int:
        """Products and convolutions of the real step, including the networks of the losses."""
        return _executed(self.traced())

    def activations(self, mesh: AbstractMesh, rows: int) -> int:
        dtype = stored_dtype(self.network.dtype, mesh.abstract_device.platform)
        network = dataclasses.replace(self.network, dtype=dtype)
        tokens = dataclasses.replace(self.config.tokens, autoencoder=network)
        return total_bytes(residuals(self.traced(tokens=tokens), mesh, rows), mesh)

    def collectives(self, sizes: dict[str, int]) -> Iterator[Call]:
        """Split weights are gathered once, and all gradients are summed whole."""
        for each in self.state()[0]:
            split = "fsdp" in spec_of(each)
            size = each.size * WIDTHS[self.network.dtype if split else "float32"]
            if split:
                yield Call("all-gather", ("fsdp",), 1, size)
            yield Call("all-reduce", ("data", "fsdp"), 1, size)

    def weights_read(self, sizes: dict[str, int]) -> float | int:
        """The weights are read by the forward and the backward pass; gradients are written."""
        return 3 * sum(each.size for each in self.state()[0]) * WIDTHS[self.network.dtype]


@functools.cache
def _executed(training: TokenizerTraining) -> int:
    """FLOPs of the traced step, on one device, with attention in its plain form."""
    mesh, batch = sharding.one_device(), training.batch(training.train.batch_size)
    with jax.sharding.use_abstract_mesh(mesh):
        state = state_of(training, mesh)
        return flops.of_program(training.train_step, state, batch, training.frozen())
