"""Corruptions of test images at five strengths, after Hendrycks & Dietterich 2019.

ImageNet-C and CIFAR-10-C (arXiv:1903.12261) give a strength for images of 224 and of 32 pixels.
Here a strength is interpolated between the two, geometrically in the shorter side of the image.
Shift and occlusion are not among those corruptions; their strengths are shares of the image.
"""

import io
import math

import numpy as np
from etils import epy
from jaxtyping import UInt8
from PIL import Image

from gptv_jax.config.fields import FROM_ZERO, field, one_of
from gptv_jax.config.stages import CORRUPTIONS
from gptv_jax.data import records
from gptv_jax.data.images import Transform
from gptv_jax.data.records import Record, to_array, to_picture

with epy.lazy_imports():  # slow to import, and only some corruptions need it
    from scipy import ndimage

STRENGTHS = 5
SIDES = 32, 224  # pixels, of the images of CIFAR-10-C and of ImageNet-C
# Of each of the five strengths, for images of these sides: `make_cifar_c.py` and
# `make_imagenet_c.py` of https://github.com/hendrycks/robustness (ImageNet-C/create_c).
PUBLISHED = {
    # gaussian_noise: standard deviation, as a share of the range of values
    "noise": ((0.04, 0.06, 0.08, 0.09, 0.1), (0.08, 0.12, 0.18, 0.26, 0.38)),
    # gaussian_blur: standard deviation, in pixels
    "blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
    # jpeg_compression: quality
    "jpeg": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    # added to the value of hue, saturation and value, as a share of the range
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    # factor of the distance from the mean of each channel
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
}
# Of images of any size.
SHARES = {
    "shift": (1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16),  # of each side; rounded up to whole pixels
    "occlusion": (0.05, 0.1, 0.2, 0.3, 0.4),  # of the area; a grey rectangle of the image's shape
}
DIRECTIONS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
GREY = 0.5  # of the range of values, of an occlusion


class Corrupt(Transform):
    """Corrupts an image by one `kind` of corruption, at a strength of 1 to 5.

    What is random is drawn from the seed and the number of the example alone, in evaluation too,
    and is equal at every strength. Pixels have the values 0 .. levels-1. A shift moves boxes and
    label maps with the pixels, and what comes from outside is 0, of no class.
    """

    kind: str = field(accepted=one_of(*CORRUPTIONS))
    strength: int = field(1, (f"1 to {STRENGTHS}", lambda v: 1 <= v <= STRENGTHS))
    levels: int = field(256, ("2 to 256", lambda v: 2 <= v <= 256))
    seed: int = field(0, FROM_ZERO)

    def generator(self, number, rng=None):
        return np.random.default_rng((self.seed, CORRUPTIONS.index(self.kind), number))

    def __call__(self, record: Record, rng=None) -> Record:
        rng = self.generator(0) if rng is None else rng
        if self.kind == "shift":
            return self._shifted(record, rng)
        return {**record, "image": self.pixels(record["image"], rng)}

    def pixels(self, image: UInt8[np.ndarray, "*F H W C"], rng) -> UInt8[np.ndarray, "*F H W C"]:
        change = {
            "noise": self._noise,
            "blur": self._blur,
            "jpeg": self._jpeg,
            "brightness": self._brightness,
            "contrast": self._contrast,
            "occlusion": self._occlusion,
        }[self.kind]
        top = self.levels - 1
        values = change(image / np.float64(top), amount(self.kind, self.strength, image.shape), rng)
        return np.rint(np.clip(values, 0, 1) * top).astype(np.uint8)

    def _noise(self, x, deviation, rng):
        return x + deviation * rng.standard_normal(x.shape)

    def _blur(self, x, deviation, rng):
        del rng
        sides = (*[0] * (x.ndim - 3), deviation, deviation, 0)  # neither over frames nor channels
        return ndimage.gaussian_filter(x, sides, mode="nearest")

    def _jpeg(self, x, quality, rng):
        del rng
        frames = np.rint(255 * x).astype(np.uint8).reshape(-1, *x.shape[-3:])
        return np.stack([_compressed(frame, quality) for frame in frames]).reshape(x.shape) / 255

    def _brightness(self, x, added, rng):
        del rng
        value = x.max(axis=-1, keepdims=True)  # of hue, saturation and value
        brighter = np.clip(value + added, 0, 1)
        return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)

    def _contrast(self, x, factor, rng):
        del rng
        mean = x.mean(axis=(-3, -2), keepdims=True)
        return (x - mean) * factor + mean

    def _occlusion(self, x, share, rng):
        height, width = x.shape[-3:-1]
        rows, columns = (max(round(side * math.sqrt(share)), 1) for side in (height, width))
        # With a fixed share of the room, a larger rectangle covers every smaller one.
        top, left = (
            int(rng.random() * (side - part + 1))
            for side, part in ((height, rows), (width, columns))
        )
        x[..., top : top + rows, left : left + columns, :] = GREY
        return x

    def _shifted(self, record: Record, rng) -> Record:
        sides, share = records.shape(record), SHARES["shift"][self.strength - 1]
        signs = DIRECTIONS[rng.integers(len(DIRECTIONS))]
        top, left = (
            sign * math.ceil(share * side) for sign, side in zip(signs, sides, strict=True)
        )
        return records.crop(record, top, left, *sides)


def amount(kind: str, strength: int, shape: tuple[int, ...]) -> float:
    """What a strength, 1 to 5, means for an image of this shape, [..., H, W, C]: see the tables."""
    if kind in SHARES:
        return SHARES[kind][strength - 1]
    small, large = (column[strength - 1] for column in PUBLISHED[kind])
    near, far = SIDES
    share = np.clip(math.log(min(shape[-3:-1]) / near) / math.log(far / near), 0, 1)
    return float(small ** (1 - share) * large**share)


def _compressed(frame: UInt8[np.ndarray, "H W C"], quality: float) -> UInt8[np.ndarray, "H W C"]:
    """The pixels after JPEG of this quality."""
    with io.BytesIO() as file:
        to_picture(frame).save(file, "JPEG", quality=round(quality))
        with Image.open(file) as picture:
            return to_array(picture, frame.shape[-1])
