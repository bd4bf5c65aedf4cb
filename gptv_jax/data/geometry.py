"""Transforms of where pixels lie: crops, sizes, flips and shifts; `transforms.py` names them."""

import dataclasses
import math
from typing import ClassVar

import numpy as np
from PIL import Image

from gptv_jax.config.fields import NOT_NEGATIVE, POSITIVE, SHARE, field, one_of
from gptv_jax.data.images import to_array, to_picture
from gptv_jax.errors import InputError

METHODS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
METHOD = one_of(*METHODS)


def _range(most: float):
    words = "two numbers above 0" + (f" up to {most:g}" if most < math.inf else "")
    return f"{words}, the smaller first", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= most


@dataclasses.dataclass(frozen=True)
class Shift:
    """Moves the image by up to `pixels` in each direction and fills with 0.

    With probability `keep` it stays where it is, else every shift (that one too) is equally
    likely. The variant names the shift, 0 being none: distribution augmentation (Jun et al. 2020)
    gives each a start vector of its own.
    """

    random: ClassVar = True
    of_pixels: ClassVar = False
    pixels: int = field(1, POSITIVE)
    keep: float = field(0.0, SHARE)

    @property
    def variants(self) -> int:
        """Number of shifts."""
        return (2 * self.pixels + 1) ** 2

    def draw(self, rng: np.random.Generator) -> int:
        """The variant to make of the next image."""
        return 0 if rng.random() < self.keep else int(rng.integers(self.variants))

    def variant(self, image: np.ndarray, variant: int) -> np.ndarray:
        """That variant of the image."""
        side = 2 * self.pixels + 1
        # Variants count from the middle of the square of shifts, so that 0 is no shift.
        down, right = divmod((variant + self.variants // 2) % self.variants, side)
        height, width = image.shape[:2]
        padded = _padded(image, self.pixels, mode="constant")
        top, left = 2 * self.pixels - down, 2 * self.pixels - right
        return padded[top : top + height, left : left + width]

    def __call__(self, image, rng):
        """The image moved; `draw` and `variant` also tell where to."""
        return self.variant(image, self.draw(rng))


@dataclasses.dataclass(frozen=True)
class Resize:
    """To `size` x `size` pixels, whatever the shape was; antialiased."""

    random: ClassVar = False
    of_pixels: ClassVar = True
    size: int = field(accepted=POSITIVE)
    method: str = field("bilinear", METHOD)

    def __call__(self, image, rng):
        """Uint8 [size, size, C]."""
        return _resized(image, self.size, self.size, self.method)


@dataclasses.dataclass(frozen=True)
class ResizeShort(Resize):
    """The shorter side to `size` pixels, the other in proportion; antialiased."""

    def __call__(self, image, rng):
        """Uint8 [H, W, C], min(H, W) being `size`."""
        return _resized_short(image, self.size, self.method)


@dataclasses.dataclass(frozen=True)
class RandomResizeShort:
    """The shorter side to a size from `low` to `high`, both included (Chen et al. 2020)."""

    random: ClassVar = True
    of_pixels: ClassVar = True
    low: int = field(256, POSITIVE)
    high: int = field(384, POSITIVE)
    method: str = field("bilinear", METHOD)

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError("low is more than high")

    def __call__(self, image, rng):
        """Uint8 [H, W, C]."""
        size = int(rng.integers(self.low, self.high, endpoint=True))
        return _resized_short(image, size, self.method)


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """The middle `size` x `size` pixels."""

    random: ClassVar = False
    of_pixels: ClassVar = False
    size: int = field(accepted=POSITIVE)

    def __call__(self, image, rng):
        """Uint8 [size, size, C]."""
        height, width = image.shape[:2]
        return _cropped(image, (height - self.size) // 2, (width - self.size) // 2, self.size)


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Any `size` x `size` pixels, after `padding` pixels were added on each side by reflection."""

    random: ClassVar = True
    of_pixels: ClassVar = False
    size: int = field(accepted=POSITIVE)
    padding: int = field(0, NOT_NEGATIVE)

    def __call__(self, image, rng):
        """Uint8 [size, size, C]."""
        image = _padded(image, self.padding, mode="reflect")
        top, left = (int(rng.integers(max(n - self.size, 0) + 1)) for n in image.shape[:2])
        return _cropped(image, top, left, self.size)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, `area` of it with sides in `ratio`, resized to `size` x `size`.

    Szegedy et al. 2015; where ten draws do not fit into the image, its middle square is taken.
    """

    random: ClassVar = True
    of_pixels: ClassVar = True
    size: int = field(accepted=POSITIVE)
    # Share of the image, from .. to.
    area: tuple[float, float] = field((0.08, 1.0), _range(1.0))
    # Width over height, from .. to.
    ratio: tuple[float, float] = field((3 / 4, 4 / 3), _range(math.inf))
    method: str = field("bilinear", METHOD)

    def __call__(self, image, rng):
        """Uint8 [size, size, C]."""
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
        return _resized(image[top : top + h, left : left + w], self.size, self.size, self.method)


@dataclasses.dataclass(frozen=True)
class Flip:
    """Mirrors left and right, with a probability."""

    random: ClassVar = True
    of_pixels: ClassVar = False
    probability: float = field(0.5, SHARE)

    def __call__(self, image, rng):
        """The image or its mirror image."""
        return image[:, ::-1] if rng.random() < self.probability else image


def _padded(image: np.ndarray, margin: int, mode: str) -> np.ndarray:
    return np.pad(image, [(margin, margin), (margin, margin), (0, 0)], mode=mode)


def _cropped(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    if min(image.shape[:2]) < size:
        shape = " x ".join(map(str, image.shape[:2]))
        raise InputError(
            f"an image has {shape} pixels where a crop takes {size} x {size}; "
            f'put "resize_short({size})" before the crop.'
        )
    return image[top : top + size, left : left + size]


def _resized_short(image: np.ndarray, size: int, method: str) -> np.ndarray:
    height, width = image.shape[:2]
    scale = size / min(height, width)
    return _resized(
        image, max(round(height * scale), size), max(round(width * scale), size), method
    )


def _resized(image: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    resized = to_picture(image).resize((width, height), METHODS[method], reducing_gap=None)
    return to_array(resized, image.shape[-1])
