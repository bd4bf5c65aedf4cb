"""2D rotary positions: what two positions are to each other, by rows and columns apart.

Half of each head's channels turn with the row of a place on the grid, half with the column, so that
attention's scores know of the difference alone (Su et al. 2021, arXiv:2104.09864; along two axes as
in LlamaGen, Sun et al. 2024, arXiv:2406.06525).

A query turns with the place of the token that its position predicts, a key with that of the token
that it holds: their difference is the way from a known pixel to the one in question, also from the
end of one row to the beginning of the next. The start vector's place is the one before the first.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BASE = 10_000.0  # frequencies fall from 1 towards 1 / BASE, their logs evenly; as in LlamaGen


class Rotation(NamedTuple):
    """Cosines and sines, float32, that the queries and the keys of P positions are turned by."""

    queries: Float[Array, "2 *B P half"]  # of every row its own, or of all rows the same
    keys: Float[Array, "2 *B P half"]


def turns(places: Int[Array, "P"], columns: int, size: int) -> Float[Array, "2 P half"]:
    """Cosines and sines of the angles of places.

    Args:
      places: on the grid, in raster order; -1 lies before the first one.
      columns: of the grid.
      size: K, a multiple of 4.
    """
    frequencies = BASE ** -jnp.linspace(0, 1, size // 4, endpoint=False, dtype=jnp.float32)
    axes = jnp.stack(jnp.divmod(places, columns), axis=-1).astype(jnp.float32)
    angles = (axes[:, :, None] * frequencies[None, None]).reshape(len(places), size // 2)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Float[Array, "B P H K"], by: Float[Array, "2 *B P half"]) -> Float[Array, "B P H K"]:
    """Every pair of channels i, i + K/2 turned by its angle; computed in float32."""
    of_rows = by if by.ndim == x.ndim else by[:, None]
    cosine, sine = of_rows[..., None, :]
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
