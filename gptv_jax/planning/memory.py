"""Bytes of one device by arithmetic: from the shapes of the real program, without compiling it.

The program is traced, not run: JAX then says which arrays the backward pass keeps and how each is
split, under the rematerialisation that the config asks for.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model.gpt import Network
from gptv_jax.planning.topology import Topology
from gptv_jax.train import objective, optimizer, step

ONES = (1,) * len(sharding.AXES)  # the mesh of one device
TILE = (8, 128)  # of a TPU's registers and memory


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device at the worst moment of a step."""

    parameters: int
    optimizer: int  # its moments, and the average of the weights
    batch: int
    gradients: int
    activations: int  # what the backward pass keeps, and the layer that it works on

    @property
    def total(self) -> int:
        """Of all of it."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape of an array, and the mesh axes that split each of its dimensions."""

    shape: tuple[int, ...]
    itemsize: int
    axes: tuple[tuple[str, ...], ...]
    by_head: bool = False  # its last dimension is K, which TPUs keep as the fastest one

    def bytes(self, sizes: dict[str, int], *, tiled: bool) -> int:
        """On one device.

        Args:
          sizes: of the mesh, by axis.
          tiled: as a TPU holds it, with one dimension filled up to a multiple of 128 and another
            one of 8, those where that adds the least.
        """
        shard = [
            size // math.prod(sizes[axis] for axis in axes)
            for size, axes in zip(self.shape, self.axes, strict=True)
        ]
        if tiled and len(shard) > 1:
            pairs = itertools.permutations(range(len(shard)), 2)
            pairs = [pair for pair in pairs if not self.by_head or pair[0] == len(shard) - 1]
            return self.itemsize * min(math.prod(_filled(shard, *pair)) for pair in pairs)
        return self.itemsize * math.prod(shard)


def _filled(shard: list[int], lanes: int, rows: int) -> list[int]:
    multiple = {lanes: TILE[1], rows: TILE[0]}
    return [-(-size // (m := multiple.get(i, 1))) * m for i, size in enumerate(shard)]


def estimate(
    config: config_lib.Config, network: Network, topology: Topology, sizes: dict[str, int]
) -> Memory:
    """Bytes on a mesh.

    Args:
      config: of the run.
      network: its network.
      topology: whose platform decides how the network attends.
      sizes: of the mesh, by axis.
    """
    train = config.train
    params, opt = _state(network, train.optimizer, train.ema, topology.abstract_mesh(ONES))
    parameters = sum(_bytes(params, sizes, topology))
    ways = math.prod(sizes[axis] for axis in sharding.BATCH)
    # Rows of the batch that the devices which share them work on at a time.
    rows = train.batch_size // (ways * train.microbatches)
    within = {axis: 1 if axis in sharding.BATCH else size for axis, size in sizes.items()}
    batch = step.abstract_batch(network, train.batch_size // ways)
    kept, layer = _kept(network, topology, within, rows)
    held = sum(_bytes(kept, within, topology))
    # What a layer leaves, less what of it is kept anyway, is there again while it is worked on.
    stacked = _of_layers(kept, network.config.layers)
    of_a_layer = sum(_bytes(stacked, within, topology)) // network.config.layers
    of_layer = sum(_bytes(layer, within, topology)) - of_a_layer
    # Logits of one part, where there are several, and their gradient; all of them are among `kept`.
    parts = objective.loss_parts(network, rows, within)
    logits = 4 * network.vocabulary * rows * network.length // (within["sequence"] * parts)
    at_work = max(of_layer, 2 * logits * (parts > 1))
    return Memory(
        parameters,
        sum(_bytes(opt, sizes, topology)),
        sum(math.prod(array.shape) * array.dtype.itemsize for array in batch.values()),
        parameters,  # gradients
        held + at_work,
    )


def parameter_count(config: config_lib.Config, network: Network, topology: Topology) -> int:
    """Weights of the network."""
    train = config.train
    params, _ = _state(network, train.optimizer, train.ema, topology.abstract_mesh(ONES))
    return sum(math.prod(array.shape) for array in params)


@functools.cache
def _state(network: Network, config: config_lib.Optimizer, ema: float | None, mesh: AbstractMesh):
    """Parameters, and the rest of the state; the length of the training is of no consequence."""
    update, _ = optimizer.make_optimizer(config, steps=1)
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(lambda: step.make_init(network, update, ema)(jax.random.key(0)))
    del state["step"]
    return tuple(_arrays(jax.tree.leaves(part)) for part in (state.pop("params"), state))


def _kept(network: Network, topology: Topology, sizes: dict[str, int], rows: int):
    """For so many rows: what the backward pass keeps, and what one layer leaves with no remat."""
    mesh = topology.abstract_mesh(tuple(sizes.values()))
    if topology.platform == "cpu":  # whose compiler widens bfloat16
        network = dataclasses.replace(
            network, config=dataclasses.replace(network.config, dtype="float32")
        )
    kept = _residuals(network, mesh, rows)
    two = dataclasses.replace(network.config, remat="none", layers=2, scan_layers=True)
    stacked = _residuals(dataclasses.replace(network, config=two), mesh, rows)
    layers = _of_layers(stacked, 2)
    return kept, tuple(Array(a.shape[1:], a.itemsize, a.axes[1:], a.by_head) for a in layers)


def _of_layers(arrays: Iterable[Array], count: int) -> list[Array]:
    """Those with so many layers on their first axis, which is not split, as that of rows is."""
    return [array for array in arrays if array.shape[:1] == (count,) and not array.axes[0]]


@functools.cache
def _residuals(network: Network, mesh: AbstractMesh, rows: int) -> tuple[Array, ...]:
    """Distinct arrays, but for the parameters, that a forward pass of so many rows leaves."""
    with jax.sharding.use_abstract_mesh(mesh):
        params = jax.eval_shape(lambda: network.init(jax.random.key(0)))
        split = NamedSharding(mesh, sharding.BATCH_FIRST)
        batch = step.abstract_batch(network, rows, split)
        loss = step.generative_loss(network, steps=1)

        def backward(params, batch):
            key = jax.random.key(0)
            return jax.vjp(lambda p: loss(p, batch, key, jnp.int32(0)), params, has_aux=True)[1]

        jaxpr = jax.make_jaxpr(backward)(params, batch).jaxpr
    given = {id(var) for var in jaxpr.invars}
    outs = {id(v): v.aval for v in jaxpr.outvars if id(v) not in given}
    head = network.config.width // network.config.heads
    return tuple(
        dataclasses.replace(array, by_head=len(array.shape) > 3 and array.shape[-1] == head)
        for array in _arrays(outs.values())
    )


def _arrays(avals: Iterable) -> tuple[Array, ...]:
    return tuple(_array(aval) for aval in avals)


def _array(aval) -> Array:
    spec = getattr(getattr(aval, "sharding", None), "spec", None) or ()
    axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    axes += [()] * (len(aval.shape) - len(axes))
    return Array(tuple(aval.shape), getattr(aval.dtype, "itemsize", 1), tuple(axes))


def _bytes(arrays: Iterable[Array], sizes: dict[str, int], topology: Topology) -> list[int]:
    return [array.bytes(sizes, tiled=topology.platform == "tpu") for array in arrays]
