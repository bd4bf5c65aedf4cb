"""What the planner needs to know of a training: its real step, and facts for arithmetic."""

import abc
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from gptv_jax import config as config_lib
from gptv_jax.model import flops
from gptv_jax.planning.arrays import Array
from gptv_jax.planning.topology import Topology

WIDTHS = {"float32": 4, "bfloat16": 2}  # bytes


class Call(NamedTuple):
    """A collective that the sharding of a training requires, `count` times a step."""

    kind: str
    axes: tuple[str, ...]  # mesh axes; axes of size 1 are ignored
    count: int
    bytes: float | int  # of one call: of the whole array, on one device


class Training(abc.ABC):
    """A training to be planned; it holds no mesh, so that traced programs serve all meshes.

    In its methods `sizes` are those of the mesh, by axis.
    """

    section: str  # path of the section `train` in the configuration
    sections: tuple[str, ...]  # of the configuration, which the mesh must divide
    unit: str  # FLOPs are shown per "token" or "image"
    units: int  # of an image
    remat: str  # rematerialisation of the layers
    policies: tuple[str, ...]  # rematerialisations to choose from
    splits_batches: bool  # whether it takes microbatches
    train: config_lib.Train
    heads: int  # the most parts that the axis "tensor" can split weights into
    positions: int  # of an image, which the axis "sequence" can split
    flops: flops.Flops  # of training on one unit, forward and backward

    @abc.abstractmethod
    def executed(self, platform: str, sizes: dict[str, int]) -> int:
        """FLOPs that a step executes, on all devices together."""

    @abc.abstractmethod
    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """The stage's train step for the mesh, which is in force, on abstract arguments."""

    @abc.abstractmethod
    def batch(self, rows: int, split: NamedSharding | None = None) -> dict:
        """Abstract arrays of a batch of `rows` images."""

    @abc.abstractmethod
    def state(self, mesh: AbstractMesh) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Parameters, and all other arrays that live from step to step."""

    @abc.abstractmethod
    def activations(self, topology: Topology, sizes: dict[str, int], rows: int) -> int:
        """Bytes that a device holds besides state, batch and gradients.

        `rows` images at a time are worked on by the devices of `sizes`, whose batch axes are 1.
        """

    @abc.abstractmethod
    def collectives(self, sizes: dict[str, int]) -> Iterator[Call]:
        """The collectives that the sharding requires in a step."""

    @abc.abstractmethod
    def weights_read(self, sizes: dict[str, int]) -> float | int:
        """Bytes of weights that a device reads and writes in a step, without the optimizer."""
