"""What segmentation must know of the training's label maps before it is trained."""

import io
import math
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from gptv_jax.config.tasks import Segment
from gptv_jax.data.records import no_class
from gptv_jax.tokens import label_maps

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

    def possible(self) -> Bool[np.ndarray, " V"]:
        """Whether the square of each token holds no class but those of the training."""
        codec, count = self.codec, self.codec.vocabulary
        rows = np.repeat(np.arange(count)[:, None], math.prod(codec.grid), axis=1)
        known = self.frequencies > 0
        return known[codec.decode(rows)].reshape(count, -1).all(axis=1)


def measure(maps: Integer[np.ndarray, "n h w"], classes: int, settings: Segment, seed: int) -> bytes:
    """`Facts` of training maps as a file, which `load` reads; ValueError: no pixel has a class."""
    counts = np.bincount(maps[~no_class(maps)].ravel(), minlength=classes)
    if not counts.any():
        raise ValueError("no pixel has a class")
    best, prior = np.zeros(maps.shape[1:], int), np.full(maps.shape[1:], counts.argmax(), np.int32)
    for label in range(classes):
        here = (maps == label).sum(axis=0)
        best, prior = np.maximum(best, here), np.where(here > best, np.int32(label), prior)
    found = {"frequencies": counts / counts.sum(), "prior": prior}
    if settings.write:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "codec"
            _codec(maps, classes, settings, seed).save(path)
            found["codec"] = np.frombuffer(path.read_bytes(), np.uint8)
    content = io.BytesIO()
    np.savez_compressed(content, **found)
    return content.getvalue()


def load(content: bytes) -> Facts:
    """The facts that `measure` wrote."""
    with np.load(io.BytesIO(content)) as found, tempfile.TemporaryDirectory() as folder:
        codec, path = None, pathlib.Path(folder) / "codec"
        if "codec" in found:
            path.write_bytes(found["codec"].tobytes())
            codec = label_maps.load_label_codec(path)
        return Facts(found["frequencies"], found["prior"], codec)


def _codec(maps, classes: int, settings: Segment, seed: int) -> label_maps.LabelCodec:
    if settings.labels == "cells":
        return label_maps.Cells(classes, maps.shape[1:], settings.cell)
    return label_maps.fit_patches(maps, classes, settings.cell, settings.codes, seed)
