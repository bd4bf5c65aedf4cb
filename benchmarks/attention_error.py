"""Attention and its gradients against the reference, with the masks that the package uses.

Command: python -m benchmarks.attention_error [--quick] [--out=FILE]

The reference is the plain form in float32 on equal inputs, with products in full precision. The
form that gptv_jax uses on this platform (`form`: cuDNN's kernel on a GPU, the blocked form on a
CPU) may have twice the error of the plain form in the dtype of compute, or 1e-5. An error is the
largest difference from the reference over the largest value of the reference; the error of the
gradients is the largest one of queries, keys and values. The exit code is 1 if an error is too
large.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np

from benchmarks import harness
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import attention
from gptv_jax.model.layout import Part, by_frames, causal_mask, full_mask, prefixed

TIMES, LEAST = 2, 1e-5  # of the plain form's error; of the reference's largest value
ERRORS = ("error", "plain_error", "gradients_error", "plain_gradients_error")


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, dtype and mask of the attention that is checked."""

    mask: str  # causal, full, prefix or frames
    head_size: int
    batch: int = 4
    tokens: int = 1024
    heads: int = 8
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.tokens} H{self.heads} K{self.head_size}"
        return f"{self.mask} {shape} {self.dtype}"

    @property
    def visible(self) -> tuple[int, ...]:
        """The number of positions that each position sees."""
        quarter = self.tokens // 4
        if self.mask == "prefix":
            image, map_ = Part("image", 2, (quarter,), predicted=False), Part("map", 2, (quarter,))
            return prefixed(image, map_, Part("boxes", 2, (2 * quarter,))).visible
        if self.mask == "frames":
            return by_frames(Part("clip", 2, (4, 1, quarter))).visible
        return {"causal": causal_mask, "full": full_mask}[self.mask](self.tokens)


def cases(platform: str) -> list[Case]:
    """Heads of iGPT-S, L and M with a causal mask, then the other masks."""
    of_masks = [Case(mask, 64) for mask in ("full", "prefix", "frames")]
    found = [Case("causal", 64), Case("causal", 96), Case("causal", 128), *of_masks]
    if platform == "gpu":
        return found
    return [dataclasses.replace(case, batch=1, heads=2, dtype="float32") for case in found]


def quick(case: Case) -> Case:
    """A tiny case of its mask; from 128 positions on a CPU takes the blocked form."""
    return dataclasses.replace(case, batch=1, heads=2, head_size=8, tokens=128)


def measure(case: Case) -> dict:
    """The errors of a case, and whether they are small enough."""
    shape, visible = (case.batch, case.tokens, case.heads, case.head_size), case.visible
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [
        jax.random.normal(k, shape, case.dtype, out_sharding=sharding.BATCH_FIRST) for k in keys
    ]
    mask = np.arange(case.tokens)[None] < np.array(visible)[:, None]

    def plain(q, k, v):
        return attention.attention(q, k, v, jax.numpy.asarray(mask))

    def used(q, k, v):
        return attention.self_attention(q, k, v, visible=visible)

    with jax.default_matmul_precision("highest"):
        wanted = computed(plain, [x.astype("float32") for x in arrays])
    errors = {}
    for name, function in (("", used), ("plain_", plain)):
        off = [error(*pair) for pair in zip(computed(function, arrays), wanted, strict=True)]
        errors |= {f"{name}error": off[0], f"{name}gradients_error": max(off[1:])}
    platform = sharding.platform()
    form = attention.form(platform, visible, 1, case.dtype, case.head_size)
    holds = all(errors[name] <= max(TIMES * errors[f"plain_{name}"], LEAST) for name in ERRORS[::2])
    return {"case": str(case), "form": form, **errors, "holds": holds}


def computed(function, arrays: list) -> list[np.ndarray]:
    """The output of attention, and the gradients of queries, keys and values."""
    *qkv, gradient = arrays

    def both(*qkv):
        out, pull = jax.vjp(function, *qkv)
        return out, *pull(gradient)

    return [np.asarray(x, np.float32) for x in jax.jit(both)(*qkv)]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the largest value; infinite where something is not finite."""
    off = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    return off if np.isfinite(found).all() else float("inf")


def main() -> None:
    """Checks all cases.

    Raises:
      SystemExit: with code 1 if an error is too large.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it works")
    parser.add_argument("--out", type=pathlib.Path, help="file for the numbers, as JSON")
    arguments = parser.parse_args()
    about = harness.facts()  # asks a process of its own, before this process holds the device
    every = cases(about["hardware"]["platform"])
    jax.set_mesh(sharding.make_mesh(config_lib.Mesh(data=1), jax.devices()[:1]))
    head, rows = ["case", "form", *(name.replace("_", " ") for name in ERRORS), ""], []
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for case in dict.fromkeys(map(quick, every) if arguments.quick else every):
        rows.append(row := measure(case))
        numbers = [f"{row[name]:.1e}" for name in ERRORS]
        told = "holds" if row["holds"] else "too large"
        print(f"| {' | '.join([row['case'], row['form'], *numbers, told])} |", flush=True)
    found = {"benchmark": "attention_error", "rows": rows} | about
    if arguments.out:
        harness.write_json(arguments.out, found)
    print(json.dumps(found))
    sys.exit(not all(row["holds"] for row in rows))


if __name__ == "__main__":
    main()
