"""Several real processes on this machine: one run of all of them, and the end when one fails."""

import json
import pathlib
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator

import jax
import pytest
from conftest import Command, encoded, free_port, make_folder, random_image, small_arguments

from gptv_jax import command, hosts
from gptv_jax import config as config_lib
from gptv_jax.errors import InputError
from gptv_jax.hosts import distributed
from gptv_jax.stages import setup

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
BOUND = 60  # seconds in which the other processes end when one fails
OTHER_DIED = "error: another process of this run has died or cannot be reached, "
CONTINUES = "; the same command continues from the last checkpoint."


class Hosts:
    """The real command in so many processes, which are gone when the `with` ends."""

    def __init__(
        self,
        start: Callable,
        count: int,
        workdir: pathlib.Path,
        *more: str,
        own: dict[int, tuple[str, ...]] | None = None,
    ):
        meeting = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
        self.processes: list[Command] = []
        for index in range(count):
            arguments = small_arguments(workdir, *FIELDS, *more, *(own or {}).get(index, ()))
            arguments += [*meeting, f"--process_id={index}"] if count > 1 else []
            self.processes.append(start("main", *arguments))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.send_to_all(signal.SIGKILL)
            process.wait()

    def wait(self, but: int | None = None, limit: float = LIMIT) -> list[int]:
        """The exit codes of all processes but one, in order."""
        until = time.monotonic() + limit
        awaited = [p for i, p in enumerate(self.processes) if i != but]
        return [process.wait(until - time.monotonic()) for process in awaited]


def run(start: Callable, count: int, workdir: pathlib.Path, *more: str, **rest) -> list[Command]:
    """Runs the command to its end."""
    with Hosts(start, count, workdir, *more, **rest) as hosts:
        codes = hosts.wait()
    assert codes == [0] * count, hosts.processes[codes.index(max(codes))].errors[-3000:]
    return hosts.processes


def events(workdir: pathlib.Path) -> dict[tuple, float]:
    """Every number that the run logged, times left out."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        for name in event.keys() - NOT_NUMBERS - {"stage", "step"}:
            assert (event["stage"], event["step"], name) not in found
            found[event["stage"], event["step"], name] = event[name]
    return found


def assert_same(found: dict[tuple, float], wanted: dict[tuple, float]) -> None:
    """Losses within 1e-6; norms, which are larger, within that share of them."""
    losses = {key for key in wanted if "nats" in key[-1]}
    assert losses and found.keys() == wanted.keys()
    for keys, within in (
        (losses, {"abs": 1e-6, "rel": 0}),
        (wanted.keys() - losses, {"rel": 1e-6}),
    ):
        expected = pytest.approx({key: wanted[key] for key in keys}, **within)
        assert {key: found[key] for key in keys} == expected


def wait_for(path: pathlib.Path, hosts: Hosts) -> None:
    until = time.monotonic() + LIMIT
    while not path.exists():
        running = all(process.poll() is None for process in hosts.processes)
        assert running and time.monotonic() < until, hosts.processes[0].errors[-3000:]
        time.sleep(0.02)


def fail(
    start: Callable, index: int, by: signal.Signals, count: int, folder: pathlib.Path
) -> list[int]:
    """Runs `count` processes, sends a signal to one, and returns the others' exit codes."""
    with Hosts(start, count, folder, "--stages=pretrain") as hosts:
        wait_for(folder / "checkpoints" / "pretrain" / "10", hosts)
        if by == signal.SIGKILL:  # to the command alone, whose child process must end with it
            hosts.processes[index].send_signal(by)
        else:
            hosts.processes[index].send_to_all(by)
        codes = hosts.wait(but=index, limit=BOUND)
        logs = [process.errors for i, process in enumerate(hosts.processes) if i != index]
    assert all(ended_by_another(log) for log in logs), logs
    assert not (folder / "summary.json").exists()
    return codes


def ended_by_another(log: str) -> bool:
    last = log.splitlines()[-1]
    return last.startswith(OTHER_DIED) and last.endswith(CONTINUES)


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory) -> pathlib.Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("hosts") / "alone"
    run(start, 1, folder)
    return folder


@pytest.fixture(scope="module")
def failing(start, tmp_path_factory) -> Iterator[tuple[Hosts, list[int]]]:
    """Three processes of which two have failed, and their exit codes; process 0 still waits.

    Process 1 cannot read its data, and process 2 meets an error that nobody has expected.
    """
    folder, own = tmp_path_factory.mktemp("failing"), {}
    for index in range(3):
        files = {f"{i:03d}.png": encoded(random_image(8, 8, 1, seed=i)) for i in range(64)}
        if index:  # so that the first batch of the first evaluation has damaged images
            files |= {f"{i:03d}.png": b"cut" for i in range(64) if i % 8}
        make_folder(folder / str(index), files)
        own[index] = (f"--config.data.path={folder / str(index)}",)
    work = folder / "of-process-2"
    work.mkdir()
    (work / "skipped-2.jsonl").symlink_to(folder / "nowhere" / "file")
    own[2] += (f"--workdir={work}",)
    data = {
        "name": "folder",
        "train_split": "train[:75%]",
        "validation_split": "train[75%:]",
        "test_split": "train[75%:]",
        "train_transforms": ("decode(channels=1)",),
        "eval_transforms": ("decode(channels=1)",),
        "max_damaged": 0.0,
    }
    fields = [f"--config.data.{name}={value}" for name, value in data.items()]
    fields += ["--config.tokens.levels=256", "--config.model.start_per_variant=False"]
    fields += ["--config.train.batch_size=12", "--stages=pretrain"]
    with Hosts(start, 3, folder / "run", *fields, own=own) as hosts:
        codes = hosts.wait(but=0)
        assert hosts.processes[0].poll() is None
        yield hosts, codes


