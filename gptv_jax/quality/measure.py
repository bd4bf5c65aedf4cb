"""Features of a stream of images: their moments, a random sample, and class probabilities."""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Float64, UInt8

from gptv_jax.errors import InputError
from gptv_jax.quality.features import FeatureExtractor


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of feature vectors, in float64.

    The scatter is the sum over vectors of the outer product of their deviations from the mean.
    """

    count: int
    mean: Float64[np.ndarray, "D"]
    scatter: Float64[np.ndarray, "D D"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "B D"]) -> "Moments":
        """Moments of one batch.

        Raises:
          ValueError: the batch is empty or holds values that are not finite.
        """
        if not len(features) or not np.isfinite(features).all():
            what = "hold values that are not finite" if len(features) else "are of no image"
            raise ValueError(f"the features {what}.")
        features = features.astype(np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merged(self, other: "Moments") -> "Moments":
        """Moments of both batches together, exact (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        difference = other.mean - self.mean
        between = np.outer(difference, difference) * (self.count * other.count / count)
        mean = self.mean + difference * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Float64[np.ndarray, "D D"]:
        """The unbiased covariance, divided by count - 1, as in pytorch-fid and ADM's evaluator.

        Raises:
          InputError: there is only one vector.
        """
        if self.count < 2:
            raise InputError("one image has no covariance; give two or more.")
        return self.scatter / (self.count - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """Features of one set of images."""

    moments: Moments
    kept: Float[np.ndarray, "K D"]  # features of images drawn at random, in random order
    probabilities: Float[np.ndarray, "N classes"] | None


def measure(
    extractor: FeatureExtractor, batches: Iterable[UInt8[np.ndarray, "B H W C"]], keep: int
) -> Measured:
    """Reads every batch once and holds the images of one batch at a time.

    Args:
      extractor: computes the features.
      batches: uint8 images, one or more in each batch. A batch smaller than the largest one before
        is padded, so that the extractor compiles once.
      keep: largest number of feature vectors to keep. Which vectors are kept depends on the order
        of the images, not on the size of the batches.

    Raises:
      InputError: there are no images.
      ValueError: a batch is not uint8 [B, H, W, C], or features are not finite.
    """
    moments, sample, probabilities, size = None, _Sample(keep), [], 0
    for images in batches:
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(
                f"a batch is {images.dtype} {list(images.shape)}; it must be uint8 [B, H, W, C] of "
                "one image or more."
            )
        size = max(size, len(images))
        padded = np.pad(images, ((0, size - len(images)), (0, 0), (0, 0), (0, 0)), mode="edge")
        x, p = (None if y is None else y[: len(images)] for y in extractor(padded))
        batch = Moments.of(x)
        moments = batch if moments is None else moments.merged(batch)
        sample.add(x)
        if p is not None:
            probabilities.append(p)
    if moments is None:
        raise InputError("there are no images to measure; give one or more.")
    return Measured(
        moments, sample.rows(), np.concatenate(probabilities) if probabilities else None
    )


class _Sample:
    """Draws `keep` rows of a stream without replacement: those with the smallest random keys."""

    def __init__(self, keep: int):
        self._keep, self._generator = keep, np.random.default_rng(0)
        self._rows: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        self._rows.append(rows)
        self._keys.append(self._generator.random(len(rows)))
        if sum(map(len, self._rows)) > 2 * self._keep:
            self._discard()

    def rows(self) -> np.ndarray:
        """The drawn rows in random order, so the first n rows are a random sample too."""
        self._discard()
        return self._rows[0]

    def _discard(self) -> None:
        keys, rows = np.concatenate(self._keys), np.concatenate(self._rows)
        smallest = np.argsort(keys)[: self._keep]
        self._keys, self._rows = [keys[smallest]], [rows[smallest]]
