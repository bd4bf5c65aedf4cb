"""Checks of what Python users pass; a message says what was given and what is accepted."""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int, UInt8

from gptv_jax import config as config_lib
from gptv_jax import tokens
from gptv_jax.config import fields
from gptv_jax.decode.sampler import known_tokens
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.tokens.codec import AnyArray

Labels = int | np.integer | list[int] | tuple[int, ...] | AnyArray | None  # one, or one each
SETTINGS = fields.by_name(config_lib.Sample)
DRAWING = dataclasses.fields(config_lib.Drawing)
Method = TypeVar("Method", bound=Callable)


def arguments_by_name(method: Method) -> Method:
    """Takes `label=` as well as `labels=`, and shows the fields of `Drawing` for `**drawing`.

    help() and notebooks then list every setting with its type, default and meaning. The first
    three settings may follow the positional arguments, as in earlier versions.
    """
    signature, document = inspect.signature(method), inspect.cleandoc(method.__doc__)
    shown = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    count, early = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in shown), []
    if len(shown) < len(signature.parameters):
        keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
        shown += [keyword(f.name, default=f.default, annotation=f.type) for f in DRAWING]
        document += f"\n\n{inspect.cleandoc(config_lib.Drawing.__doc__)}"
        early = [each.name for each in DRAWING[:3]]

    @functools.wraps(method)
    def call(*positional, **named):
        if "label" in named:
            if "labels" in named:
                raise TypeError("label and labels are both given; give labels alone.")
            named["labels"] = named.pop("label")
        settings = dict(zip(early, positional[count:], strict=False))
        return method(
            *positional[:count], *positional[count + len(settings) :], **settings, **named
        )

    call.__signature__, call.__doc__ = signature.replace(parameters=shown), document
    return call


def _is_whole(value) -> bool:
    """Whether `value` is an integer of Python or NumPy, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def whole(value, name: str, least: int = 0, most: int | None = None) -> int:
    """A whole number from `least` to `most`."""
    if not _is_whole(value) or value < least or (most is not None and value > most):
        accepted = f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(f"{name} is {value!r}; it takes a whole number, {accepted}.")
    return int(value)


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


def images(given, codec: tokens.Codec) -> UInt8[np.ndarray, "B H W C"]:
    """One image or more, of the shape that the codec takes."""
    given, shape = np.asarray(given), codec.image_shape
    if given.dtype != np.uint8 or given.shape[1:] != shape or given.ndim != 4:
        shown = ", ".join(map(str, shape))
        raise InputError(
            f"images are {given.dtype} {list(given.shape)}; they must be uint8 [B, {shown}]."
        )
    return _not_empty(given)


def sequences(given, network: Network) -> Int[np.ndarray, "B T"]:
    """One whole sequence of the network's tokens or more."""
    given, length = np.asarray(given), network.length
    if given.ndim != 2 or given.shape[1] != length or given.dtype.kind not in "iu":
        raise InputError(
            f"tokens are {given.dtype} {list(given.shape)}; they must be whole numbers "
            f"[B, {length}]."
        )
    return _below(_not_empty(given), network.vocabulary, "tokens")


def labels(given, count: int, network: Network) -> Int[np.ndarray, "B"] | None:
    """The class of each of `count` rows, from one class or as many; None stays None."""
    if given is None:
        return None
    classes = network.config.class_tokens
    if not classes:
        raise InputError(
            "labels are given, but this network was trained without classes "
            "(config.model.class_tokens is 0); leave labels away."
        )
    found = np.asarray(given)
    if found.shape not in [(), (count,)] or found.dtype.kind not in "iu":
        raise InputError(
            f"labels are {found.dtype} {list(found.shape)}; they must be one whole number, or "
            f"{count} of them."
        )
    return np.broadcast_to(_below(found, classes, "labels"), count)


def _not_empty(given: np.ndarray) -> np.ndarray:
    if not len(given):
        raise InputError("the batch is empty; give one row or more.")
    return given


def _below(given: np.ndarray, end: int, name: str) -> np.ndarray:
    """Int32 numbers, all in 0 .. end - 1."""
    if given.min() < 0 or given.max() >= end:
        raise InputError(
            f"{name} range from {given.min()} to {given.max()}; they must lie in 0 to {end - 1}."
        )
    return given.astype(np.int32)


def mask(given, count: int, codec: tokens.Codec) -> Bool[np.ndarray, "B T"]:
    """Which tokens of each of `count` images are known, from a mask of pixels or of tokens."""
    found, sizes = np.asarray(given), [codec.image_shape[:2], codec.grid]
    right_size = found.ndim >= 2 and found.shape[-2:] in sizes
    if found.dtype != bool or not right_size or found.shape[:-2] not in [(), (count,)]:
        shown = " or ".join(str(list(size)) for size in dict.fromkeys(sizes))
        raise InputError(
            f"mask is {found.dtype} {list(found.shape)}; it must be bool {shown}, one for all "
            f"images or one for each of the {count} images."
        )
    known = known_tokens(found, codec.grid)
    return np.broadcast_to(known, (count, known.shape[-1]))


def margins(codec: tokens.Codec, **pixels) -> tuple[int, int, int, int]:
    """Rows above and below and columns left and right, counted in tokens."""
    height, width = (codec.image_shape[axis] // codec.grid[axis] for axis in (0, 1))
    sides = {"top": height, "bottom": height, "left": width, "right": width}
    for name, side in sides.items():
        if whole(pixels[name], name) % side:
            raise InputError(
                f"{name} is {pixels[name]} pixels; it takes a multiple of {side}, the side of a "
                "token."
            )
    return tuple(pixels[name] // side for name, side in sides.items())


def tokenizer_size(size, downsample: int) -> int:
    """Height and width of images, where a token stands for `downsample` x `downsample` pixels."""
    if not _is_whole(size) or size < 1 or size % downsample:
        raise InputError(
            f"image_size is {size!r}; a token stands for {downsample} x {downsample} pixels, so it "
            f"takes a multiple of {downsample}."
        )
    return int(size)
