"""2D rotary positions: attention scores depend on the distance in rows and columns.

Half of each head's channels are rotated by the row of a place on the grid and half by the column,
so that scores depend on differences of rows and columns alone (Su et al. 2021, arXiv:2104.09864;
along two axes as in LlamaGen, Sun et al. 2024, arXiv:2406.06525).

A query is rotated by the place of the token that its position predicts, a key by the place of its
position's input token: their difference is the way from a known token to the token in question,
also from the end of one row to the beginning of the next. The start vector's place is -1.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BASE = 10_000.0  # frequencies fall geometrically from 1 towards 1 / BASE, as in LlamaGen


class Rotation(NamedTuple):
    """Float32 cosines and sines (leading axis) that rotate queries and keys of P positions."""

    queries: Float[Array, "2 *B P half"]  # with axis B where rows have orders of their own
    keys: Float[Array, "2 *B P half"]


def phases(places: Int[Array, "P"], columns: int, size: int) -> Float[Array, "2 P half"]:
    """Cosines and sines of the angles of places, numbered in raster order, in a grid's `columns`.

    `size` is K, a multiple of 4; half is K / 2. Place -1 is one before the first.
    """
    frequencies = BASE ** -jnp.linspace(0, 1, size // 4, endpoint=False, dtype=jnp.float32)
    axes = jnp.stack(jnp.divmod(places, columns), axis=-1).astype(jnp.float32)
    angles = (axes[:, :, None] * frequencies[None, None]).reshape(len(places), size // 2)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Float[Array, "B P H K"], by: Float[Array, "2 *B P half"]) -> Float[Array, "B P H K"]:
    """Rotates every pair of channels i, i + K/2 by an angle; computed in float32."""
    cosine, sine = (by if by.ndim == x.ndim else by[:, None])[..., None, :]
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
