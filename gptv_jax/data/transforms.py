"""The transforms that a configuration can name, and the reading of its lists of transforms.

An entry of a list is a call with literal arguments, `"shift(pixels=1, keep=0.3)"`. To add a
transform, write a subclass of `Transform` and name it in `TRANSFORMS`.
"""

import ast
import dataclasses
import inspect

import numpy as np

from gptv_jax.config import fields
from gptv_jax.config.fields import field
from gptv_jax.data.augmentations import (
    Brightness,
    ColorBalance,
    Contrast,
    RandomAugment,
    Rotate,
)
from gptv_jax.data.geometry import (
    CenterCrop,
    Flip,
    FlipVertical,
    RandomCrop,
    RandomResizedCrop,
    RandomResizeShort,
    RandomScale,
    Resize,
    ResizeShort,
    Shift,
)
from gptv_jax.data.images import Decode, Transform
from gptv_jax.errors import InputError, cut, first_line, shorten


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class Quantize(Transform):
    """Turns the values 0..255 into `levels` grey levels, 0 .. levels-1, each to the nearest one.

    Level k stands for the value k * 255 / (levels - 1), in which pictures of grey tokens show it.
    """

    levels: int = field(accepted=("2 to 256", lambda v: 2 <= v <= 256))

    def pixels(self, image, rng):
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
    "flip_vertical": FlipVertical,
    "random_scale": RandomScale,
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


def parse_view(entry: str) -> list[Transform]:
    """The transforms of an entry such as "flip(1.0)|flip_vertical(1.0)", one after the other."""
    return [parse(each) for each in entry.split("|")]


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
