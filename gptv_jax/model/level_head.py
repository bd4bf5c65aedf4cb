"""A head that predicts a code of finite scalar quantization level by level, exactly.

A code is a number whose digits are the levels l_0, l_1, ... of its dimensions (quantizers.py). By
the chain rule the code's probability is the product of the probabilities of its levels, given the
features h of the position and the prefix, which are the levels before:

  P(l_i | h, prefix) = softmax over a of  sum_d  h[d] (1 + C_i[prefix, d]) W_i[a, d]

W_i has a row for each level, C_i one for each prefix of level i: the prefix scales each feature
h[d] before level i reads the features. A loss reads one prefix of each level: sum(levels) products
in place of V. Where the probabilities of all codes are needed, as for sampling with top-p, they are
computed exactly, for about the cost of a flat head.

With C = 0 the levels are independent given h, and the head is exactly the flat head whose rows are
the sums of the rows of a code's levels. With one dimension it is exactly any flat head.

Letters: B batch, N positions, D width, V codes, n levels of a dimension, S prefixes of a level.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gptv_jax import sharding
from gptv_jax.model import layers
from gptv_jax.model.layout import Part
from gptv_jax.model.quantizers import strides


class LevelHead(nnx.Module):
    """Weights of the head; both begin at zero, so the first loss is ln V, as with a flat head."""

    def __init__(self, levels: tuple[int, ...], width: int):
        self.levels, self.strides = levels, strides(levels)
        rows, prefixes = sum(levels), sum(self.strides[1:])  # the first level has no prefix
        self.level_rows = layers.constant("level_rows", (rows, width), 0.0)
        if prefixes:
            self.prefix_scale = layers.constant("prefix_scale", (prefixes, width), 0.0)

    def log_probabilities(self, final: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
        """Float32 logarithms of the probabilities of all codes, which sum to 1."""
        spec, found = jax.typeof(final).sharding.spec, None
        for _, _, rows, scale in self._by_level(final.dtype):
            if scale is None:
                logits = _product("bnd,ld->bnl", final, rows)
                found = jax.nn.log_softmax(logits, axis=-1)
                continue
            scaled = final[:, :, None] * rows[None, None]
            logits = _product("bnld,sd->bnls", scaled, scale)
            found = found[:, :, None] + jax.nn.log_softmax(logits, axis=2)
            found = found.reshape(*found.shape[:2], -1, out_sharding=spec)
        return found

    def nats(self, final: Float[Array, "B N D"], codes: Int[Array, "B N"]) -> Float[Array, "B N"]:
        """Float32 negative log-probabilities of codes; the backward pass computes them again."""
        weights, spec = list(self._by_level(final.dtype)), jax.typeof(codes).sharding.spec

        @jax.checkpoint
        def of_codes(final, codes):
            total = 0.0
            for count, stride, rows, scale in weights:
                read = final
                if scale is not None:
                    read = final * scale.at[codes % stride].get(out_sharding=spec)
                logits = _product("bnd,ld->bnl", read, rows)
                level = jax.nn.one_hot(codes // stride % count, count, dtype=logits.dtype)
                total += jax.nn.logsumexp(logits, axis=-1) - (logits * level).sum(axis=-1)
            return total

        return of_codes(final, codes)

    def _by_level(self, dtype) -> Iterator[tuple]:
        """Number of levels, of prefixes, W_i and 1 + C_i (None: no prefix) of every dimension."""
        row = prefix = 0
        all_rows = sharding.gather(self.level_rows[...], dtype)
        scales = 1 + sharding.gather(self.prefix_scale[...], dtype) if self.strides[1:] else None
        for i, (count, stride) in enumerate(zip(self.levels, self.strides, strict=True)):
            rows, row = all_rows[row : row + count], row + count
            scale = None
            if i:
                scale, prefix = scales[prefix : prefix + stride], prefix + stride
            yield count, stride, rows, scale


def make_head(part: Part, width: int) -> LevelHead | nnx.Param:
    """The head of the first part: a `LevelHead` where it has levels, else the rows [V, D]."""
    if part.levels:
        return LevelHead(part.levels, width)
    return layers.constant("head", (part.vocabulary, width), 0.0)


def _product(equation: str, x: Array, weight: Array) -> Array:
    return jnp.einsum(equation, x, weight, preferred_element_type=layers.accumulator(x))
