"""How much of two sets of images overlaps: each is the union of balls round its feature vectors.

Improved precision and recall are Kynkaanniemi et al. 2019 (arXiv:1904.06991), density and coverage
Naeem et al. 2020 (arXiv:2002.09797).
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from gptv_jax.errors import InputError
from gptv_jax.quality import host

NEIGHBORS, DENSITY_NEIGHBORS = 3, 5  # as the two papers have them
BLOCK_BYTES = 2**27  # of distances that are held at once
ROUNDING = 1e-14  # share of the squared norms, below which a squared distance is rounding


class Overlap(NamedTuple):
    """Shares from 0 to 1; the density may be above 1."""

    precision: float  # of generated images inside a real one's ball
    recall: float  # of real images inside a generated one's ball
    density: float  # real balls that a generated image lies in, over how many are expected
    coverage: float  # of real images with a generated one in their ball


def overlap(
    real: Float[np.ndarray, "N D"],
    generated: Float[np.ndarray, "M D"],
    neighbors: int = NEIGHBORS,
    density_neighbors: int = DENSITY_NEIGHBORS,
) -> Overlap:
    """Precision, recall, density and coverage, from all N x M distances, a block at a time.

    A ball reaches to the k-th nearest other vector of its own set, that one included.

    Args:
      real: features. All four numbers depend on N and M: compare like with like.
      generated: features.
      neighbors: k of precision and recall.
      density_neighbors: k of density and coverage.

    Raises:
      InputError: a set has no so many neighbours.
    """
    ks = (neighbors, density_neighbors)
    for name, given in (("real", real), ("generated", generated)):
        if len(given) <= max(ks):
            raise InputError(
                f"precision and recall look at {max(ks)} neighbours of each image, but there are "
                f"only {len(given)} {name} ones; give {max(ks) + 1} or more."
            )
    # Distances come from products, which lose the digits that all vectors share.
    center = real.mean(axis=0, dtype=np.float64)
    real, generated = (x.astype(np.float64) - center for x in (real, generated))
    with host.float64():
        real_radii, wide_radii = _radii(real, ks)
        generated_radii, _ = _radii(generated, ks)
        hits, inside = np.zeros(len(generated), int), np.zeros(len(generated), bool)
        recalled, covered = 0, 0
        for rows, squared in _blocks(real, generated):
            inside |= (squared <= real_radii[rows, None]).any(axis=0)
            recalled += (squared <= generated_radii[None]).any(axis=1).sum()
            close = squared <= wide_radii[rows, None]
            hits += close.sum(axis=0)
            covered += close.any(axis=1).sum()
    return Overlap(
        precision=float(inside.mean()),
        recall=float(recalled / len(real)),
        density=float(hits.mean() / density_neighbors),
        coverage=float(covered / len(real)),
    )


def _radii(x: Float64[np.ndarray, "N D"], ks: tuple[int, ...]) -> Float64[np.ndarray, "K N"]:
    """Squared distances to the k-th nearest other vectors, for every k."""
    # The vector itself is the nearest; among equals it does not matter which of them it is.
    found = [np.partition(squared, ks, axis=1)[:, ks] for _, squared in _blocks(x, x)]
    return np.concatenate(found).T


def _blocks(
    x: Float64[np.ndarray, "N D"], y: Float64[np.ndarray, "M D"]
) -> Iterator[tuple[slice, Float64[np.ndarray, "rows M"]]]:
    """Squared distances of some rows of x to all of y, all rows in turn."""
    size = min(len(x), max(1, BLOCK_BYTES // (8 * len(y))))
    y = jnp.asarray(y)
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        filled = np.pad(rows, ((0, size - len(rows)), (0, 0)))  # one shape, one compilation
        yield slice(start, start + len(rows)), np.asarray(_squared(filled, y))[: len(rows)]


@jax.jit
def _squared(x: Float64[Array, "N D"], y: Float64[Array, "M D"]) -> Float64[Array, "N M"]:
    norms = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None]
    squared = norms - 2 * x @ y.T
    return jnp.where(squared > ROUNDING * norms, squared, 0)  # equal vectors are at 0 exactly
