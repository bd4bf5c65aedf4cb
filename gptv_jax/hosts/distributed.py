"""Several processes, usually one a host: how they find each other, agree, and end together.

Who decides how many processes there are, with --distributed=auto the first that applies:

  --coordinator, --num_processes, --process_id     they do; all three of them, or it is refused
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,      these variables, in place of the flags
  JAX_PROCESS_ID
  a Slurm step (srun) of several tasks             Slurm; on GPUs one task a device, as in JAX
  TPU_WORKER_HOSTNAMES naming several hosts, or    Cloud TPU
  MEGASCALE_COORDINATOR_ADDRESS
  nothing of it                                    it is one process

--distributed=slurm and =tpu ask for these alone, and are refused where they are not there; a pod of
TPU virtual machines, which has nothing in its environment, needs the second. =off is one process.
JAX_COORDINATOR_ADDRESS alone is where Slurm's or Cloud TPU's processes meet, as in JAX.

Nothing that was asked for and does not work is passed over: the command ends with one sentence.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax._src import distributed as jax_distributed  # tells where the processes have met

from gptv_jax import errors
from gptv_jax.errors import InputError, first_line
from gptv_jax.hosts import watch
from gptv_jax.hosts.exchange import from_first

WAYS = ("auto", "off", "tpu", "slurm")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # comma-separated; GKE sets them
MEETING = 300.0  # seconds in which all processes must have come
SETTLING = 10.0  # seconds that a process whose collective failed waits to be told why

LOG = logging.getLogger(__name__)
_watch: watch.Watch | None = None


class Meeting(NamedTuple):
    """How the processes find each other."""

    told: str  # by whom, in words
    arguments: dict  # of jax.distributed.initialize


def decide(
    how: str,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str],
) -> Meeting | None:
    """How the processes find each other, by the table above; None where there is only this one.

    Raises:
      InputError: the flags or the variables are incomplete or impossible, or what --distributed
        asks for is not there.
    """
    flags = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    given = [name for name, value in flags.items() if value is not None]
    if given and how != "auto":
        raise InputError(
            f"--distributed={how} and {', '.join(given)} are two answers to one question; leave "
            "one of them out."
        )
    if given:
        return _explicit("the flags", flags)
    if how == "off":
        return None
    variables = {name: environment.get(name) for name in VARIABLES}
    lacking = [name for name in SLURM if name not in environment]
    hosts = next((environment[name] for name in TPU_HOSTS if name in environment), "")
    if how == "slurm" and lacking:
        raise InputError(
            f"--distributed=slurm, but {', '.join(lacking)} is not set; start the processes by "
            "srun, or name them by --coordinator, --num_processes and --process_id."
        )
    if how == "auto" and any(variables[name] for name in VARIABLES[1:]):
        return _explicit("the environment", variables)
    if how == "slurm" or (how == "auto" and not lacking and environment["SLURM_NTASKS"] != "1"):
        return Meeting("Slurm", {"cluster_detection_method": "slurm"})
    if how == "tpu" or "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return Meeting("Cloud TPU", {"cluster_detection_method": "gketpu" if hosts else "gcetpu"})
    return _explicit("the environment", variables) if variables[VARIABLES[0]] else None


def _explicit(told: str, named: dict[str, str | int | None]) -> Meeting:
    """Coordinator, number of processes and number of this one, by what they are called."""
    missing = [name for name, value in named.items() if value is None]
    if missing:
        raise InputError(
            f"{', '.join(n for n in named if n not in missing)} without {', '.join(missing)}: give "
            "all three, or none."
        )
    (address, coordinator), (count, processes), (number, index) = named.items()
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(
            f"{address} is {coordinator!r}; it takes HOST:PORT of process 0, as in 10.0.0.1:8476."
        )
    if not str(processes).isdecimal() or not str(index).isdecimal() or int(index) >= int(processes):
        raise InputError(
            f"{number} is {index} and {count} is {processes}; processes are numbered from 0 to one "
            "less than there are."
        )
    meeting = {
        "coordinator_address": coordinator,
        "num_processes": int(processes),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }
    return Meeting(told, meeting)


def start(
    how: str = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Meets the other processes, where there are any; before JAX is asked for a device.

    Args:
      how: one of `WAYS`.
      coordinator: HOST:PORT at which process 0 is met by all.
      num_processes: how many there are.
      process_id: which of them this one is.

    Raises:
      InputError: as `decide`, or they do not meet.
    """
    meeting = decide(how, coordinator, num_processes, process_id, os.environ)
    if meeting:
        _meet(meeting)
    elif jax.process_count() > 1:
        raise InputError(
            f"this is one of {jax.process_count()} processes on one accelerator, but nothing says "
            "so; give --distributed=tpu (see gptv_jax/hosts/distributed.py)."
        )


def _meet(meeting: Meeting) -> None:
    global _watch
    address = meeting.arguments.get("coordinator_address", "the address that it gives")
    failed = f"the processes named by {meeting.told} cannot meet at {address}"
    advice = "check that all of them started, process 0 there, and that its port is free and open"
    # JAX would abort; this comes first.
    late = f"error: {failed} within {MEETING:g} seconds; {advice}."
    alarm = threading.Timer(MEETING, errors.end, (1, late))
    alarm.daemon = True
    alarm.start()
    try:
        if meeting.arguments.get("process_id") == 0:  # JAX may crash where the port is taken
            watch.listen(int(address.rpartition(":")[2])).close()
        jax.distributed.initialize(
            **meeting.arguments,
            initialization_timeout=2 * int(MEETING),
            heartbeat_timeout_seconds=2 * int(watch.SILENCE),
        )
        count, index = jax.process_count(), jax.process_index()
        if count > 1:
            host = jax_distributed.global_state.coordinator_address.rpartition(":")[0].strip("[]")
            _watch = watch.meet(index, count, host, from_first, _end_as_another)
    except Exception as error:  # whatever JAX and the network raise
        raise InputError(f"{failed} ({first_line(error)}); {advice}.") from error
    finally:
        alarm.cancel()
    here = f"{jax.local_device_count()} of {jax.device_count()} devices"
    LOG.info("process %d of %d (%s), with %s", index, count, meeting.told, here)
    if index != 0:  # from here on all would say the same
        logging.getLogger("gptv_jax").setLevel(logging.WARNING)


def _end_as_another(sentence: str, code: int) -> None:
    errors.end(code, f"error: {sentence}")


def tell(reason: str, code: int) -> None:
    """Tells the other processes why this one ends, and with which code, so that they end too."""
    if _watch:
        _watch.tell(reason, code)


def settle() -> None:
    """Waits a while after an error, which may be what another process's end looks like from here.

    Where it is, this process ends meanwhile with a sentence that says so.
    """
    if _watch:
        time.sleep(SETTLING)


def stop() -> None:
    """Waits until all processes are through."""
    if _watch:
        _watch.leave()
        jax.distributed.shutdown()
