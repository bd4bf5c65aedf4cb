"""How time and memory of a train step grow with layers, width, tokens, batch and devices.

Command: python -m benchmarks.growth [--cases=layers,width,tokens,batch,devices] [--rounds=5]

Each case varies one size. Every point is a train step of pretraining: its time by the clock, and in
`processor seconds` the processor time of all threads, which other programs disturb less. Memory
is the bytes of the train state and the batch, and the growth of the process in a step, by the
kernel; `planned MiB` is what `gptv_jax.plan` computes by arithmetic, and GFLOP what a step executes
by `model/flops.py`. Devices are simulated: they share this machine's cores and memory, split
weights and batch (`mesh.fsdp`), and the batch grows with them. Their memory is that of one device.

The last rows of a size have the exponents b of size ** b: over all points (least squares of the
logarithms) and over the last two, the exponent of the time beside the exponent of the FLOPs, and
the exponent of the memory beside the exponent of the planned memory. Below the expected exponent,
small steps cost more than their share. An exponent of the last two points that is more than EXCESS
above the expected one has a note: growth without a reason.
"""

import argparse
import dataclasses
import math
import pathlib

import jax
import numpy as np

from benchmarks import harness
from benchmarks.turns import Contender, compare
from benchmarks.worker import Task
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.planning import compiled, plan, topology
from gptv_jax.planning.training import Pretraining

