"""Several real processes on this machine: one run of them all, and what happens when one dies."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import small_arguments

from gptv_jax import watch

STEPS = 40
# Little of everything; nothing in it makes more of a rounding error than it is.
FIELDS = (
    f"--config.train.steps={STEPS}",
    "--config.train.eval_every=20",
    "--config.train.log_every=5",
    "--config.train.optimizer.name=adamw",
    "--config.train.optimizer.rest_learning_rate=None",
    "--config.train.optimizer.learning_rate=0.001",
    "--config.finetune.train.steps=4",
    "--config.finetune.train.log_every=2",
    "--config.finetune.train.optimizer.learning_rate=0.001",
    "--config.finetune.standardize=False",
    "--config.probe.c=(0.1,)",
)
# Times; and the accuracy of 16 training images, which a rounding may tip.
NOT_NUMBERS = {"time", "tokens_per_second", "data_wait_share", "mfu", "accuracy"}
LIMIT = 240  # seconds after which a test has failed, on a busy machine as well
BOUND = 10  # seconds in which the others have noticed that a process died


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Hosts:
    """The real command in so many processes, which are gone when the `with` ends."""

    def __init__(self, count: int, workdir, *more: str, own: dict[int, tuple[str, ...]] = {}):  # noqa: B006
        coordinator = f"--coordinator=127.0.0.1:{free_port()}"
        self.logs, self.processes = [], []
        for index in range(count):
            meeting = (coordinator, f"--num_processes={count}", f"--process_id={index}")
            arguments = small_arguments(workdir, *FIELDS, *more, *own.get(index, ()))
            arguments += meeting if count > 1 else ()
            log = workdir.with_name(f"{workdir.name}-{count}-{index}.log")
            self.logs.append(log)
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "gptv_jax.main", *arguments],
                        stdout=file,
                        stderr=file,
                        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, but: int | None = None, limit: float = LIMIT) -> list[int]:
        """Exit codes, in order."""
        until = time.monotonic() + limit
        watched = [p for i, p in enumerate(self.processes) if i != but]
        return [process.wait(until - time.monotonic()) for process in watched]

    def told(self, index: int) -> str:
        return self.logs[index].read_text()


def run(count: int, workdir: pathlib.Path, *more: str, **rest) -> list[str]:
    """Runs the command to its end; what each process has printed."""
    with Hosts(count, workdir, *more, **rest) as hosts:
        codes = hosts.wait()
        logs = [hosts.told(index) for index in range(count)]
    assert codes == [0] * count, logs[codes.index(max(codes))][-3000:]
    return logs


def events(workdir: pathlib.Path) -> dict[tuple, float]:
    """Every number that the run logged, times left out."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        for name in event.keys() - NOT_NUMBERS - {"stage", "step"}:
            assert (event["stage"], event["step"], name) not in found
            found[event["stage"], event["step"], name] = event[name]
    return found


def wait_for(found, hosts: Hosts) -> None:
    """Waits until a file is there."""
    until = time.monotonic() + LIMIT
    while not found():
        assert time.monotonic() < until and not any(p.poll() for p in hosts.processes), hosts.told(
            0
        )
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("hosts") / "alone"
    run(1, folder)
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> pathlib.Path:
    """A run of four processes of which one was killed in the middle."""
    folder = tmp_path_factory.mktemp("hosts") / "broken"
    with Hosts(4, folder, "--stages=pretrain") as hosts:
        wait_for((folder / "checkpoints" / "pretrain" / "10").exists, hosts)
        hosts.processes[2].kill()
        begin = time.monotonic()
        codes = hosts.wait(but=2)
        assert time.monotonic() - begin < BOUND
        assert codes == [1, 1, 1]
        for index in (0, 1, 3):
            last = hosts.told(index).splitlines()[-1]
            assert last.startswith("error: process 2 of 4 (")
            assert last.endswith(") has stopped answering; " + watch.CONTINUE)
    assert not (folder / "summary.json").exists()
    return folder


@pytest.mark.process
def test_two_processes_do_all_stages_as_one_does(alone, tmp_path):
    folder = tmp_path / "two"
    logs = run(2, folder)
    assert events(folder) == pytest.approx(events(alone), abs=1e-6)
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, alone))
    assert json.loads(logs[0][logs[0].index("{\n") :]) == ours and "{\n" not in logs[1]
    speeds = {name for name in ours if "per_second" in name}
    assert len(speeds) == 2
    assert {k: v for k, v in ours.items() if k not in speeds} == pytest.approx(
        {k: v for k, v in theirs.items() if k not in speeds}, abs=1e-6
    )
    files = [
        sorted(
            p.name
            for p in f.rglob("*")
            if p.is_file() and "checkpoints" not in p.parts and "tensorboard" not in p.parts
        )
        for f in (folder, alone)
    ]
    assert files[0] == files[1]
    for name in ("unconditional", "completions"):
        picture = pathlib.Path("samples") / f"{name}.png"
        assert (folder / picture).read_bytes() == (alone / picture).read_bytes()


@pytest.mark.process
@pytest.mark.parametrize(
    ("count", "mesh"), [(1, ()), (2, ("--config.mesh.data=1", "--config.mesh.fsdp=2"))]
)
def test_what_four_processes_saved_fewer_go_on_from(count, mesh, broken, alone, tmp_path):
    folder = tmp_path / "fewer"
    shutil.copytree(broken, folder)
    logs = run(count, folder, "--stages=pretrain", *mesh)
    assert "pretrain continues from step" in logs[0]
    wanted = {k: v for k, v in events(alone).items() if k[0] == "pretrain"}
    assert events(folder) == pytest.approx(wanted, abs=1e-6)
