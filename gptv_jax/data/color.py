"""Transforms of what colour pixels have; `transforms.py` names them."""

import dataclasses
from typing import ClassVar

import numpy as np
from PIL import ImageEnhance

from gptv_jax.config.fields import SHARE, field
from gptv_jax.data.images import to_array, to_picture


@dataclasses.dataclass(frozen=True)
class _Jitter:
    random: ClassVar = True
    of_pixels: ClassVar = True
    enhance: ClassVar = None
    amount: float = field(0.4, SHARE)

    def __call__(self, image, rng):
        """The image between `1 - amount` and `1 + amount` times as strong; 1 is unchanged."""
        factor = rng.uniform(1 - self.amount, 1 + self.amount)
        return to_array(self.enhance(to_picture(image)).enhance(factor), image.shape[-1])


class Brightness(_Jitter):
    """Makes the image darker or brighter by up to `amount`; 0 would be black."""

    enhance = ImageEnhance.Brightness


class Contrast(_Jitter):
    """Weakens or strengthens contrast by up to `amount`; 0 would be the mean grey."""

    enhance = ImageEnhance.Contrast


class ColorBalance(_Jitter):
    """Weakens or strengthens colour by up to `amount`; 0 would be a grey image."""

    enhance = ImageEnhance.Color


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Stretches each image so that the share `clip` of its values lies at 0 and at 255 each.

    The scale that a network would want, [-1, 1], is the palette's affair: tokens have no scale.
    """

    random: ClassVar = False
    of_pixels: ClassVar = True
    clip: float = field(0.0, ("0 up to but not 0.5", lambda v: 0 <= v < 0.5))

    def __call__(self, image, rng):
        """Uint8 [H, W, C]; an image of one value is left as it is."""
        low, high = np.quantile(image, [self.clip, 1 - self.clip])
        if low == high:
            return image
        return np.rint((np.clip(image, low, high) - low) * (255 / (high - low))).astype(np.uint8)
