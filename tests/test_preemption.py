"""SIGTERM, at any moment: what was done is saved, and the run goes on as if it had not been."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import small_arguments
from test_resume import STEPS, Training, assert_identical

from gptv_jax import hosts
from gptv_jax.hosts import stopping


@pytest.fixture(scope="module")
def training() -> Training:
    return Training((1, 1, 1))


@pytest.fixture(scope="module")
def uninterrupted(training, tmp_path_factory):
    return training.run(tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(autouse=True, scope="module")
def answered():
    """Signals are answered in this process, as in the command's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stopping.install(lambda: os._exit(130))
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def terminate() -> None:
    """A real SIGTERM to this process, while it trains; returns when it was heard."""
    request = stopping._current
    assert request is not None  # else the process would end
    os.kill(os.getpid(), signal.SIGTERM)
    while request.since is None:
        time.sleep(0.001)


def terminated(training: Training, folder: pathlib.Path, every: int, stop: tuple[str, int]) -> int:
    """The step at which a training stopped and saved, with SIGTERM at an event."""
    with pytest.raises(hosts.StoppedError) as stopped:
        training.run(folder, every, stop, terminate)
    step = stopped_at(str(stopped.value))
    assert training.saved(folder)[1] == step
    return step


def stopped_at(told: str) -> int:
    saved = r"at step (\d+), saved in [\d.]+ s; the same command continues"
    return int(re.fullmatch(f"pretrain stopped by SIGTERM {saved}", told)[1])


# The step that SIGTERM is to stop it at; the even ones are evaluated.
MOMENTS = {
    ("next batch", 1): 2,
    ("next batch", 4): 5,
    ("step", 5): 5,
    ("step", 6): 6,
    ("evaluation", 2): 2,
    ("evaluation", 6): 6,
    ("save", 2): 3,
    ("save", 4): 5,
}


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda m: f"{m[0]} {m[1]}")
def test_stopped_after_the_step_under_way_it_ends_as_if_it_had_not_been(
    training, uninterrupted, tmp_path, moment
):
    assert terminated(training, tmp_path, 2, moment) == MOMENTS[moment]
    late = MOMENTS[moment] == STEPS  # saved without its evaluation
    assert_identical(training.run(tmp_path, 2, unevaluated=late), uninterrupted)


def test_stopped_again_and_again_it_ends_as_if_it_had_not_been(training, uninterrupted, tmp_path):
    for taken in (1, 3, 5):  # a process that has not taken a step has nothing to save
        assert terminated(training, tmp_path, 100, ("next batch", taken)) == taken + 1
    assert_identical(training.run(tmp_path, 100, unevaluated=1), uninterrupted)


@pytest.mark.parametrize("kill", [("evaluation", 4), ("next batch", 4), ("next batch", 5)])
def test_killed_about_the_evaluation_that_was_given_up_it_makes_it_again(
    training, uninterrupted, tmp_path, kill
):
    assert terminated(training, tmp_path, 100, ("evaluation", 4)) == 4
    training.stopped(tmp_path, 100, kill)
    assert_identical(training.run(tmp_path, 100), uninterrupted)


def test_an_evaluation_is_given_up_between_two_batches(training, uninterrupted, tmp_path):
    read, taken = training.eval_step, []

    def eval_step(params, batch):
        taken.append(len(taken))
        if len(taken) == 3:  # two at step 0, the first at step 2
            terminate()
        return read(params, batch)

    training.eval_step = eval_step
    try:
        with pytest.raises(hosts.StoppedError, match="at step 2,"):
            training.run(tmp_path, 2)
    finally:
        training.eval_step = read
    assert len(taken) == 3
    assert_identical(training.run(tmp_path, 2), uninterrupted)


# Real processes.

