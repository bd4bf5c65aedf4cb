"""Transforms that change the colours of pixels."""

import dataclasses
from typing import ClassVar

import numpy as np
from PIL import ImageEnhance

from gptv_jax.config.fields import SHARE, field
from gptv_jax.data.images import to_array, to_picture
from gptv_jax.data.transform import Transform


@dataclasses.dataclass(frozen=True)
class _Jitter(Transform):
    """Scales a property of the image by a factor between `1 - amount` and `1 + amount`."""

    random: ClassVar = True
    enhance: ClassVar = None  # Pillow's class; factor 1 leaves the image unchanged
    amount: float = field(0.4, SHARE)

    def __call__(self, image, rng):
        factor = rng.uniform(1 - self.amount, 1 + self.amount)
        return to_array(self.enhance(to_picture(image)).enhance(factor), image.shape[-1])


class Brightness(_Jitter):
    """Makes the image darker or brighter by up to `amount`; factor 0 would be black."""

    enhance = ImageEnhance.Brightness


class Contrast(_Jitter):
    """Changes the contrast by up to `amount`; factor 0 would be the mean grey."""

    enhance = ImageEnhance.Contrast


class ColorBalance(_Jitter):
    """Changes the saturation by up to `amount`; factor 0 would be a grey image."""

    enhance = ImageEnhance.Color


@dataclasses.dataclass(frozen=True)
class Normalize(Transform):
    """Stretches each image's values to 0..255; a share `clip` of them is clipped at either end.

    An image of a single value is left as it is.
    """

    clip: float = field(0.0, ("0 up to but not 0.5", lambda v: 0 <= v < 0.5))

    def __call__(self, image, rng):
        low, high = np.quantile(image, [self.clip, 1 - self.clip])
        if low == high:
            return image
        return np.rint((np.clip(image, low, high) - low) * (255 / (high - low))).astype(np.uint8)
