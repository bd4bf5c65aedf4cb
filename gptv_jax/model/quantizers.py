"""Quantizers of an encoder's output: to one of a number of codes, and back to values.

A quantizer maps the encoder's output to the decoder's input, with gradients that pass straight
through to the encoder, to codes, each a whole number, and to a commitment loss.

Letters: B batch, K steps in time of a clip, h and w the grid of codes, Z dimensions of a code.
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

# 2 sigmoid(1.6 z) - 1 is close to the cumulative distribution of a unit normal, scaled to -1 .. 1:
# a normal encoder output then uses all levels equally often; tanh would favour the outer levels.
STEEPNESS = 1.6


class Quantized(NamedTuple):
    """The quantized output of an encoder."""

    values: Float[Array, "B *K h w Z"]  # of the codes; gradients pass as if nothing were rounded
    codes: Int[Array, "B *K h w"]
    commitment: Float[Array, ""]  # mean squared distance to learned codes; else 0


class ScalarQuantizer(nnx.Module):
    """Rounds each dimension to a number of levels (Mentzer et al. 2023, arXiv:2309.15505).

    A dimension of n levels is squashed to -1 .. 1, cut into n intervals of equal size, and replaced
    by the middle of its interval: (2 i + 1) / n - 1 for i = 0 .. n-1. The levels are symmetric
    around 0; 0 is a level where n is odd. Nothing is learned.
    """

    def __init__(self, levels: tuple[int, ...]):
        self.levels = levels
        self.size = len(levels)  # Z
        self._strides = strides(levels)

    def __call__(self, z: Float[Array, "B *K h w Z"]) -> Quantized:
        """Quantizes any real numbers; computes in float32 at least."""
        squashed = 2 * jax.nn.sigmoid(STEEPNESS * z.astype(layers.accumulator(z))) - 1
        return Quantized(self.rounded(squashed), self.codes(squashed), jnp.zeros(()))

    def rounded(self, squashed: Float[Array, "*any Z"]) -> Float[Array, "*any Z"]:
        """The nearest levels of numbers from -1 to 1, with the gradient of the identity."""
        nearest = (2 * self._digits(squashed) + 1) / _last(self.levels, squashed) - 1
        return squashed + jax.lax.stop_gradient(nearest - squashed)

    def values(self, codes: Int[Array, "*any"]) -> Float[Array, "*any Z"]:
        codes = codes[..., None]
        digits = codes // _last(self._strides, codes) % _last(self.levels, codes)
        digits = digits.astype(jnp.float32)
        return (2 * digits + 1) / _last(self.levels, digits) - 1

    def codes(self, squashed: Float[Array, "*any Z"]) -> Int[Array, "*any"]:
        """Codes of the nearest levels of numbers from -1 to 1."""
        digits = self._digits(squashed).astype(jnp.int32)
        return (digits * _last(self._strides, digits)).sum(axis=-1)

    def _digits(self, squashed: Float[Array, "*any Z"]) -> Float[Array, "*any Z"]:
        counts = _last(self.levels, squashed)
        return jnp.clip(jnp.floor((squashed + 1) / 2 * counts), 0, counts - 1)


class VectorQuantizer(nnx.Module):
    """Takes the nearest of learned unit vectors (van den Oord et al. 2017, arXiv:1711.00937).

    Only directions are compared, which keeps more of a large codebook in use (Yu et al. 2021,
    arXiv:2110.04627). The codebook gets no gradient: train/autoencoding.py moves it after a step.
    """

    def __init__(self, config: config_lib.Autoencoder, *, rngs: nnx.Rngs):
        self.size = config.code_size  # Z
        self.codebook = layers.normal(rngs, "codebook", (config.codes, self.size), 1.0)

    def __call__(self, z: Float[Array, "B *K h w Z"]) -> Quantized:
        """Quantizes any real numbers; computes in float32 at least."""
        z = unit(z.astype(layers.accumulator(z)))
        book = unit(jax.lax.stop_gradient(self.codebook[...]))
        # By default a TPU rounds both to bfloat16, and takes the wrong one of two near codes.
        cosine = jnp.einsum("...z,vz->...v", z, book, precision="highest")
        codes = jnp.argmax(cosine, axis=-1)
        nearest = self.values(codes)
        distance = jnp.square(z - jax.lax.stop_gradient(nearest)).sum(axis=-1).mean()
        return Quantized(z + jax.lax.stop_gradient(nearest - z), codes, distance)

    def values(self, codes: Int[Array, "*any"]) -> Float[Array, "*any Z"]:
        book = unit(self.codebook[...])
        return book.at[codes].get(out_sharding=jax.typeof(codes).sharding.spec)


def strides(levels: tuple[int, ...]) -> tuple[int, ...]:
    """What one level of each dimension adds to a code: the number of codes of those before."""
    return tuple(math.prod(levels[:i]) for i in range(len(levels)))


def _last(values: tuple[int, ...], like: Array) -> np.ndarray:
    """The values along the last axis of an array of the dtype and rank of `like`."""
    return np.array(values, like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def unit(x: Float[Array, "*any Z"]) -> Float[Array, "*any Z"]:
    """The vectors scaled to length 1."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)
