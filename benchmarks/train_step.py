"""Speed of a train step, beside PyTorch and `transformers`.

Command: python -m benchmarks.train_step [--cases=D256,iGPT-S] [--only=gptv_jax,PyTorch] [--batch=4]

The contenders train the same network on the same batch, which lies on the device: forward,
backward, AdamW. `gptv_jax` is the step of `python -m gptv_jax.main` on one device and in the
case's dtype; on a CPU the command may take a device a core, and float32. The limit is the speed
of a large matrix product in this run, in the faster framework. MFU counts FLOPs as
PaLM does (`model/flops.py`); it is given relative to that limit and to the peak of the data sheet.
Ratios are to eager PyTorch, or to compiled PyTorch where --only leaves out the eager form.
"""

from benchmarks import harness
from benchmarks.ours import network_of
from benchmarks.sizes import IGPT_L, IGPT_M, IGPT_S, LONG, QUICK, SMALL, Case
from benchmarks.turns import Contender, compare, device_a_core
from gptv_jax import hardware
from gptv_jax.model import flops

# How the layers are walked where that is not the default: see `config.Model.scan_layers`.
OTHER_WALK = {
    "cpu": ("scanned", {"scan_layers": True}),
    "gpu": ("unrolled", {"scan_layers": False}),
}
THEIRS = {
    "PyTorch": {"model": "gpt"},
    "PyTorch compiled": {"model": "gpt", "compiled": True},
    "transformers": {"model": "imagegpt"},
}
PRODUCTS = {"JAX matmul": "benchmarks.ours:matmul", "PyTorch matmul": "benchmarks.peers:matmul"}
SIDES = {"cpu": 2048, "gpu": 8192}  # of the matrices whose product is the limit


def cases(platform: str) -> list[Case]:
    """The cases that fit the platform's devices."""
    if platform == "cpu":
        # PyTorch takes a minute for four sequences where the CPU has no products in bfloat16.
        return [Case(LONG, 4), Case(SMALL, 64), Case(LONG, 1, "bfloat16")]
    return [Case(s, b, "bfloat16") for s, b in ((IGPT_S, 16), (IGPT_M, 8), (IGPT_L, 4))]


def measure(case: Case, arguments) -> list[dict]:
    """Measures a case; returns its rows of the table."""
    machine, shared = harness.hardware(), case.asdict()
    side = SIDES[machine["platform"]]
    # On a GPU contenders share its memory: our other walk is measured only if --only names some.
    every = machine["platform"] == "cpu" or arguments.only
    ours = {"gptv_jax": {}} | dict([OTHER_WALK[machine["platform"]]] if every else [])
    product = {"side": side, "dtype": case.dtype}
    contenders = []
    if machine["platform"] == "cpu":
        plain = Contender("gptv_jax", "benchmarks.ours:train", shared)
        contenders += device_a_core(plain, case.batch, machine["cores"])
        if case.dtype != "float32":
            wide = shared | {"dtype": "float32"}
            contenders.append(Contender("gptv_jax float32", "benchmarks.ours:train", wide))
    contenders += [
        *(Contender(n, "benchmarks.ours:train", shared | more) for n, more in ours.items()),
        *(Contender(n, "benchmarks.peers:train", shared | more) for n, more in THEIRS.items()),
        *(Contender(n, factory, product, limit=True) for n, factory in PRODUCTS.items()),
    ]
    found = compare(contenders, arguments)
    products = {name: found.pop(name) for name in PRODUCTS}
    base = next((name for name in ("PyTorch", "PyTorch compiled") if name in found), "")
    rows = harness.rows(str(case), found, case.batch * case.size.tokens, "tokens", base)
    limits = harness.rows(str(case), products, 2 * side**3 / 1e9, "GFLOP")
    reached = max((1e9 * row["median"] for row in limits if "median" in row), default=None)
    known, needed = hardware.of(machine["device"]), flops.training(network_of(case.size)).total
    for row in rows:
        if reached and "median" in row:
            row["mfu"] = row["median"] * needed / reached
        if known and "median" in row:
            row["mfu_of_data_sheet"] = row["median"] * needed / known.peak_flops
    return rows + limits


if __name__ == "__main__":
    harness.main("train_step", __doc__, cases, measure, quick=[QUICK])
