"""Weights of the parts after the first one, and the geometry that coordinates and image share.

A token that names a height or width, such as a corner of a box, is embedded with the features of
this height or width. The head's weights of the token have them too: what the head learns of a place
then holds for the places beside it. A position that predicts a token of a grid over the image, such
as a label map, is given the features of the height and width of the token's cell. The positions
that hold the image are given the features of the height and width of their centers, so that
attention can compare the two. Without this, detection learns the statistics of boxes and not where
objects are (docs/architecture.md).
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from gptv_jax import sharding
from gptv_jax.model import layers
from gptv_jax.model.layout import Part

CYCLES = 0.5, 4.0  # of the slowest and the fastest feature, from edge to edge of the image
# Initial sizes of the features of places and of embeddings: as large as what the first layers add,
# in which iGPT's 0.02 would drown.
PLACE, EMBEDDING = 0.7, 0.1


class PartWeights(nnx.Module):
    """Embeddings, positions and head of a part; with places, the scales of their features."""

    def __init__(self, part: Part, width: int, *, rngs: nnx.Rngs):
        self.part = part
        if part.vocabulary:
            self.embedding = layers.normal(rngs, "embedding", (part.vocabulary, width), EMBEDDING)
        self.position = layers.normal(rngs, "position", (part.size, width), 0.01)
        if part.predicted:
            self.head = layers.constant("head", (part.vocabulary, width), 0.0)
            if part.bins:
                self.place_head = layers.constant("place_head", (width,), 0.0)
        if part.has_places:
            self.place = layers.constant("place", (width,), PLACE)

    def table(self, dtype: str) -> Float[Array, "V D"]:
        """The embedding of every token, with the features of the place that the token names."""
        table = sharding.gather(self.embedding[...], dtype)
        return table + scaled(self._named(), self.place, dtype) if self.part.bins else table

    def head_table(self, dtype: str) -> Float[Array, "V D"]:
        """The head's weights for every token, with the features of the place the token names."""
        table = sharding.gather(self.head[...], dtype)
        return table + scaled(self._named(), self.place_head, dtype) if self.part.bins else table

    def _named(self) -> Float[np.ndarray, "V D"]:
        """Features of the places that tokens name; 0 of the other tokens."""
        others = ((0, self.part.vocabulary - 2 * self.part.bins), (0, 0))
        return np.pad(coordinates(self.part.bins, self.position.shape[1]), others)

    def positions(self, dtype: str) -> Float[Array, "N D"]:
        """What every position of the part is given, whatever its input is."""
        table = sharding.gather(self.position[...], dtype)
        if not self.part.covers_image:
            return table
        return table + scaled(centers(self.part.shape, table.shape[1]), self.place, dtype)


def scaled(features: Float[np.ndarray, "N D"], scale: nnx.Param, dtype: str) -> Float[Array, "N D"]:
    """Features of places times their learned scale, [D]."""
    return scale[...].astype(dtype)[None] * jnp.array(features, dtype)


def coordinates(bins: int, width: int) -> Float[np.ndarray, "N D"]:
    """Features of heights, in the first half of the channels, and of widths, in the second.

    Bin k lies at k / (bins - 1) from edge to edge.
    """
    half, at = width // 2, np.arange(bins) / (bins - 1)
    return np.concatenate(
        [
            np.pad(waves(at, half), ((0, 0), (0, width - half))),
            np.pad(waves(at, width - half), ((0, 0), (half, 0))),
        ]
    )


def centers(shape: tuple[int, ...], width: int) -> Float[np.ndarray, "N D"]:
    """Features of the centers of the cells of a grid, in raster order, of one frame or several."""
    rows, columns = shape[-2:]
    y, x = ((np.arange(count) + 0.5) / count for count in (rows, columns))
    height, across = waves(y, width // 2), waves(x, width - width // 2)
    cells = np.concatenate([np.repeat(height, columns, axis=0), np.tile(across, (rows, 1))], axis=1)
    return np.tile(cells, (math.prod(shape[:-2]), 1))


def waves(at: Float[np.ndarray, " n"], count: int) -> Float[np.ndarray, "n count"]:
    """Sines, then cosines of `at`, which runs from 0 to 1, at frequencies that grow by a factor."""
    angles = 2 * np.pi * at[:, None] * np.geomspace(*CYCLES, -(-count // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :count].astype(np.float32)