EXCESS = 0.15
MIB = 2**20
HEAD_SIZE, COLORS = 32, 512
STATUS = pathlib.Path("/proc/self/status")
# With this variable glibc takes the memory of each large buffer from the system and gives it back
# when the buffer is freed, so the process grows by what a step needs; `runtime.keep_memory` then
# changes nothing.
BY_BUFFER = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclasses.dataclass(frozen=True)
class Point:
    """The sizes of a train step."""

    layers: int = 4
    width: int = 128
    tokens: int = 256  # a square number
    batch: int = 8  # of one device
    devices: int = 1

    @property
    def training(self) -> Pretraining:
        """The pretraining of this size, on all devices together."""
        model = config_lib.Model(self.layers, self.width, max(self.width // HEAD_SIZE, 1))
        return Pretraining(
            config_lib.Config(
                model=model,
                mesh=config_lib.Mesh(data=1, fsdp=self.devices),
                tokens=config_lib.Tokens(kind="palette", colors=COLORS),
                data=config_lib.Data(image_size=math.isqrt(self.tokens)),
                train=config_lib.Train(batch_size=self.batch * self.devices),
            )
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """A size that is varied: a field of `Point`."""

    axis: str
    values: tuple[int, ...]
    base: Point = Point()

    def __str__(self) -> str:
        return self.axis

    @property
    def points(self) -> dict[int, Point]:
        return {
            value: dataclasses.replace(self.base, **{self.axis: value}) for value in self.values
        }


def cases(platform: str) -> list[Case]:
    """All sizes; on a CPU alone, as the process's memory does not include a GPU's memory."""
    if platform != "cpu":
        return []
    return [
        Case("layers", (2, 4, 8, 16)),
        Case("width", (64, 128, 256, 512)),
        Case("tokens", (64, 256, 1024, 4096), Point(batch=2)),
        Case("batch", (2, 4, 8, 16, 32)),
        Case("devices", (1, 2, 4, 8), Point(batch=4)),
    ]


def train(point: dict, memory: bool = False) -> Task:
    """Train steps of a point; its facts are FLOPs and planned bytes, with `memory` measured ones.

    Bytes and FLOPs are those of all devices together.
    """
    sizes = Point(**point)
    training = sizes.training
    planned = plan.make(training, topology.parse(f"cpu:{sizes.devices}"), compiling=False)
    facts = {"planned": planned.memory.total * sizes.devices, "flops": planned.executed}
    mesh = sharding.make_mesh(training.config.mesh, jax.devices()[: sizes.devices])
    jax.set_mesh(mesh)
    state = jax.jit(training.init)(jax.random.key(0))
    step = compiled.program(training, mesh)
    shape, rng = (training.train.batch_size, sizes.tokens), np.random.default_rng(0)
    tokens = rng.integers(COLORS, size=shape, dtype=np.int32)
    batch = sharding.global_batch({"tokens": tokens, "variant": np.zeros(shape[0], np.int32)})
    metrics = None

    def advance():
        nonlocal state, metrics
        state, metrics = step(state, batch, None)
        return metrics

    if memory:
        held = sum(x.nbytes for x in jax.tree.leaves((state, batch)))
        grown = [growth_of(lambda: jax.block_until_ready((advance(), state))) for _ in range(3)]
        facts["measured"] = held + max(grown)
    return Task(advance, jax.block_until_ready, facts)


def growth_of(function) -> int:
    """Bytes that the process grows by, at most, while the function runs."""
    STATUS.with_name("clear_refs").write_text("5")  # the peak, VmHWM, becomes the present size
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = STATUS.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measure(case: Case, arguments: argparse.Namespace) -> list[dict]:
    """Measures a case; returns its rows of the table."""
    points = {str(value): point for value, point in case.points.items()}
    of_time, of_memory = [], []
    for name, point in points.items():
        devices = {"JAX_NUM_CPU_DEVICES": str(point.devices)}
        given = {"point": dataclasses.asdict(point)}
        of_time.append(Contender(name, "benchmarks.growth:train", given, devices))
        more = given | {"memory": True}, devices | BY_BUFFER
        of_memory.append(Contender(name, "benchmarks.growth:train", *more))
    found = compare(of_time, arguments)
    once = argparse.Namespace(rounds=1, seconds=0.0, warm_up=0.0, only=arguments.only)
    for name, measured in compare(of_memory, once).items():
        known = dataclasses.replace(found[name], facts=measured.facts)
        found[name] = measured if measured.note else known
    rows = harness.rows(str(case), found, 1, "steps")
    for row in rows:
        if "median" in row:
            row |= numbers(found[row["contender"]], points[row["contender"]].devices)
    measured = [row for row in rows if "median" in row]
    return rows + exponents(case, measured) if len(measured) > 1 else rows


def numbers(measured, devices: int) -> dict:
    """The numbers of a row: seconds of a step, memory of a device, FLOPs of all devices."""
    low, median, high = np.quantile(measured.seconds, [0.25, 0.5, 0.75]).tolist()
    facts = measured.facts
    return {
        "unit": "s",
        "median": median,
        "quartiles": [low, high],
        "processor_seconds": float(np.median(measured.processor)),
        "GFLOP": facts["flops"] / 1e9,
        "MiB": facts["measured"] / devices / MIB,
        "planned_MiB": facts["planned"] / devices / MIB,
    }


def exponents(case: Case, rows: list[dict]) -> list[dict]:
    """Two rows: the exponents of all points, and of the last two."""
    made = []
    for name, some in (("all", rows), ("last two", rows[-2:])):
        sizes = [int(row["contender"]) for row in some]
        found = {
            key: exponent(sizes, [row[key] for row in some])
            for key in ("median", "processor_seconds", "GFLOP", "MiB", "planned_MiB")
        }
        note = f"exponent {found.pop('median'):.2f}"
        if name == "last two":
            # Another program that was busy can only lengthen the time of the clock.
            over = found["processor_seconds"] - found["GFLOP"], found["MiB"] - found["planned_MiB"]
            names = ("time", "memory")
            above = [n for n, more in zip(names, over, strict=True) if more > EXCESS]
            note += f"; {' and '.join(above)} above what is expected" if above else ""
        made.append({"case": str(case), "contender": f"exponent, {name}", "note": note, **found})
    return made


def exponent(sizes: list[int], values: list[float]) -> float:
    """The b of the closest value = a size ** b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


if __name__ == "__main__":
    quick = [Case("layers", (1, 2), Point(width=32, tokens=16, batch=2))]
    harness.main("growth", __doc__, cases, measure, quick=quick, rounds=3)
