"""The pretraining of a GPT, to be planned."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import flops, remat
from gptv_jax.model.gpt import Network
from gptv_jax.planning import arrays
from gptv_jax.planning.arrays import Array
from gptv_jax.planning.topology import Topology
from gptv_jax.planning.training import WIDTHS, Call, Training
from gptv_jax.runs.record import network_of
from gptv_jax.train import objective, optimizer, step


@dataclasses.dataclass(frozen=True)
class Pretraining(Training):
    """All positions of every image; the choice is of mesh, rematerialisation and microbatches."""

    network: Network
    train: config_lib.Train
    seed: int

    section = "train"
    sections = ("model", "train")
    unit = "token"
    policies = ("none", *remat.POLICIES)
    splits_batches = True

    @classmethod
    def of(cls, config: config_lib.Config) -> "Pretraining":
        """That of a configuration."""
        return cls(network_of(config), config.train, config.seed)

    @property
    def units(self) -> int:
        """Tokens of an image."""
        return self.network.length

    @property
    def remat(self) -> str:
        """Of its layers."""
        return self.network.config.remat

    @property
    def heads(self) -> int:
        """Of its attention."""
        return self.network.config.heads

    @property
    def positions(self) -> int:
        """Tokens of an image."""
        return self.network.length

    @property
    def flops(self) -> flops.Flops:
        """Of one token."""
        return flops.training(self.network)

    def executed(self, platform: str, sizes: dict[str, int]) -> int:
        """See `flops.executed`."""
        rows = self.train.batch_size // self.train.microbatches
        parts = objective.loss_parts(self.network, rows, sizes)
        of_token = flops.executed(self.network, platform, sizes["sequence"], parts)
        return of_token.total * self.units * self.train.batch_size

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """The step as the stage makes it."""
        train = self.train
        update, rate = optimizer.make_optimizer(
            train.optimizer, train.steps, relative_width=self.network.config.relative_width
        )
        train_step = step.make_train_step(
            step.generative_loss(self.network, train.steps),
            update,
            rate,
            microbatches=train.microbatches,
            seed=self.seed,
            ema=train.ema,
        )
        state = sharding.abstract(step.make_init(self.network, update, train.ema))
        rows = NamedSharding(mesh, sharding.BATCH_FIRST)
        return train_step.lower(state, self.batch(train.batch_size, rows))

    def batch(self, rows: int, split: NamedSharding | None = None) -> dict:
        """Tokens, and what the start vector is chosen by."""
        return step.abstract_batch(self.network, rows, split)

    def state(self, mesh: AbstractMesh) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Parameters; moments and the average of the weights."""
        return _state(self.network, self.train.optimizer, self.train.ema, mesh)

    def activations(self, topology: Topology, sizes: dict[str, int], rows: int) -> int:
        """What the backward pass keeps, and the layer, or part of the logits, it works on."""
        layers = self.network.config.layers
        kept, layer = _kept(self.network, topology, sizes, rows)
        # What a layer leaves, less what of it is kept anyway, is there again while it is worked on.
        of_a_layer = arrays.held(_of_layers(kept, layers), sizes, topology) // layers
        of_layer = arrays.held(layer, sizes, topology) - of_a_layer
        # Logits of one part, where there are several, and their gradient; all of them are kept.
        parts = objective.loss_parts(self.network, rows, sizes)
        positions = rows * self.network.length // (sizes["sequence"] * parts)
        logits = 4 * self.network.vocabulary * positions
        return arrays.held(kept, sizes, topology) + max(of_layer, 2 * logits * (parts > 1))

    def collectives(self, sizes: dict[str, int]) -> Iterator[Call]:
        """Weights and their gradients, layer by layer; sums over tensor; keys and values."""
        c, network, parts = self.network.config, self.network, self.train.microbatches
        width, tensor, sequence = WIDTHS[c.dtype], sizes["tensor"], sizes["sequence"]
        # Columns of qkv, attention_out, and the MLP's first and second matrix.
        first = 2 * c.mlp_width if c.mlp == "swiglu" else c.mlp_width
        for columns in (3 * c.width, c.width, first, c.mlp_width):
            weight = columns * c.width * width / tensor
            yield Call("all-gather", ("fsdp",), c.layers * parts * 2, weight)  # forward, backward
            yield Call("reduce-scatter", ("fsdp",), c.layers * parts, weight)
            shard = weight / sizes["fsdp"]
            yield Call("all-reduce", ("data", "sequence"), c.layers * parts, shard)
        vectors = 2 * network.vocabulary + c.learned_positions * network.length
        tables = vectors * c.width * width
        yield Call("all-gather", ("fsdp",), parts, tables)
        yield Call("all-reduce", ("data", "fsdp", "sequence"), parts, tables)

        # Of each layer: two products whose results are partial sums, in each direction.
        positions = self.train.batch_size * network.length
        positions /= parts * sizes["data"] * sizes["fsdp"] * sequence
        hidden = positions * c.width * width
        sums = 4 + (c.remat == "full")
        yield Call("all-reduce", ("tensor",), c.layers * parts * sums, hidden)
        # Keys and values of all positions, and their gradients.
        again, both = c.remat != "none", 2 * hidden * sequence / tensor
        yield Call("all-gather", ("sequence",), c.layers * parts * (1 + again), both)
        yield Call("reduce-scatter", ("sequence",), c.layers * parts, both)

    def weights_read(self, sizes: dict[str, int]) -> float | int:
        """Forward, backward, once more where that is repeated; gradients are written."""
        c = self.network.config
        weights = flops.forward(self.network).matmul // 2 * WIDTHS[c.dtype] / sizes["tensor"]
        return self.train.microbatches * (3 + (c.remat == "full")) * weights


