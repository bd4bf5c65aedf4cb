"""What happens to an image before it becomes tokens, each step a named entry of the config.

An entry is written as a call with literal arguments, `"shift(pixels=1, keep=0.3)"`. A transform
takes an image, uint8 [H, W, C], and a generator of its own, so the result depends on the seed and
the element's position alone, not on workers or hosts. Those that move pixels about without mixing
them (`of_pixels` False) act on grids of tokens as well, uint16 [rows, columns, 1].
"""

import ast
import dataclasses
import inspect
from typing import Protocol, runtime_checkable

import numpy as np

from gptv_jax.config import fields
from gptv_jax.data import color, geometry
from gptv_jax.data.images import Decode
from gptv_jax.errors import InputError, first_line


@runtime_checkable
class Transform(Protocol):
    """A step of the list."""

    random: bool  # whether the generator is used; elsewhere than in training it must not be
    of_pixels: bool  # whether it needs pixels, where grids of tokens will not do

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """A new image."""


TRANSFORMS = {
    "decode": Decode,
    "resize": geometry.Resize,
    "resize_short": geometry.ResizeShort,
    "random_resize_short": geometry.RandomResizeShort,
    "center_crop": geometry.CenterCrop,
    "random_crop": geometry.RandomCrop,
    "random_resized_crop": geometry.RandomResizedCrop,
    "flip": geometry.Flip,
    "shift": geometry.Shift,
    "brightness": color.Brightness,
    "contrast": color.Contrast,
    "color_balance": color.ColorBalance,
    "normalize": color.Normalize,
}


def parse(entry: str) -> Transform | Decode:
    """The transform that an entry of a list describes.

    Raises:
      InputError: not a call of a known transform with literal arguments that it takes.
    """
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
        accepted = "; ".join(f"{name}({_arguments(t)})" for name, t in TRANSFORMS.items())
        reason = first_line(error).rstrip(".")
        raise InputError(
            f"a list of transforms has {entry!r} ({reason}); an entry is one of: {accepted}."
        ) from error


def written_out(entry: str) -> str:
    """The same entry with every argument, those that were left to their defaults too."""
    values = vars(parse(entry)).items()
    name = entry.partition("(")[0].strip()
    return f"{name}({', '.join(f'{field}={value!r}' for field, value in values)})"


def check(training: tuple[str, ...], evaluation: tuple[str, ...]) -> None:
    """Whether the lists can be read, and evaluation sees the same images every time.

    Raises:
      InputError: they cannot, or it does not.
    """
    variants(training)
    random = [entry for entry in evaluation if parse(entry).random]
    if random:
        raise InputError(
            f"config.data.eval_transforms has {', '.join(random)}, which is random; it takes what "
            "gives the same image every time."
        )


def variants(entries: tuple[str, ...]) -> int:
    """Start vectors that a list of entries can tell apart.

    Raises:
      InputError: more than one entry has variants.
    """
    counts = [getattr(parse(entry), "variants", 1) for entry in entries]
    if sum(count > 1 for count in counts) > 1:
        raise InputError(
            f"the transforms are {', '.join(entries)}; only one of them may have variants."
        )
    return max(counts, default=1)


def _arguments(transform: type) -> str:
    shown = []
    for field in dataclasses.fields(transform):
        needed = field.default is dataclasses.MISSING
        shown.append(field.name if needed else f"{field.name}={field.default!r}")
    return ", ".join(shown)
