"""Devices to plan for, by name: `v5e:16x16`, `v5p-128`, `gpu:8xh200`, `cpu:8`."""

import contextlib
import dataclasses
import math
import os
import re
import sys
from typing import NamedTuple

from etils import epy

from gptv_jax import hardware
from gptv_jax.errors import InputError

with epy.lazy_imports():  # see `command`
    import jax
    from jax.experimental import topologies

FORMS = (
    "v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, an accelerator type such as v5e-256 "
    "or v5p-128, gpu:8xh200 (also a100, h100, b200) or cpu:8"
)


class _Tpu(NamedTuple):
    kind: str  # as JAX names the device
    dimensions: int  # of the torus
    cores: int  # TensorCores a chip, which accelerator types such as v5p-128 count
    compiles: bool = True


TPUS = {
    # Offline the compiler knows a v4 only as two devices a chip; in use a chip is one device.
    "v4": _Tpu("TPU v4", 3, 2, compiles=False),
    "v5e": _Tpu("TPU v5 lite", 2, 1),
    "v5p": _Tpu("TPU v5", 3, 2),
    "v6e": _Tpu("TPU v6 lite", 2, 1),
    "tpu7x": _Tpu("TPU7x", 3, 2),
}
GPUS = {name: f"NVIDIA {name.upper()}" for name in ("a100", "h100", "h200", "b200")}
# Settings of libtpu, to be made before it is loaded: not to look for a cloud host, not to lock a
# TPU (so that several processes can plan at the same time), and not to write a log.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """All devices of a job."""

    name: str  # such as v5e:16x16
    platform: str  # tpu, gpu or cpu
    kind: str  # as JAX names the device
    per_slice: int  # devices that share the fast interconnect: a TPU slice, a GPU node
    slices: int
    compiles: bool  # whether this machine can compile for it

    @property
    def count(self) -> int:
        return self.per_slice * self.slices

    @property
    def hardware(self) -> hardware.Hardware | None:
        """Speeds and memory of a device; None for a CPU."""
        return hardware.of(self.kind)

    @property
    def memory_bytes(self) -> int:
        """Bytes that a program may take of a device; CPU devices share this machine's memory."""
        if self.hardware:
            return self.hardware.memory_bytes
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.count

    def devices(self) -> list:
        """The devices to compile for, which this machine need not have.

        Raises InputError where libtpu, its topology, or enough simulated devices are missing.
        """
        if self.platform == "cpu":
            if len(jax.devices("cpu")) < self.count:
                raise InputError(
                    f"--topology={self.name} needs {self.count} simulated devices, and JAX has "
                    f"{len(jax.devices('cpu'))}; set JAX_NUM_CPU_DEVICES={self.count}."
                )
            return jax.devices("cpu")[: self.count]
        for name, value in LIBTPU.items():
            os.environ.setdefault(name, value)
        slices = {"num_slices": self.slices} if self.slices > 1 else {}
        try:
            with _silent():
                return list(topologies.get_topology_desc(self.name, "tpu", **slices).devices)
        except RuntimeError as error:
            why = f"is not known to libtpu ({error}); it takes {FORMS}"
            if "not installed" in str(error):
                why = "needs libtpu, which is not installed; pip install libtpu (without a TPU)"
            raise InputError(f"--topology={self.name} {why}.") from error


def parse(name: str, num_slices: int = 1) -> Topology:
    """The topology of a name in one of FORMS, with so many TPU slices or GPU nodes."""
    if found := re.fullmatch(r"cpu:0*([1-9]\d*)", name):
        if num_slices != 1:
            problem = f"--num_slices is {num_slices}, but --topology={name} is one machine"
            raise InputError(f"{problem}; take 1.")
        return Topology(name, "cpu", "cpu", int(found[1]), 1, True)
    if (found := re.fullmatch(r"gpu:([1-9]\d*)x(\w+)", name)) and found[2] in GPUS:
        return Topology(name, "gpu", GPUS[found[2]], int(found[1]), num_slices, False)
    found = re.fullmatch(r"(\w+)(?:-([1-9]\d*)|:([1-9]\d*(?:x[1-9]\d*)+))", name)
    if found and (tpu := TPUS.get(found[1])):
        kind, cores, shape = found.groups()
        sides = [int(side) for side in shape.split("x")] if shape else _sides(int(cores), tpu)
        if len(sides) == tpu.dimensions:
            devices = math.prod(sides) * hardware.of(tpu.kind).per_chip
            name = f"{kind}:{'x'.join(map(str, sides))}"
            return Topology(name, "tpu", tpu.kind, devices, num_slices, tpu.compiles)
    raise InputError(f"--topology={name} is not known; it takes {FORMS}.")


def _sides(cores: int, tpu: _Tpu) -> list[int]:
    """The shape of Cloud TPU's slice of so many TensorCores; [] if Cloud TPU has no such slice."""
    chips, rest = divmod(cores, tpu.cores)
    if rest or chips & (chips - 1):
        return []
    each, larger = divmod(chips.bit_length() - 1, tpu.dimensions)
    sides = [2 ** (each + (i < larger)) for i in range(tpu.dimensions)]
    # A host has 2 x 2 chips, so sides of length 1 come last.
    return sorted(sides, key=lambda side: (side == 1, side))


@contextlib.contextmanager
def _silent():
    """Silences libtpu's message that no TPU host was found, which ignores the log settings."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
