"""Speed of cached decoding, beside PyTorch and `transformers`' `generate`, each with a cache.

Command: python -m benchmarks.decode [--tokens=256] [--batch=16] [--run=RUN --draft=RUN]

All contenders begin with the start token and draw from the whole vocabulary. The limit is the
speed at which a step would read its bytes (every weight once, and the part of the cache that has
been written) at the bandwidth that a copy of a large array reaches in the same run.

Further rows compare the cost of a token in longer sequences with that in a sequence of 256 tokens:
the first 256 tokens of a sequence of 4,096, where only the table of positions is longer, since the
cache grows with the drawn tokens; and a whole sequence of 1,024, whose cache is longer.

With two run folders, --run and a smaller network --draft, speculative sampling (`decode/
speculative.py`) is measured beside plain decoding, at batch sizes 1 and 16 and with several numbers
of proposed tokens; only trained networks show how many of these are accepted.
"""

import dataclasses
import math

from benchmarks import harness
from benchmarks.ours import network_of
from benchmarks.sizes import IGPT_L, IGPT_M, IGPT_S, LONG, QUICK, Case, Size
from benchmarks.turns import Contender, compare, device_a_core
from gptv_jax.model import flops

PROPOSED = (2, 4, 8)  # tokens of a draft for each pass
BYTES = {"float32": 4, "bfloat16": 2}
COPIED = 2**28  # bytes; far beyond any cache of a processor
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # small products may be faster so
THEIRS = {"PyTorch": {"model": "gpt"}, "transformers": {"model": "imagegpt"}}
WHOLE, LONGER = 4, 16  # times the short sequence
GROWN = (LONG, IGPT_S, QUICK.size)  # whose growth is measured; larger ones may lack the memory


@dataclasses.dataclass(frozen=True)
class Pair:
    """Images that the networks of --run and --draft draw at a time."""

    batch: int

    def __str__(self) -> str:
        return f"speculative B{self.batch}"


def cases(platform: str) -> list[Case | Pair]:
    """The cases that fit the platform's devices."""
    pairs = [Pair(1), Pair(16)]
    if platform == "cpu":
        return [Case(LONG, 16, "float32"), *pairs]
    return [*(Case(size, 256, "bfloat16") for size in (IGPT_S, IGPT_M, IGPT_L)), *pairs]


def speculate(pair: Pair, arguments) -> list[dict]:
    """Rows of plain decoding and of speculative sampling; none without the two run folders."""
    if not (arguments.run and arguments.draft):
        return []
    plain = {"run": arguments.run, "batch": pair.batch}
    drafts = {f"draft of {n}": plain | {"draft": arguments.draft, "count": n} for n in PROPOSED}
    contenders = [
        Contender(name, "benchmarks.ours:sample", each)
        for name, each in {"plain": plain, **drafts}.items()
    ]
    found = compare(contenders, arguments)
    tokens = next((each.facts["tokens"] for each in found.values() if each.facts), 0)
    rows = harness.rows(str(pair), found, pair.batch * tokens, "tokens", "plain")
    for row in rows:
        if passes := found[row["contender"]].facts.get("passes"):
            row["tokens_per_pass"] = pair.batch * tokens / passes
    return rows


def measure(case: Case | Pair, arguments) -> list[dict]:
    """Measures a case; returns its rows of the table."""
    if isinstance(case, Pair):
        return speculate(case, arguments)
    count = min(arguments.tokens, case.size.tokens)
    told, drawn = f"{case}, {count} tokens", case.asdict() | {"count": count}
    contenders = [
        Contender("gptv_jax", "benchmarks.ours:generate", drawn),
        *(Contender(n, "benchmarks.peers:generate", drawn | more) for n, more in THEIRS.items()),
        Contender("copy", "benchmarks.ours:copy", {"size": COPIED}, limit=True),
    ]
    machine = harness.hardware()
    if machine["platform"] == "cpu":
        contenders += device_a_core(contenders[0], case.batch, machine["cores"])
        for name, more in THEIRS.items():
            alone = f"{name} 1 thread", "benchmarks.peers:generate", drawn | more, ONE_THREAD
            contenders.append(Contender(*alone))
    found = compare(contenders, arguments)
    copy = {"copy": found.pop("copy")}
    rows = harness.rows(told, found, case.batch * count, "tokens", "transformers")
    (bandwidth,) = harness.rows(told, copy, 2 * COPIED / 1e9, "GB")
    if "median" in bandwidth:
        step = bytes_read(case.size, case.batch, BYTES[case.dtype], count)
        for row in rows:
            if "median" in row:
                row["of_limit"] = row["median"] * step / (1e9 * bandwidth["median"] * case.batch)
    grown = case.size in GROWN and not arguments.only
    return [*rows, bandwidth, *(growth(case, arguments) if grown else [])]


def bytes_read(size: Size, batch: int, width: int, count: int) -> float:
    """Bytes that a step must read, on average over the first `count` steps of a sequence.

    Args:
      size: the network's size.
      batch: number of sequences.
      width: bytes of a number.
      count: number of steps.
    """
    weights = flops.forward(network_of(size))["matmul"] // 2
    cached = 2 * size.layers * size.width * batch * (count + 1) / 2
    return width * (weights + cached)


def growth(case: Case, arguments) -> list[dict]:
    """Rows for longer sequences: speed in tokens per second, and the cost of a token."""
    short = math.isqrt(min(arguments.tokens, case.size.tokens)) ** 2
    drawn = {}
    for count, tokens in ((short, 1), (short, LONGER), (short * WHOLE, WHOLE)):
        size = dataclasses.replace(case.size, tokens=short * tokens)
        longer = dataclasses.replace(case, size=size).asdict() | {"count": count}
        drawn[f"first {count:,} of {size.tokens:,}"] = longer
    contenders = [Contender(n, "benchmarks.ours:generate", each) for n, each in drawn.items()]
    found = compare(contenders, arguments)
    for name, each in found.items():  # scaled to the number of tokens of the short one
        seconds = tuple(spent * short / drawn[name]["count"] for spent in each.seconds)
        found[name] = dataclasses.replace(each, seconds=seconds)
    base = contenders[0].name
    rows = harness.rows(f"{case}, growth", found, case.batch * short, "tokens", base)
    for row in rows:
        if "ratio" in row:
            row["cost"] = 1 / row["ratio"]
    return rows


COUNT = {"type": harness.positive, "default": 256, "help": "that are drawn of each sequence"}

if __name__ == "__main__":
    runs = {"--run": {"help": "run folder of a network"}, "--draft": {"help": "of its draft"}}
    harness.main(
        "decode", __doc__, cases, measure, quick=[QUICK], flags={"--tokens": COUNT, **runs}
    )
