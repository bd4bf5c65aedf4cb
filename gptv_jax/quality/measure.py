"""Many images, read once: the moments of their features, and some of the features themselves."""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, UInt8

from gptv_jax.errors import InputError
from gptv_jax.quality.features import Features
from gptv_jax.quality.frechet import Moments


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """What is known of a set of images."""

    moments: Moments
    kept: Float[np.ndarray, "K D"]  # of images drawn at random, in random order
    probabilities: Float[np.ndarray, "N classes"] | None  # of the classes


def measure(
    features: Features, batches: Iterable[UInt8[np.ndarray, "B H W C"]], keep: int
) -> Measured:
    """Reads all batches, the features of one at a time.

    Args:
      features: what to measure by.
      batches: uint8 images, one or more in each. Those that are smaller than the largest before
        them are filled up, so that features compile once.
      keep: feature vectors to keep at most. Which ones depends on the order of the images, not on
        the size of the batches.

    Raises:
      InputError: there are no images.
      ValueError: they are not uint8 [B, H, W, C], or their features are not finite.
    """
    moments, sample, probabilities, size = None, _Sample(keep), [], 0
    for images in batches:
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(
                f"a batch is {images.dtype} {list(images.shape)}; it must be uint8 [B, H, W, C] of "
                "one image or more."
            )
        size = max(size, len(images))
        filled = np.pad(images, ((0, size - len(images)), (0, 0), (0, 0), (0, 0)), mode="edge")
        x, p = (None if y is None else y[: len(images)] for y in features(filled))
        batch = Moments.of(x)
        moments = batch if moments is None else moments.merged(batch)
        sample.add(x)
        if p is not None:
            probabilities.append(p)
    if moments is None:
        raise InputError("there are no images to measure; give one or more.")
    classes = np.concatenate(probabilities) if probabilities else None
    return Measured(moments, sample.rows, classes)


class _Sample:
    """Rows drawn without replacement from a stream: those with the least of random numbers."""

    def __init__(self, keep: int):
        self._keep, self._generator = keep, np.random.default_rng(0)
        self._rows: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Some more of the stream."""
        self._rows.append(rows)
        self._keys.append(self._generator.random(len(rows)))
        if sum(map(len, self._rows)) > 2 * self._keep:
            self._thin()

    @property
    def rows(self) -> np.ndarray:
        """In random order, so that any first ones of them are a sample too."""
        self._thin()
        return self._rows[0]

    def _thin(self) -> None:
        keys, rows = np.concatenate(self._keys), np.concatenate(self._rows)
        least = np.argsort(keys)[: self._keep]
        self._keys, self._rows = [keys[least]], [rows[least]]
