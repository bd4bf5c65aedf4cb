"""Every benchmark of speed that fits this machine, one after the other, into docs/results.md.

Command: python -m benchmarks.all [--quick] [--benchmarks=train_step,decode] [--cases=iGPT-S,T64]
             [--limit=570] [--pieces=FOLDER] [--write=FILE]
             [--cifar10=DIR --jpegs=FOLDER --palette=kmeans_centers.npy] [FLAGS]

Each case is a command of its own, whose result is kept in runs/speed/NAME-cpu.json (or -gpu), or
in the folder --pieces. Flags that this command does not know go to each benchmark: --rounds=3.
The table of benchmark NAME, of all its cases that are kept, is put between the document's lines
`<!-- speed:NAME-cpu -->` and `<!-- /speed:NAME-cpu -->`, with its command, hardware and date. With
--limit, for a machine that is lent for minutes at a time, cases with a kept result are not measured
again unless a contender failed, and when the time is over the exit code is 143: the same command
continues. --quick writes only where --pieces or --write say. --cifar10, --jpegs and --palette name
what the input pipeline reads; without them it is left out.
"""

import argparse
import importlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

from benchmarks import harness
from benchmarks.turns import ROOT
from gptv_jax.hosts import stopping

NAMES = (
    "train_step", "decode", "features", "attention", "startup", "input_pipeline", "cached_teacher",
    "growth", "code_head", "split_cpu",
)  # fmt: skip
DATA = ("cifar10", "jpegs", "palette")  # flags of the input pipeline
MODULE = [sys.executable, "-m"]


def run(command: list[str], timeout: float | None) -> tuple[dict | None, bool]:
    """The benchmark's last line as JSON or None, and whether the benchmark succeeded.

    Raises:
      subprocess.TimeoutExpired: the benchmark takes longer than `timeout` seconds.
    """
    begin = time.perf_counter()
    print(shlex.join(["python", "-m", *command]), flush=True)
    with subprocess.Popen(
        [*MODULE, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            raise
    print(f"{output}\n{time.perf_counter() - begin:.0f} s\n", flush=True)
    try:
        return json.loads(output.splitlines()[-1]), process.returncode == 0
    except (IndexError, json.JSONDecodeError):
        return None, False


def section(command: list[str], pieces: list[dict]) -> str:
    """The document's text of a benchmark: the facts and one table of all its measured cases."""
    told = dict.fromkeys(harness.told(["python", "-m", *command], piece) for piece in pieces)
    rows = [row for piece in pieces for row in piece["rows"]]
    return "\n".join([*told, "", harness.table(rows)])


def write(path: pathlib.Path, name: str, text: str) -> bool:
    """Puts the text between the document's lines for `name`; returns False if it lacks them."""
    begin, end = f"<!-- speed:{name} -->", f"<!-- /speed:{name} -->"
    before, found, rest = path.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        print(f"{path} has no line {begin} with {end} after it; add these two.", file=sys.stderr)
        return False
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    return True


def failed(piece: dict) -> bool:
    """Whether a contender of a measured case failed."""
    return any("failed" in row for row in piece["rows"])


def main() -> None:
    """Runs the benchmarks and writes their tables.

    Raises:
      SystemExit: with code 143 if the same command must be given again; with another code but 0 if
        a benchmark failed, or the document has no place for one.
    """
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it works")
    parser.add_argument("--benchmarks", default=",".join(NAMES), help="their names, by commas")
    parser.add_argument("--cases", default="", help="cases with one of these words, by commas")
    parser.add_argument("--limit", type=harness.positive, help="seconds that this command has")
    parser.add_argument("--pieces", type=pathlib.Path, help="default: runs/speed")
    parser.add_argument("--write", type=pathlib.Path, help="default: docs/results.md")
    for name in DATA:
        parser.add_argument(f"--{name}", help="see benchmarks/input_pipeline.py")
    (arguments, flags), well, further, named = parser.parse_known_args(), True, False, []
    folder = arguments.pieces or (None if arguments.quick else ROOT / "runs/speed")
    document = arguments.write or (None if arguments.quick else ROOT / "docs/results.md")
    unknown = set(arguments.benchmarks.split(",")) - set(NAMES)
    if unknown:
        sys.exit(f"--benchmarks has {', '.join(unknown)}; it takes some of {', '.join(NAMES)}.")
    platform = harness.hardware()["platform"]
    for name in arguments.benchmarks.split(","):
        command, cases = [f"benchmarks.{name}"], [""]
        if name == "input_pipeline":
            given = {flag: getattr(arguments, flag) for flag in DATA}
            if arguments.quick or not all(given.values()):
                print(f"{name} is left out: it needs --{', --'.join(DATA)}, and has no --quick.\n")
                continue
            command += [f"--{flag}={value}" for flag, value in given.items()]
        elif arguments.quick:
            command += ["--quick"]
        else:
            cases = list(map(str, importlib.import_module(command[0]).cases(platform)))
        command += flags
        path = folder and folder / f"{name}-{platform}.json"
        kept = json.loads(path.read_text()) if path and path.exists() else {}
        named += (chosen := cases if arguments.quick else harness.having(arguments.cases, cases))
        for case in chosen:
            if arguments.limit and case in kept and not failed(kept[case]):
                continue
            left = arguments.limit and max(begin + arguments.limit - time.monotonic(), 0)
            try:
                found, went_well = run([*command, *([f"--cases={case}"] if case else [])], left)
            except subprocess.TimeoutExpired:
                told = f"{name}, {case}: takes longer than --limit={arguments.limit}."
                sys.exit(stopping.STOPPED if further else told)
            well, further = well and went_well, True
            if found:
                kept[case] = found
            if found and path:
                harness.write_json(path, kept)
            if found and document:
                pieces = [kept[each] for each in cases if each in kept]
                well &= write(document, f"{name}-{platform}", section(command, pieces))
        well &= not any(failed(kept[each]) for each in cases if each in kept)
    if not named:
        sys.exit(f"--cases={arguments.cases} names no case of {arguments.benchmarks}.")
    sys.exit(not well)


if __name__ == "__main__":
    harness.end_by_sigterm()
    main()
