"""Runs the small documented experiments anew, and says which of their numbers hold.

Command: python -m benchmarks.verify [--only=digits,segment_digits] [--out=runs/verify]
             [--photographs=FOLDER] [--data_dir=TFDS_FOLDER]
         python -m benchmarks.verify --documented    # prints the table of docs/results.md

Each run is the real command in OUT/NAME, with its output in OUT/NAME.log: digits (four minutes on
two quiet cores), detect_digits (six), segment_digits (five), instances_digits (a quarter of an
hour of one core), video_digits (six), video_camera (four; only with --photographs, see
configs/video_camera.py) and digits_distill (four, after digits, its teacher). With --data_dir, the
folder of prepared TFDS sets, there are two runs of CIFAR-10 as well: tokenizer_cifar10 (presumably
twenty minutes) and features_cifar10 (presumably two hours). `documented.py` has all numbers and by
how much each may differ; what depends on the speed of a machine is left out.

A finished run is not repeated: to repeat a run, remove the run's folder or take another --out. A
stopped run goes on where the run was stopped. A number outside its spread, better or worse, does
not hold: the exit code is then 1, as when a run fails. OUT/verify.json has the numbers too.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable

from benchmarks import documented, harness
from benchmarks.documented import RUNS, Number, Run
from benchmarks.turns import ROOT

MODULE = [sys.executable, "-m", "gptv_jax.main"]
NO_NUMBER = "no such number"


def command(name: str, run: Run, out: pathlib.Path, data: dict[str, str | None]) -> list[str]:
    """The command of a run; `data` has the flags that name data."""
    flags = [f"--config={ROOT / 'configs' / run.config}", f"--workdir={out / name}"]
    flags += [f"--stages={run.stages}"] if run.stages else []
    return [*MODULE, *flags, *(each.format(out=out, **data) for each in run.settings)]


def summary_of(folder: pathlib.Path) -> dict:
    """The numbers of a run folder's finished stages."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def finished(run: Run, folder: pathlib.Path) -> bool:
    """Whether the folder has all documented numbers of the run."""
    return {number.key for number in run.numbers} <= summary_of(folder).keys()


def advance(name: str, run: Run, out: pathlib.Path, data: dict[str, str | None]) -> str:
    """Runs a command to its end, unless that was done before; returns what went wrong, or ""."""
    if finished(run, out / name):
        print(f"{name}: finished before, in {out / name}", flush=True)
        return ""
    print(f"{name}: runs; its output is in {out / name}.log", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with (out / f"{name}.log").open("a") as log:
        process = subprocess.Popen(command(name, run, out, data), cwd=ROOT, stdout=log, stderr=log)
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # on which the command saves and ends
            process.wait()
            raise
    print(f"{name}: ended by {code} after {time.perf_counter() - begin:.0f} s", flush=True)
    return f"ended by exit code {code}; see {out / name}.log" if code else ""


def compare(number: Number, summary: dict) -> dict:
    """A row of the table: what was documented, what was found, and whether the number holds."""
    found, wanted = summary.get(number.key), float(number.value)
    row = {"number": number.key, "documented": number.value, "spread": number.spread}
    if not isinstance(found, int | float):
        return row | {"found": None, "verdict": NO_NUMBER}
    beyond = "above" if found > wanted else "below"
    holds = abs(found - wanted) <= number.spread
    return row | {"found": found, "verdict": "holds" if holds else beyond}


def table(rows: Iterable[dict]) -> str:
    """The rows as a Markdown table."""
    lines = ["| run | number | documented | may differ by | found | |", "|---|---|---|---|---|---|"]
    for row in rows:
        found = "" if row["found"] is None else f"{row['found']:.5g}"
        cells = row["run"], f"`{row['number']}`", row["documented"], f"{row['spread']:.2g}", found
        lines.append(f"| {' | '.join(cells)} | {row['verdict']} |")
    return "\n".join(lines)


def chosen(only: str, data: dict[str, str | None]) -> tuple[list[str], list[str]]:
    """Names of the runs to do, each after the run whose weights it reads, and those left out.

    Raises:
      SystemExit: `only` names no run, or one whose data are not given.
    """
    wanted = [name for name in only.split(",") if name] or list(RUNS)
    if unknown := [name for name in wanted if name not in RUNS]:
        sys.exit(f"--only has {', '.join(unknown)}; it takes some of {', '.join(RUNS)}.")
    left = [name for name in wanted if RUNS[name].needs and not data[RUNS[name].needs]]
    if left and only:
        sys.exit(
            f"{left[0]} needs --{RUNS[left[0]].needs}=FOLDER, see configs/{RUNS[left[0]].config}."
        )
    wanted += [RUNS[name].after for name in wanted if RUNS[name].after]
    return [name for name in RUNS if name in wanted and name not in left], left


def main() -> None:
    """Runs and compares.

    Raises:
      SystemExit: with code 1 if a number does not hold or a run failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"some of {', '.join(RUNS)}; default: all")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs/verify")
    parser.add_argument("--photographs", type=pathlib.Path, help="folder for video_camera")
    parser.add_argument("--data_dir", type=pathlib.Path, help="TFDS folder for CIFAR-10")
    parser.add_argument("--documented", action="store_true", help="print the documented numbers")
    arguments = parser.parse_args()
    if arguments.documented:
        print(documented.table())
        return
    harness.end_by_sigterm()
    out, folders = arguments.out.absolute(), ("photographs", "data_dir")
    given = {name: getattr(arguments, name) for name in folders}
    data = {name: str(folder.absolute()) if folder else None for name, folder in given.items()}
    names, left = chosen(arguments.only, data)
    rows, failed = [], {}
    for name in names:
        failed[name] = advance(name, RUNS[name], out, data)
        if not failed[name]:
            summary = summary_of(out / name)
            rows += [{"run": name} | compare(number, summary) for number in RUNS[name].numbers]
        found = {"rows": rows, "failed": {n: why for n, why in failed.items() if why}, "left": left}
        harness.write_json(out / "verify.json", {"benchmark": "verify"} | harness.facts() | found)
    print(f"\n{table(rows)}\n")
    differ = [row for row in rows if row["verdict"] != "holds"]
    print(f"{len(rows) - len(differ)} of {len(rows)} numbers hold.")
    for name, why in found["failed"].items():
        print(f"{name} {why}.")
    for name in left:
        print(f"{name} is left out: it needs --{RUNS[name].needs}=FOLDER.")
    print(json.dumps(found))
    sys.exit(bool(differ or found["failed"]))


if __name__ == "__main__":
    main()
