"""The transforms that a configuration can name, and the reading of its lists of transforms.

An entry of a list is a call with literal arguments, `"shift(pixels=1, keep=0.3)"`. To add a
transform, write a subclass of `Transform` and name it in `TRANSFORMS`.
"""

import ast
import dataclasses
import inspect
import math
from typing import ClassVar

import numpy as np
from PIL import Image

from gptv_jax.config import fields
from gptv_jax.config.fields import FROM_ZERO, POSITIVE, SHARE, field, one_of
from gptv_jax.data.augmentations import (
    Brightness,
    ColorBalance,
    Contrast,
    RandomAugment,
    Rotate,
)
from gptv_jax.data.images import Decode, Transform, to_array, to_picture
from gptv_jax.errors import InputError, cut, first_line, shorten

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
        return (2 * self.pixels + 1) ** 2

    def draw(self, rng: np.random.Generator) -> int:
        return 0 if rng.random() < self.keep else int(rng.integers(self.variants))

    def variant(self, image: np.ndarray, variant: int) -> np.ndarray:
        side = 2 * self.pixels + 1
        # Variants count from the middle of the square of shifts, so that 0 is no shift.
        down, right = divmod((variant + self.variants // 2) % self.variants, side)
        height, width = image.shape[:2]
        padded = np.pad(image, [(self.pixels, self.pixels)] * 2 + [(0, 0)])
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
        scale = self.size / min(image.shape[:2])
        height, width = (max(round(side * scale), self.size) for side in image.shape[:2])
        return _resize(image, height, width, self.method)


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
        return ResizeShort(size, self.method)(image, rng)


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
    padding: int = field(0, FROM_ZERO)

    def __call__(self, image, rng):
        image = np.pad(image, [(self.padding, self.padding)] * 2 + [(0, 0)], mode="reflect")
        top, left = (int(rng.integers(max(n - self.size, 0) + 1)) for n in image.shape[:2])
        return _crop(image, top, left, self.size)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(Transform):
    """Crops a random part of the image and resizes it to `size` x `size` (Szegedy et al. 2015).

    Where ten draws of area and ratio do not fit into the image, the middle square is cropped.
    """

    random: ClassVar = True
    size: int = field(accepted=POSITIVE)
    area: tuple[float, float] = field((0.08, 1.0), _range(1.0))  # share of the image's, from .. to
    ratio: tuple[float, float] = field((3 / 4, 4 / 3), _range(math.inf))  # width / height
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


@dataclasses.dataclass(frozen=True)
class Quantize(Transform):
    """Turns the values 0..255 into `levels` grey levels, 0 .. levels-1, each to the nearest one.

    Level k stands for the value k * 255 / (levels - 1), in which pictures of grey tokens show it.
    """

    levels: int = field(accepted=("2 to 256", lambda v: 2 <= v <= 256))

    def __call__(self, image, rng):
        return np.rint(image * ((self.levels - 1) / 255)).astype(np.uint8)


TRANSFORMS = {
    "decode": Decode,
    "resize": Resize,
    "resize_short": ResizeShort,
    "random_resize_short": RandomResizeShort,
    "center_crop": CenterCrop,
    "random_crop": RandomCrop,
    "random_resized_crop": RandomResizedCrop,
    "flip": Flip,
    "shift": Shift,
    "brightness": Brightness,
    "contrast": Contrast,
    "color_balance": ColorBalance,
    "normalize": Normalize,
    "quantize": Quantize,
    "rotate": Rotate,
    "random_augment": RandomAugment,
}


def parse(entry: str) -> Transform:
    """The transform that an entry names."""
    try:
        call = ast.parse(entry, mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        if call.func.id not in TRANSFORMS:
            raise ValueError("there is no such transform")
        transform = TRANSFORMS[call.func.id]
        arguments = [ast.literal_eval(a) for a in call.args]
        named = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        given = inspect.signature(transform).bind(*arguments, **named).arguments
        known = fields.by_name(transform)
        return transform(**{n: fields.checked(v, known[n], n) for n, v in given.items()})
    except (SyntaxError, AttributeError, TypeError, ValueError) as error:
        name = entry.partition("(")[0].strip()
        accepted = f"flip(), say, or another of {shorten(TRANSFORMS, room=140)}"
        if name in TRANSFORMS:
            accepted = f"{name}({_arguments(TRANSFORMS[name])})"
        problem = f"a list of transforms has {cut(entry, 50)!r} ({cut(first_line(error), 60)})"
        raise InputError(f"{problem}; it takes {accepted}.") from error


def written_out(entry: str) -> str:
    """The entry with the values of all its arguments, defaults included."""
    values = ", ".join(f"{name}={value!r}" for name, value in vars(parse(entry)).items())
    return f"{entry.partition('(')[0].strip()}({values})"


def check(training: tuple[str, ...], evaluation: tuple[str, ...]) -> None:
    """Checks that both lists can be read and that the list for evaluation is not random."""
    variants(training)
    random = [entry for entry in evaluation if parse(entry).random]
    if random:
        raise InputError(
            f"config.data.eval_transforms has {', '.join(random)}, which is random; evaluation "
            "takes transforms that give the same image every time."
        )


def variants(entries: tuple[str, ...]) -> int:
    """Number of variants that the transforms make of an image: 1, or as many as `shift` makes."""
    counts = [getattr(parse(entry), "variants", 1) for entry in entries]
    if sum(count > 1 for count in counts) > 1:
        raise InputError(
            f"the transforms are {', '.join(entries)}; only one of them may have variants."
        )
    return max(counts, default=1)


def _arguments(transform: type) -> str:
    return ", ".join(
        f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default!r}"
        for f in dataclasses.fields(transform)
    )


def _crop(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise InputError(
            f"an image has {height} x {width} pixels where a crop takes {size} x {size}; "
            f'put "resize_short({size})" before the crop.'
        )
    return image[top : top + size, left : left + size]


def _resize(image: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    resized = to_picture(image).resize((width, height), Image.Resampling[method.upper()])
    return to_array(resized, image.shape[-1])
