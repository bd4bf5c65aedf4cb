"""Vectors to codes and back: finite scalar quantization, or a learned codebook.

Both take the encoder's output and give what the decoder is to read, from which gradients go
straight through to the encoder, the codes, and a loss of their own. A code is one whole number.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from gptv_jax import config as config_lib
from gptv_jax.model import layers

# 2 sigmoid(1.6 z) - 1 is close to the cumulative distribution of a unit normal, from -1 to 1: such
# an encoder output uses all levels alike, where tanh would favour the outer ones.
STEEPNESS = 1.6


class Quantized(NamedTuple):
    """What becomes of an encoder's output."""

    values: Float[Array, "B h w Z"]  # of the codes; gradients pass as if nothing were rounded
    codes: Int[Array, "B h w"]
    commitment: Float[Array, ""]  # mean squared distance to the codes, where those are learned


class ScalarQuantizer(nnx.Module):
    """Every dimension rounded to levels of its own (Mentzer et al. 2023, arXiv:2309.15505).

    A dimension of L levels is squashed to -1 .. 1, cut into L parts of the same size, and given
    the middle of its part: (2 i + 1) / L - 1 for i = 0 .. L-1. These lie evenly around 0, whether L
    is even or odd, where 0 itself is one of them. Nothing of it is learned.
    """

    def __init__(self, levels: tuple[int, ...]):
        self.levels = levels
        self.size = len(levels)  # Z
        self.vocabulary = math.prod(levels)
        self._strides = tuple(math.prod(levels[:i]) for i in range(len(levels)))

    def __call__(self, z: Float[Array, "B h w Z"]) -> Quantized:
        """Codes of the encoder's output, any real numbers; computed in float32 at least."""
        squashed = 2 * jax.nn.sigmoid(STEEPNESS * z.astype(layers.accumulator(z))) - 1
        return Quantized(self.rounded(squashed), self.codes(squashed), jnp.zeros(()))

    def rounded(self, squashed: Float[Array, "*any Z"]) -> Float[Array, "*any Z"]:
        """The nearest levels of numbers from -1 to 1; the gradient is that of the identity."""
        nearest = (2 * self._digits(squashed) + 1) / self._counts(squashed) - 1
        return squashed + jax.lax.stop_gradient(nearest - squashed)

    def values(self, codes: Int[Array, "*any"]) -> Float[Array, "*any Z"]:
        """What the decoder reads of codes."""
        digits = [codes // s % count for s, count in zip(self._strides, self.levels, strict=True)]
        digits = jnp.stack(digits, axis=-1).astype(jnp.float32)
        return (2 * digits + 1) / self._counts(digits) - 1

    def codes(self, squashed: Float[Array, "*any Z"]) -> Int[Array, "*any"]:
        """Of the nearest levels of numbers from -1 to 1."""
        strides = np.array(self._strides, np.int32).reshape((1,) * (squashed.ndim - 1) + (-1,))
        return (self._digits(squashed).astype(jnp.int32) * strides).sum(axis=-1)

    def _digits(self, squashed: Float[Array, "*any Z"]) -> Float[Array, "*any Z"]:
        counts = self._counts(squashed)
        return jnp.clip(jnp.floor((squashed + 1) / 2 * counts), 0, counts - 1)

    def _counts(self, like: Float[Array, "*any Z"]) -> np.ndarray:
        return np.array(self.levels, like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


class VectorQuantizer(nnx.Module):
    """The nearest of learned vectors, all of length 1 (van den Oord et al. 2017, arXiv:1711.00937).

    Directions alone count, which keeps more of a large codebook in use (Yu et al. 2021,
    arXiv:2110.04627). The codebook gets no gradient: `followed` moves it after each step.
    """

    def __init__(self, config: config_lib.Autoencoder, *, rngs: nnx.Rngs):
        self.size, self.vocabulary = config.code_size, config.codes
        self.codebook = layers.normal(rngs, "codebook", (self.vocabulary, self.size), 1.0)

    def __call__(self, z: Float[Array, "B h w Z"]) -> Quantized:
        """Codes of the encoder's output, any real numbers; computed in float32 at least."""
        z = unit(z.astype(layers.accumulator(z)))
        book = unit(jax.lax.stop_gradient(self.codebook[...]))
        # A TPU would else round both to bfloat16, and take another code where two are near.
        cosine = jnp.einsum("bhwz,vz->bhwv", z, book, precision="highest")
        codes = jnp.argmax(cosine, axis=-1)
        nearest = self.values(codes)
        distance = jnp.square(z - jax.lax.stop_gradient(nearest)).sum(axis=-1).mean()
        return Quantized(z + jax.lax.stop_gradient(nearest - z), codes, distance)

    def values(self, codes: Int[Array, "*any"]) -> Float[Array, "*any Z"]:
        """What the decoder reads of codes."""
        book = unit(self.codebook[...])
        return book.at[codes].get(out_sharding=jax.typeof(codes).sharding.spec)


def unit(x: Float[Array, "*any Z"]) -> Float[Array, "*any Z"]:
    """Vectors of the same direction and length 1."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)


def make_quantizer(config: config_lib.Autoencoder, *, rngs: nnx.Rngs):
    """The quantizer that the config names."""
    if config.quantizer == "fsq":
        return ScalarQuantizer(config.levels)
    return VectorQuantizer(config, rngs=rngs)
