"""The real train step of iGPT-S, -M, -L and -XL, compiled for TPU slices that need not be there.

Command:   python benchmarks/compiled_plans.py [--only=s] [--write=docs/scaling.md]

Mesh, rematerialisation and microbatches are those that the search finds best and libtpu's compiler
confirms. Prints the table and the same as one JSON line; --write puts the table between the
document's markers. A row takes about a minute on two cores.

The batch is the published one, 128 images and for XL 64, where it can be split over the devices.
XL on four slices of 256 would give each device only a sixteenth of an image: there the batch is
1,024, which is another recipe, and the row says so.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import time

import jax

from gptv_jax import config as config_lib
from gptv_jax.planning import search, topology
from gptv_jax.planning.plan import Plan
from gptv_jax.planning.training import Pretraining

ROOT = pathlib.Path(__file__).parent.parent
# Size, topology, slices, images a step where they are not the published ones.
ROWS = [
    *((size, devices, 1, None) for size in "sml" for devices in ("v5e-16", "v5e-256", "v5p-128")),
    ("xl", "v5p-512", 1, None),
    ("xl", "v5e-256", 4, 1024),
]
BEGIN, END = "<!-- compiled plans -->", "<!-- end of compiled plans -->"
HEAD = (
    "| iGPT | devices | batch | flags `--config.` | memory of a device (by arithmetic) "
    "| step at least "
    "| MFU at most | sent in a step: inside, between slices | days at least |"
)


def config_of(size: str, batch: int | None) -> config_lib.Config:
    """The configuration of configs/imagenet.py; `batch`, if given, also sets the other stages'."""
    spec = importlib.util.spec_from_file_location("imagenet", ROOT / "configs" / "imagenet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = module.get_config(size)
    if batch:
        settings.probe.batch_size = settings.finetune.train.batch_size = batch
        settings.train.batch_size = batch
    return config_lib.resolve(settings)


def row(size: str, name: str, found: Plan) -> str:
    """A plan's line of the table."""
    numbers = found.numbers()
    slices = f"{found.topology.slices} x " if found.topology.slices > 1 else ""
    flags = " ".join(flag.removeprefix("--config.") for flag in found.flags)
    used, there, guessed = (
        f"{size / 2**30:.1f}"
        for size in (found.bytes_per_device, found.topology.memory_bytes, found.memory.total)
    )
    memory = f"{used} of {there} GiB ({guessed})"
    sent = [sum(each[way] for each in numbers["collectives"]) for way in ("inside", "between")]
    cells = [
        size.upper(),
        f"{slices}{name} ({found.topology.count} devices)",
        str(found.training.train.batch_size),
        f"`{flags}`",
        memory + ("" if found.fits else ", does not fit"),
        f"{1e3 * found.step_seconds:.1f} ms",
        f"{found.mfu:.0%}",
        ", ".join(f"{size_ / 2**30:.2f} GiB" for size_ in sent),
        f"{numbers['days']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def write(path: pathlib.Path, text: str) -> None:
    """Puts the text between the document's markers."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{path} has no {BEGIN} with {END} after it; add these two lines.")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main():
    """Plans every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="rows of this size: s, m, l or xl")
    parser.add_argument("--write", type=pathlib.Path, help="document with the markers")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    wanted = [each for each in ROWS if arguments.only in (None, each[0])]
    lines, records = [HEAD, "|---" * HEAD.count(" | ") + "|---|"], []
    for i, (size, name, slices, batch) in enumerate(wanted):
        begin = time.perf_counter()
        config = config_of(size, batch)
        found = search.search(Pretraining(config), topology.parse(name, slices), wanted=1)[0]
        lines.append(row(size, name, found))
        spent = time.perf_counter() - begin
        records.append({"size": size, **found.numbers(), "planning_seconds": round(spent, 1)})
        done = f"{i + 1}/{len(wanted)}  iGPT-{size.upper()} on {slices} x {name}"
        print(f"{done}  {spent:.0f} s", file=sys.stderr, flush=True)
    versions = f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
    lines += ["", f"Made by `benchmarks/compiled_plans.py` on {datetime.date.today()}, {versions}."]
    text = "\n".join(lines)
    print(text)
    print(json.dumps({"benchmark": "compiled_plans", "jax": jax.__version__, "rows": records}))
    if arguments.write:
        write(arguments.write, text)


if __name__ == "__main__":
    main()
