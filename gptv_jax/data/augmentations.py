"""Random changes of colour and geometry that Pillow computes; see `transforms.TRANSFORMS`."""

import dataclasses
from typing import ClassVar

from PIL import Image, ImageEnhance, ImageOps

from gptv_jax.config.fields import POSITIVE, SHARE, field, one_of
from gptv_jax.data.images import GREY, Transform
from gptv_jax.data.records import to_array, to_picture


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
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
# outside. The ranges at strength 1 are those of AutoAugment (Cubuk et al. 2019, arXiv:1805.09501,
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
