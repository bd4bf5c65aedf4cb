"""What segmentation must know of the training's label maps before it is trained."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from gptv_jax import config as config_lib
from gptv_jax.config.tasks import Segment
from gptv_jax.tasks import confusion
from gptv_jax.tokens import label_maps
from gptv_jax.tokens.label_maps import has_class
from gptv_jax.train.autoencoding import fit_learned

BATCH_SIZE = 16  # label maps; of the training of learned tokens
LEAST = 1e-3  # frequency; a rarer class weighs in the loss as if it had this one


class Facts(NamedTuple):
    """What is known of the training's label maps."""

    frequencies: Float[np.ndarray, " C"]  # share of the pixels with a class
    prior: Integer[np.ndarray, "h w"]  # the most frequent class of every pixel
    codec: label_maps.LabelCodec | None  # None where nothing is written

    def class_weights(self, balance: float) -> Float[np.ndarray, " C"]:
        """Weights of the classes' pixels in the loss; their mean over all pixels is 1."""
        weights = np.maximum(self.frequencies, LEAST) ** -balance
        return (weights / (weights * self.frequencies).sum()).astype(np.float32)


def measure(
    maps: Sequence[Integer[np.ndarray, "h w"]], classes: int, settings: Segment, seed: int
) -> bytes:
    """`Facts` of training maps of one shape as a file, which `load` reads.

    ValueError: no pixel has a class. InputError as of `label_maps.fit_patches`.
    """
    counts = sum(np.bincount(m[has_class(m, classes)], minlength=classes) for m in maps)
    if not counts.any():
        raise ValueError("no pixel has a class")
    found = {"frequencies": counts / counts.sum()}
    found["prior"] = confusion.position_prior(maps, classes, maps[0].shape)
    if settings.write:
        content = _codec(maps, classes, settings, seed).to_bytes()
        found["codec"] = np.frombuffer(content, np.uint8)
    content = io.BytesIO()
    np.savez_compressed(content, **found)
    return content.getvalue()


def load(content: bytes) -> Facts:
    """The facts that `measure` wrote."""
    with np.load(io.BytesIO(content)) as found:
        held = "codec" in found
        codec = label_maps.from_bytes(found["codec"].tobytes()) if held else None
        return Facts(found["frequencies"], found["prior"], codec)


def _codec(maps, classes: int, settings: Segment, seed: int) -> label_maps.LabelCodec:
    if settings.labels == "cells":
        return label_maps.Cells(classes, maps[0].shape, settings.cell)
    if settings.labels == "learned":
        config = config_lib.Autoencoder(
            downsample=settings.cell,
            widths=settings.widths,
            encoder_blocks=1,
            decoder_blocks=1,
            levels=settings.levels,
        )
        return fit_learned(maps, classes, config, settings.steps, BATCH_SIZE, seed)
    return label_maps.fit_patches(maps, classes, settings.cell, settings.codes, seed)
