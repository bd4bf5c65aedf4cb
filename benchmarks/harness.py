"""Contenders side by side: a process each, in turns, so that what the machine does meets all.

A process of its own keeps a contender's threads and memory from disturbing the others; that it
is idle between its turns is measured too (`Measured.waiting`). After a warm-up, which compiles and
tells how many iterations make a turn, the contenders take turns A B A B; ratios are of turns of the
same round, and their median is what counts.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
VERSIONED = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")
PAUSE = 0.1  # seconds between two turns, in which OpenMP's threads cease to spin
ENDING = 10  # seconds that a process may take to end
DISTURBED = 0.1  # cores used by others from which the numbers are not to be trusted
TOLD = ("unit", "median", "quartiles")  # of a row, in one cell of the table


@dataclasses.dataclass(frozen=True)
class Contender:
    """What is measured, and how its process comes to it."""

    name: str
    factory: str  # "module:function", which makes a `worker.Task`
    arguments: dict = dataclasses.field(default_factory=dict)  # of the factory; JSON
    environment: dict[str, str] = dataclasses.field(default_factory=dict)  # beside this process's
    limit: bool = False  # of the others: measured whichever of them are wanted


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came of a contender."""

    seconds: tuple[float, ...] = ()  # of an iteration, round by round
    facts: dict = dataclasses.field(default_factory=dict)  # that its task tells
    waiting: float = 0.0  # cores that its process used while others had their turns
    note: str = ""  # why there is nothing
    failed: bool = False  # for a reason that is a mistake

    def quartiles(self, work: float) -> list[float]:
        """First, second and third one of the speed, where an iteration does `work`."""
        return np.quantile(work / np.array(self.seconds), [0.25, 0.5, 0.75]).tolist()

    def times_as_fast_as(self, base: "Measured") -> float:
        """Median over the rounds."""
        return float(np.median(np.array(base.seconds) / np.array(self.seconds)))


def compare(contenders: list[Contender], arguments: argparse.Namespace) -> dict[str, Measured]:
    """Measures contenders against each other.

    Args:
      contenders: with different names.
      arguments: `rounds`, in each of which every contender has one turn; `seconds` that a turn
        takes at least, which is one iteration where that takes longer; and `only`, names of those
        that are wanted, by commas, or "".

    Returns:
      What came of each, by name; those that cannot run here are noted, and the others go on.
    """
    if arguments.only:
        wanted = arguments.only.split(",")
        contenders = [c for c in contenders if c.limit or c.name in wanted]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_others_told())
        workers = [stack.enter_context(_Worker(contender)) for contender in contenders]
        for worker in workers:
            worker.receive("ready")
        for worker in workers:
            worker.turn(1)
        for worker in workers:
            spent = worker.turn(1)
            worker.iterations = max(1, math.ceil(arguments.seconds / spent)) if spent else 1
        for worker in workers:
            worker.begin()
        for _ in range(arguments.rounds):
            for worker in workers:
                worker.turn(worker.iterations)
        return {worker.contender.name: worker.measured() for worker in workers}


@contextlib.contextmanager
def _others_told():
    """Says so where other processes used the machine within the `with`: ratios suffer too.

    Threads that wait for each other, as PyTorch's do, are slowed down out of proportion.
    """
    begin, busy, own = time.perf_counter(), _busy(), _own()
    yield
    spent = time.perf_counter() - begin
    others = (_busy() - busy - (_own() - own)) / spent
    if others > DISTURBED:
        told = f"Other processes used {others:.2f} cores meanwhile; measure again when they rest."
        print(told, file=sys.stderr, flush=True)


