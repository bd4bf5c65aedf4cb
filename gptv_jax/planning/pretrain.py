"""The pretraining of a GPT, as the planner sees it."""

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
    """Pretraining, for which mesh, rematerialisation and microbatches can be chosen."""

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
        return cls(network_of(config), config.train, config.seed)

    @property
    def units(self) -> int:
        return self.network.length

    positions = units

    @property
    def remat(self) -> str:
        return self.network.config.remat

    @property
    def heads(self) -> int:
        return self.network.config.heads

    @property
    def flops(self) -> flops.Flops:
        return flops.training(self.network)

    def executed(self, platform: str, sizes: dict[str, int]) -> int:
        rows = self.train.batch_size // self.train.microbatches
        parts = objective.loss_parts(self.network, rows, sizes)
        of_token = flops.executed(self.network, platform, sizes["sequence"], parts)
        return of_token.total * self.units * self.train.batch_size

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        train = self.train
        update, rate = optimizer.make_optimizer(
            train.optimizer, train.steps, relative_width=self.network.config.relative_width
        )
        train_step = step.make_train_step(
            step.make_loss(self.network, steps=train.steps),
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
        return step.abstract_batch(self.network, rows, split)

    def state(self, mesh: AbstractMesh) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        return _state(self.network, self.train.optimizer, self.train.ema, mesh)

    def activations(self, topology: Topology, sizes: dict[str, int], rows: int) -> int:
        """Arrays kept for the backward pass, and of the layer or logits being computed."""
        layers = self.network.config.layers
        kept, layer = _kept(self.network, topology, sizes, rows)
        # While the backward pass works on a layer, all activations of the layer exist, and so also
        # those that rematerialisation does not keep.
        kept_of_layer = arrays.total_bytes(_of_layers(kept, layers), sizes, topology) // layers
        repeated = arrays.total_bytes(layer, sizes, topology) - kept_of_layer
        # Logits of one part and their gradient, if there are several parts; else logits are kept.
        parts = objective.loss_parts(self.network, rows, sizes)
        positions = rows * self.network.length // (sizes["sequence"] * parts)
        logits = 4 * self.network.vocabulary * positions
        return arrays.total_bytes(kept, sizes, topology) + max(repeated, 2 * logits * (parts > 1))

    def collectives(self, sizes: dict[str, int]) -> Iterator[Call]:
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

        # Each layer has two products whose results are partial sums, in each direction.
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
        """Read by the forward and the backward pass and by repetition; gradients are written."""
        c = self.network.config
        weights = flops.forward(self.network).matmul // 2 * WIDTHS[c.dtype] / sizes["tensor"]
        return self.train.microbatches * (3 + (c.remat == "full")) * weights


@functools.cache
def _state(network: Network, config: config_lib.Optimizer, ema: float | None, mesh: AbstractMesh):
    update, _ = optimizer.make_optimizer(config, steps=1)  # the state is the same for all lengths
    with jax.sharding.use_abstract_mesh(mesh):
        return arrays.of_state(step.make_init(network, update, ema))


def _kept(network: Network, topology: Topology, sizes: dict[str, int], rows: int):
    """Arrays kept for the backward pass, and the activations of one layer without remat."""
    mesh = topology.abstract_mesh(tuple(sizes.values()))
    dtype = arrays.stored_dtype(network.config.dtype, topology.platform)
    network = dataclasses.replace(network, config=dataclasses.replace(network.config, dtype=dtype))
    kept = _residuals(network, mesh, rows)
    two = dataclasses.replace(network.config, remat="none", layers=2, scan_layers=True)
    stacked = _residuals(dataclasses.replace(network, config=two), mesh, rows)
    layers = _of_layers(stacked, 2)
    return kept, tuple(Array(a.shape[1:], a.itemsize, a.axes[1:], a.by_head) for a in layers)


def _of_layers(found: Iterable[Array], count: int) -> list[Array]:
    """Arrays stacked over `count` layers: the axis of layers is never split, an axis of rows is."""
    return [array for array in found if array.shape[:1] == (count,) and not array.axes[0]]


@functools.cache
def _residuals(network: Network, mesh: AbstractMesh, rows: int) -> tuple[Array, ...]:
    loss = step.make_loss(network, steps=1)
    with jax.sharding.use_abstract_mesh(mesh):
        params = jax.eval_shape(lambda: network.init(jax.random.key(0)))
        batch = step.abstract_batch(network, rows, NamedSharding(mesh, sharding.BATCH_FIRST))
        found = arrays.residuals(
            lambda p, batch: loss(p, None, batch, jax.random.key(0), jnp.int32(0)), params, batch
        )
    head = network.config.width // network.config.heads
    return tuple(
        dataclasses.replace(array, by_head=len(array.shape) > 3 and array.shape[-1] == head)
        for array in found
    )
