"""What all benchmarks share as commands: their flags, one table, and one JSON line at the end.

How contenders are measured is in `turns.py`.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable

from benchmarks.turns import DISTURBED, Measured
from gptv_jax.hardware import cpu_flags
from gptv_jax.hosts import cores, stopping

VERSIONED = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}  # instructions by the flag in /proc/cpuinfo
TOLD = ("unit", "median", "quartiles")  # of a row, in one cell of the table


def rows(
    case: str, found: dict[str, Measured], work: float, unit: str, base: str = ""
) -> list[dict]:
    """Makes a row of the table for each contender.

    Args:
      case: what was measured.
      found: what `turns.compare` returned.
      work: number of units that one iteration processes.
      unit: name of the unit (tokens, images, ...); the rows give units per second.
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
        idle = {"waiting_cores": each.waiting, "other_cores": each.others}
        made.append(row | {name: cores for name, cores in idle.items() if cores is not None})
    return made


def table(made: list[dict]) -> str:
    """Rows as a Markdown table: case, contender, speed with quartiles, and further numbers."""
    hidden = {"case", "contender", "note", "failed", "waiting_cores", "other_cores", *TOLD}
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
      benchmark: name of the benchmark.
      made: rows of the table.
      more: further entries of the JSON object.

    Raises:
      SystemExit: a contender failed.
    """
    print(table(made))
    ratios: dict[str, dict[str, float]] = {}
    for row in made:
        if "ratio" in row:
            ratios.setdefault(row["case"], {})[row["contender"]] = round(row["ratio"], 3)
    found = {"benchmark": benchmark, "rows": made, "ratios": ratios} | more | facts()
    print(json.dumps(found), flush=True)
    if any("failed" in row for row in made):
        sys.exit(1)


def write_json(path: pathlib.Path, value) -> None:
    """Writes a JSON file, whole or not at all; unlike `gptv_jax.files` without taking a device."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def facts() -> dict:
    """Versions, hardware and date, printed with every table."""
    return {"versions": versions(), "hardware": hardware(), "date": str(datetime.date.today())}


def told(command: list[str], about: dict) -> str:
    """The line above a table: the command, and the hardware, versions and date of `facts`."""
    machine, packages = about["hardware"], about["versions"].items()
    device = "" if machine["platform"] == "cpu" else f"{machine['device']}, "
    vectors = machine.get("vectors", "")  # which results of earlier versions do not name
    size = f"{machine['cores']} cores" + (f", {vectors}" if vectors else "")
    cpu = f"{machine['cpu']} ({size})"
    versions = ", ".join(f"{name} {version}" for name, version in packages if version)
    others = max((row.get("other_cores", 0.0) for row in about.get("rows", ())), default=0.0)
    also = f" Disturbed: other processes used {others:.2f} cores." if others > DISTURBED else ""
    return f"`{shlex.join(command)}`; {device}{cpu}; {versions}; {about['date']}.{also}"


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages `VERSIONED`; None if a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def hardware() -> dict[str, str | int]:
    """The device as JAX names it, and the CPU with its cores and widest vector instructions.

    A process of its own asks JAX and then ends, so that this process does not hold the device.
    """
    asked = "import jax, json; d = jax.devices()[0]; print(json.dumps([d.platform, d.device_kind]))"
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    kind, device = json.loads(told.stdout.splitlines()[-1])
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    words = (cpu_flags() or "").split()
    return {
        "platform": kind,
        "device": device,
        "cpu": cpu or platform.processor(),
        "cores": cores.available(),
        "vectors": next((name for flag, name in VECTORS.items() if flag in words), ""),
    }


def having(words: str, cases: list) -> list:
    """The cases that --cases selects.

    `words` is the whole name of one case, or words separated by commas, of which a case's name must
    have one. Without words, all cases are selected.
    """
    named = [case for case in cases if str(case) == words]
    wanted = [word for word in words.split(",") if word]
    found = [case for case in cases if not wanted or any(word in str(case) for word in wanted)]
    return named or found


def positive(flag: str) -> int:
    """Parses a flag's positive integer.

    Raises:
      argparse.ArgumentTypeError: the text is not a positive integer.
    """
    if not flag.isdecimal() or not int(flag):
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {flag!r}")
    return int(flag)


def seconds(flag: str) -> float:
    """Parses a flag's number of seconds, 0 or more.

    Raises:
      argparse.ArgumentTypeError: the text is not such a number.
    """
    with contextlib.suppress(ValueError):
        if 0 <= float(flag) < math.inf:
            return float(flag)
    raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, not {flag!r}")


def end_by_sigterm() -> None:
    """Makes SIGTERM end this command, by exit code 143, and the processes that it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(stopping.STOPPED))


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
    """Runs a benchmark as a command: reads its flags, measures its cases and prints the report.

    Args:
      benchmark: name of the benchmark.
      description: docstring of the benchmark's module.
      cases: `platform -> cases` that fit the machine; a case's name is its `str`.
      measure: `(case, arguments) -> rows`.
      quick: the cases of --quick.
      rounds: default of --rounds.
      flags: further flags, with the arguments of `add_argument` for each.

    Raises:
      SystemExit: --cases selects no case, or a contender failed.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help="turns that each contender has"
    )
    parser.add_argument("--seconds", type=seconds, default=1.0, help="least seconds of a turn")
    words = "most seconds of a contender's warm-up"
    parser.add_argument("--warm_up", type=seconds, default=60.0, help=words)
    parser.add_argument("--cases", default="", help="cases with one of these words, by commas")
    parser.add_argument("--only", default="", help="these contenders, by commas")
    parser.add_argument("--batch", type=positive, help="batch size, in place of that of the cases")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it works")
    for name, options in (flags or {}).items():
        parser.add_argument(name, **options)
    end_by_sigterm()
    arguments = parser.parse_args()
    every = quick if arguments.quick else cases(hardware()["platform"])
    chosen = having(arguments.cases, every)
    if not chosen:
        sys.exit(f"--cases={arguments.cases} names none of: {'; '.join(map(str, every))}.")
    if arguments.batch:
        chosen = [dataclasses.replace(case, batch=arguments.batch) for case in chosen]
    made = []
    for case in chosen:
        print(f"{benchmark}: {case}", file=sys.stderr, flush=True)
        made += measure(case, arguments)
    report(benchmark, made)
