"""Every number of a set of generated images, compared with a reference."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8

from gptv_jax.quality.features import FeatureExtractor
from gptv_jax.quality.measure import measure
from gptv_jax.quality.metrics import frechet_distance, inception_score, overlap
from gptv_jax.quality.reference import Reference


def evaluate(
    batches: Iterable[UInt8[np.ndarray, "B H W C"]],
    reference: Reference,
    extractor: FeatureExtractor,
) -> dict:
    """Compares generated images with real ones; docs/generation_quality.md explains the numbers.

    Args:
      batches: generated images, uint8, in the data set's range. A batch is taken from the iterable
        when the batch before has been read, and is not kept.
      reference: statistics of the real images.
      extractor: the one that the reference was made with.

    Returns:
      `frechet_distance`; `precision`, `recall`, `density` and `coverage`, computed from
      `overlap_count` images of each set (None where the reference kept no features);
      `inception_score` and `inception_score_deviation` (None where the extractor gives no
      probabilities); `count` and `reference_count`; `warning`, a text or None.

    Raises:
      InputError: the reference was made with another extractor (raised before a batch is taken), or
        there are too few images.
    """
    reference.must_fit(extractor)
    found = measure(extractor, batches, 0 if reference.kept is None else len(reference.kept))
    moments, score, shared = found.moments, None, None
    if found.probabilities is not None:
        score = inception_score(found.probabilities)
    if reference.kept is not None:
        # The numbers depend on the counts, so both sets are cut to the same count.
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


def _warning(count: int, reference_count: int, width: int) -> str | None:
    counts = {"generated": count, "reference": reference_count}
    few = [f"{number} {name} images" for name, number in counts.items() if number <= width]
    if not few:
        return None
    return (
        f"{' and '.join(few)} do not span the {width} features: the covariance is singular and the "
        "Frechet distance is biased; the distance falls as images are added. Compare it only with "
        "a distance of the same counts."
    )
