"""Speeds and memory of accelerators, by JAX's name of the device, from their makers' pages.

A device is an entry of `jax.devices()`: a chip, but half a chip of TPU7x. Rates are per second, of
one device, in one direction, over all its links together.

TPUs: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x; v4's share of the data centre's
network from jax-ml.github.io/scaling-book. The memory that a TPU program may take is the limit at
which its compiler refuses a program (libtpu 0.0.52).
GPUs: NVIDIA's data sheets of the A100 (80 GB), H100 and H200 (SXM), and those of the DGX systems
for the B200 and for the network between nodes.
"""

import dataclasses
import pathlib

from etils import epy

from gptv_jax.errors import InputError, cut, first_line

with epy.lazy_imports():  # see `command`
    import jax

GB, GIB = 10**9, 2**30
GPU_SHARE = 0.75  # that JAX takes of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION is set


def devices(*, local: bool = False) -> "list[jax.Device]":
    """The devices of all processes, or of this one.

    Raises InputError where JAX has none of the kind in JAX_PLATFORMS, or cannot use them.
    """
    try:
        return jax.local_devices() if local else jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax 0.10 asserts that there is a GPU
        reason = f" ({cut(first_line(error), 100)})" if str(error) else ""
        problem = "JAX cannot use the devices of this machine"
        if asked := jax.config.jax_platforms:
            problem = f"JAX finds no device that JAX_PLATFORMS={asked} asks for"
        advice = "or install gptv_jax[cuda] for a GPU, gptv_jax[tpu] for a TPU"
        raise InputError(f"{problem}{reason}; take JAX_PLATFORMS=cpu, {advice}.") from error


def cpu_flags() -> str | None:
    """The line of /proc/cpuinfo with the CPU's instructions, or ""; None without that file."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of device."""

    peak_flops: float  # dense bfloat16, FLOP/s
    memory_bytes: int  # that a program may take
    memory_bandwidth: float  # bytes/s
    interconnect: float  # bytes/s inside a slice (TPU) or node (GPU)
    network: float  # bytes/s between slices or nodes
    per_chip: int = 1  # devices


# By the beginning of `device_kind`; a name comes before the shorter name that it begins with.
KINDS = {
    "TPU v4": Hardware(275e12, int(30.5 * GIB), 1200e9, 300e9, 6.25e9),
    "TPU v5 lite": Hardware(197e12, int(15.75 * GIB), 819e9, 200e9, 3.125e9),  # v5e
    "TPU v5": Hardware(459e12, int(95.73 * GIB), 2765e9, 600e9, 6.25e9),  # v5p
    "TPU v6 lite": Hardware(918e12, int(31.24 * GIB), 1638e9, 400e9, 12.5e9),  # v6e
    "TPU7x": Hardware(1153.5e12, int(94.74 * GIB), 3690e9, 300e9, 6.25e9, per_chip=2),
    "NVIDIA A100": Hardware(312e12, int(GPU_SHARE * 80 * GB), 2039e9, 300e9, 25e9),
    "NVIDIA H100": Hardware(989e12, int(GPU_SHARE * 80 * GB), 3350e9, 450e9, 50e9),
    "NVIDIA H200": Hardware(989e12, int(GPU_SHARE * 141 * GB), 4800e9, 450e9, 50e9),
    "NVIDIA B200": Hardware(2250e12, int(GPU_SHARE * 180 * GB), 8000e9, 900e9, 50e9),
}


def of(kind: str) -> Hardware | None:
    """The hardware of a device of this `device_kind`; None if it is not in the table."""
    return next((facts for name, facts in KINDS.items() if kind.startswith(name)), None)
