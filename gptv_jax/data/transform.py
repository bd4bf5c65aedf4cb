"""The base class of transforms."""

import abc
from typing import ClassVar

import numpy as np


class Transform(abc.ABC):
    """A step that turns an image, uint8 [H, W, C], into a new one; see `transforms.TRANSFORMS`.

    Subclasses are dataclasses; their fields are the arguments of the entry in the configuration.
    """

    random: ClassVar[bool] = False  # whether the generator is used; not allowed in evaluation
    # False: the transform only moves pixels, so that it may move tokens, uint16 [rows, columns, 1].
    needs_pixels: ClassVar[bool] = True

    @abc.abstractmethod
    def __call__(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Transforms one image; `rng` is the generator of this example, None in evaluation."""
