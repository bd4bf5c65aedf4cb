"""How many processes a run has, and how they meet."""

import socket
import subprocess
import sys

import jax
import pytest

from gptv_jax.errors import InputError
from gptv_jax.hosts import distributed

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
def test_how_the_processes_meet(how, flags, environment, wanted):
    found = distributed.decide(how, flags or (None,) * 3, environment)
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
def test_incomplete_or_impossible_arguments_are_refused(how, flags, environment, words):
    with pytest.raises(InputError) as error:
        distributed.decide(how, flags or (None,) * 3, environment)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_pod_whose_processes_nothing_names_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    for name in distributed.SLURM + distributed.TPU_HOSTS + distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="--distributed=tpu"):
        distributed.start("auto", None, None, None)


def start(patch: str, coordinator: str, index: int) -> subprocess.Popen:
    """Starts one of two processes that are to meet; the other one never comes."""
    call = f"distributed.start('auto', {coordinator!r}, 2, {index})"
    program = "from gptv_jax import command\nfrom gptv_jax.hosts import distributed\n"
    program += f"{patch}\ncommand.run(lambda: {call})"
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.process
def test_a_process_that_meets_no_other_ends_with_a_sentence():
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    free, other, taken = (f"127.0.0.1:{server.getsockname()[1]}" for server in servers)
    for server in servers[:2]:
        server.close()
    short = "distributed.MEETING = 2"
    processes = [start(short, free, 0), start(short, other, 1), start("", taken, 0)]
    told = [process.communicate(timeout=120)[1] for process in processes]
    servers[2].close()
    assert [process.returncode for process in processes] == [1, 1, 1], told
    first, second, third = (text.splitlines()[-1] for text in told)
    for line, at, words in (
        (first, free, "within 2 seconds"),
        (second, other, "within 2 seconds"),
        (third, taken, "in use"),
    ):
        assert line.startswith(f"error: the processes named by the flags cannot meet at {at} ")
        assert words in line and "check that" in line
