"""Every number of a set of generated images, compared with a reference, in float64 on the host.

The Frechet distance is Heusel et al. 2017 (arXiv:1706.08500), improved precision and recall are
Kynkaanniemi et al. 2019 (arXiv:1904.06991), density and coverage Naeem et al. 2020
(arXiv:2002.09797), the Inception Score Salimans et al. 2016 (arXiv:1606.03498).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from etils import epy
from jaxtyping import Float, Float64, UInt8

from gptv_jax.errors import InputError
from gptv_jax.quality.features import FeatureExtractor
from gptv_jax.quality.reference import Moments, Reference, measure

with epy.lazy_imports():  # slow to import, and needed only when images are compared
    from scipy import special
    from sklearn import metrics

NEIGHBORS, DENSITY_NEIGHBORS = 3, 5  # as published
BLOCK_MIB = 128  # size of the block of distances that is computed at once
ROUNDING = 1e-14  # a squared distance below this share of the squared norms is rounding error
SPLITS = 10  # of the Inception Score, as published
SUM_TOLERANCE = 1e-3  # by which a row of float32 probabilities may miss a sum of 1


def evaluate(
    batches: Iterable[UInt8[np.ndarray, "B *F H W C"]],
    reference: Reference,
    extractor: FeatureExtractor,
) -> dict:
    """Compares generated images with real ones; docs/generation_quality.md explains the numbers.

    Generated images are in the data set's range. A batch is taken from the iterable when the batch
    before has been read, and is not kept. The extractor is the one that made the reference.

    Returns:
      `frechet_distance`; `precision`, `recall`, `density` and `coverage`, computed from
      `overlap_count` images of each set (None where the reference kept no features);
      `inception_score` and `inception_score_deviation` (None where the extractor gives no
      probabilities); `count` and `reference_count`; `warning`, a text or None.

    Raises InputError where the reference was made with another extractor, before a batch is taken,
    or where there are too few images.
    """
    reference.must_fit(extractor)
    wanted = 0 if reference.kept is None else len(reference.kept)
    moments, kept, probabilities = measure(extractor, batches, wanted)
    shared, score, deviation = dict.fromkeys([*Overlap._fields, "overlap_count"]), None, None
    if probabilities is not None:
        score, deviation = inception_score(probabilities)
    if reference.kept is not None:
        # The numbers depend on the counts, so both sets are cut to the same count.
        shared = overlap(reference.kept[: len(kept)], kept)._asdict() | {"overlap_count": len(kept)}
    counts, width = {"generated": moments.count, "reference": reference.count}, len(reference.mean)
    few = [f"{number} {name} images" for name, number in counts.items() if number <= width]
    warning = (
        f"{' and '.join(few)} do not span the {width} features: the covariance is singular and the "
        "Frechet distance is biased; the distance falls as images are added. Compare it only with "
        "a distance of the same counts."
    )
    return {
        "frechet_distance": frechet_distance(moments, reference),
        **shared,
        "inception_score": score,
        "inception_score_deviation": deviation,
        "count": moments.count,
        "reference_count": reference.count,
        "warning": warning if few else None,
    }


def frechet_distance(x: Moments | Reference, y: Moments | Reference) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), in squared units of the features, never below 0.

    The published number is the square of the distance (Dowson and Landau 1982). Covariances must be
    symmetric and positive semidefinite; they may be singular.
    """
    # C C' is not symmetric, and its root is ill-conditioned where C C' is singular. With R and R'
    # the symmetric roots of C and C', the trace of that root is the sum of the singular values of
    # R R' (its nuclear norm), which magnifies no rounding error by a square root.
    product = _symmetric_root(x.covariance) @ _symmetric_root(y.covariance)
    traces = np.trace(x.covariance) + np.trace(y.covariance)
    distance = np.square(x.mean - y.mean).sum() + traces - 2 * np.linalg.norm(product, "nuc")
    return max(float(distance), 0.0)  # rounding takes the distance of equal moments below 0


def _symmetric_root(covariance: Float64[np.ndarray, "D D"]) -> Float64[np.ndarray, "D D"]:
    values, vectors = np.linalg.eigh(covariance)
    # Eigenvalues that rounding error explains belong to directions in which nothing varies.
    rounding = len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    return (vectors * np.sqrt(np.where(values > rounding, values, 0))) @ vectors.T


class Overlap(NamedTuple):
    """Shares from 0 to 1, but the density may exceed 1.

    The radius of an image's ball is the distance to the k-th nearest other image of its set, which
    lies inside.
    """

    precision: float  # share of generated images inside the ball of a real image
    recall: float  # share of real images inside the ball of a generated image
    density: float  # number of real balls around a generated image, divided by k
    coverage: float  # share of real images with a generated image in their ball


