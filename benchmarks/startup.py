"""Seconds from the start of the real command to the end of its first training step.

Command: python -m benchmarks.startup [--cases=digits] [--rounds=3]

Each round starts `python -m gptv_jax.main` twice in new run folders: with an empty compilation
cache, and with the programs that the first start left in it. The batch is small, so that the step
itself takes little of the time; CIFAR-10's images and palette are random, so no data are needed.
"""

import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import harness
from benchmarks.turns import ROOT
from gptv_jax.hosts import runtime

LIMIT = 300  # seconds after which a start is given up
EMPTY, WARM = "empty cache", "warm cache"
# What `python -m gptv_jax.main` does, with an ear for what JAX tells of its compilations.
START = (
    "import runpy, sys; from benchmarks import startup; startup.listen(sys.argv.pop(1)); "
    "runpy.run_module('gptv_jax.main', run_name='__main__', alter_sys=True)"
)
COMPILED = {  # what JAX calls the parts of a compilation
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace",
    "/jax/core/compile/backend_compile_duration": "compile",
}
PARTS = ("imports", "set_up", "trace", "compile", "first_step")


@dataclasses.dataclass(frozen=True)
class Case:
    """The configuration and batch size of the command that is started."""

    config: str
    batch: int

    def __str__(self) -> str:
        return f"{self.config} B{self.batch}"


def cases(platform: str) -> list[Case]:
    """The commands to start; they do not depend on the platform."""
    return [Case("digits.py", 4), Case("cifar10.py:10m", 1)]


def measure(case: Case, arguments) -> list[dict]:
    """Measures a case; returns its rows of the table."""
    found: dict[str, list[dict[str, float]]] = {EMPTY: [], WARM: []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for cache in (EMPTY, WARM):
                found[cache].append(start(case, pathlib.Path(folder), cache.replace(" ", "_")))
    totals = {cache: np.array([sum(each.values()) for each in found[cache]]) for cache in found}
    rows = []
    for cache, total in totals.items():
        low, median, high = np.quantile(total, [0.25, 0.5, 0.75]).tolist()
        parts = {p: float(np.median([each[p] for each in found[cache]])) for p in PARTS}
        row = {"case": str(case), "contender": cache, "unit": "s", "median": median}
        ratio = float(np.median(totals[EMPTY] / total))
        rows.append(row | {"quartiles": [low, high], "ratio": ratio, **parts})
    return rows


def start(case: Case, folder: pathlib.Path, name: str) -> dict[str, float]:
    """Seconds of each part of a start; the command is killed when its first step is done.

    Args:
      case: the command to start.
      folder: folder for the compilation cache and all runs.
      name: name of this run.

    Raises:
      RuntimeError: the command ended without a step, or takes too long.
    """
    workdir, marks, log = (folder / f"{name}{kind}" for kind in ("", ".marks", ".log"))
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    flags = [f"--config={ROOT / 'configs' / case.config}", f"--workdir={workdir}"]
    settings = {"batch_size": case.batch, "log_every": 1, "eval_every": 0}
    flags += [f"--config.train.{key}={value}" for key, value in settings.items()]
    if case.config.startswith("cifar10"):
        flags += [f"--config.{key}={value}" for key, value in random_data(folder).items()]
    began = time.time()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", START, marks, *flags],
            env=os.environ | cache,
            stdout=output,
            stderr=output,
        )
    try:
        while (stepped := first_step(workdir / "metrics.jsonl")) is None:
            if process.poll() is not None or time.time() > began + LIMIT:
                raise RuntimeError(f"{case} made no step: {log.read_text()[-3000:]}")
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return parts_of([json.loads(line) for line in marks.read_text().splitlines()], began, stepped)


def parts_of(marks: list[dict], began: float, stepped: float) -> dict[str, float]:
    """Seconds of each of PARTS, from the marks that `listen` wrote."""
    imported, *compiled = marks
    spent = {"trace": 0.0, "compile": 0.0}
    for each in compiled:
        spent[each["part"]] += each["seconds"]
    traced = compiled[0]["time"] - compiled[0]["seconds"]
    return {
        "imports": imported["time"] - began,
        "set_up": traced - imported["time"],
        **spent,
        "first_step": stepped - traced - sum(spent.values()),
    }


def listen(path: str) -> None:
    """Imports what the command imports to open a run, then records the train step's compilation."""
    runtime.keep_memory()
    gc.disable()  # as the command does while it imports
    from jax import monitoring

    from gptv_jax import command  # noqa: F401
    from gptv_jax.stages import run  # noqa: F401

    gc.freeze()
    gc.enable()

    def write(part: str, seconds: float) -> None:
        with open(path, "a") as file:
            file.write(json.dumps({"part": part, "seconds": seconds, "time": time.time()}) + "\n")

    def heard(event: str, seconds: float, fun_name: str = "", **_) -> None:
        if event in COMPILED and "train_step" in fun_name:
            write(COMPILED[event], seconds)

    write("imports", 0.0)
    monitoring.register_event_duration_secs_listener(heard)


def first_step(path: pathlib.Path) -> float | None:
    """Time of the first step's entry in the log, in seconds since 1970; None: not yet there."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        return next((event["time"] for event in events if event["step"] == 1), None)
    return None


def random_data(folder: pathlib.Path) -> dict[str, str]:
    """Writes random images and a palette into the folder; returns the settings that name them."""
    rng, data, palette = np.random.default_rng(0), folder / "noise.npz", folder / "palette.npy"
    if not data.exists():
        splits = {}
        for split in ("train", "test"):
            splits[f"{split}_images"] = rng.integers(256, size=(1000, 32, 32, 3), dtype=np.uint8)
            splits[f"{split}_labels"] = rng.integers(10, size=1000, dtype=np.int32)
        np.savez(data, **splits)
        np.save(palette, rng.uniform(-1, 1, (512, 3)).astype(np.float32))
    return {"data.name": "arrays", "data.path": str(data), "tokens.palette": str(palette)}


if __name__ == "__main__":
    harness.main("startup", __doc__, cases, measure, quick=[Case("digits.py", 4)], rounds=3)