@pytest.fixture(scope="module")
def broken(start, failing, tmp_path_factory) -> pathlib.Path:
    """The folder of a run of four processes, of which one froze in the middle.

    The run starts after `failing`, whose process 0 waits meanwhile: JAX needs 40 seconds to miss
    a process.
    """
    folder = tmp_path_factory.mktemp("hosts") / "broken"
    assert fail(start, 2, signal.SIGSTOP, 4, folder) == [distributed.OTHER_DIED] * 3
    return folder


@pytest.mark.process
def test_the_other_processes_end_when_process_0_dies(start, tmp_path):
    assert fail(start, 0, signal.SIGKILL, 2, tmp_path / "run") == [distributed.OTHER_DIED]


@pytest.mark.process
def test_four_processes_have_the_losses_of_one_and_end_when_one_freezes(alone, broken):
    found = events(broken)
    assert ("pretrain", 5, "nats_per_token") in found
    assert_same(found, {key: value for key, value in events(alone).items() if key in found})


@pytest.mark.process
def test_one_process_continues_the_run_of_four(start, broken, alone, tmp_path):
    folder = tmp_path / "one"
    shutil.copytree(broken, folder)
    [process] = run(start, 1, folder, "--stages=pretrain")
    assert "pretrain continues from step" in process.errors
    assert_same(events(folder), {k: v for k, v in events(alone).items() if k[0] == "pretrain"})


TIMES = ("per_second", "goodput", "restarts", "redone", "lost", "seconds_up", "seconds_down")


@pytest.mark.process
def test_two_processes_continue_the_run_of_four_through_all_stages(start, broken, alone, tmp_path):
    folder, other = tmp_path / "two", tmp_path / "other"
    shutil.copytree(broken, folder)
    other.mkdir()  # of the second process, which sees the same checkpoints and nothing else
    (other / "checkpoints").symlink_to(folder / "checkpoints")
    fields = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.profile.steps=31:32")
    first, second = run(start, 2, folder, *fields, own={1: (f"--workdir={other}",)})
    assert_same(events(folder), events(alone))
    for index, workdir in enumerate((folder, other)):  # each process writes a trace of its own
        traces = workdir / "profile" / "plugins" / "profile" / "steps_31_32"
        kinds = ("perfetto.json.gz", "xplane.pb")
        assert sorted(path.name for path in traces.iterdir()) == [
            f"process_{index}.{kind}" for kind in kinds
        ]
        shutil.rmtree(workdir / "profile")
    assert [path.name for path in other.iterdir()] == ["checkpoints"]

    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, alone))
    printed = first.output[first.output.index("{\n") :]
    assert json.loads(printed) == ours and "{\n" not in second.output
    times = {name for name in ours if name.endswith(TIMES)}
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - times:
        wanted = theirs[name]
        within = wanted if wanted is None else pytest.approx(wanted, abs=1e-6, rel=0)
        assert ours[name] == within, name
    for name in ("unconditional", "completions"):
        picture = pathlib.Path("samples") / f"{name}.png"
        assert (folder / picture).read_bytes() == (alone / picture).read_bytes()
    for stage in ("probe", "finetune"):  # every test image counts once, as of one process
        confusions = [(f / stage / "confusion.json").read_text() for f in (folder, alone)]
        assert confusions[0] == confusions[1]
    written = [{path.name for path in f.iterdir()} for f in (folder, alone)]
    assert written[0] == written[1]


@pytest.mark.process
def test_processes_that_fail_say_why_at_once_and_the_others_end(failing):
    hosts, failed = failing
    codes, logs = hosts.wait(limit=BOUND), [process.errors for process in hosts.processes]
    assert codes == [distributed.OTHER_DIED, 1, command.UNEXPECTED] and failed == codes[1:], logs
    assert ended_by_another(logs[0])
    assert re.match(r"error: \d of 64 images cannot be read, ", logs[1].splitlines()[-1])
    assert "Traceback (most recent call last)" in logs[2]
    assert logs[2].rstrip().splitlines()[-1].startswith("FileNotFoundError: ")


def test_an_error_of_one_process_while_the_run_is_opened_ends_all_processes_by_it(monkeypatch):
    def refuse():
        raise InputError("config.data.path=/b does not exist.")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    told = []
    monkeypatch.setattr(hosts, "from_all", lambda own: told.append(own) or [None, own or "no."])
    with pytest.raises(InputError, match=r"process 1 of 2: config\.data\.path=/b does not exist"):
        hosts.on_all(refuse)
    with pytest.raises(InputError, match=r"process 1 of 2: no\."):
        hosts.on_all(lambda: 3)
    assert told == ["config.data.path=/b does not exist.", None]
    monkeypatch.setattr(hosts, "from_all", lambda own: [own, own])
    assert hosts.on_all(lambda: 3) == 3


def test_processes_with_different_settings_are_refused(monkeypatch):
    theirs = {"config.train.steps": 7}

    def with_another(own: dict) -> list[dict]:
        return [own, own | theirs]

    monkeypatch.setattr(setup.hosts, "from_all", with_another)
    with pytest.raises(
        InputError, match=r"different settings: config\.train\.steps is 7, expected 1000"
    ):
        setup.check_same_settings(config_lib.Config())
