"""Checks of what Python users pass; a message says what was given and what is accepted."""

import dataclasses
import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image, ImageOps

from gptv_jax import config as config_lib
from gptv_jax import errors, tokens
from gptv_jax.config import fields
from gptv_jax.errors import InputError, as_input_error
from gptv_jax.model.gpt import Network
from gptv_jax.tokens.codec import AnyArray

# One class or one for each row, as numbers or as names.
Labels = int | np.integer | str | list[int] | list[str] | tuple[int | str, ...] | AnyArray | None
SETTINGS = fields.by_name(config_lib.Sample)
DRAWING = dataclasses.fields(config_lib.Drawing)
Method = TypeVar("Method", bound=Callable)


def arguments_by_name(method: Method) -> Method:
    """Takes `label=` as well as `labels=`, and shows the fields of `Drawing` for `**drawing`.

    help() and notebooks then list every setting with its type, default and meaning. The first
    three settings may follow the positional arguments, as in earlier versions.
    """
    signature, document = inspect.signature(method), inspect.cleandoc(method.__doc__)
    make = inspect.Parameter
    shown = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(shown) < len(signature.parameters):
        for i, f in enumerate(DRAWING):
            kind = make.POSITIONAL_OR_KEYWORD if i < 3 else make.KEYWORD_ONLY
            shown.append(make(f.name, kind, default=f.default, annotation=f.type))
        document += f"\n\n{inspect.cleandoc(config_lib.Drawing.__doc__)}"
    signature = signature.replace(parameters=sorted(shown, key=lambda p: p.kind))

    @functools.wraps(method)
    def call(*positional, **named):
        if "label" in named:
            if "labels" in named:
                raise TypeError("label and labels are both given; give labels alone.")
            named["labels"] = named.pop("label")
        try:
            given = signature.bind_partial(*positional).arguments
        except TypeError:
            names = [p.name for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
            raise TypeError(
                f"{method.__name__} takes {', '.join(names[1:])} by position; name the other "
                "arguments."
            ) from None
        return method(**given, **named)

    call.__signature__, call.__doc__ = signature, document
    return call


def whole(value, name: str, least: int = 0, most: int | None = None, side: int = 1) -> int:
    """A whole number from `least` to `most`; of pixels, a multiple of a token's `side`."""
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integer or value < least or (most is not None and value > most) or value % side:
        accepted = f"{least} or more" if most is None else f"{least} to {most}"
        if side > 1:
            accepted = f"a multiple of {side}, the side of a token in pixels, {accepted}"
        raise InputError(f"{name} is {value!r}; it takes a whole number, {accepted}.")
    return int(value)


def regions(value, network: Network) -> int:
    """A whole number that divides the rows and the columns of an image's tokens."""
    value, (rows, columns) = whole(value, "regions", least=1), network.grid[-2:]
    if rows % value or columns % value:
        raise InputError(
            f"regions is {value}; it takes a divisor of both sides of {rows} x {columns} tokens."
        )
    return value


def seed(value) -> int:
    """A seed of 32 bits."""
    return whole(value, "seed", most=2**32 - 1)


def drawing(given: dict) -> config_lib.Drawing:
    """The settings of drawing that are given, with the defaults of all others."""
    names = [each.name for each in DRAWING]
    if unknown := [name for name in given if name not in names]:
        raise TypeError(
            f"{', '.join(unknown)} is not a setting of drawing; these are {', '.join(names)}."
        )
    return config_lib.Drawing(**{name: setting(name, value) for name, value in given.items()})


def setting(name: str, value):
    """`value` as the field `name` of `config.Sample` takes it."""
    value = value.item() if isinstance(value, np.generic) else value
    return fields.checked(value, SETTINGS[name], name)


def share(name: str, value) -> float:
    """A number from 0 to 1."""
    number = isinstance(value, numbers.Real | np.number) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}; it takes a number from 0 to 1.")
    return float(value)


def images(given, codec: tokens.Codec) -> UInt8[np.ndarray, "B *F H W C"]:
    """Images or clips of the shape that the codec takes; also a list of Pillow images."""
    shape = codec.image_shape
    if isinstance(given, str | os.PathLike | Image.Image):
        given = [given]
    if isinstance(given, list | tuple):
        given = _stacked(given, shape)
    given = np.asarray(given)
    right = given.dtype == np.uint8 and given.shape[1:] == shape
    subject = "images are" if len(shape) == 3 else "clips are"
    return _checked(given, right, subject, f"uint8 [B, {', '.join(map(str, shape))}]")


def given_frames(given, codec: tokens.Codec, whole: bool = True) -> UInt8[np.ndarray, "B K H W C"]:
    """The first frames of one clip or more, of the height and width that the codec takes.

    If `whole`, the frames fill tokens. Where a token stands for t frames, K is k t, or 1 + k t if
    the first frame has tokens of its own.
    """
    if len(codec.image_shape) == 3:
        raise InputError(
            "this model is of images, so it reads and continues no clips; load a run with "
            "config.data.frames above 0."
        )
    _, *shape = codec.image_shape
    if isinstance(given, list | tuple) and len({np.shape(each) for each in given}) > 1:
        raise InputError(
            "frames are of clips of several lengths or sizes; give the clips of each in a call."
        )
    given = np.asarray(given)
    right = given.dtype == np.uint8 and given.ndim == 5 and given.shape[2:] == tuple(shape)
    accepted = f"uint8 [B, K, {', '.join(map(str, shape))}], of K frames, 1 or more"
    found = _checked(given, right and given.shape[1] > 0, "frames are", accepted)
    first, span = codec.sides[0][[0, -1]].tolist()
    if whole and ((count := given.shape[1]) < first or (count - first) % span):
        alone = ", and that of the first frame for 1" if first < span else ""
        more = "1 more than " if first < span else ""
        raise InputError(
            f"{count} frames are given, but each token stands for {span} frames{alone}; give "
            f"{more}a multiple of {span}."
        )
    return found


