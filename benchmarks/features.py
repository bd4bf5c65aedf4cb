"""Speed of reading features of all layers, beside a PyTorch model with forward hooks.

Command: python -m benchmarks.features [--cases=D256] [--batch=16]

Features are means over positions of every layer's normed input. Further rows have the features of
all layers added to the moments of a ridge regression, as the probe does (`ridge`), and the features
of the last layer alone, with which the others' costs are compared.
"""

from benchmarks import harness
from benchmarks.sizes import IGPT_S, LONG, QUICK, SMALL, Case
from benchmarks.turns import Contender, compare, device_a_core

OURS = {"gptv_jax": "all", "gptv_jax ridge": "ridge", "gptv_jax last layer": "last"}
THEIRS = {"PyTorch": {}, "PyTorch compiled": {"compiled": True}}


def cases(platform: str) -> list[Case]:
    """The cases that fit the platform's devices."""
    if platform == "cpu":
        return [Case(LONG, 16, "float32"), Case(SMALL, 16, "float32")]
    return [Case(IGPT_S, 64, "bfloat16")]


def measure(case: Case, arguments) -> list[dict]:
    """Measures a case; returns its rows of the table."""
    shared = case.asdict()
    contenders = [
        *(Contender(n, "benchmarks.ours:read", shared | {"what": w}) for n, w in OURS.items()),
        *(Contender(n, "benchmarks.peers:read", shared | more) for n, more in THEIRS.items()),
    ]
    machine = harness.hardware()
    if machine["platform"] == "cpu":
        contenders += device_a_core(contenders[0], case.batch, machine["cores"])
    found = compare(contenders, arguments)
    rows = harness.rows(str(case), found, case.batch, "images", "PyTorch")
    last = found.get("gptv_jax last layer")
    for row in rows:
        if last and last.seconds and row["contender"] in OURS:
            row["cost_over_last_layer"] = 1 / found[row["contender"]].times_as_fast_as(last)
    return rows


if __name__ == "__main__":
    harness.main("features", __doc__, cases, measure, quick=[QUICK])
