"""Images of any size that users give, as a network reads them."""

import itertools
import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from PIL import Image, ImageOps

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.data import records, transforms
from gptv_jax.data.images import Decode
from gptv_jax.errors import InputError, cut
from gptv_jax.model.gpt import Network
from gptv_jax.tokens import Codec

AT_ONCE = 64  # views that are read in one batch
SIZES = (1, 4, 16, AT_ONCE)  # of batches, as every size is compiled
Picture = np.ndarray | jax.Array | Image.Image


def batches(
    method: str,
    data: config_lib.Data,
    network: Network,
    codec: Codec | None,
    images: np.ndarray | jax.Array | Sequence[Picture],
    extra: Sequence[Sequence[transforms.Transform]] = ((),),
) -> Iterator[tuple[tuple, list[records.Record]]]:
    """Inputs of the network, see `_inputs`, and the records that the first rows are made of.

    There is a record of each image after the transforms of evaluation and each of `extra`, of the
    size that the network takes; "original" is the height and width before. InputError names the
    `method` that was called: an image is no image.
    """
    one = isinstance(images, str | os.PathLike | Image.Image)
    if one or (hasattr(images, "ndim") and images.ndim != 4):
        found = f"one {type(images).__name__}" if one else list(images.shape)
        raise InputError(
            f"{method} was given {found}; it takes a list of images, as in {method}([image]), or "
            "an array [B, H, W, C]."
        )
    entries = [transforms.parse(entry) for entry in data.eval_transforms]
    steps = [step for step in entries if not isinstance(step, Decode)]
    channels = (1, 3) if codec is None else codec.image_shape[2:]
    numbered = (
        (number, _view(method, image, channels, [*steps, *more], data.size))
        for number, image in enumerate(images)
        for more in extra
    )
    while batch := list(itertools.islice(numbered, AT_ONCE)):
        yield _inputs(network, codec, batch), [record for _, record in batch]


def _view(
    method: str,
    image: Picture,
    channels: tuple[int, ...],
    steps: list[transforms.Transform],
    size: tuple[int, int],
) -> records.Record:
    """The record of an image after the transforms, of the size that the network takes."""
    if isinstance(image, Image.Image):  # upright, as training shows it
        image = ImageOps.exif_transpose(image).convert("RGB" if 3 in channels else "L")
    pixels = np.asarray(image)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    whole = pixels.ndim == 3 and pixels.size and pixels.shape[-1] in channels
    if pixels.dtype != np.uint8 or not whole:
        array = f"{pixels.dtype} {list(np.shape(image))}"
        found = cut(repr(image), 60) if isinstance(image, str | os.PathLike) else array
        raise InputError(
            f"an image is {found}; {method} takes Pillow images, such as PIL.Image.open(path), and "
            f"uint8 arrays [H, W, {' or '.join(map(str, channels))}] of any height and width "
            "from 1 on."
        )
    original = np.array(pixels.shape[:2])
    record = records.with_view({"image": pixels, "original": original}, *pixels.shape[:2])
    for step in steps:
        record = step(record, None)
    return records.resize(record, *size)


def _inputs(
    network: Network, codec: Codec | None, numbered: list[tuple[int, records.Record]]
) -> tuple[jax.Array | None, jax.Array | None, jax.Array]:
    """Tokens, pixels and numbers of the records on the mesh, padded to one of SIZES rows."""
    size = next(size for size in SIZES if size >= len(numbered))
    padded = numbered + numbered[-1:] * (size - len(numbered))
    images = [record["image"] for _, record in padded]
    channels = max(image.shape[-1] for image in images)  # a grey image has three equal ones
    pixels = np.stack([np.broadcast_to(x, (*x.shape[:2], channels)) for x in images])
    numbers = np.array([number for number, _ in padded], np.int32)
    tokens = None if codec is None else codec.encode(pixels)
    inputs = (tokens, pixels if network.stem else None, numbers)
    return jax.tree.map(sharding.shard_rows, inputs)
