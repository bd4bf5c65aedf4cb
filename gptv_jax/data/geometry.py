"""Transforms that move pixels: crops, resizes, flips and shifts."""

import dataclasses
import math
from typing import ClassVar

import numpy as np
from PIL import Image

from gptv_jax.config.fields import NOT_NEGATIVE, POSITIVE, SHARE, field, one_of
from gptv_jax.data.images import to_array, to_picture
from gptv_jax.data.transform import Transform
from gptv_jax.errors import InputError

METHODS = ("nearest", "bilinear", "bicubic", "lanczos")
METHOD = one_of(*METHODS)


def _range(most: float):
    words = "two numbers above 0" + (f" up to {most:g}" if most < math.inf else "")
    return f"{words}, the smaller first", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= most


@dataclasses.dataclass(frozen=True)
class Shift(Transform):
    """Moves the image by up to `pixels` in each direction and fills the border with 0.

    With probability `keep` the image stays where it is; otherwise every shift, no shift included,
    is equally likely. Each shift is a variant with a number, 0 for no shift: in distribution
    augmentation (Jun et al. 2020) each variant has a start vector.
    """

    random: ClassVar = True
    needs_pixels: ClassVar = False
    pixels: int = field(1, POSITIVE)
    keep: float = field(0.0, SHARE)

    @property
    def variants(self) -> int:
        """Number of shifts."""
        return (2 * self.pixels + 1) ** 2

    def draw(self, rng: np.random.Generator) -> int:
        """Draws the variant for the next image."""
        return 0 if rng.random() < self.keep else int(rng.integers(self.variants))

    def variant(self, image: np.ndarray, variant: int) -> np.ndarray:
        """The image, shifted as the number `variant` says."""
        side = 2 * self.pixels + 1
        # Variants count from the middle of the square of shifts, so that 0 is no shift.
        down, right = divmod((variant + self.variants // 2) % self.variants, side)
        height, width = image.shape[:2]
        padded = _pad(image, self.pixels, mode="constant")
        top, left = 2 * self.pixels - down, 2 * self.pixels - right
        return padded[top : top + height, left : left + width]

    def __call__(self, image, rng):
        return self.variant(image, self.draw(rng))


@dataclasses.dataclass(frozen=True)
class Resize(Transform):
    """Resizes to `size` x `size` pixels, with antialiasing; the aspect ratio is not kept."""

    size: int = field(accepted=POSITIVE)
    method: str = field("bilinear", METHOD)

    def __call__(self, image, rng):
        return _resize(image, self.size, self.size, self.method)


@dataclasses.dataclass(frozen=True)
class ResizeShort(Resize):
    """Resizes the shorter side to `size` pixels, with antialiasing; the aspect ratio is kept."""

    def __call__(self, image, rng):
        return _resize_short(image, self.size, self.method)


@dataclasses.dataclass(frozen=True)
class RandomResizeShort(Transform):
    """Resizes the shorter side to `low` .. `high` pixels, both included (Chen et al. 2020)."""

    random: ClassVar = True
    low: int = field(256, POSITIVE)
    high: int = field(384, POSITIVE)
    method: str = field("bilinear", METHOD)

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError("low is more than high")

    def __call__(self, image, rng):
        size = int(rng.integers(self.low, self.high, endpoint=True))
        return _resize_short(image, size, self.method)


@dataclasses.dataclass(frozen=True)
class CenterCrop(Transform):
    """Crops the middle `size` x `size` pixels."""

    needs_pixels: ClassVar = False
    size: int = field(accepted=POSITIVE)

    def __call__(self, image, rng):
        height, width = image.shape[:2]
        return _crop(image, (height - self.size) // 2, (width - self.size) // 2, self.size)


@dataclasses.dataclass(frozen=True)
class RandomCrop(Transform):
    """Pads each side with `padding` pixels by reflection, then crops any `size` x `size` pixels."""

    random: ClassVar = True
    needs_pixels: ClassVar = False
    size: int = field(accepted=POSITIVE)
    padding: int = field(0, NOT_NEGATIVE)

    def __call__(self, image, rng):
        image = _pad(image, self.padding, mode="reflect")
        top, left = (int(rng.integers(max(n - self.size, 0) + 1)) for n in image.shape[:2])
        return _crop(image, top, left, self.size)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(Transform):
    """Crops a random part of the image and resizes it to `size` x `size` (Szegedy et al. 2015).

    Where ten draws of area and ratio do not fit into the image, the middle square is cropped.
    """

    random: ClassVar = True
    size: int = field(accepted=POSITIVE)
    # Share of the image's area, from .. to.
    area: tuple[float, float] = field((0.08, 1.0), _range(1.0))
    # Width over height, from .. to.
    ratio: tuple[float, float] = field((3 / 4, 4 / 3), _range(math.inf))
    method: str = field("bilinear", METHOD)

    def __call__(self, image, rng):
        height, width = image.shape[:2]
        for _ in range(10):
            area = rng.uniform(*self.area) * height * width
            ratio = np.exp(rng.uniform(*np.log(self.ratio)))
            h, w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                break
        else:
            h = w = min(height, width)
            top, left = (height - h) // 2, (width - w) // 2
        return _resize(image[top : top + h, left : left + w], self.size, self.size, self.method)


@dataclasses.dataclass(frozen=True)
class Flip(Transform):
    """Mirrors left and right with a probability."""

    random: ClassVar = True
    needs_pixels: ClassVar = False
    probability: float = field(0.5, SHARE)

    def __call__(self, image, rng):
        return image[:, ::-1] if rng.random() < self.probability else image


def _pad(image: np.ndarray, margin: int, mode: str) -> np.ndarray:
    return np.pad(image, [(margin, margin), (margin, margin), (0, 0)], mode=mode)


def _crop(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise InputError(
            f"an image has {height} x {width} pixels where a crop takes {size} x {size}; "
            f'put "resize_short({size})" before the crop.'
        )
    return image[top : top + size, left : left + size]


def _resize_short(image: np.ndarray, size: int, method: str) -> np.ndarray:
    height, width = image.shape[:2]
    scale = size / min(height, width)
    height, width = max(round(height * scale), size), max(round(width * scale), size)
    return _resize(image, height, width, method)


def _resize(image: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    resampling = Image.Resampling[method.upper()]
    resized = to_picture(image).resize((width, height), resampling, reducing_gap=None)
    return to_array(resized, image.shape[-1])
