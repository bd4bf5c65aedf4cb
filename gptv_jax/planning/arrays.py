"""Arrays of a traced program, and the bytes of each that a device holds."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from gptv_jax.planning.topology import Topology

TILE = (8, 128)  # of a TPU's registers and memory


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape of an array, and the mesh axes that split each of its dimensions."""

    shape: tuple[int, ...]
    itemsize: int
    axes: tuple[tuple[str, ...], ...]
    by_head: bool = False  # the last dimension is K, which TPUs store along the lanes

    def bytes(self, sizes: dict[str, int], *, tiled: bool) -> int:
        """Bytes on one device of a mesh whose axes have these sizes.

        `tiled` is how a TPU stores an array: one dimension padded to a multiple of 128 and another
        to a multiple of 8, the two for which that adds the least.
        """
        shard = [
            size // math.prod(sizes[axis] for axis in axes)
            for size, axes in zip(self.shape, self.axes, strict=True)
        ]
        if tiled and len(shard) > 1:
            pairs = itertools.permutations(range(len(shard)), 2)
            pairs = [pair for pair in pairs if not self.by_head or pair[0] == len(shard) - 1]
            return self.itemsize * min(math.prod(_padded(shard, *pair)) for pair in pairs)
        return self.itemsize * math.prod(shard)


def _padded(shard: list[int], lanes: int, rows: int) -> list[int]:
    multiple = {lanes: TILE[1], rows: TILE[0]}
    return [-(-size // (m := multiple.get(i, 1))) * m for i, size in enumerate(shard)]


def of_avals(avals: Iterable) -> tuple[Array, ...]:
    """The `Array` of each abstract value of JAX."""
    found = []
    for aval in avals:
        spec = getattr(getattr(aval, "sharding", None), "spec", None) or ()
        axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
        axes += [()] * (len(aval.shape) - len(axes))
        found.append(Array(tuple(aval.shape), getattr(aval.dtype, "itemsize", 1), tuple(axes)))
    return tuple(found)


def of_state(init: Callable) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Parameters, and the rest of the train state that `init(key)` makes."""
    state = jax.eval_shape(lambda: init(jax.random.key(0)))
    del state["step"]
    return tuple(of_avals(jax.tree.leaves(part)) for part in (state.pop("params"), state))


def residuals(loss: Callable, params: dict, *arguments) -> tuple[Array, ...]:
    """Arrays, besides the arguments, that a forward pass keeps for the backward pass.

    `loss(params, *arguments) -> (loss, anything)` is traced with abstract arguments, not run.
    """

    def backward(params, *arguments):
        return jax.vjp(lambda p: loss(p, *arguments), params, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(backward)(params, *arguments).jaxpr
    given = {id(var) for var in jaxpr.invars}
    return of_avals({id(v): v.aval for v in jaxpr.outvars if id(v) not in given}.values())


def stored_dtype(dtype: str, platform: str) -> str:
    """The dtype in which a platform's compiler keeps activations that are computed in `dtype`."""
    return "float32" if platform == "cpu" and _cpu_widens(dtype) else dtype


@functools.cache
def _cpu_widens(dtype: str) -> bool:
    """Whether XLA's CPU compiler keeps arrays of this dtype as float32.

    Found by compiling two products: jax 0.10 keeps bfloat16 as float32, jax 0.12 does not.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    x = jax.ShapeDtypeStruct((512, 512), jnp.dtype(dtype), sharding=device)
    compiled = jax.jit(lambda x: x @ x @ x).lower(x).compile()
    return compiled.memory_analysis().temp_size_in_bytes > 1.5 * x.size * x.dtype.itemsize


def total_bytes(arrays: Iterable[Array], sizes: dict[str, int], topology: Topology) -> int:
    """Bytes of the arrays on one device."""
    return sum(array.bytes(sizes, tiled=topology.platform == "tpu") for array in arrays)
