"""What a plan asks of the training that it is for."""

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
    """Collectives that the sharding calls for."""

    kind: str
    axes: tuple[str, ...]  # of the mesh; those of size 1 do not matter
    count: int  # a step
    bytes: float | int  # each time: of the whole array, on one device


class Training(abc.ABC):
    """A training: its real step, and what arithmetic knows of it.

    It is made of a configuration but holds no mesh, so that what is traced once serves all meshes.
    """

    section: str  # of the configuration, that `train` is
    sections: tuple[str, ...]  # of the configuration that the mesh must divide
    unit: str  # what FLOPs are told of: token or image
    policies: tuple[str, ...]  # of rematerialisation, that there is a choice of
    splits_batches: bool  # whether there can be microbatches
    train: config_lib.Train

    @property
    @abc.abstractmethod
    def units(self) -> int:
        """How many there are in an image."""

    @property
    @abc.abstractmethod
    def remat(self) -> str:
        """Its rematerialisation."""

    @property
    @abc.abstractmethod
    def heads(self) -> int:
        """Parts that "tensor" can split weights into, at most."""

    @property
    @abc.abstractmethod
    def positions(self) -> int:
        """Of an image, that "sequence" can split."""

    @property
    @abc.abstractmethod
    def flops(self) -> flops.Flops | flops.OfImage:
        """That one unit of training needs, the backward pass counted in."""

    @abc.abstractmethod
    def executed(self, platform: str, sizes: dict[str, int]) -> int:
        """FLOPs that a step does, on all devices together."""

    @abc.abstractmethod
    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """The real step for the mesh, which is in force, on abstract arguments."""

    @abc.abstractmethod
    def batch(self, rows: int, split: NamedSharding | None = None) -> dict:
        """Shapes of a batch of so many images."""

    @abc.abstractmethod
    def state(self, mesh: AbstractMesh) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Parameters, and what else lasts from step to step."""

    @abc.abstractmethod
    def activations(self, topology: Topology, sizes: dict[str, int], rows: int) -> int:
        """Bytes of a device beside state, batch and gradients.

        Args:
          topology: the devices.
          sizes: of the mesh, by axis, among those that work on the same rows.
          rows: images that these work on at a time.
        """

    @abc.abstractmethod
    def collectives(self, sizes: dict[str, int]) -> Iterator[Call]:
        """What the sharding calls for in a step."""

    @abc.abstractmethod
    def weights_read(self, sizes: dict[str, int]) -> float | int:
        """Bytes of weights that a device reads and writes in a step, the optimizer aside."""
