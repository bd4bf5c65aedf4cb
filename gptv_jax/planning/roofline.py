"""The least time that a step can take, by what each part of a device can do at its best."""

import dataclasses
import math

from gptv_jax.hardware import Hardware
from gptv_jax.planning.memory import Memory
from gptv_jax.planning.traffic import Traffic
from gptv_jax.planning.training import Training


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step in each part of a device, as if it were alone."""

    compute: float
    memory: float
    interconnect: float
    network: float  # between slices or nodes

    @property
    def bound(self) -> float:
        """Where everything else hides behind the slowest part."""
        return max(dataclasses.astuple(self))

    @property
    def serial(self) -> float:
        """Where nothing overlaps."""
        return sum(dataclasses.astuple(self))


def estimate(
    training: Training,
    executed: int,
    sizes: dict[str, int],
    memory: Memory,
    traffic: list[Traffic],
    hardware: Hardware,
) -> Roofline:
    """The roofline of a step.

    Args:
      training: to be planned.
      executed: FLOPs of a step, over all devices.
      sizes: of the mesh, by axis.
      memory: bytes of a device.
      traffic: between devices.
      hardware: a device.
    """
    # Each pass over the layers reads their weights. The optimizer reads and writes all of
    # its state and the parameters, and reads the gradients. What layers pass on is left out: how
    # much of it goes through memory is the compiler's choice, and recomputing passes it on again.
    moved = training.weights_read(sizes)
    moved += 2 * (memory.parameters + memory.optimizer) + memory.gradients
    return Roofline(
        executed / math.prod(sizes.values()) / hardware.peak_flops,
        moved / hardware.memory_bandwidth,
        sum(each.inside for each in traffic) / hardware.interconnect,
        sum(each.between for each in traffic) / hardware.network,
    )
