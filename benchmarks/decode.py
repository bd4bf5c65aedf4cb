"""Speed of cached decoding, beside `transformers`' `generate` with its cache.

Command: python -m benchmarks.decode [--tokens=256] [--batch=16]

Both draw from nothing but the start token, among all of the vocabulary. The limit is the bytes
that a token must read, every weight once a step and of the cache what has been written, over the
bandwidth that a copy of a large array reaches in the same run. Then the growth of the cost: the
first tokens of a short sequence, and as many of a long one, whose cache has room for all of it.
"""

import dataclasses
import math

from benchmarks import harness
from benchmarks.ours import network_of
from benchmarks.sizes import IGPT_S, LONG, QUICK, Case, Size
from benchmarks.turns import Contender, compare
from gptv_jax.model import flops

BYTES = {"float32": 4, "bfloat16": 2}
COPIED = 2**28  # bytes; far beyond any cache of a processor
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # small products may be faster so
LONGER = 16  # times the short sequence


def cases(platform: str) -> list[Case]:
    """Those that fit the machine."""
    return [Case(LONG, 16, "float32") if platform == "cpu" else Case(IGPT_S, 256, "bfloat16")]


def measure(case: Case, arguments) -> list[dict]:
    """The rows of a case."""
    count = min(arguments.tokens, case.size.tokens)
    name, drawn = f"{case}, {count} tokens", case.asdict() | {"count": count}
    contenders = [
        Contender("gptv_jax", "benchmarks.ours:generate", drawn),
        Contender("transformers", "benchmarks.peers:generate", drawn),
        Contender("transformers 1 thread", "benchmarks.peers:generate", drawn, ONE_THREAD),
        Contender("copy", "benchmarks.ours:copy", {"size": COPIED}, limit=True),
    ]
    found = compare(contenders, arguments)
    copy = {"copy": found.pop("copy")}
    rows = harness.rows(name, found, case.batch * count, "tokens", "transformers")
    (bandwidth,) = harness.rows(name, copy, 2 * COPIED / 1e9, "GB")
    if "median" in bandwidth:
        step = bytes_read(case.size, case.batch, BYTES[case.dtype], count)
        for row in rows:
            if "median" in row:
                row["of_limit"] = row["median"] * step / (1e9 * bandwidth["median"] * case.batch)
    return [*rows, bandwidth, *([] if arguments.only else growth(case, arguments))]


def bytes_read(size: Size, batch: int, width: int, count: int) -> float:
    """Bytes that a step must read, on average over the first `count` of a sequence.

    Args:
      size: of the network.
      batch: sequences.
      width: bytes of a number.
      count: steps.
    """
    weights = flops.forward(network_of(size)).matmul // 2
    cached = 2 * size.layers * size.width * batch * (count + 1) / 2
    return width * (weights + cached)


def growth(case: Case, arguments) -> list[dict]:
    """What as many tokens cost where the sequence is to be longer."""
    side = math.isqrt(min(arguments.tokens, case.size.tokens))
    count, contenders = side**2, []
    for tokens in (count, count * LONGER):
        longer = dataclasses.replace(case, size=dataclasses.replace(case.size, tokens=tokens))
        drawn = longer.asdict() | {"count": count}
        contenders.append(Contender(f"room for {tokens}", "benchmarks.ours:generate", drawn))
    found = compare(contenders, arguments)
    base = contenders[0].name
    rows = harness.rows(f"first {count} tokens, {case}", found, case.batch * count, "tokens", base)
    for row in rows:
        if "ratio" in row:
            row["cost"] = 1 / row["ratio"]
    return rows


FLAGS = {"--tokens": {"type": int, "default": 256, "help": "that are drawn of each sequence"}}

if __name__ == "__main__":
    harness.main("decode", __doc__, cases, measure, quick=[QUICK], flags=FLAGS)
