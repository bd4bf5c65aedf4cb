"""SIGTERM at any moment: the training saves its state, and continues as if it had not stopped."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import Command, free_port, small_arguments
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
    """This process answers signals as the commands do."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stopping.install()
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def terminate() -> None:
    """Sends SIGTERM to this process while a training runs; returns when the training sees it."""
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(hosts.StoppedError):
        for _ in hosts.until_stop(itertools.repeat({})):
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


# SIGTERM at an event, and the step at which it stops the training; even steps are evaluated.
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
def test_a_training_stopped_by_sigterm_ends_as_if_it_had_not_stopped(
    training, uninterrupted, tmp_path, moment
):
    assert terminated(training, tmp_path, 2, moment) == MOMENTS[moment]
    late = MOMENTS[moment] == STEPS  # saved without its evaluation
    assert_identical(training.run(tmp_path, 2, unevaluated=late), uninterrupted)


def test_a_training_stopped_repeatedly_ends_as_if_it_had_not_stopped(
    training, uninterrupted, tmp_path
):
    for taken in (1, 3, 5):  # a process that has not taken a step has nothing to save
        assert terminated(training, tmp_path, 100, ("next batch", taken)) == taken + 1
    assert_identical(training.run(tmp_path, 100, unevaluated=1), uninterrupted)


@pytest.mark.parametrize("kill", [("evaluation", 4), ("next batch", 4), ("next batch", 5)])
def test_a_training_killed_near_the_evaluation_that_it_gave_up_repeats_the_evaluation(
    training, uninterrupted, tmp_path, kill
):
    assert terminated(training, tmp_path, 100, ("evaluation", 4)) == 4
    training.stopped(tmp_path, 100, kill)
    assert_identical(training.run(tmp_path, 100), uninterrupted)


def test_an_evaluation_stops_between_two_batches(training, uninterrupted, tmp_path, monkeypatch):
    metric, taken = training.metric, []

    def step(params, batch):
        taken.append(len(taken))
        if len(taken) == 3:  # two at step 0, the first at step 2
            terminate()
        return metric.step(params, batch)

    with monkeypatch.context() as patch:
        patch.setattr(training, "metric", dataclasses.replace(metric, step=step))
        with pytest.raises(hosts.StoppedError, match="at step 2,"):
            training.run(tmp_path, 2)
    assert len(taken) == 3
    assert_identical(training.run(tmp_path, 2), uninterrupted)


# Real processes.

OUTSIDE = """
import time
from gptv_jax.hosts import stopping
stopping.install()
print("ready", flush=True)
while True:
    try:
        time.sleep(60)
    except BaseException:  # as a library's callback may
        pass
"""
OUTSIDE_A_TRAINING = "stopped by SIGTERM; the same command continues from the last checkpoint"
TOO_LATE = """
import time
from gptv_jax import hosts
from gptv_jax.hosts import stopping
stopping.install()
with hosts.deferred_stop() as request:
    print("ready", flush=True)
    while not request.agreed():
        time.sleep(0.01)
    print("saved", flush=True)
print("on", flush=True)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("script", "last"), [(OUTSIDE, ""), (TOO_LATE, "saved\n")], ids=["outside", "late"]
)
def test_sigterm_ends_a_process_at_once_where_nothing_is_to_save(script, last):
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        output, told = process.communicate(timeout=30)
    assert (process.returncode, output) == (143, last)
    assert told.splitlines()[-1] == OUTSIDE_A_TRAINING


@pytest.mark.process
@pytest.mark.parametrize(("before", "code"), [("default_int_handler", 130), ("SIG_IGN", 143)])
def test_sigint_ends_a_process_at_once_but_not_in_the_background_of_a_shell(before, code):
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


def two_processes(start, folder: pathlib.Path) -> list[Command]:
    settings = ["--stages=pretrain", "--config.train.steps=100000", "--config.train.eval_every=50"]
    settings += ["--config.train.checkpoint_every=100000", "--config.data.validation_split=train"]
    settings += ["--config.train.batch_size=2"]  # so that an evaluation takes seconds
    meeting = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    arguments = [*meeting, *small_arguments(folder, *settings)]
    return [start("main", f"--process_id={index}", *arguments) for index in (0, 1)]


@pytest.mark.process
def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(start, tmp_path):
    folder, begun = tmp_path / "run", 0
    moments = [(1, "start"), (1, "step"), *[(0, "evaluation")] * 3]
    for asked, moment in moments:
        processes = two_processes(start, folder)

        def reached(moment=moment, begun=begun, processes=processes) -> bool:
            if moment == "start":  # both have met, and compile
                return all("of 2 devices" in process.errors for process in processes)
            found = [e for e in events(folder) if e["step"] > begun and "nats_per_token" in e]
            return bool(found) and (moment == "step" or found[-1]["step"] % 50 == 0)

        while not reached() and all(p.poll() is None for p in processes):
            time.sleep(0.0005)
        processes[asked].send_signal(signal.SIGTERM)
        try:
            codes = [process.wait(timeout=90) for process in processes]
        finally:  # where they do not stop together, they wait for each other
            for process in processes:
                process.send_to_all(signal.SIGKILL)
        told = [process.errors for process in processes]
        assert codes == [stopping.STOPPED] * 2, told
        last = [text.splitlines()[-1] for text in told]
        if moment == "start":
            assert last == [OUTSIDE_A_TRAINING] * 2
            continue
        steps = [stopped_at(line) for line in last]
        assert steps[0] == steps[1] > begun
        assert (folder / "checkpoints" / "pretrain" / str(steps[0])).exists()
        assert not begun or f"continues from step {begun} of 100000; 0 steps" in told[0]
        begun = steps[0]
        # JAX looks for the signal once a second, so the evaluation may end before.
        if moment == "evaluation" and begun % 50 == 0:
            assert "nats_per_token" in events(folder)[-1]  # the run gave the evaluation up
            return
    pytest.fail("none of three evaluations was given up")


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
def test_a_reader_process_survives_sigterm_but_ends_with_the_process_it_reads_for(tmp_path):
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
