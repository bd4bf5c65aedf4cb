"""What a Python user passes, checked: one clear sentence says what came and what is taken."""

import numbers

import jax
import numpy as np
from jaxtyping import Bool, Int, PRNGKeyArray, UInt8

from gptv_jax import config as config_lib
from gptv_jax import tokens
from gptv_jax.config import fields
from gptv_jax.decode.sampler import known_tokens
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network

SETTINGS = fields.by_name(config_lib.Sample)


def whole(value, name: str, least: int = 0) -> int:
    """A whole number from `least`."""
    if not is_whole(value) or value < least:
        raise InputError(f"{name} is {value!r}; it takes a whole number, {least} or more.")
    return int(value)


def key(seed) -> PRNGKeyArray:
    """The key of a seed."""
    if not is_whole(seed) or not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed!r}; it takes a whole number from 0, below 2**32.")
    return jax.random.key(int(seed))


def settings(**given) -> dict:
    """Settings of drawing, which take what the fields of `config.Sample` take."""
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in given.items()}
    return {name: fields.checked(value, SETTINGS[name], name) for name, value in plain.items()}


def images(given, codec: tokens.Codec) -> UInt8[np.ndarray, "B H W C"]:
    """One image or more, of the shape that the codec takes."""
    given, wanted = np.asarray(given), codec.image_shape
    if given.dtype != np.uint8 or given.shape[1:] != wanted or given.ndim != 4:
        shown = ", ".join(map(str, wanted))
        raise InputError(
            f"images are {given.dtype} {list(given.shape)}; they must be uint8 [B, {shown}]."
        )
    if not len(given):
        raise InputError("the batch is empty; give one image or more.")
    return given


def sequences(given, network: Network) -> Int[np.ndarray, "B T"]:
    """Whole sequences of the network's tokens."""
    given, length, vocabulary = np.asarray(given), network.length, network.vocabulary
    if given.ndim != 2 or given.shape[1] != length or given.dtype.kind not in "iu":
        raise InputError(
            f"tokens are {given.dtype} {list(given.shape)}; they must be whole numbers "
            f"[B, {length}]."
        )
    if not len(given):
        raise InputError("the batch is empty; give one row or more.")
    if given.min() < 0 or given.max() >= vocabulary:
        raise InputError(
            f"tokens range from {given.min()} to {given.max()}; they must lie in 0 to "
            f"{vocabulary - 1}."
        )
    return given.astype(np.int32)


def labels(given, count: int, network: Network) -> Int[np.ndarray, "B"] | None:
    """The class of each of `count` rows, of one number or of as many; None where none is told."""
    if given is None:
        return None
    classes = network.config.class_tokens
    if not classes:
        raise InputError(
            "labels are given, but this network was trained without config.model.class_tokens; "
            "take None."
        )
    found = np.asarray(given)
    if found.shape not in [(), (count,)] or found.dtype.kind not in "iu":
        raise InputError(
            f"labels are {found.dtype} {list(found.shape)}; they must be one whole number, or "
            f"{count} of them."
        )
    if found.min() < 0 or found.max() >= classes:
        raise InputError(
            f"labels range from {found.min()} to {found.max()}; they must lie in 0 to "
            f"{classes - 1}."
        )
    return np.broadcast_to(found.astype(np.int32), count)


def mask(given, count: int, codec: tokens.Codec) -> Bool[np.ndarray, "B T"]:
    """Which tokens of each of `count` images are known."""
    found, sizes = np.asarray(given), [codec.image_shape[:2], codec.grid]
    of_size = found.ndim >= 2 and found.shape[-2:] in sizes
    if found.dtype != bool or not of_size or found.shape[:-2] not in [(), (count,)]:
        shown = " or ".join(str(list(size)) for size in dict.fromkeys(sizes))
        raise InputError(
            f"mask is {found.dtype} {list(found.shape)}; it must be bool {shown}, or as many of "
            f"these as images, {count}."
        )
    known = known_tokens(found, codec.grid)
    return np.broadcast_to(known, (count, known.shape[-1]))


def margins(codec: tokens.Codec, **given) -> tuple[int, int, int, int]:
    """Rows above and below and columns left and right, in tokens, from the same in pixels."""
    pixels = codec.image_shape
    height, width = (pixels[axis] // codec.grid[axis] for axis in (0, 1))
    sides = {"top": height, "bottom": height, "left": width, "right": width}
    for name, side in sides.items():
        if whole(given[name], name) % side:
            raise InputError(
                f"{name} is {given[name]} pixels; it takes a multiple of {side}, a token's side."
            )
    return tuple(given[name] // side for name, side in sides.items())


def tokenizer_size(given, downsample: int) -> int:
    """Height and width of images whose every token stands for `downsample` pixels a side."""
    if not is_whole(given) or given < 1 or given % downsample:
        raise InputError(
            f"image_size is {given!r}; a token stands for {downsample} x {downsample} pixels, so "
            f"it takes a multiple of {downsample}."
        )
    return int(given)


def is_whole(value) -> bool:
    """Whether it is an integer, of Python or of NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
