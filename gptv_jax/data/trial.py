"""Tries transforms and codec on the first training images, so that misfits are found early."""

import dataclasses
import logging

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import depths, pipeline, transforms
from gptv_jax.data.damage import DecodedSource
from gptv_jax.tokens import Codec, GreyCodec

LOG = logging.getLogger(__name__)
TRIED = 32  # images
# An image of a standard deviation below BLANK looks blank, one of no value above DARK dark; of 255.
BLANK, DARK = 4, 64


def try_out(
    config: config_lib.Data,
    codec: Codec | None,
    shape: tuple[int, ...],
    entries: tuple[str, ...],
    annotated: bool = False,
) -> None:
    """Makes tokens of the first training images, so that misfits are found before any work.

    Without a codec, or if the codec encodes on devices, only `shape` is checked, [H, W, C], or
    [H, W] of grey and RGB images. Files of more than 8 bits are looked at before. After the
    transforms of evaluation, images that all look blank or dark are warned of. `annotated`: boxes
    and label maps are transformed as well.
    """
    example, rng = pipeline.open_examples(config, "train", entries), np.random.default_rng(0)
    example = dataclasses.replace(example, codec=codec, annotated=annotated)
    evaluated, warned = entries == config.eval_transforms, False
    # A list that decodes files exactly as the list for evaluation does is not looked at again.
    if isinstance(example.source, DecodedSource) and (
        evaluated or example.source.decode not in map(transforms.parse, config.eval_transforms[:1])
    ):
        warned = depths.check(config, example.source)
    shown = []
    for index in range(min(TRIED, len(example.source))):
        record = example.record(index, rng)
        image = record.get("image")  # absent from a token cache
        if codec is None or (codec.on_devices and image is not None):
            grey_or_rgb = (*shape, 1 if image.shape[-1] == 1 else 3)
            pipeline.check_shape(image, shape if len(shape) == 3 else grey_or_rgb)
        else:
            pipeline.to_tokens(codec, record)
        if image is not None:
            shown.append(codec.picture(image[None])[0] if codec else image)
    if shown and evaluated and not warned:
        _warn_of_blank(config, codec, shown)


def _warn_of_blank(
    config: config_lib.Data, codec: Codec | None, pictures: list[np.ndarray]
) -> None:
    """Warns where no picture, uint8 [H, W, C] in 0..255, has contrast, or all are dark."""
    deviation = max(picture.std(axis=(0, 1)).max() for picture in pictures)
    low = min(picture.min() for picture in pictures)
    high = max(picture.max() for picture in pictures)
    if deviation >= BLANK and high > DARK:
        return
    look = "have nearly one value each" if deviation < BLANK else "are all dark"
    cure = ""
    if high <= DARK and not (isinstance(codec, GreyCodec) and codec.vocabulary < 256):
        cure = ' The transform "normalize()" makes dark images bright.'
    LOG.warning(
        "images of %s (%d looked at) %s: values %d to %d of 255, deviating by %.1f at most. Look "
        "at the files and at the transforms.%s",
        *(config.path or config.name, len(pictures), look, low, high, deviation, cure),
    )
