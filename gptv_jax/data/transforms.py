"""The transforms of colour, and the reading of the configuration's lists of transforms.

An entry of a list is a call with literal arguments, `"shift(pixels=1, keep=0.3)"`. To add a
transform, write a subclass of `Transform`, here or in data/geometry.py.
"""

import ast
import dataclasses
import inspect
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from gptv_jax.config import fields
from gptv_jax.config.fields import POSITIVE, SHARE, field, one_of
from gptv_jax.data import corruptions as corruptions  # whose transform has a name
from gptv_jax.data import geometry as geometry  # whose transforms have names
from gptv_jax.data.filters import FILTERS
from gptv_jax.data.images import GREY, Decode, Transform
from gptv_jax.data.records import to_array, to_picture
from gptv_jax.errors import InputError, cut, first_line, shorten

TRANSFORMS = Transform.named  # by the names of entries


class _Jitter(Transform):
    """Scales a property of the image by a factor between `1 - amount` and `1 + amount`."""

    random: ClassVar = True
    enhance: ClassVar = None  # Pillow's class; factor 1 leaves the image unchanged
    amount: float = field(0.4, SHARE)

    def pixels(self, image, rng):
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


class Normalize(Transform):
    """Stretches each image's values to 0..255; a share `clip` of them is clipped at either end.

    An image of a single value is left as it is.
    """

    clip: float = field(0.0, ("0 up to but not 0.5", lambda v: 0 <= v < 0.5))

    def pixels(self, image, rng):
        low, high = np.quantile(image, [self.clip, 1 - self.clip])
        if low == high:
            return image
        return np.rint((np.clip(image, low, high) - low) * (255 / (high - low))).astype(np.uint8)


class Quantize(Transform):
    """Turns the values 0..255 into `levels` grey levels, 0 .. levels-1, each to the nearest one.

    Level k stands for the value k * 255 / (levels - 1), in which pictures of grey tokens show it.
    """

    levels: int = field(accepted=("2 to 256", lambda v: 2 <= v <= 256))

    def pixels(self, image, rng):
        return np.rint(image * ((self.levels - 1) / 255)).astype(np.uint8)


class Rotate(Transform):
    """Rotates about the centre, by up to `degrees` to either side.

    Pixels from outside the image get the value `fill`.
    """

    random: ClassVar = True
    in_place: ClassVar = False
    degrees: float = field(15.0, ("more than 0, up to 180", lambda v: 0 < v <= 180))
    fill: int = field(0, GREY)
    method: str = field("bilinear", one_of("nearest", "bilinear", "bicubic"))

    def pixels(self, image, rng):
        picture, method = to_picture(image), Image.Resampling[self.method.upper()]
        angle, fill = rng.uniform(-self.degrees, self.degrees), _filling(picture, self.fill)
        return to_array(picture.rotate(angle, method, fillcolor=fill), image.shape[-1])


class RandomAugment(Transform):
    """RandAugment (Cubuk et al. 2020, arXiv:1909.13719): `n` random operations, one after another.

    Each operation is drawn from the paper's 14 (`OPERATIONS`); all have one `magnitude`, 0 to 10.
    Pixels from outside the image get the value `fill`.
    """

    random: ClassVar = True
    in_place: ClassVar = False
    n: int = field(2, POSITIVE)
    magnitude: float = field(9.0, ("0 to 10", lambda v: 0 <= v <= 10))
    fill: int = field(128, GREY)

    def pixels(self, image, rng):
        picture, operations = to_picture(image), list(OPERATIONS.values())
        filling = _filling(picture, self.fill)
        for number in rng.integers(len(operations), size=self.n):
            strength = self.magnitude / 10 * rng.choice((-1, 1))
            picture = operations[number](picture, strength, filling)
        return to_array(picture, image.shape[-1])


def _filling(picture: Image.Image, value: int) -> int | tuple[int, ...]:
    return (value,) * 3 if picture.mode == "RGB" else value


def _enhance(kind: type):
    return lambda picture, strength, fill: kind(picture).enhance(1 + 0.9 * strength)