OUTSIDE = """
import time
from gptv_jax import errors, hosts
from gptv_jax.hosts import stopping
stopping.install(lambda: errors.end(130, "interrupted"))
print("ready", flush=True)
while True:
    try:
        time.sleep(60)
    except BaseException:  # as a library's callback may
        pass
"""
TOO_LATE = """
import time
from gptv_jax import errors, hosts
from gptv_jax.hosts import stopping
stopping.install(lambda: errors.end(130, "interrupted"))
with hosts.deferred_stop() as request:
    print("ready", flush=True)
    while request.since is None:
        time.sleep(0.01)
    print("saved", flush=True)
print("on", flush=True)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("script", "last"), [(OUTSIDE, ""), (TOO_LATE, "saved\n")], ids=["outside", "late"]
)
def test_where_nothing_is_left_to_save_it_ends_at_once(script, last):
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        output, told = process.communicate(timeout=30)
    assert (process.returncode, output) == (143, last)
    sentence = "stopped by SIGTERM; the same command continues from the last checkpoint"
    assert told.splitlines()[-1] == sentence


@pytest.mark.process
@pytest.mark.parametrize(("before", "code"), [("default_int_handler", 130), ("SIG_IGN", 143)])
def test_an_interrupt_ends_it_wherever_it_is_but_in_a_shell_s_background(before, code):
    script = f"import signal\nsignal.signal(signal.SIGINT, signal.{before})\n{OUTSIDE}"
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        if before == "SIG_IGN":
            time.sleep(1)  # that is how long it would have to end in
            process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=30)
    assert process.returncode == code, told


def events(folder: pathlib.Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.process
def test_of_two_processes_one_is_asked_and_both_stop_after_the_same_step(tmp_path):
    folder = tmp_path / "run"
    settings = ["--stages=pretrain", "--config.train.steps=100000", "--config.train.eval_every=50"]
    settings += ["--config.train.checkpoint_every=100000", "--config.data.validation_split=train"]
    begun = 0
    for asked, evaluating in ((1, False), (0, True)):
        port, logs = free_port(), [tmp_path / f"log-{asked}-{index}" for index in (0, 1)]
        processes = []
        for index, log in enumerate(logs):
            command = [sys.executable, "-m", "gptv_jax.main", f"--coordinator=127.0.0.1:{port}"]
            command += ["--num_processes=2", f"--process_id={index}"]
            with log.open("w") as file:
                arguments = [*command, *small_arguments(folder, *settings)]
                processes.append(subprocess.Popen(arguments, stdout=file, stderr=file))

        def reached(evaluating=evaluating, begun=begun) -> bool:
            found = [e for e in events(folder) if e["step"] > begun]
            found = [e for e in found if "nats_per_token" in e]
            return bool(found) and (not evaluating or found[-1]["step"] % 50 == 0)

        while not reached() and all(p.poll() is None for p in processes):
            time.sleep(0.0005)
        processes[asked].send_signal(signal.SIGTERM)
        try:
            codes = [process.wait(timeout=90) for process in processes]
        finally:  # where they do not stop together, they wait for each other
            for process in processes:
                process.kill()
                process.wait()
        told = [log.read_text() for log in logs]
        assert codes == [stopping.EXIT_CODE] * 2, told
        steps = [stopped_at(text.splitlines()[-1]) for text in told]
        assert steps[0] == steps[1] > begun
        assert (folder / "checkpoints" / "pretrain" / str(steps[0])).exists()
        assert not begun or f"continues from step {begun} of 100000; 0 steps" in told[0]
        begun = steps[0]
        if evaluating:  # which it gave up
            assert begun % 50 == 0 and "nats_per_token" in events(folder)[-1]


READER = """
import multiprocessing, sys
from absl import flags
from gptv_jax import config, tokens
from gptv_jax.data.pipeline import Pipeline
if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    settings = config.Config()
    codec = tokens.make_codec(settings.tokens, settings.data.image_size)
    batches = iter(Pipeline(config.Data(workers=1), codec, seed=0).train(8))
    for _ in sys.stdin:
        next(batches)
        print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
"""


def alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.process
@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_worker_outlives_sigterm_but_not_the_process_it_reads_for(tmp_path):
    script, pipe = tmp_path / "reader.py", subprocess.PIPE
    script.write_text(READER)
    with subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, text=True) as reader:

        def read() -> list[int]:
            reader.stdin.write("\n")
            reader.stdin.flush()
            return [int(pid) for pid in reader.stdout.readline().split()]

        [worker] = read()
        os.kill(worker, signal.SIGTERM)
        for _ in range(50):  # more than are read ahead
            assert read() == [worker]
        reader.kill()
    deadline = time.monotonic() + 20
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(worker)
