"""The process of one contender: makes it, and runs it whenever the harness says so.

Command: python -m benchmarks.worker CONNECTION FACTORY ARGUMENTS, which `turns.compare` starts.
"""

import contextlib
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

from gptv_jax.hosts import runtime

OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory")  # as JAX and PyTorch say it
OPTIONAL = ("torch", "transformers")  # the bench extra


class UnavailableError(Exception):
    """The machine lacks something that a contender needs; the message names it."""


class Task(NamedTuple):
    """The work of a contender, which its factory makes."""

    step: Callable[[], object]  # one iteration; what it returns need not be computed yet
    wait: Callable[[object], None] = lambda result: None  # until what `step` returned is computed
    facts: dict = {}  # noqa: RUF012 - JSON, of what was made; nobody writes to the default


class Turn(NamedTuple):
    """Measurements of the iterations of one turn."""

    seconds: float  # of one iteration, on average
    cpu: tuple[float, float]  # processor time of the process, before and after


def run(task: Task, iterations: int) -> Turn:
    """Runs iterations and waits once, after the last, as a training loop does."""
    before, begin, result = time.process_time(), time.perf_counter(), None
    for _ in range(iterations):
        result = task.step()
    task.wait(result)
    return Turn((time.perf_counter() - begin) / iterations, (before, time.process_time()))


def main() -> None:
    """Sends the task's facts, then a `Turn` for each request; after a failure, its reason."""
    connection, factory, arguments = Connection(int(sys.argv[1])), *sys.argv[2:]
    if not factory.startswith("benchmarks.peers:"):
        runtime.keep_memory()  # as the command does, before JAX starts threads
    with contextlib.suppress(EOFError, BrokenPipeError):  # the harness has ended
        try:
            module, function = factory.split(":")
            task = getattr(importlib.import_module(module), function)(**json.loads(arguments))
            connection.send(("ready", task.facts))
            while iterations := connection.recv():
                connection.send(("turn", run(task, iterations)))
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            lacking = isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL
            full = any(word in str(error) for word in OUT_OF_MEMORY)
            if lacking or full or isinstance(error, UnavailableError):
                connection.send(("unavailable", str(error).splitlines()[0]))
                return
            traceback.print_exc()
            connection.send(("failed", f"{type(error).__name__}: {error}".splitlines()[0]))


if __name__ == "__main__":
    # Under its own name, by which factories and the harness know its classes.
    from benchmarks import worker

    worker.main()
