"""How several processes, usually one a host, find each other and end together.

docs/scaling.md has the table of what --distributed=auto looks at. JAX_COORDINATOR_ADDRESS alone is
the meeting point of Slurm's or Cloud TPU's processes, as in JAX. JAX's coordination service notices
a process that died, froze or lost its network, and then ends the others by abort(), from C++: no
Python runs any more. So each process works in a child, and the parent says in a sentence what an
aborted child could not say.
"""

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epy

from gptv_jax import errors, hardware
from gptv_jax.errors import InputError, first_line
from gptv_jax.hosts import stopping

with epy.lazy_imports():  # see `command`
    import jax

WAYS = ("auto", "off", "tpu", "slurm")
FLAGS = ("--coordinator", "--num_processes", "--process_id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # comma-separated; GKE sets them
MEETING = 300  # seconds in which all processes must have started
HEARTBEAT = 40  # seconds without a heartbeat after which JAX counts a process as dead
MARGIN = 15  # seconds in which JAX ends the others after it has noticed a dead process
OTHER_DIED = 75  # exit code; sysexits.h: a temporary failure, to be tried again
ADVICE = "check that all of them started, process 0 there, and that its port is free and open"

LOG = logging.getLogger(__name__)


class Meeting(NamedTuple):
    """How the processes find each other."""

    source: str  # of the arguments, in words
    arguments: dict  # of jax.distributed.initialize

    def fails(self, reason: str) -> str:
        address = self.arguments.get("coordinator_address", "the address that it gives")
        problem = f"the processes named by {self.source} cannot meet at {address}"
        return f"{problem} {reason}; {ADVICE}."


def decide(
    how: str, flags: Sequence[str | int | None], environment: Mapping[str, str]
) -> Meeting | None:
    """How the processes find each other, by the table in docs/scaling.md; None for one process.

    Raises InputError where the values of `FLAGS` or variables are incomplete or impossible, or the
    cluster that --distributed asks for is missing.
    """
    values = dict(zip(FLAGS, flags, strict=True))
    given = ", ".join(name for name, value in values.items() if value is not None)
    if given and how != "auto":
        problem = f"--distributed={how} and {given} contradict each other"
        raise InputError(f"{problem}; leave one of them out.")
    if given:
        return _explicit("the flags", values)
    if how == "off":
        return None
    variables = {name: environment.get(name) for name in VARIABLES}
    lacking = [name for name in SLURM if name not in environment]
    tpu_hosts = next((environment[name] for name in TPU_HOSTS if name in environment), "")
    if how == "slurm" and lacking:
        problem = f"--distributed=slurm, but {', '.join(lacking)} is not set"
        advice = f"start the processes by srun, or name them by {', '.join(FLAGS)}"
        raise InputError(f"{problem}; {advice}.")
    if how == "auto" and any(variables[name] for name in VARIABLES[1:]):
        return _explicit("the environment", variables)
    if how == "slurm" or (how == "auto" and not lacking and environment["SLURM_NTASKS"] != "1"):
        return Meeting("Slurm", {"cluster_detection_method": "slurm"})
    if how == "tpu" or "," in tpu_hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        method = "gketpu" if tpu_hosts else "gcetpu"
        return Meeting("Cloud TPU", {"cluster_detection_method": method})
    return _explicit("the environment", variables) if variables[VARIABLES[0]] else None


def _explicit(source: str, named: dict[str, str | int | None]) -> Meeting:
    """The meeting by address of process 0, number of processes and index of this process."""
    missing = ", ".join(name for name, value in named.items() if value is None)
    if missing:
        given = ", ".join(name for name, value in named.items() if value is not None)
        raise InputError(f"{given} without {missing}: give all three, or none.")
    (address, coordinator), (count, processes), (number, index) = named.items()
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        problem = f"{address} is {coordinator!r}"
        raise InputError(f"{problem}; it takes HOST:PORT of process 0, as in 10.0.0.1:8476.")
    if not str(processes).isdecimal() or not str(index).isdecimal() or int(index) >= int(processes):
        problem = f"{number} is {index} and {count} is {processes}"
        raise InputError(f"{problem}; it takes 0 to one less than {count}.")
    arguments = {"coordinator_address": coordinator, "num_processes": int(processes)}
    arguments |= {"process_id": int(index), "cluster_detection_method": "deactivate"}
    return Meeting(source, arguments)


def start(how: str, *flags: str | int | None) -> None:
    """Meets the other processes, if any; to be called before JAX is asked for a device.

    `how` is the value of --distributed, `flags` are the values of `FLAGS`. Of several processes
    each returns in a child process. Raises InputError as `decide`, or where they do not meet.
    """
    meeting = decide(how, flags, os.environ)
    if not meeting:
        hardware.devices()  # InputError where there are none
        if jax.process_count() > 1:
            raise InputError(
                f"this is one of {jax.process_count()} processes on one accelerator, but no flag "
                "or variable says so; give --distributed=tpu (see docs/scaling.md)."
            )
        return
    if not hasattr(os, "fork"):
        raise InputError("several processes need Linux or macOS; take --distributed=off.")
    met = _continue_in_child(meeting)
    try:
        if meeting.arguments.get("process_id") == 0:  # JAX may crash where the port is taken
            _, _, port = meeting.arguments["coordinator_address"].rpartition(":")
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            socket.create_server(("", int(port)), family=family, dualstack_ipv6=dual).close()
        jax.config.update("jax_enable_preemption_service", True)
        limits = {"initialization_timeout": MEETING, "heartbeat_timeout_seconds": HEARTBEAT}
        jax.distributed.initialize(**meeting.arguments, **limits)
    except Exception as error:  # any error of JAX or of the network
        raise InputError(meeting.fails(f"({first_line(error)})")) from error
    stopping.synchronize()
    os.write(met, b"1")
    count, index = jax.process_count(), jax.process_index()
    devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
    LOG.info("process %d of %d (%s), with %s", index, count, meeting.source, devices)
    if index != 0:  # process 0 alone logs, as all would log the same
        logging.getLogger("gptv_jax").setLevel(logging.WARNING)


def _continue_in_child(meeting: Meeting) -> int:
    """Forks; returns, in the child alone, the write end of a pipe.

    The child writes one byte into the pipe once all processes have met. The parent passes signals
    on, waits, and ends with the child's exit code or, where JAX aborted the child, with a sentence.
    The child ends when the parent does.
    """

    def end_after_parent() -> None:
        os.read(parent_lives, 1)  # returns when the parent's end of the pipe is closed
        os._exit(OTHER_DIED)

    sys.stdout.flush()
    sys.stderr.flush()
    (met, has_met), (parent_lives, lives) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(lives)
        threading.Thread(target=end_after_parent, daemon=True).start()
        stopping.install()
        return has_met
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: os.kill(child, received))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(has_met)
    if code != -signal.SIGABRT:
        os._exit(code if code >= 0 else 128 - code)
    if not os.read(met, 1):
        errors.end(1, f"error: {meeting.fails(f'within {MEETING} seconds')}")
    errors.end(
        OTHER_DIED,
        "error: another process of this run has died or cannot be reached, so JAX has ended this "
        "one (the lines above say more); the same command continues from the last checkpoint.",
    )


def wait_for_abort(error: Exception) -> None:
    """Waits, after the error of a collective, until JAX would have ended this process by abort().

    A process that dies makes the collectives of the others fail long before its heartbeat is
    missed. The wait outlasts the heartbeat, so the abort, and the parent's sentence with it, comes
    first. After any other error this process ends at once, so that the others notice in time.
    """
    # JAX may raise the failure of a collective as a ValueError too, or a library may wrap it.
    trace = "".join(traceback.format_exception(error))
    collective = re.search("JaxRuntimeError|gloo|nccl", trace, re.IGNORECASE)
    if jax.distributed.is_initialized() and collective and "RESOURCE_EXHAUSTED" not in trace:
        time.sleep(HEARTBEAT + MARGIN)