def _affine(place: int, amount: float):
    """Sets one entry of Pillow's 2 x 3 matrix; a move (entry 2 or 5) is a share of the size."""

    def apply(picture: Image.Image, strength: float, fill) -> Image.Image:
        matrix, sizes = [1, 0, 0, 0, 1, 0], {2: picture.width, 5: picture.height}
        matrix[place] = strength * amount * sizes.get(place, 1)
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix, fillcolor=fill)

    return apply


# RandAugment's operations: of a picture, a strength of -1 to 1, and the value for pixels from
# outside. AutoAugment gives the ranges at strength 1 (Cubuk et al. 2019, arXiv:1805.09501,
# table 6), to which RandAugment refers; where a range has one side, the sign does not count.
OPERATIONS = {
    "identity": lambda picture, strength, fill: picture,
    "auto_contrast": lambda picture, strength, fill: ImageOps.autocontrast(picture),
    "equalize": lambda picture, strength, fill: ImageOps.equalize(picture),
    "rotate": lambda picture, strength, fill: picture.rotate(30 * strength, fillcolor=fill),
    "solarize": lambda picture, strength, fill: ImageOps.solarize(
        picture, round(256 * (1 - abs(strength)))
    ),
    "color": _enhance(ImageEnhance.Color),
    "posterize": lambda picture, strength, fill: ImageOps.posterize(
        picture, 8 - round(4 * abs(strength))
    ),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(1, 0.3),
    "shear_y": _affine(3, 0.3),
    "translate_x": _affine(2, 150 / 331),
    "translate_y": _affine(5, 150 / 331),
}


def parse(entry: str) -> Transform:
    """The transform, or the filter, that an entry names."""
    named = TRANSFORMS | FILTERS
    try:
        call = ast.parse(entry, mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError("an entry is one transform")
        if call.func.id not in named:
            raise ValueError("there is no such transform")
        transform = named[call.func.id]
        arguments = [ast.literal_eval(a) for a in call.args]
        by_name = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        given = inspect.signature(transform).bind(*arguments, **by_name).arguments
        known = fields.by_name(transform)
        return transform(**{n: fields.checked(v, known[n], n) for n, v in given.items()})
    except (SyntaxError, AttributeError, TypeError, ValueError) as error:
        name = entry.partition("(")[0].strip()
        accepted = f"flip(), say, or another of {shorten(named, room=140)}"
        if name in named:
            accepted = f"{name}({_arguments(named[name])})"
        problem = f"a list of transforms has {cut(entry, 50)!r} ({cut(first_line(error), 60)})"
        raise InputError(f"{problem}; it takes {accepted}.") from error


def with_decode(entries: Sequence[str], channels: int) -> list[Transform]:
    """The transforms from an image file on; the first one decodes the file.

    Where no entry decodes, as of arrays, the image gets so many `channels`.
    """
    steps = [parse(entry) for entry in entries]
    return steps if steps[:1] and isinstance(steps[0], Decode) else [Decode(channels), *steps]


def parse_views(entries: Sequence[str], name: str) -> list[list[Transform]]:
    """The transforms of each entry, such as "flip(1.0)|flip_vertical(1.0)", one after the other.

    Raises InputError, which calls the list `name`: an entry cannot be read, or is random.
    """
    try:
        views = [[parse(step) for step in entry.split("|")] for entry in entries]
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if wrong := [e for e, view in zip(entries, views, strict=True) if any(s.random for s in view)]:
        raise InputError(
            f"{name} has {wrong[0]}, which is random; a vote takes transforms that give the same "
            "image every time, such as flip(1.0)."
        )
    return views


def corrupted(
    entries: Sequence[str], kind: str, strength: int, levels: int, seed: int
) -> tuple[str, ...]:
    """The transforms of evaluation with a corruption of the images that they make.

    Images have the values 0 .. levels-1. Where the last entry makes grey levels of 256 values, the
    corruption stands before that entry, as images are corrupted before they are read.
    """
    *others, last = entries or ("",)
    late = bool(last) and isinstance(parse(last), Quantize)
    before, after = (others, (last,)) if late else (entries, ())
    values = f"levels={256 if late else levels}, seed={seed}"
    return (*before, f"corrupt({kind!r}, {strength}, {values})", *after)


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
