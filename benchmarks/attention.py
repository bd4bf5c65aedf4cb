"""Speed of the implementations of causal attention, forward and with the gradients.

Command: python -m benchmarks.attention [--cases=backward]

The contenders are the plain form, which defines the result, the form that gptv_jax uses on this
platform, and PyTorch's `scaled_dot_product_attention`.
"""

import dataclasses

from benchmarks import harness
from benchmarks.turns import Contender, compare


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and dtype of the attention that is measured."""

    batch: int
    tokens: int
    heads: int
    head_size: int
    backward: bool
    dtype: str

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.tokens} H{self.heads} K{self.head_size} {self.dtype}"
        return f"{shape}, {'forward and backward' if self.backward else 'forward'}"


def cases(platform: str) -> list[Case]:
    """The cases that fit the platform's devices."""
    shapes = [(8, 1024, 2, 32), (4, 1024, 4, 64)] if platform == "cpu" else [(16, 1024, 8, 64)]
    dtype = "float32" if platform == "cpu" else "bfloat16"
    return [Case(*shape, backward, dtype) for shape in shapes for backward in (False, True)]


def measure(case: Case, arguments) -> list[dict]:
    """Measures a case; returns its rows of the table."""
    shared = dataclasses.asdict(case)
    contenders = [
        Contender("gptv_jax", "benchmarks.ours:attend", shared),
        Contender("gptv_jax plain", "benchmarks.ours:attend", shared | {"plain": True}),
        Contender("PyTorch", "benchmarks.peers:attend", shared),
    ]
    found = compare(contenders, arguments)
    return harness.rows(str(case), found, case.batch * case.tokens, "tokens", "PyTorch")


if __name__ == "__main__":
    quick = [Case(2, 16, 2, 8, True, "float32")]
    harness.main("attention", __doc__, cases, measure, quick=quick)
