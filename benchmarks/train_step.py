"""Speed of a train step, beside PyTorch and `transformers`.

Command: python -m benchmarks.train_step [--cases=D256] [--only=gptv_jax,PyTorch] [--batch=4]

The contenders train the same network on the same batch, which lies on the device: forward,
backward, AdamW. `gptv_jax` is the step of `python -m gptv_jax.main`. Its limit is what a large
matrix product reaches in the same run, of either framework the faster; MFU counts FLOPs as PaLM
does (`model/flops.py`), beside that limit and beside the data sheet.
"""

import dataclasses

from benchmarks import harness
from benchmarks.harness import Contender
from benchmarks.ours import network_of
from benchmarks.sizes import IGPT, LONG, QUICK, SMALL, Size
from gptv_jax import hardware
from gptv_jax.model import flops

OURS = {"gptv_jax": {}, "scanned": {"scan_layers": True}, "unrolled": {"scan_layers": False}}
THEIRS = {
    "PyTorch": {"model": "gpt"},
    "PyTorch compiled": {"model": "gpt", "compiled": True},
    "transformers": {"model": "imagegpt"},
}
BASE = "PyTorch"
LIMITS = ("JAX matmul", "PyTorch matmul")
SIDES = {"cpu": 2048, "gpu": 8192}  # of the matrices whose product is the limit


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained."""

    size: Size
    batch: int
    dtype: str


def cases(platform: str, quick: bool) -> dict[str, Case]:
    """By name, those that fit the machine."""
    if quick:
        found = [("", Case(QUICK, 2, "float32"))]
    elif platform == "cpu":
        dtypes = ("float32", "bfloat16")
        found = [("", Case(s, b, d)) for s, b in ((LONG, 4), (SMALL, 64)) for d in dtypes]
    else:
        batches = zip(IGPT.items(), (32, 16, 4), strict=True)
        found = [(f"{name} ", Case(s, b, "bfloat16")) for (name, s), b in batches]
    return {f"{name}{c.size} B{c.batch} {c.dtype}": c for name, c in found}


def contenders(case: Case, side: int) -> list[Contender]:
    """Of this project, of PyTorch, and the limits."""
    shared = {"size": case.size.asdict(), "batch": case.batch, "dtype": case.dtype}
    product = {"side": side, "dtype": case.dtype}
    return [
        *(Contender(n, "benchmarks.ours:train", shared | more) for n, more in OURS.items()),
        *(Contender(n, "benchmarks.peers:train", shared | more) for n, more in THEIRS.items()),
        Contender(LIMITS[0], "benchmarks.ours:matmul", product),
        Contender(LIMITS[1], "benchmarks.peers:matmul", product),
    ]


def measure(name: str, case: Case, arguments, machine: dict) -> list[dict]:
    """The rows of a case."""
    side = SIDES[machine["platform"]]
    wanted = arguments.only.split(",") if arguments.only else [*OURS, *THEIRS]
    chosen = [c for c in contenders(case, side) if c.name in (*wanted, *LIMITS)]
    found = harness.compare(chosen, arguments.rounds, arguments.seconds)
    limits = {limit: found.pop(limit) for limit in LIMITS}
    rows = harness.rows(name, found, case.batch * case.size.tokens, "tokens", BASE)
    products = harness.rows(name, limits, 2 * side**3 / 1e9, "GFLOP", "")
    reached = max((1e9 * row["median"] for row in products if "median" in row), default=None)
    known = hardware.of(machine["device"])
    needed = flops.training(network_of(case.size)).total
    for row in rows:
        if reached and "median" in row:
            row["mfu"] = row["median"] * needed / reached
        if known and "median" in row:
            row["mfu_of_data_sheet"] = row["median"] * needed / known.peak_flops
    return rows + products


def main() -> None:
    """Measures every case."""
    parser = harness.parser(__doc__)
    parser.add_argument("--only", default="", help="these contenders, by commas")
    parser.add_argument("--batch", type=int, help="sequences, in place of each case's own")
    arguments, machine = parser.parse_args(), harness.hardware()
    rows = []
    found = harness.chosen(cases(machine["platform"], arguments.quick), arguments.cases)
    for name, case in found.items():
        if arguments.batch:
            name = name.replace(f" B{case.batch} ", f" B{arguments.batch} ")
            case = dataclasses.replace(case, batch=arguments.batch)
        rows += measure(name, case, arguments, machine)
    harness.report("train_step", rows)


if __name__ == "__main__":
    main()
