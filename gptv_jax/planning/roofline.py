"""The least time that a step can take, given the peak rates of each part of a device."""

import dataclasses
import math

from gptv_jax.hardware import Hardware
from gptv_jax.planning.memory import Memory
from gptv_jax.planning.traffic import Traffic
from gptv_jax.planning.training import Training


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that one step takes in each part of a device, without waiting for other parts."""

    compute: float
    memory: float
    interconnect: float
    network: float  # between slices or nodes

    @property
    def bound(self) -> float:
        """Seconds of a step if the slowest part hides all other parts."""
        return max(dataclasses.astuple(self))

    @property
    def serial(self) -> float:
        """Seconds of a step if nothing overlaps."""
        return sum(dataclasses.astuple(self))


def estimate(
    training: Training,
    executed: int,
    sizes: dict[str, int],
    memory: Memory,
    traffic: list[Traffic],
    hardware: Hardware,
) -> Roofline:
    """The roofline of a step that executes so many FLOPs, on all devices together."""
    # Each pass over the layers reads their weights. The optimizer reads and writes its state and
    # the parameters, and reads the gradients. Activations are left out: the compiler decides how
    # many of them go through memory.
    moved = training.weights_read(sizes)
    moved += 2 * (memory.parameters + memory.optimizer) + memory.gradients
    return Roofline(
        executed / math.prod(sizes.values()) / hardware.peak_flops,
        moved / hardware.memory_bandwidth,
        sum(each.inside for each in traffic) / hardware.interconnect,
        sum(each.between for each in traffic) / hardware.network,
    )