@functools.cache
def _state(network: Network, config: config_lib.Optimizer, ema: float | None, mesh: AbstractMesh):
    """The length of the training is of no consequence."""
    update, _ = optimizer.make_optimizer(config, steps=1)
    with jax.sharding.use_abstract_mesh(mesh):
        return arrays.of_state(step.make_init(network, update, ema))


def _kept(network: Network, topology: Topology, sizes: dict[str, int], rows: int):
    """For so many rows: what the backward pass keeps, and what one layer leaves with no remat."""
    mesh = topology.abstract_mesh(tuple(sizes.values()))
    dtype = arrays.stored_dtype(network.config.dtype, topology.platform)
    network = dataclasses.replace(network, config=dataclasses.replace(network.config, dtype=dtype))
    kept = _residuals(network, mesh, rows)
    two = dataclasses.replace(network.config, remat="none", layers=2, scan_layers=True)
    stacked = _residuals(dataclasses.replace(network, config=two), mesh, rows)
    layers = _of_layers(stacked, 2)
    return kept, tuple(Array(a.shape[1:], a.itemsize, a.axes[1:], a.by_head) for a in layers)


def _of_layers(found: Iterable[Array], count: int) -> list[Array]:
    """Those with so many layers on their first axis, which is not split, as that of rows is."""
    return [array for array in found if array.shape[:1] == (count,) and not array.axes[0]]


@functools.cache
def _residuals(network: Network, mesh: AbstractMesh, rows: int) -> tuple[Array, ...]:
    """Of a forward pass of so many rows."""
    loss = step.generative_loss(network, steps=1)
    with jax.sharding.use_abstract_mesh(mesh):
        params = jax.eval_shape(lambda: network.init(jax.random.key(0)))
        batch = step.abstract_batch(network, rows, NamedSharding(mesh, sharding.BATCH_FIRST))
        found = arrays.kept(
            lambda p, batch: loss(p, None, batch, jax.random.key(0), jnp.int32(0)), params, batch
        )
    head = network.config.width // network.config.heads
    return tuple(
        dataclasses.replace(array, by_head=len(array.shape) > 3 and array.shape[-1] == head)
        for array in found
    )
