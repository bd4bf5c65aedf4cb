"""Every benchmark of speed that fits this machine, one after the other, into docs/results.md.

Command: python -m benchmarks.all [--quick] [--benchmarks=train_step,decode] [--write=FILE]
             [--cifar10=DIR --jpegs=FOLDER --palette=kmeans_centers.npy]

The table of benchmark NAME is put between the document's lines `<!-- speed:NAME-cpu -->` and
`<!-- /speed:NAME-cpu -->` (or -gpu), with its command, hardware and date. --quick writes nothing.
The three last flags are what the input pipeline reads; without them it is left out.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import time

from benchmarks import harness
from benchmarks.turns import ROOT

NAMES = ("train_step", "decode", "features", "attention", "startup", "input_pipeline")
DATA = ("cifar10", "jpegs", "palette")  # flags of the input pipeline


def run(command: list[str]) -> tuple[dict | None, bool]:
    """What a benchmark told as its last line, or None, and whether all of it went well."""
    ended = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    print(ended.stdout, flush=True)
    try:
        return json.loads(ended.stdout.splitlines()[-1]), ended.returncode == 0
    except (IndexError, json.JSONDecodeError):
        return None, False


def section(command: list[str], found: dict) -> str:
    """What the document says of a benchmark."""
    hardware, versions = found["hardware"], found["versions"]
    device = "" if hardware["platform"] == "cpu" else f"{hardware['device']}, "
    packages = ", ".join(f"{n} {v}" for n, v in versions.items() if v)
    machine = f"{device}{hardware['cpu']} ({hardware['cores']} cores)"
    told = f"`{shlex.join(command)}`; {machine}; {packages}; {found['date']}."
    return f"{told}\n\n{harness.table(found['rows'])}"


def write(path: pathlib.Path, name: str, text: str) -> bool:
    """Puts the text between the document's lines for `name`; whether it has them."""
    begin, end = f"<!-- speed:{name} -->", f"<!-- /speed:{name} -->"
    before, found, rest = path.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        print(f"{path} has no line {begin} with {end} after it; add these two.", file=sys.stderr)
        return False
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    return True


def main() -> None:
    """Runs and writes.

    Raises:
      SystemExit: a benchmark failed, or the document has no place for one.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it works")
    parser.add_argument("--benchmarks", default=",".join(NAMES), help="these, by commas")
    parser.add_argument("--write", type=pathlib.Path, default=ROOT / "docs/results.md")
    for name in DATA:
        parser.add_argument(f"--{name}", help="see benchmarks/input_pipeline.py")
    arguments, well = parser.parse_args(), True
    unknown = set(arguments.benchmarks.split(",")) - set(NAMES)
    if unknown:
        sys.exit(f"--benchmarks has {', '.join(unknown)}; it takes some of {', '.join(NAMES)}.")
    for name in arguments.benchmarks.split(","):
        command = ["python", "-m", f"benchmarks.{name}"]
        if name == "input_pipeline":
            given = {flag: getattr(arguments, flag) for flag in DATA}
            if arguments.quick or not all(given.values()):
                print(f"{name} is left out: it needs --{', --'.join(DATA)}, and has no --quick.\n")
                continue
            command += [f"--{flag}={value}" for flag, value in given.items()]
        elif arguments.quick:
            command += ["--quick"]
        print(f"{shlex.join(command)}", flush=True)
        begin = time.perf_counter()
        found, went_well = run(command)
        print(f"{name}: {time.perf_counter() - begin:.0f} s\n", flush=True)
        well &= went_well
        if found and not arguments.quick:
            place = f"{name}-{found['hardware']['platform']}"
            well &= write(arguments.write, place, section(command, found))
    sys.exit(not well)


if __name__ == "__main__":
    main()
