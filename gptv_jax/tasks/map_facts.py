"""What segmentation must know of the training's label maps before it is trained."""

import dataclasses
import functools
import io
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Integer

from gptv_jax.config.tasks import Segment
from gptv_jax.errors import InputError, counted
from gptv_jax.files import load_arrays
from gptv_jax.tokens import label_maps
from gptv_jax.tokens.label_maps import has_class
from gptv_jax.train.autoencoding import fit_learned

BATCH_SIZE = 16  # label maps; of the training of learned tokens
MOST_BYTES = 2**28  # of the facts in a file of weights
LEAST = 1e-3  # frequency; a rarer class weighs in the loss as if it had this one


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """What is known of the training's label maps."""

    frequencies: Float[np.ndarray, " C"]  # share of the pixels with a class
    # The most frequent class of every pixel; of a pixel that never has one, that of all pixels.
    prior: Integer[np.ndarray, "h w"]
    codec: label_maps.LabelCodec | None  # None where nothing is written
    frames: tuple[int, ...] = ()  # (F,), the number of frames of a clip; (): maps are of images

    @functools.cached_property
    def _usual(self) -> Int[np.ndarray, "1 T"]:
        return self.codec.encode(self.prior[None])[0]

    def encode(
        self, maps: Integer[np.ndarray, "B *F h w"]
    ) -> tuple[Int[np.ndarray, "B T"], Float[np.ndarray, "B T"]]:
        """As `LabelCodec.encode`; a cell without a class has the token of the prior there.

        What the network reads in place of such a cell then says nothing of the image, nor of cells
        that come later in the sequence. The tokens of a clip's maps come frame by frame.
        """
        tokens, weights = self.codec.encode(maps.reshape(-1, *maps.shape[-2:]))
        tokens = np.where(weights > 0, tokens, self._usual)
        return tokens.reshape(len(maps), -1), weights.reshape(len(maps), -1)

    def decode(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B *F h w"]:
        """As `LabelCodec.decode`, of images or clips."""
        maps = self.codec.decode(tokens.reshape(-1, math.prod(self.codec.grid)))
        return maps.reshape(len(tokens), *self.frames, *maps.shape[1:])

    def class_weights(self, balance: float) -> Float[np.ndarray, " C"]:
        """Weights of the classes' pixels in the loss; their mean over all pixels is 1."""
        weights = np.maximum(self.frequencies, LEAST) ** -balance
        return (weights / (weights * self.frequencies).sum()).astype(np.float32)


def measure(
    maps: Sequence[Integer[np.ndarray, "h w"]], classes: int, settings: Segment, seed: int
) -> bytes:
    """`Facts` of training maps of one shape as a file, which `load` reads.

    InputError: no pixel has a class, or as of `label_maps.fit_patches`.
    """
    counts = np.zeros((*maps[0].shape, classes + 1), np.int32)  # of the classes of each pixel
    rows, columns = np.indices(maps[0].shape, sparse=True)
    for each in maps:
        counts[rows, columns, np.where(has_class(each, classes), each, classes)] += 1
    counts = counts[..., :classes]
    total = counts.sum(axis=(0, 1), dtype=np.int64)
    if not total.any():
        raise InputError(
            f"no pixel of {counted(len(maps), 'training label map')} has a class; see "
            "config.data.map_names and config.data.map_ignore."
        )
    prior = np.where(counts.any(axis=-1), counts.argmax(axis=-1), total.argmax())
    found = {"frequencies": total / total.sum(), "prior": prior.astype(np.int32)}
    if settings.write:
        content = _codec(maps, classes, settings, seed).to_bytes()
        found["codec"] = np.frombuffer(content, np.uint8)
    content = io.BytesIO()
    np.savez_compressed(content, **found)
    return content.getvalue()


def load(content: bytes, frames: tuple[int, ...] = ()) -> Facts:
    """The facts that `measure` wrote, of images, or of clips of `frames`."""
    found = load_arrays(io.BytesIO(content), MOST_BYTES)
    codec = label_maps.from_bytes(found["codec"].tobytes()) if "codec" in found else None
    return Facts(found["frequencies"], found["prior"], codec, frames)


def _codec(maps, classes: int, settings: Segment, seed: int) -> label_maps.LabelCodec:
    if settings.labels == "cells":
        return label_maps.Cells(classes, maps[0].shape, settings.cell)
    if settings.labels == "learned":
        own = {"downsample": settings.cell, "widths": settings.widths, "levels": settings.levels}
        return fit_learned(maps, classes, settings.steps, BATCH_SIZE, seed, **own)
    return label_maps.fit_patches(maps, classes, settings.cell, settings.codes, seed)
