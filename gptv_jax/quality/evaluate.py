"""All numbers of a set of generated images, beside a reference."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8

from gptv_jax.quality import host
from gptv_jax.quality.features import Features
from gptv_jax.quality.frechet import frechet_distance
from gptv_jax.quality.inception_score import inception_score
from gptv_jax.quality.measure import measure
from gptv_jax.quality.precision_recall import overlap
from gptv_jax.quality.reference import Reference


def evaluate(
    batches: Iterable[UInt8[np.ndarray, "B H W C"]], reference: Reference, features: Features
) -> dict:
    """Compares generated images with real ones; docs/generation_quality.md says what numbers mean.

    Args:
      batches: generated images, uint8, in the data set's own range; each is asked for when the one
        before has been read, and is not kept.
      reference: of the real ones.
      features: the same that the reference was made with.

    Returns:
      `frechet_distance`; `precision`, `recall`, `density` and `coverage`, of as many images of
      each set as `overlap_count` says (None where the reference kept no features);
      `inception_score` and `inception_score_deviation` (None where features give no probabilities);
      `count` and `reference_count`; `warning`, a text or None.

    Raises:
      InputError: the reference was made with other features (before any image is asked for), or
        there are too few images.
    """
    reference.must_fit(features)
    host.cpu()  # where it is missing, that is said now and not after the last image
    found = measure(features, batches, 0 if reference.kept is None else len(reference.kept))
    moments, score, shared = found.moments, None, None
    if found.probabilities is not None:
        score = inception_score(found.probabilities)
    if reference.kept is not None:
        # Both numbers depend on how many images there are, so of both sets as many are taken.
        shared = overlap(reference.kept[: len(found.kept)], found.kept)
    distance = frechet_distance(
        moments.mean, moments.covariance, reference.mean, reference.covariance
    )
    return {
        "frechet_distance": distance,
        "precision": shared and shared.precision,
        "recall": shared and shared.recall,
        "density": shared and shared.density,
        "coverage": shared and shared.coverage,
        "overlap_count": shared and len(found.kept),
        "inception_score": score and score.mean,
        "inception_score_deviation": score and score.deviation,
        "count": moments.count,
        "reference_count": reference.count,
        "warning": _warning(moments.count, reference.count, len(reference.mean)),
    }


def _warning(count: int, reference_count: int, size: int) -> str | None:
    """What keeps the Frechet distance from being worth much."""
    few = {"generated": count, "reference": reference_count}
    few = [f"{number} {name} images" for name, number in few.items() if number <= size]
    if not few:
        return None
    return (
        f"{' and '.join(few)} do not span the {size} features: the covariance is singular and the "
        "Frechet distance biased; it falls as images are added. Compare it only with one of the "
        "same counts."
    )
