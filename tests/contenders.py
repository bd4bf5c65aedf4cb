"""Contenders of tests/test_benchmarks.py, in the processes that the harness starts."""

import threading
import time

from benchmarks.worker import Task, UnavailableError


def sleeper(seconds: float, log: str = "") -> Task:
    """A contender: an iteration takes so long, and leaves its length in the log."""

    def sleep():
        time.sleep(seconds)
        if log:
            with open(log, "a") as file:
                file.write(f"{seconds}\n")

    return Task(sleep, facts={"sleeps": seconds})


def spinner() -> Task:
    """A contender whose threads go on after its turn."""

    def spin():
        end = time.perf_counter() + 60
        while time.perf_counter() < end:
            pass

    threading.Thread(target=spin, daemon=True).start()
    return Task(lambda: time.sleep(0.02))


def lacking() -> Task:
    """A contender that cannot run here."""
    raise UnavailableError("there is no such machine")


def mistaken() -> Task:
    """A contender with a mistake in it."""
    return Task(lambda: 1 / 0)
