"""Transforms of geometry: they move everything that lies in the image; see `records`.

A `size` is one number of pixels, for squares, or height and width.
"""

import math
from typing import ClassVar

import numpy as np

from gptv_jax.config.data import PIXELS, height_and_width
from gptv_jax.config.fields import FROM_ZERO, POSITIVE, SHARE, field, one_of
from gptv_jax.data import records
from gptv_jax.data.images import GREY, Transform
from gptv_jax.data.records import Record
from gptv_jax.errors import InputError

METHODS = ("nearest", "bilinear", "bicubic", "lanczos")
METHOD = one_of(*METHODS)


def _range(most: float):
    words = "two numbers above 0" + (f" up to {most:g}" if most < math.inf else "")
    return f"{words}, the smaller first", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= most


class Resize(Transform):
    """Resizes to `size` pixels, with antialiasing; the aspect ratio is not kept."""

    size: int | tuple[int, ...] = field(accepted=PIXELS)
    method: str = field("bilinear", METHOD)

    def __call__(self, record, rng=None):
        return records.resize(record, *height_and_width(self.size), self.method)


class ResizeShort(Resize):
    """Resizes to the least image that covers `size`, with antialiasing; the aspect ratio is kept.

    Of one number, the shorter side gets `size` pixels.
    """

    def __call__(self, record, rng=None):
        sides, least = records.shape(record), height_and_width(self.size)
        scale = max(short / side for short, side in zip(least, sides, strict=True))
        height, width = (max(round(s * scale), n) for s, n in zip(sides, least, strict=True))
        return records.resize(record, height, width, self.method)


class RandomResizeShort(Transform):
    """Resizes the shorter side to `low` .. `high` pixels, both included (Chen et al. 2020)."""

    random: ClassVar = True
    low: int = field(256, POSITIVE)
    high: int = field(384, POSITIVE)
    method: str = field("bilinear", METHOD)

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError("low is more than high")

    def __call__(self, record, rng=None):
        size = int(rng.integers(self.low, self.high, endpoint=True))
        return ResizeShort(size, self.method)(record)


class CenterCrop(Transform):
    """Crops the middle `size` pixels."""

    needs_pixels: ClassVar = False
    size: int | tuple[int, ...] = field(accepted=PIXELS)

    def __call__(self, record, rng=None):
        (rows, columns), (height, width) = _sides(record, self.size)
        return records.crop(record, (rows - height) // 2, (columns - width) // 2, height, width)


class RandomCrop(Transform):
    """Pads each side with `padding` pixels by reflection, then crops any `size` pixels.

    An object of whose box less than the share `keep_area` stays is dropped.
    """

    random: ClassVar = True
    needs_pixels: ClassVar = False
    size: int | tuple[int, ...] = field(accepted=PIXELS)
    padding: int = field(0, FROM_ZERO)
    keep_area: float = field(0.0, SHARE)

    def __call__(self, record, rng=None):
        (rows, columns), (height, width) = _sides(record, self.size, self.padding)
        top = int(rng.integers(rows - height + 1)) - self.padding
        left = int(rng.integers(columns - width + 1)) - self.padding
        box = (top, left, height, width)
        return records.crop(record, *box, reflect=True, keep_area=self.keep_area)


class RandomResizedCrop(Transform):
    """Crops a random part of the image and resizes it to `size` (Szegedy et al. 2015).

    Where ten draws of area and ratio do not fit into the image, the middle square is cropped. An
    object of whose box less than the share `keep_area` stays is dropped.
    """

    random: ClassVar = True
    size: int | tuple[int, ...] = field(accepted=PIXELS)
    area: tuple[float, float] = field((0.08, 1.0), _range(1.0))  # share of the image's, from .. to
    ratio: tuple[float, float] = field((3 / 4, 4 / 3), _range(math.inf))  # width / height
    method: str = field("bilinear", METHOD)
    keep_area: float = field(0.0, SHARE)

    def __call__(self, record, rng=None):
        height, width = records.shape(record)
        for _ in range(10):
            area = rng.uniform(*self.area) * height * width
            ratio = np.exp(rng.uniform(*np.log(self.ratio)))
            h, w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                top, left = (int(rng.integers(room + 1)) for room in (height - h, width - w))
                break
        else:
            h = w = min(height, width)
            top, left = (height - h) // 2, (width - w) // 2
        part = records.crop(record, top, left, h, w, keep_area=self.keep_area)
        return records.resize(part, *height_and_width(self.size), self.method)


class Flip(Transform):
    """Mirrors left and right with a probability."""

    axis: ClassVar = 1
    needs_pixels: ClassVar = False
    probability: float = field(0.5, SHARE)

    @property
    def random(self) -> bool:
        return 0 < self.probability < 1

    def __call__(self, record, rng=None):
        drawn = 0.0 if rng is None else rng.random()  # without a generator nothing is random
        return records.mirror(record, self.axis) if drawn < self.probability else record


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
        return (2 * self.pixels + 1) ** 2

    def draw(self, rng: np.random.Generator) -> int:
        return 0 if rng.random() < self.keep else int(rng.integers(self.variants))

    def variant(self, record: Record, variant: int) -> Record:
        side = 2 * self.pixels + 1
        # Variants count from the middle of the square of shifts, so that 0 is no shift.
        down, right = divmod((variant + self.variants // 2) % self.variants, side)
        top, left = self.pixels - down, self.pixels - right
        moved = records.crop(record, top, left, *records.shape(record))
        return {**moved, "variant": np.int32(variant)}

    def __call__(self, record, rng=None):
        return self.variant(record, self.draw(rng))


class FlipVertical(Flip):
    """Mirrors top and bottom with a probability."""

    axis = 0


class RandomScale(Transform):
    """Resizes a window to `size`, or to the image's size (None).

    The window is higher and wider than the image by one factor `scale`, and lies anywhere inside
    the image, or around the image, with pixels of the value `fill` beyond it. An object of whose
    box less than the share `keep_area` stays is dropped.
    """

    random: ClassVar = True
    scale: tuple[float, float] = field((0.72, 1.08), _range(math.inf))
    size: int | tuple[int, ...] | None = field(None, PIXELS)
    fill: int = field(0, GREY)
    method: str = field("bilinear", METHOD)
    keep_area: float = field(0.0, SHARE)

    def __call__(self, record, rng=None):
        sides, factor = records.shape(record), rng.uniform(*self.scale)
        window = [max(round(side * factor), 1) for side in sides]
        room = [side - part for side, part in zip(sides, window, strict=True)]
        corner = [int(rng.integers(min(r, 0), max(r, 0), endpoint=True)) for r in room]
        options = {"fill": self.fill, "keep_area": self.keep_area}
        part = records.crop(record, *corner, *window, **options)
        return records.resize(part, *height_and_width(self.size or sides), self.method)


def _sides(record: Record, size: int | tuple[int, ...], padding: int = 0) -> list[tuple[int, ...]]:
    """Height and width of the padded image, and of a crop; InputError if the crop is larger."""
    rows, columns = (side + 2 * padding for side in records.shape(record))
    height, width = height_and_width(size)
    if height > rows or width > columns:
        raise InputError(
            f"an image has {rows} x {columns} pixels where a crop takes {height} x {width}; "
            f'put "resize_short({size})" before the crop.'
        )
    return [(rows, columns), (height, width)]
