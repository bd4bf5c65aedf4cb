"""Bytes of arrays on one device, from their shapes and shardings alone."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

TILE = (8, 128)  # of a TPU's registers and memory


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device at the worst moment of a step."""

    parameters: int
    optimizer: int  # moments, the average of the weights, and the rest of a tokenizer's state
    batch: int
    gradients: int
    activations: int  # kept for the backward pass, or of the layer that is being computed
    teachers: int = 0  # weights of a distillation's teachers

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def spec_of(array) -> jax.P:
    """How an abstract array is split; scalars have no sharding and are replicated."""
    return getattr(array.sharding, "spec", jax.P())


def total_bytes(
    arrays: Iterable, mesh: AbstractMesh, head_size: int = 0, *, one_layer: bool = False
) -> int:
    """Bytes of abstract arrays on one device of the mesh; with `one_layer`, without the first axis.

    A TPU stores an array with one dimension padded to a multiple of 128 and another to a multiple
    of 8, the two for which that adds the least; if the last dimension is K, it is along the lanes.
    """
    total = 0
    for array in arrays:
        shard = jax.NamedSharding(mesh, spec_of(array)).shard_shape(array.shape)[int(one_layer) :]
        if mesh.abstract_device.platform == "tpu" and len(shard) > 1:
            last, by_head = len(shard) - 1, len(array.shape) > 3 and array.shape[-1] == head_size
            pairs = itertools.permutations(range(len(shard)), 2)
            size = min(_tiled(shard, *pair) for pair in pairs if not by_head or pair[0] == last)
        else:
            size = math.prod(shard)
        total += array.dtype.itemsize * size
    return total


def _tiled(shard: tuple[int, ...], lanes: int, rows: int) -> int:
    """Elements of a shard whose axes `lanes` and `rows` are padded to whole tiles."""
    sides = ({lanes: TILE[1], rows: TILE[0]}.get(axis, 1) for axis in range(len(shard)))
    return math.prod(-(-n // side) * side for n, side in zip(shard, sides, strict=True))


@functools.cache
def stored_dtype(dtype: str, platform: str) -> str:
    """The dtype in which a platform's compiler keeps activations that are computed in `dtype`.

    XLA's CPU compiler may keep bfloat16 as float32 (in jax 0.10, but not in 0.12), which two
    compiled products show.
    """
    if platform != "cpu":
        return dtype
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    x = jax.ShapeDtypeStruct((512, 512), jnp.dtype(dtype), sharding=device)
    compiled = jax.jit(lambda x: x @ x @ x).lower(x).compile()
    wide = compiled.memory_analysis().temp_size_in_bytes > 1.5 * x.size * x.dtype.itemsize
    return "float32" if wide else dtype
