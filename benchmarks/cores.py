"""Speed of a train step with a JAX device for each core of the CPU, beside one device.

Command: python -m benchmarks.cores [--cases=D64] [--rounds=5]

The networks differ in width, tokens and batch size, so that the table shows where splitting the
batch over the cores begins to win. The ratio is that of the round: another program on the machine
disturbs both. `chosen` is the number of devices that `python -m gptv_jax.main` takes by itself.
"""

from benchmarks import harness
from benchmarks.sizes import QUICK, Case, Size
from benchmarks.turns import Contender, compare, device_a_core
from gptv_jax.hosts import cores

# Width, heads, tokens, batch size; two layers compile fast, and all layers cost the same.
GRID = [
    (width, width // 16, tokens, batch)
    for width in (32, 64, 128, 256)
    for tokens, batch in ((64, 16), (64, 64), (256, 8), (256, 32), (1024, 4))
]


def cases(platform: str) -> list[Case]:
    """The networks of the grid; none where the devices are no CPU."""
    made = [Case(Size(w, 2, heads, tokens, 64), batch) for w, heads, tokens, batch in GRID]
    return made if platform == "cpu" else []


def measure(case: Case, arguments) -> list[dict]:
    """Measures a case; returns its rows of the table."""
    one = Contender("one device", "benchmarks.ours:train", case.asdict())
    count = harness.hardware()["cores"]
    found = compare([one, *device_a_core(one, case.batch, count)], arguments)
    made = harness.rows(str(case), found, case.batch * case.size.tokens, "tokens", one.name)
    size = case.size
    chosen = cores.choose(size.width, size.tokens, case.batch, count)
    return [row | {"chosen": chosen} for row in made]


if __name__ == "__main__":
    harness.main("cores", __doc__, cases, measure, quick=[QUICK])
