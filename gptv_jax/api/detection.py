"""Detection in images of any size, by a trained network."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from gptv_jax import sharding
from gptv_jax.data import records, transforms
from gptv_jax.data.images import Decode
from gptv_jax.decode import answers
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.tasks.boxes import Detections, vote
from gptv_jax.tasks.detect import NAME, Detect
from gptv_jax.tasks.task import Grammar
from gptv_jax.tokens import Codec

AT_ONCE = 64  # views that are read in one batch
SIZES = (1, 4, 16, AT_ONCE)  # of batches, as every size is compiled
Picture = np.ndarray | jax.Array | Image.Image


def detect(
    task: Detect,
    network: Network,
    params: dict,
    codec: Codec | None,
    images: np.ndarray | jax.Array | Sequence[Picture],
    votes: Sequence[str] = (),
) -> list[Detections]:
    """The objects in each image, which is transformed as in evaluation; under the set mesh.

    `votes` are transforms, of which each gives a further view of every image. InputError: an image
    is no image, or a transform does not fit it.
    """
    if isinstance(images, Image.Image) or (hasattr(images, "ndim") and images.ndim != 4):
        found = "one Pillow image" if isinstance(images, Image.Image) else list(images.shape)
        raise InputError(
            f"detect was given {found}; it takes a list of images, as in detect([image]), or an "
            "array [B, H, W, C]."
        )
    entries = [transforms.parse(entry) for entry in task.config.data.eval_transforms]
    steps = [step for step in entries if not isinstance(step, Decode)]
    extra = [[], *(transforms.parse_view(entry) for entry in votes)]
    names = [name for entry in votes for name in entry.split("|")]
    if wrong := [name for name in names if transforms.parse(name).random]:
        raise InputError(f"votes has {', '.join(wrong)}, which is random; flip(1.0) is not.")
    channels = (1, 3) if codec is None else codec.image_shape[2:]
    size = task.config.data.size
    shown = (
        (number, _view(image, channels, [*steps, *v], size))
        for number, image in enumerate(images)
        for v in extra
    )
    found = []
    while batch := list(itertools.islice(shown, AT_ONCE)):
        found += _detect(task, network, params, codec, batch)
    groups = (found[at : at + len(extra)] for at in range(0, len(found), len(extra)))
    return [task.best(vote(group)) for group in groups]


def _view(
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
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in channels:
        raise InputError(
            f"an image is {pixels.dtype} {list(np.shape(image))}; detect takes Pillow images, and "
            f"uint8 arrays [H, W, {' or '.join(map(str, channels))}] of any height and width."
        )
    record = records.with_view({"image": pixels}, *pixels.shape[:2])
    for step in steps:
        record = step(record, None)
    return records.resize(record, *size)


def _detect(
    task, network, params, codec, numbered: list[tuple[int, records.Record]]
) -> list[Detections]:
    """The objects in views, each with the number of its image."""
    size = next(size for size in SIZES if size >= len(numbered))
    padded = numbered + numbered[-1:] * (size - len(numbered))
    pixels = np.stack([record["image"] for _, record in padded])
    numbers = np.array([number for number, _ in padded], np.int32)
    tokens = None if codec is None else codec.encode(pixels)
    inputs = (tokens, pixels if network.stem else None, numbers)
    *inputs, numbers = jax.tree.map(sharding.shard_rows, inputs)
    answered = answers.answer(
        network,
        params,
        *inputs,
        jax.random.key(task.config.seed),
        jax.tree.map(jnp.asarray, task.restriction(network)),
        Grammar(task),
        numbers=numbers,
    )
    places = network.layout.slices[NAME]
    drawn, probabilities = (np.asarray(x)[:, places] for x in answered)
    rows = zip(drawn, probabilities, numbered, strict=False)  # without the padding
    return [task.found(*row, record["view"]) for *row, (_, record) in rows]
