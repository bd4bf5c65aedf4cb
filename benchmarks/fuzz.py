"""Damaged files of every kind, read by worker processes with limits of memory and time.

    python -m benchmarks.fuzz [--images=2000] [--weights=500] [--texts=300] [--tables=300]
        [--seed=0] [--keep=DIR]

Each case is a whole file, changed by one mutation, which depends on the seed and the case's number
alone; the modules fuzz_* have the files, the mutations, and what an accepted file must hold. No
case is equal to its original. A case passes where the file is refused by one sentence, or accepted
with the right content. Everything else is a fault: another exception, wrong content, a file that
needs more than --memory MiB (images: 256) or --seconds, the end of the worker. Prints a table and
a JSON line; the exit code is 1 where there is a fault. --keep writes the files of all faults.
"""

import argparse
import collections
import json
import multiprocessing
import os
import pathlib
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from typing import NamedTuple

import numpy as np

from benchmarks import harness
from benchmarks.fuzz_cases import Subject
from benchmarks.fuzz_images import Images
from benchmarks.fuzz_tables import Tables
from benchmarks.fuzz_texts import Texts
from benchmarks.fuzz_weights import Weights
from gptv_jax.data.limits import DamagedImageError
from gptv_jax.errors import InputError

BEGINS = 300  # seconds in which a worker begins
SUBJECTS = {"images": Images, "weights": Weights, "texts": Texts, "tables": Tables}


class Outcome(NamedTuple):
    """What became of a case."""

    kind: str  # of the file
    mutation: str
    verdict: str  # "refused", "accepted", or the fault
    words: str  # the reason of a refusal or of a fault
    number: int = -1  # of the case
    seconds: float = 0.0

    @property
    def fault(self) -> bool:
        return self.verdict not in ("refused", "accepted")


def case(subject: Subject, seed: int, number: int) -> tuple[str, str, bytes]:
    """The original's name, the mutation's name and the content of a case's file."""
    rng = np.random.default_rng([seed, number])
    return subject.mutated(rng)


def judge(subject: Subject, seed: int, number: int) -> Outcome:
    """Reads a case's file in this process."""
    name, mutation, content = case(subject, seed, number)
    try:
        subject.read(name, mutation, content)
        return Outcome(name, mutation, "accepted", "")
    except (InputError, DamagedImageError) as error:
        words, chain = str(error), [error]
        for each in chain:
            chain += [e for e in (each.__cause__, each.__context__) if e and e not in chain]
        if any(isinstance(each, MemoryError) for each in chain):
            return Outcome(name, mutation, "memory", words)
        if len(words.splitlines()) != 1:
            return Outcome(name, mutation, "several lines", words)
        return Outcome(name, mutation, "refused", words)
    except MemoryError:
        return Outcome(name, mutation, "memory", traceback.format_exc())
    except AssertionError as error:
        return Outcome(name, mutation, "wrong content", str(error))
    except BaseException:
        return Outcome(name, mutation, "crash", traceback.format_exc())


def _work(connection, subject: Subject, seed: int, memory: int) -> None:
    """Judges cases by their numbers, with at most so many bytes more than are in use now."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and libjpeg write there
    subject.begin()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send("ready")
    while (number := connection.recv()) is not None:
        connection.send(judge(subject, seed, number))


def run(subject: Subject, count: int, seed: int, memory: int, seconds: float) -> list[Outcome]:
    """Judges `count` cases, one after another; a worker that ends is replaced.

    `memory` is in bytes, `seconds` are those of a case.
    """
    found, worker = [], None
    context = multiprocessing.get_context("forkserver")  # this process may have threads of JAX
    context.set_forkserver_preload(["benchmarks.fuzz_texts"])
    for number in range(count):
        if worker is None:
            connection, other = context.Pipe()
            worker = context.Process(target=_work, args=(other, subject, seed, memory))
            worker.start()
            other.close()
            if not connection.poll(BEGINS) or connection.recv() != "ready":
                raise RuntimeError(f"a worker did not begin in {BEGINS} seconds.")
        start = time.monotonic()
        connection.send(number)
        name, mutation, _ = case(subject, seed, number)
        try:
            if connection.poll(seconds):
                outcome = connection.recv()
            else:
                outcome = Outcome(name, mutation, "hang", f"more than {seconds:g} seconds")
        except (EOFError, OSError):
            worker.join()
            words = f"the worker ended by {signal.Signals(-worker.exitcode).name}"
            outcome = Outcome(name, mutation, "end", words if worker.exitcode < 0 else "the worker")
        found.append(outcome._replace(number=number, seconds=time.monotonic() - start))
        if outcome.verdict in ("hang", "end"):
            worker.kill()
            worker.join()
            worker = None
    if worker is not None:
        connection.send(None)
        worker.join()
    return found


def table(found: dict[str, list[Outcome]]) -> str:
    """A row for each kind of file: cases, refused, accepted, faults, and the longest case."""
    lines = [["kind", "file", "cases", "refused", "accepted", "faults", "longest, ms"]]
    for kind, outcomes in found.items():
        names = sorted({each.kind for each in outcomes})
        for name in [*names, "all"]:
            own = [each for each in outcomes if name in (each.kind, "all")]
            verdicts = collections.Counter("fault" if o.fault else o.verdict for o in own)
            counts = [len(own), *(verdicts[each] for each in ("refused", "accepted", "fault"))]
            longest = max(each.seconds for each in own[1:] or own)
            lines.append([kind, name, *map(str, counts), f"{longest * 1000:.0f}"])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Runs all kinds and prints the table, the faults and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, count in (("images", 2000), ("weights", 500), ("texts", 300), ("tables", 300)):
        parser.add_argument(f"--{name}", type=int, default=count, help="number of files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=int, default=512, help="MiB more than a worker has")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a case")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the files of the faults")
    given, found = parser.parse_args(), {}
    for kind, make in SUBJECTS.items():
        with tempfile.TemporaryDirectory() as folder:
            subject = make(pathlib.Path(folder))
            count, memory = getattr(given, kind), min(given.memory * 2**20, subject.most_memory)
            found[kind] = run(subject, count, given.seed, memory, given.seconds)
            for each in found[kind]:
                if each.fault:
                    print(f"{kind} {each.number}, {each.kind}, {each.mutation}: {each.verdict}:")
                    print(each.words, flush=True)
                    if given.keep:
                        given.keep.mkdir(parents=True, exist_ok=True)
                        content = case(subject, given.seed, each.number)[2]
                        ending = re.sub(r"\W+", "-", each.kind)
                        (given.keep / f"{kind}-{each.number}-{ending}").write_bytes(content)
    found = {kind: outcomes for kind, outcomes in found.items() if outcomes}
    print(table(found))
    faults = sum(each.fault for outcomes in found.values() for each in outcomes)
    counts = {kind: len(outcomes) for kind, outcomes in found.items()}
    print(json.dumps({"benchmark": "fuzz", "cases": counts, "faults": faults} | vars(given)
                     | {"keep": None} | harness.facts()))  # fmt: skip
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
