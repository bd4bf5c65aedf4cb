"""What happens to an image before it becomes tokens, each step a named entry of the config.

An entry is written as a call with literal arguments, `"shift(pixels=1, keep=0.3)"`. A transform
takes an element `{"image", "label", "variant"}` and a generator of its own, so the result depends
on the seed and the element's position alone, not on workers or hosts.
"""

import ast
import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np

from gptv_jax import config as config_lib


@runtime_checkable
class Transform(Protocol):
    """A step of the list."""

    variants: int  # kinds of result it tells apart in element["variant"]; 1: it does not

    def __call__(self, element: dict, rng: np.random.Generator) -> dict:
        """A new element."""


@dataclasses.dataclass(frozen=True)
class Shift:
    """Moves the image by up to `pixels` in each direction and fills with 0.

    With probability `keep` it stays where it is, else every shift (that one too) is equally
    likely. The variant names the shift, 0 being none: distribution augmentation (Jun et al. 2020)
    gives each a start vector of its own.
    """

    pixels: int = 1
    keep: float = 0.0

    def __post_init__(self):
        if self.pixels < 1 or not 0 <= self.keep <= 1:
            raise ValueError("pixels must be 1 or more and keep a probability")

    @property
    def variants(self) -> int:
        """Number of shifts."""
        return (2 * self.pixels + 1) ** 2

    def __call__(self, element: dict, rng: np.random.Generator) -> dict:
        """The element with its image moved, uint8 [H, W, C], and the variant it has become."""
        side = 2 * self.pixels + 1
        # Variants count from the middle of the square of shifts, so that 0 is no shift.
        variant = 0 if rng.random() < self.keep else int(rng.integers(self.variants))
        down, right = divmod((variant + self.variants // 2) % self.variants, side)
        height, width = element["image"].shape[:2]
        margin = [(self.pixels, self.pixels), (self.pixels, self.pixels), (0, 0)]
        padded = np.pad(element["image"], margin)
        top, left = 2 * self.pixels - down, 2 * self.pixels - right
        image = padded[top : top + height, left : left + width]
        return {**element, "image": image, "variant": np.int32(variant)}


TRANSFORMS = {"shift": Shift}


def parse(entry: str) -> Transform:
    """The transform that an entry of `config.data.augmentation` describes.

    Raises:
      InputError: not a call of a known transform with literal arguments that it takes.
    """
    try:
        call = ast.parse(entry, mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        transform = TRANSFORMS[call.func.id]
        arguments = [ast.literal_eval(a) for a in call.args]
        named = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        return transform(*arguments, **named)
    except (SyntaxError, AttributeError, KeyError, TypeError, ValueError) as error:
        accepted = "; ".join(
            f"{name}({', '.join(f'{f.name}={f.default}' for f in dataclasses.fields(t))})"
            for name, t in TRANSFORMS.items()
        )
        raise config_lib.InputError(
            f"config.data.augmentation has {entry!r} ({error}); an entry is one of: {accepted}."
        ) from error


def variants(entries: tuple[str, ...]) -> int:
    """Start vectors that a list of entries can tell apart.

    Raises:
      InputError: more than one entry has variants.
    """
    counts = [parse(entry).variants for entry in entries]
    if sum(count > 1 for count in counts) > 1:
        raise config_lib.InputError(
            f"config.data.augmentation is {entries}; only one of its entries may have variants."
        )
    return max(counts, default=1)
