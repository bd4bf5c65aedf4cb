"""Into how many JAX devices the cores of a CPU are split, decided before JAX starts.

A CPU is one JAX device, whose threads share every operation and wait for each other at its end.
With a device a core the batch is split over the cores, and each core works through its own rows:
the cores meet to add up gradients, not at every operation. Tiny networks lose more by the meetings
than they gain, and so does any network whose cores other programs use (docs/results.md).
"""

import dataclasses
import logging
import math
import os
import pathlib
import re

from etils import epy

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.errors import InputError
from gptv_jax.hosts import runtime

with epy.lazy_imports():  # see `command`
    import jax

LOG = logging.getLogger(__name__)
# A container's quota: so many microseconds of work in each period of so many microseconds.
QUOTA = pathlib.Path("/sys/fs/cgroup/cpu.max")
VARIABLE = "JAX_NUM_CPU_DEVICES"
FORCED = "xla_force_host_platform_device_count"  # XLA's flag, by which users set devices as well
# What `benchmarks.split_cpu` measured to be faster by a split, on a machine of so many cores that
# ran nothing else: widths, and the fewest tokens of a gradient. Anything else is left to the user;
# a large network would also need its weights and optimizer state in memory once more for each
# device.
CORES, WIDTHS, TOKENS = 2, range(64, 257), 4096


def choose(width: int, tokens: int, batch: int, cores: int) -> int:
    """Number of devices, 1 or `cores`, with which a network of this width trains faster.

    Args:
      width: D, of the network's activations.
      tokens: T, positions of an example.
      batch: number of examples that a gradient is taken of at a time.
      cores: cores that this process may use.
    """
    wins = cores == CORES and width in WIDTHS and tokens * batch >= TOKENS
    return cores if wins and batch % cores == 0 else 1


def of_run(config: config_lib.Config, cores: int) -> int:
    """Number of devices, 1 or `cores`, with which every training of the configuration is faster.

    A run that trains its tokenizer has one device, on which convolutions are faster
    (docs/results.md).
    """
    probe = config.probe
    sizes = [probe.batch_size] + [probe.sgd.batch_size] * (probe.method == "sgd")
    trainings = [config.finetune.train]
    if config.tokens.kind != "none":  # else there is nothing to predict
        trainings.append(config.train)
    batches = [train.batch_size // train.microbatches for train in trainings]
    if config.trains_tokenizer or any(size % cores for size in sizes):
        return 1
    tokens = math.prod(config.grid)
    return min(choose(config.model.width, tokens, batch, cores) for batch in batches)


def check_environment() -> None:
    """InputError where JAX_NUM_CPU_DEVICES is no number of devices; to be called before JAX."""
    given = os.environ.get(VARIABLE, "1")
    if not ((given.isdecimal() and int(given)) or given == "-1"):  # -1 stands for no variable
        raise InputError(
            f"the environment variable {VARIABLE} is {given!r}; it takes a number of devices, 1 or "
            "more. Without the variable the command decides."
        )


def split(config: config_lib.Config, begun: pathlib.Path | None) -> None:
    """Sets the number of CPU devices of this process; to be called before JAX starts.

    `begun` is the folder of a run that continues; None: a new run. A run that continues keeps the
    number with which the run began, also on a machine of other cores: another number adds the
    gradients in another order, and results differ by rounding. A mesh whose sizes are all named
    gets as many devices as it names, at most one for each core. Nothing is set where the user has
    decided otherwise (JAX_NUM_CPU_DEVICES, XLA's flag, another mesh) or JAX uses an accelerator.
    """
    if not _may_choose():
        return
    cores, sizes = available(), dataclasses.astuple(config.mesh)
    advice = f"{VARIABLE}=1 keeps it one"
    if -1 not in sizes:
        count, why = math.prod(sizes), "as config.mesh says"
        if count > cores:  # which is refused, by a sentence that names the variable
            return
    elif begun:
        count, why = _recorded(begun), f"as when this run began; {advice}"
    elif config.mesh == config_lib.Mesh():
        count, width = of_run(config, cores), config.model.width
        why = f"one for each core, with which a network of width {width} trains faster; {advice}"
    else:
        return
    if count:
        jax.config.update("jax_num_cpu_devices", count)
    if count > 1:
        LOG.info("The CPU is %d JAX devices, %s.", count, why)


def available() -> int:
    """The number of cores that this process may use; a container's quota counts in whole cores."""
    affine = hasattr(os, "sched_getaffinity")  # macOS and Windows have no affinity
    cores = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    try:
        quota, period = map(int, QUOTA.read_text().split())
    except (OSError, ValueError):  # no control groups, or "max": no quota
        return cores
    return max(1, min(cores, quota // period))


def _may_choose() -> bool:
    """Whether JAX will compute on the CPU, and the user has not set the number of CPU devices."""
    platforms = jax.config.jax_platforms or ("" if runtime.accelerators() else "cpu")
    given = jax.config.jax_num_cpu_devices >= 0 or FORCED in os.environ.get("XLA_FLAGS", "")
    return platforms == "cpu" and not given


def _recorded(folder: pathlib.Path) -> int:
    """The CPU devices with which the run began; 0: it began on other devices."""
    record = files.read_json(folder / "config.json", {})
    found = re.fullmatch(r"(\d+) cpu", record.get("devices", ""))
    return int(found[1]) if found else 0
