"""Bytes of one device by arithmetic: from the shapes of the real program, without compiling it.

The program is traced, not run: JAX then says which arrays the backward pass keeps and how each is
split, under the rematerialisation of the config.
"""

import dataclasses
import math

from gptv_jax import sharding
from gptv_jax.planning import arrays
from gptv_jax.planning.topology import Topology
from gptv_jax.planning.training import Training

ONES = (1,) * len(sharding.AXES)  # the mesh of one device


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device at the worst moment of a step."""

    parameters: int
    optimizer: int  # moments, the average of the weights, and the rest of a tokenizer's state
    batch: int
    gradients: int
    activations: int  # those kept for the backward pass, and those of the layer being computed

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def estimate(training: Training, topology: Topology, sizes: dict[str, int]) -> Memory:
    """Bytes on a mesh whose axes have these sizes."""
    train = training.train
    params, rest = training.state(topology.abstract_mesh(ONES))
    parameters = arrays.total_bytes(params, sizes, topology)
    ways = math.prod(sizes[axis] for axis in sharding.BATCH)
    # Rows of the batch that the devices which share them work on at a time.
    rows = train.batch_size // (ways * train.microbatches)
    within = {axis: 1 if axis in sharding.BATCH else size for axis, size in sizes.items()}
    batch = training.batch(train.batch_size // ways)
    return Memory(
        parameters,
        arrays.total_bytes(rest, sizes, topology),
        sum(math.prod(array.shape) * array.dtype.itemsize for array in batch.values()),
        parameters,  # gradients
        training.activations(topology, within, rows),
    )


def parameter_count(training: Training, topology: Topology) -> int:
    """Number of weights of the network."""
    params, _ = training.state(topology.abstract_mesh(ONES))
    return sum(math.prod(array.shape) for array in params)