def _busy() -> float:
    """Seconds that all cores have worked since the machine was started."""
    user, nice, system = pathlib.Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Seconds that this process, and those it has waited for, have worked."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class _Worker:
    """A contender's process, as the harness sees it; a failed one does nothing any more."""

    def __init__(self, contender: Contender):
        self.contender, self.iterations = contender, 1
        self.note, self.failed, self.facts = "", False, {}
        self.begin()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - what it prints, open as long as it
        self._connection, there = multiprocessing.Pipe()
        arguments = [str(there.fileno()), contender.factory, json.dumps(contender.arguments)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        shared = {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            env=os.environ | shared | contender.environment,
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        there.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._connection.close()  # by which it ends
        try:
            self._process.wait(timeout=ENDING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def begin(self) -> None:
        """Forgets the turns so far, which were to warm up."""
        self.seconds, self._used, self._waited, self._last = [], 0.0, 0.0, None

    def turn(self, iterations: int) -> float | None:
        """Seconds that an iteration took."""
        if self.note:
            return None
        time.sleep(PAUSE)
        begin = time.perf_counter()
        self._connection.send(iterations)
        turn = self.receive("turn")
        if turn is None:
            return None
        if self._last:
            self._waited += begin - self._last[0]
            self._used += turn.cpu[0] - self._last[1]
        self._last = time.perf_counter(), turn.cpu[1]
        self.seconds.append(turn.seconds)
        return turn.seconds

    def receive(self, wanted: str):
        """What the worker sends, or None where it says that it cannot go on."""
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            kind, value = "failed", f"its process ended by code {self._process.wait()}"
        if kind == wanted:
            if kind == "ready":
                self.facts = value
            return value
        self.note, self.failed = value, kind != "unavailable"
        if self.failed:
            self._log.seek(0)
            print(f"{self.contender.name}: {self._log.read()[-3000:]}", file=sys.stderr, flush=True)
        return None

    def measured(self) -> Measured:
        """All that came of it."""
        if self.note:
            return Measured(facts=self.facts, note=self.note, failed=self.failed)
        waiting = self._used / self._waited if self._waited else 0.0
        return Measured(tuple(self.seconds), self.facts, waiting)


def rows(
    case: str, found: dict[str, Measured], work: float, unit: str, base: str = ""
) -> list[dict]:
    """A row of the table for each contender.

    Args:
      case: what was measured.
      found: of `compare`.
      work: that an iteration does, in units.
      unit: tokens, images, ...; the rows have as many of them a second.
      base: the contender whose ratio is 1; without one there are no ratios.
    """
    made = []
    for name, each in found.items():
        row = {"case": case, "contender": name, "unit": f"{unit}/s"}
        if each.note:
            made.append(row | {"note": each.note} | ({"failed": True} if each.failed else {}))
            continue
        low, median, high = each.quartiles(work)
        row |= {"median": median, "quartiles": [low, high]}
        if base in found and found[base].seconds:
            row["ratio"] = each.times_as_fast_as(found[base])
        made.append(row | {"waiting_cores": each.waiting})
    return made


def table(made: list[dict]) -> str:
    """Rows as a table in Markdown: case, contender, speed with its quartiles, and what else is."""
    hidden = {"case", "contender", "note", "failed", "waiting_cores", *TOLD}
    more = list(dict.fromkeys(key for row in made for key in row if key not in hidden))
    lines = [["case", "contender", "median (quartiles)", *(key.replace("_", " ") for key in more)]]
    for row in made:
        speed = row.get("note", "")
        if "median" in row:
            low, high = (_number(v) for v in row["quartiles"])
            speed = f"{_number(row['median'])} {row['unit']} ({low} to {high})"
        lines.append([row["case"], row["contender"], speed, *(_cell(row.get(k)) for k in more)])
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in wide])
    padded = ([c.ljust(w) for c, w in zip(line, wide, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _cell(value) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def report(benchmark: str, made: list[dict], **more) -> None:
    """Prints the table and, as the last line, all of it as one JSON object.

    Args:
      benchmark: its name.
      made: its rows.
      more: for the JSON object.

    Raises:
      SystemExit: a contender failed.
    """
    print(table(made))
    ratios: dict[str, dict[str, float]] = {}
    for row in made:
        if "ratio" in row:
            ratios.setdefault(row["case"], {})[row["contender"]] = round(row["ratio"], 3)
    facts = {"versions": versions(), "hardware": hardware(), "date": str(datetime.date.today())}
    found = {"benchmark": benchmark, "rows": made, "ratios": ratios} | more | facts
    print(json.dumps(found), flush=True)
    if any("failed" in row for row in made):
        sys.exit(1)


def versions() -> dict[str, str | None]:
    """Of what takes part; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def hardware() -> dict[str, str | int]:
    """The device as JAX names it, and the CPU; asked in a process of its own, which then ends."""
    asked = "import jax, json; d = jax.devices()[0]; print(json.dumps([d.platform, d.device_kind]))"
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    kind, device = json.loads(told.stdout.splitlines()[-1])
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0))
    return {"platform": kind, "device": device, "cpu": cpu or platform.processor(), "cores": cores}


def main(
    benchmark: str,
    description: str,
    cases: Callable,
    measure: Callable,
    *,
    quick: list,
    rounds: int = 5,
    flags: dict[str, dict] | None = None,
) -> None:
    """What a benchmark does as a command.

    Args:
      benchmark: its name.
      description: its docstring.
      cases: `platform -> cases` that fit the machine; a case's name is its `str`.
      measure: `(case, arguments) -> rows`.
      quick: the cases of --quick.
      rounds: the default of --rounds.
      flags: further ones, and what they are.

    Raises:
      SystemExit: no case is left, or a contender failed.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="turns that each contender has")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a turn takes at least")
    parser.add_argument("--cases", default="", help="those with one of these words, by commas")
    parser.add_argument("--only", default="", help="these contenders, by commas")
    parser.add_argument("--batch", type=int, help="in place of the cases' own")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it works")
    for name, options in (flags or {}).items():
        parser.add_argument(name, **options)
    arguments = parser.parse_args()
    every = quick if arguments.quick else cases(hardware()["platform"])
    words = [word for word in arguments.cases.split(",") if word]
    chosen = [c for c in every if not words or any(word in str(c) for word in words)]
    if not chosen:
        sys.exit(f"--cases={arguments.cases} names none of: {'; '.join(map(str, every))}.")
    if arguments.batch:
        chosen = [dataclasses.replace(case, batch=arguments.batch) for case in chosen]
    report(benchmark, [row for case in chosen for row in measure(case, arguments)])
