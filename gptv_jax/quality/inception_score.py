"""The Inception Score: how sure and how varied a classifier finds images (Salimans et al. 2016)."""

from typing import NamedTuple

import jax
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Array, Float, Float64

from gptv_jax.errors import InputError
from gptv_jax.quality import host

SPLITS = 10  # as published
SUM_TOLERANCE = 1e-3  # of a row of probabilities, which is then made to add up to 1


class InceptionScore(NamedTuple):
    """Mean and standard deviation over splits; the mean is from 1 to the number of classes."""

    mean: float
    deviation: float


def inception_score(
    probabilities: Float[np.ndarray, "N classes"], splits: int = SPLITS
) -> InceptionScore:
    """exp(E KL(p(y|x) || p(y))), each split having its own p(y).

    Args:
      probabilities: p(y|x), a row an image.
      splits: parts of equal size, drawn at random: images may come sorted by class, or by turns.

    Raises:
      InputError: fewer images than splits.
      ValueError: rows that are no probabilities.
    """
    if len(probabilities) < splits:
        raise InputError(
            f"{len(probabilities)} images cannot be split into {splits} for the Inception Score; "
            f"give {splits} or more."
        )
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if not (probabilities >= 0).all() or not np.abs(sums - 1).max() <= SUM_TOLERANCE:
        raise ValueError("rows of probabilities must be 0 or more and add up to 1.")
    order = np.random.default_rng(0).permutation(len(probabilities))
    parts = [probabilities[order[i::splits]].astype(np.float64) for i in range(splits)]
    with host.float64():
        scores = [float(_score(part / part.sum(axis=1, keepdims=True))) for part in parts]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


@jax.jit
def _score(p: Float64[Array, "N classes"]) -> Float64[Array, ""]:
    # E KL(p(y|x) || p(y)) = H(p(y)) - E H(p(y|x)), the mutual information.
    return jax.numpy.exp(entr(p.mean(axis=0)).sum() - entr(p).sum(axis=1).mean())
