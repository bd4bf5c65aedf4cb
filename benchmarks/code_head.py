"""Speed of a head by levels (`config.model.code_head`), beside a flat head of as many codes.

Command: python -m benchmarks.code_head [--cases=4096]

A network of the shape of tokenizer_cifar10.py trains on codes, and draws images, which takes the
probabilities of all codes. The plan of a config says what both heads need of memory:
python -m gptv_jax.plan --config=configs/tokenizer_cifar10.py:tiny_levels --topology=cpu:1
"""

import dataclasses

from benchmarks import harness
from benchmarks.sizes import Case, Size
from benchmarks.turns import Contender, compare

SHAPE = {"width": 128, "layers": 4, "heads": 4, "tokens": 64}
CODES = [
    Size(**SHAPE, vocabulary=4096, levels=(8, 8, 8, 8), name="4096 codes"),
    Size(**SHAPE, vocabulary=16384, levels=(8, 8, 8, 8, 4), name="16384 codes"),
]
TINY = Size(width=32, layers=1, heads=2, tokens=16, vocabulary=12, levels=(3, 4))


def cases(platform: str) -> list[Case]:
    """The cases of every platform."""
    del platform
    return [Case(size, 64) for size in CODES]


def measure(case: Case, arguments) -> list[dict]:
    """Measures a case; returns its rows of the table."""
    flat = dataclasses.replace(case, size=dataclasses.replace(case.size, levels=()))
    made, tokens = [], case.size.tokens
    for what, factory, more in (("train", "train", {}), ("draw", "generate", {"count": tokens})):
        contenders = [
            Contender(name, f"benchmarks.ours:{factory}", each.asdict() | more)
            for name, each in (("flat", flat), ("levels", case))
        ]
        found = compare(contenders, arguments)
        made += harness.rows(f"{what}: {case}", found, case.batch * tokens, "tokens", "flat")
    return made


if __name__ == "__main__":
    harness.main("code_head", __doc__, cases, measure, quick=[Case(TINY, 2)])
