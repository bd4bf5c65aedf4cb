"""Contenders measured side by side: a process each, in turns, so that disturbances affect all.

A process of its own keeps a contender's threads and memory from disturbing the others; that it is
idle between its turns is measured too (`Measured.waiting`), and what other processes do on the
machine (`Measured.others`): threads that wait for each other, as PyTorch's do, suffer from it out
of proportion. After a warm-up the contenders take turns A B A B. Each ratio compares turns of one
round; the median is reported.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
# A process compiles in its first iteration. In some of its first 20 to 40 iterations it takes
# memory pages, which the kernel clears: these iterations last up to five times as long as later
# ones, and the warm-up takes them.
FIRST_ITERATIONS = 40
PAUSE = 0.1  # seconds between two turns, in which OpenMP's threads cease to spin
ENDING = 10  # seconds that a process may take to end
DISTURBED = 0.1  # cores used by others from which the numbers are not to be trusted


@dataclasses.dataclass(frozen=True)
class Contender:
    """One of the programs that are compared, and how its process makes it."""

    name: str
    factory: str  # "module:function", which makes a `worker.Task`
    arguments: dict = dataclasses.field(default_factory=dict)  # of the factory, as JSON
    environment: dict[str, str] = dataclasses.field(default_factory=dict)  # added to ours
    limit: bool = False  # an upper limit of the others: measured whatever --only says


def device_a_core(contender: Contender, batch: int, cores: int) -> list[Contender]:
    """The contender with each core of the CPU as a JAX device, if the cores divide the batch."""
    split = contender.environment | {"JAX_NUM_CPU_DEVICES": str(cores)}
    other = dataclasses.replace(contender, name="a device a core", environment=split)
    return [] if batch % cores else [other]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurements of one contender."""

    seconds: tuple[float, ...] = ()  # of an iteration, round by round
    facts: dict = dataclasses.field(default_factory=dict)  # facts of its `Task`
    waiting: float | None = None  # cores that its process used in others' turns; None: not known
    others: float | None = None  # cores used by processes that are no contenders
    processor: tuple[float, ...] = ()  # seconds of processor time of an iteration, round by round
    note: str = ""  # why it was not measured
    failed: bool = False  # whether `note` is an error, not something that is missing here

    def quartiles(self, work: float) -> list[float]:
        """The three quartiles of the speed; an iteration does `work`."""
        return np.quantile(work / np.array(self.seconds), [0.25, 0.5, 0.75]).tolist()

    def times_as_fast_as(self, base: "Measured") -> float:
        """How many times as fast as `base` this is: the median over the rounds."""
        return float(np.median(np.array(base.seconds) / np.array(self.seconds)))


def compare(contenders: list[Contender], arguments: argparse.Namespace) -> dict[str, Measured]:
    """Measures contenders against each other.

    Args:
      contenders: with different names.
      arguments: the flags. `rounds` is the number of rounds, in each of which every contender has
        one turn; `seconds` is how long a turn takes at least (one iteration, if that takes
        longer); `warm_up` is how many seconds the warm-up of a contender may take after its first
        two iterations; `only` is the names of the contenders to measure, by commas, or "" for all.

    Returns:
      Measurements by contender's name; for a contender that cannot run here they have a note.
    """
    if arguments.only:
        wanted = arguments.only.split(",")
        unknown = set(wanted) - {contender.name for contender in contenders}
        if unknown:
            names = ", ".join(contender.name for contender in contenders)
            sys.exit(f"--only has {', '.join(unknown)}; it takes some of: {names}.")
        contenders = [c for c in contenders if c.limit or c.name in wanted]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_Worker(contender)) for contender in contenders]
        for worker in workers:
            worker.receive("ready")
        for worker in workers:
            worker.turn(1)
        for worker in workers:
            spent = worker.turn(1)
            if spent and (more := min(int(arguments.warm_up / spent), FIRST_ITERATIONS)):
                spent = worker.turn(more)
            worker.iterations = max(1, math.ceil(arguments.seconds / spent)) if spent else 1
        for worker in workers:
            worker.begin()
        begin, busy = time.perf_counter(), _busy()
        for _ in range(arguments.rounds):
            for worker in workers:
                worker.turn(worker.iterations)
        busy = _busy() - busy - sum(worker.used for worker in workers)
        others = max(busy / (time.perf_counter() - begin), 0.0)
        if others > DISTURBED:
            told = f"Other processes used {others:.2f} cores meanwhile; measure again without them."
            print(told, file=sys.stderr, flush=True)
        return {worker.contender.name: worker.measured(others) for worker in workers}


def _busy() -> float:
    """Seconds that all cores have worked since the machine was started."""
    user, nice, system = pathlib.Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


class _Worker:
    """The harness's side of a contender's process; after a failure it does nothing."""

    def __init__(self, contender: Contender):
        self.contender, self.iterations = contender, 1
        self.note, self.failed, self.facts = "", False, {}
        self.begin()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - its output, open as long as it
        self._connection, there = multiprocessing.Pipe()
        arguments = [str(there.fileno()), contender.factory, json.dumps(contender.arguments)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        shared = {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        shared |= {"JAX_NUM_CPU_DEVICES": "1"}  # unless the contender has more
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
        self._connection.close()  # which ends the worker
        try:
            self._process.wait(timeout=ENDING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def begin(self) -> None:
        """Forgets the turns so far, which were the warm-up."""
        self.seconds, self.processor = [], []
        self.used = 0.0  # seconds of processor time, waiting included
        self._idle, self._waited, self._last = 0.0, 0.0, None

    def turn(self, iterations: int) -> float | None:
        """Runs a turn; returns the seconds of one iteration, or None after a failure."""
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
            self._idle += turn.cpu[0] - self._last[1]
        self.used += turn.cpu[1] - (self._last[1] if self._last else turn.cpu[0])
        self._last = time.perf_counter(), turn.cpu[1]
        self.seconds.append(turn.seconds)
        self.processor.append((turn.cpu[1] - turn.cpu[0]) / iterations)
        return turn.seconds

    def receive(self, wanted: str):
        """Returns what the worker sends, or None if the worker cannot go on; notes the reason."""
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

    def measured(self, others: float) -> Measured:
        """Measurements of this contender; `others` is the cores that other processes used."""
        if self.note:
            return Measured(facts=self.facts, note=self.note, failed=self.failed)
        waiting = self._idle / self._waited if self._waited else 0.0
        processor = tuple(self.processor)
        return Measured(tuple(self.seconds), self.facts, waiting, others, processor)
