"""From which network on a CPU trains faster as one JAX device a core than as one device.

Command: python -m benchmarks.split_cpu [--cases=D64,T64] [--rounds=15]

The contenders are the train step of `python -m gptv_jax.main`, in float32 with AdamW, on one device
and on a device a core. Networks have six layers and heads of 32 activations (width 48: one head of
48); widths grow from 32 to 384, and a step has 1,024 or 4,096 tokens. `gptv_jax/hosts/cores.py`
decides by the ratios of this benchmark on two cores. Where another program uses the cores, a device
a core can lose where it gains on a quiet machine.
"""

from benchmarks import harness
from benchmarks.sizes import QUICK, Case, Size
from benchmarks.turns import Contender, compare, device_a_core

WIDTHS = (32, 48, 64, 96, 128, 256, 384)
STEPS = ((64, 64), (64, 16), (1024, 4))  # tokens and examples of a step


def cases(platform: str) -> list[Case]:
    """The networks and steps; an accelerator is not split, and has none."""
    every = [Case(size(width, tokens), batch) for tokens, batch in STEPS for width in WIDTHS]
    return every if platform == "cpu" else []


def size(width: int, tokens: int) -> Size:
    """The network of a width, with a vocabulary of 512."""
    return Size(width=width, layers=6, heads=width // 32, tokens=tokens, vocabulary=512)


def measure(case: Case, arguments) -> list[dict]:
    """Measures a case; returns its rows of the table, whose ratios are to one device."""
    one = Contender("one device", "benchmarks.ours:train", case.asdict())
    split = device_a_core(one, case.batch, harness.hardware()["cores"])
    found = compare([one, *split], arguments)
    return harness.rows(str(case), found, case.batch * case.size.tokens, "tokens", one.name)


if __name__ == "__main__":
    harness.main("split_cpu", __doc__, cases, measure, quick=[QUICK])