def overlap(
    real: Float[np.ndarray, "N D"],
    generated: Float[np.ndarray, "M D"],
    neighbors: int = NEIGHBORS,
    density_neighbors: int = DENSITY_NEIGHBORS,
) -> Overlap:
    """Precision, recall, density and coverage, from all N x M distances, a block at a time.

    All four numbers depend on N and M, so only results of equal counts can be compared. `neighbors`
    is k of precision and recall, `density_neighbors` of density and coverage. Each set needs more
    images than the larger k.
    """
    ks = (neighbors, density_neighbors)
    for name, features in (("real", real), ("generated", generated)):
        if len(features) <= max(ks):
            raise InputError(
                f"precision and recall look at {max(ks)} neighbours of each image, but there are "
                f"only {len(features)} {name} images; give {max(ks) + 1} or more."
            )
    # Distances are differences of products, which lose the digits that all vectors share.
    center = real.mean(axis=0, dtype=np.float64)
    real, generated = (x.astype(np.float64) - center for x in (real, generated))
    (radii, density_radii), (generated_radii, _) = _radii(real, ks), _radii(generated, ks)
    inside, balls = np.zeros(len(generated), bool), np.zeros(len(generated), int)
    recalled = covered = 0
    for rows, squared in _squared_distances(real, generated):
        inside |= (squared <= radii[rows, None]).any(axis=0)
        recalled += (squared <= generated_radii).any(axis=1).sum()
        close = squared <= density_radii[rows, None]
        balls += close.sum(axis=0)
        covered += close.any(axis=1).sum()
    return Overlap(
        precision=float(inside.mean()),
        recall=float(recalled / len(real)),
        density=float(balls.mean() / density_neighbors),
        coverage=float(covered / len(real)),
    )


def _radii(x: Float64[np.ndarray, "N D"], ks: tuple[int, ...]) -> Float64[np.ndarray, "K N"]:
    """Squared distances from each vector to its k-th nearest other vector, for every k."""
    # Index 0 of a sorted row is the vector itself, or a vector equal to it.
    found = [np.partition(squared, ks, axis=1)[:, ks] for _, squared in _squared_distances(x, x)]
    return np.concatenate(found).T


def _squared_distances(
    x: Float64[np.ndarray, "N D"], y: Float64[np.ndarray, "M D"]
) -> Iterator[tuple[slice, Float64[np.ndarray, "rows M"]]]:
    """Slices of the rows of x in order, each with the squared distances to all of y."""
    x_norms, y_norms = (np.square(z).sum(axis=1) for z in (x, y))
    start = 0
    for squared in metrics.pairwise_distances_chunked(
        x, y, metric="euclidean", squared=True, working_memory=BLOCK_MIB
    ):
        rows = slice(start, start + len(squared))
        squared[squared <= ROUNDING * (x_norms[rows, None] + y_norms)] = 0  # equal vectors
        yield rows, squared
        start = rows.stop


def inception_score(
    probabilities: Float[np.ndarray, "N classes"], splits: int = SPLITS
) -> tuple[float, float]:
    """exp(E KL(p(y|x) || p(y))): high where a classifier is sure of images and they vary.

    Mean and standard deviation over `splits` equal parts of the rows p(y|x), each with a p(y) of
    its own; the mean is 1 to the number of classes. Images are assigned to parts at random, because
    they may come sorted by class. Raises InputError where there are fewer images than splits,
    ValueError where a row has negative entries or does not add up to 1.
    """
    if (count := len(probabilities)) < splits:
        problem = f"{count} images cannot be split into {splits} for the Inception Score"
        raise InputError(f"{problem}; give {splits} or more.")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if not (probabilities >= 0).all() or not np.abs(sums - 1).max() <= SUM_TOLERANCE:
        raise ValueError("rows of probabilities must be 0 or more and add up to 1.")
    order, scores = np.random.default_rng(0).permutation(len(probabilities)), []
    for i in range(splits):
        p = probabilities[order[i::splits]].astype(np.float64)
        p /= p.sum(axis=1, keepdims=True)
        # E KL(p(y|x) || p(y)) = H(p(y)) - E H(p(y|x)), the mutual information.
        entropy, entropies = special.entr(p.mean(axis=0)).sum(), special.entr(p).sum(axis=1)
        scores.append(np.exp(entropy - entropies.mean()))
    return float(np.mean(scores)), float(np.std(scores))
