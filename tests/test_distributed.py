"""Who decides how many processes there are, and what they tell each other."""

import contextlib
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import threading

import pytest

from gptv_jax.errors import InputError
from gptv_jax.hosts import distributed, watch

SLURM = dict.fromkeys(distributed.SLURM, "7") | {"SLURM_NTASKS": "8"}
THREE = dict(zip(distributed.VARIABLES, ("10.0.0.1:8476", "4", "3"), strict=True))
EXPLICIT = {
    "coordinator_address": "10.0.0.1:8476",
    "num_processes": 4,
    "process_id": 3,
    "cluster_detection_method": "deactivate",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b"}
METADATA = {"MEGASCALE_COORDINATOR_ADDRESS": "a:8080"}


@pytest.mark.parametrize(
    ("how", "flags", "environment", "wanted"),
    [
        ("auto", (), {}, None),
        ("auto", ("10.0.0.1:8476", 4, 3), SLURM | GKE, EXPLICIT),
        ("auto", (), THREE | SLURM, EXPLICIT),
        ("auto", ("10.0.0.1:8476", 4, 3), dict.fromkeys(distributed.VARIABLES, "other"), EXPLICIT),
        ("auto", (), SLURM | GKE, "slurm"),
        ("auto", (), SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1"}, "slurm"),
        ("auto", (), SLURM | {"SLURM_NTASKS": "1"}, None),
        ("auto", (), {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # in sbatch, before srun
        ("auto", (), GKE, "gketpu"),
        ("auto", (), GKE | {"TPU_PROCESS_ADDRESSES": "a:1"}, None),  # which JAX reads first
        ("auto", (), {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ("auto", (), METADATA, "gcetpu"),
        ("auto", (), METADATA | {"TPU_WORKER_HOSTNAMES": "localhost"}, "gketpu"),
        ("off", (), THREE | SLURM | GKE, None),
        ("slurm", (), SLURM | {"SLURM_NTASKS": "1"} | THREE, "slurm"),
        ("tpu", (), SLURM | THREE, "gcetpu"),
        ("tpu", (), {"TPU_WORKER_HOSTNAMES": "localhost"}, "gketpu"),
    ],
)
def test_who_decides(how, flags, environment, wanted):
    found = distributed.decide(how, *(flags or (None,) * 3), environment)
    arguments = {"cluster_detection_method": wanted} if isinstance(wanted, str) else wanted
    assert (found and found.arguments) == arguments


@pytest.mark.parametrize(
    ("how", "flags", "environment", "words"),
    [
        ("auto", ("a:1", 4, None), {}, ["--coordinator, --num_processes without --process_id"]),
        ("auto", (None, None, 1), THREE, ["--process_id without --coordinator, --num_processes"]),
        ("auto", ("a", 4, 1), {}, ["--coordinator is 'a'", "HOST:PORT"]),
        ("auto", ("a:99999", 4, 1), {}, ["--coordinator is 'a:99999'"]),
        ("auto", ("a:1", 4, 4), {}, ["--process_id is 4", "--num_processes is 4"]),
        ("auto", ("a:1", 4, -1), {}, ["--process_id is -1"]),
        ("auto", (), {"JAX_COORDINATOR_ADDRESS": "a:1"}, ["without JAX_NUM_PROCESSES"]),
        ("auto", (), {"JAX_PROCESS_ID": "0"}, ["JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS"]),
        ("auto", (), THREE | {"JAX_NUM_PROCESSES": "four"}, ["JAX_NUM_PROCESSES is four"]),
        ("off", ("a:1", None, None), {}, ["--distributed=off and --coordinator"]),
        ("slurm", (), {"SLURM_JOB_ID": "7"}, ["--distributed=slurm", "SLURM_PROCID", "srun"]),
    ],
)
def test_what_is_incomplete_or_impossible_is_refused(how, flags, environment, words):
    with pytest.raises(InputError) as error:
        distributed.decide(how, *(flags or (None,) * 3), environment)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_pod_that_nobody_told_of_is_refused(monkeypatch):
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 4)
    for name in distributed.SLURM + distributed.TPU_HOSTS + distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="--distributed=tpu"):
        distributed.start()


def started(patch: str, coordinator: str, index: int) -> subprocess.CompletedProcess:
    """Of two processes that are to meet the one that comes."""
    call = f"distributed.start('auto', {coordinator!r}, 2, {index})"
    program = f"from gptv_jax import command, distributed\n{patch}\ncommand.run(lambda: {call})"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.process
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_nobody_meets_ends_with_a_sentence(index):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    ended = started("distributed.MEETING = 2", address, index)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: the processes")
    assert address in ended.stderr and "within 2 seconds" in ended.stderr


@pytest.mark.process
def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = started("", address, 0)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: ") and address in last and "in use" in last


class Line:
    """Four processes' ends of the line, and what each was told."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(watch, "_delay_aborts", lambda: None)
        pairs = {i: socket.socketpair() for i in (1, 2, 3)}
        names = {i: f"process {i}" for i in range(4)}
        self.told = [queue.Queue() for _ in range(4)]
        self.sockets = {i: pair[1] for i, pair in pairs.items()}
        self.opened = [each for pair in pairs.values() for each in pair]
        own = [{i: pair[0] for i, pair in pairs.items()}]
        own += [{0: self.sockets[i]} for i in (1, 2, 3)]
        self.ends = [watch.Watch(names[i], own[i], names, self._put(i)) for i in range(4)]

    def _put(self, index: int):
        return lambda sentence, code: self.told[index].put((sentence, code))

    def hear(self, index: int) -> tuple[str, int]:
        return self.told[index].get(timeout=10)

    def die(self, index: int) -> None:
        """As the system closes what a dead process had open."""
        with contextlib.suppress(OSError):
            self.sockets[index].shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for index in self.sockets:
            self.die(index)
        for thread in threading.enumerate():
            if thread.name == "watch":
                thread.join(10)
        for each in self.opened:
            each.close()


@pytest.fixture
def line(monkeypatch):
    monkeypatch.setattr(watch, "BEAT", 0.05)
    line = Line(monkeypatch)
    yield line
    line.close()


def test_all_hear_who_died(line):
    line.die(2)
    for index in (0, 1, 3):
        told = f"process 2 has stopped answering; {watch.CONTINUE}"
        assert line.hear(index) == (told, watch.DIED)


@pytest.mark.parametrize("index", [0, 3])
def test_all_hear_why_a_process_ends(line, index):
    line.ends[index].tell("its data are damaged.", 1)
    for other in {0, 1, 2, 3} - {index}:
        assert line.hear(other) == (f"process {index} has ended: its data are damaged.", 1)


def test_a_process_that_falls_silent_counts_as_gone(line, monkeypatch):
    monkeypatch.setattr(watch, "SILENCE", 0.5)
    monkeypatch.setattr(line.ends[2], "_send", lambda *_, **__: None)
    for index in (0, 1, 3):
        assert line.hear(index)[0].startswith("process 2 has been silent for 0.5 seconds")


def test_a_process_that_is_through_may_go(line, monkeypatch):
    line.ends[2].leave()
    line.die(2)
    with pytest.raises(queue.Empty):
        line.told[0].get(timeout=0.5)
    line.die(1)
    assert line.hear(3)[0].startswith("process 1 has stopped")


@pytest.mark.parametrize(("meanwhile", "code"), [("os._exit(1)", 1), ("None", -signal.SIGABRT)])
def test_an_abort_waits_for_what_is_to_be_said_and_then_goes_on(meanwhile, code):
    program = (
        "import ctypes, os, threading, watch\n"
        "watch._delay_aborts()\n"
        f"threading.Timer(0.5, lambda: {meanwhile}).start()\n"
        "ctypes.CDLL(None).abort()\n"
    )
    folder = pathlib.Path(watch.__file__).parent  # alone, without JAX
    assert (
        subprocess.run([sys.executable, "-c", program], cwd=folder, timeout=60).returncode == code
    )