def _stacked(given: Sequence, shape: tuple[int, ...]) -> Sequence | np.ndarray:
    """Pillow images or arrays as one array; InputError where they are of several sizes or modes."""
    *frames, height, width, channels = shape
    mode = "RGB" if channels == 3 else "L"
    if any(isinstance(each, str | os.PathLike) for each in given):
        found = "file names"
    elif any(isinstance(each, Image.Image) for each in given):
        given = [_upright(each, (height, width)) for each in given]
        kinds = {f"{i.mode} {i.width} x {i.height}" for i in given if isinstance(i, Image.Image)}
        if not frames and kinds == {f"{mode} {width} x {height}"}:
            return np.stack([np.asarray(i).reshape(-1, width, channels) for i in given])
        found = f"Pillow images of {errors.shorten(sorted(kinds))}"
    elif len({np.shape(each) for each in given}) > 1:
        found = "arrays of several sizes"
    else:
        return given
    if frames:
        raise InputError(
            f"clips are {found}; give an array, uint8 [B, {', '.join(map(str, shape))}]."
        )
    raise InputError(
        f"images are {found}; give {mode} images of {width} x {height}, as in "
        f'[PIL.ImageOps.fit(i.convert("{mode}"), ({width}, {height})) for i in images]. '
        "python -m gptv_jax.predict reads files with the run's own transforms."
    )


def _upright(given, size: tuple[int, int]):
    """A Pillow image of `size` as its EXIF orientation shows it; anything else unchanged."""
    if not isinstance(given, Image.Image) or sorted(given.size) != sorted(size):
        return given  # is refused, and need not be decoded
    with as_input_error("an image cannot be read"):
        return ImageOps.exif_transpose(given)


def sequences(given, network: Network) -> Int[np.ndarray, "B T"]:
    """The tokens of one image or more."""
    given, length = np.asarray(given), network.layout.parts[0].size
    right = given.shape[1:] == (length,) and given.dtype.kind in "iu"
    given = _checked(given, right, "tokens are", f"whole numbers [B, {length}]")
    return _below(given, network.vocabulary, "tokens")


def labels(
    given, count: int, network: Network, names: tuple[str, ...] = ()
) -> Int[np.ndarray, " B"] | None:
    """The class of each of `count` rows, from one class or as many; None stays None.

    Classes are numbers, or some of `names`, which are in the order of the numbers.
    """
    if given is None:
        return None
    classes = network.config.class_tokens
    if not classes:
        raise InputError(
            "labels are given, but this network was trained without classes "
            "(config.model.class_tokens is 0); leave labels away."
        )
    found = np.asarray(given)
    if found.dtype.kind == "U":
        if unknown := sorted(set(found.ravel().tolist()) - set(names)):
            raise InputError(f"labels name {unknown[0]!r}; classes are {errors.shorten(names)}.")
        found = np.vectorize(names.index, otypes=[np.int32])(found)
    right = found.shape in [(), (count,)] and found.dtype.kind in "iu"
    found = _checked(found, right, "labels are", f"one whole number, or {count} of them")
    return np.broadcast_to(_below(found, classes, "labels"), count)


def _checked(found: np.ndarray, right: bool, subject: str, accepted: str) -> np.ndarray:
    if not right:
        raise InputError(f"{subject} {found.dtype} {list(found.shape)}; give {accepted}.")
    if found.shape[:1] == (0,):
        raise InputError("the batch is empty; give one row or more.")
    return found


def _below(given: np.ndarray, end: int, name: str) -> np.ndarray:
    """Int32 numbers, all in 0 .. end - 1."""
    if given.min() < 0 or given.max() >= end:
        raise InputError(
            f"{name} range from {given.min()} to {given.max()}; they must lie in 0 to {end - 1}."
        )
    return given.astype(np.int32)


def mask(given, count: int, codec: tokens.Codec) -> Bool[np.ndarray, "B T"]:
    """Which tokens of each of `count` images are known, from a mask of pixels or of tokens."""
    found, sizes, axes = np.asarray(given), [codec.image_shape[:-1], codec.grid], len(codec.grid)
    pixels, before = found.shape[-axes:], found.shape[:-axes]
    right = found.dtype == bool and pixels in sizes and before in [(), (count,)]
    shown = " or ".join(str(list(size)) for size in dict.fromkeys(sizes))
    accepted = f"bool {shown}, one for all images or one for each of the {count} images"
    found = _checked(found, right, "mask is", accepted)
    found = found.reshape(-1, *pixels)
    for axis, side in enumerate(codec.sides if pixels != codec.grid else (), start=1):
        found = np.logical_and.reduceat(found, np.cumsum(side) - side, axis=axis)
    length = math.prod(codec.grid)
    return np.broadcast_to(found.reshape(-1, length), (count, length))


def margins(codec: tokens.Codec, **pixels) -> tuple[int, int, int, int]:
    """Rows above and below and columns left and right, counted in tokens."""
    sides = zip(codec.image_shape[-3:-1], codec.grid[-2:], strict=True)
    height, width = (side // count for side, count in sides)
    sides = {"top": height, "bottom": height, "left": width, "right": width}
    return tuple(whole(pixels[name], name, side=side) // side for name, side in sides.items())
