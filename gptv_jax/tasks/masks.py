"""Masks of objects as a few tokens and back: codes of an autoencoder of the pixels in a box.

After the codec of PaliGemma (Beyer et al. 2024, arXiv:2407.07726): the mask is cropped to its box,
resized to a square of fixed size, and becomes a grid of codes. Letters: n objects, K mask tokens
of each, S the side of the square, H and W pixels of an image.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax.config import rules
from gptv_jax.config.tasks import Detect
from gptv_jax.data.records import Record
from gptv_jax.errors import InputError
from gptv_jax.tokens.label_maps import LabelCodec
from gptv_jax.train.autoencoding import fit_learned

WIDTHS = (32, 64)  # channels of the autoencoder
BATCH_SIZE = 32  # masks; of the autoencoder's training
CLASSES = 2  # of a pixel in a box: not of the object, of the object
SIDES = (4, 8, 16)  # pixels that a mask token may stand for


@dataclasses.dataclass(frozen=True, eq=False)
class Masks:
    """The masks of n objects of an image, which are made when they are looked at.

    `np.asarray(masks)` is bool [n, H, W], `masks[0]` bool [H, W]; `masks[rows]` are `Masks`.
    """

    codec: LabelCodec
    codes: Int[np.ndarray, "n K"]
    boxes: Float[np.ndarray, "n 4"]  # in pixels of the image
    mirrored: Bool[np.ndarray, "n 2"]  # whether the code is of the mask with y, with x reversed
    shape: tuple[int, int]  # height and width of the image

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, which) -> "Masks | Bool[np.ndarray, 'H W']":
        if isinstance(which, int | np.integer):
            return np.asarray(self[[which]])[0]
        return self._with(*(each[which] for each in (self.codes, self.boxes, self.mirrored)))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        found = np.zeros((len(self), *self.shape), bool)
        crops = self.codec.decode(self.codes) > 0 if len(self) else found
        for mask, crop, box, (up, left) in zip(
            found, crops, self.boxes, self.mirrored, strict=True
        ):
            paste(crop[:: -1 if up else 1, :: -1 if left else 1], box, mask)
        return found if dtype is None else found.astype(dtype)

    def _with(self, codes, boxes, mirrored) -> "Masks":
        return dataclasses.replace(self, codes=codes, boxes=boxes, mirrored=mirrored)

    @classmethod
    def join(cls, several: Sequence["Masks"]) -> "Masks":
        """The masks of all, which are of one image."""
        rows = ([each.codes, each.boxes, each.mirrored] for each in several)
        return several[0]._with(*map(np.concatenate, zip(*rows, strict=True)))


def crop(
    masks: Bool[np.ndarray, "n H W"], boxes: Float[np.ndarray, "n 4"], side: int
) -> UInt8[np.ndarray, "n S S"]:
    """What is in the boxes, resized bilinearly to a square: 1 on the object, else 0.

    A box of less than a pixel counts as a pixel.
    """
    found = np.zeros((len(masks), side, side), np.float32)
    for row, mask, box in zip(found, masks, boxes, strict=True):
        low, size = box[:2].astype(float), np.maximum(box[2:] - box[:2], 1)
        y, x = np.clip(low, 0, np.array(mask.shape) - size)
        window, picture = (x, y, x + size[1], y + size[0]), Image.fromarray(mask.astype(np.float32))
        row[:] = picture.resize((side, side), Image.Resampling.BILINEAR, box=window)
    return (found > 0.5).astype(np.uint8)


def paste(inside: Bool[np.ndarray, "S S"], box: Float[np.ndarray, " 4"], mask: np.ndarray) -> None:
    """Sets pixels of `mask`, bool [H, W], of which the object in the box covers half or more."""
    rows, columns = (
        _shares(*box[axis::2].astype(float), len(inside), pixels)
        for axis, pixels in enumerate(mask.shape)
    )
    y, x = (np.flatnonzero(shares.any(axis=1)) for shares in (rows, columns))
    mask[np.ix_(y, x)] = rows[y] @ inside @ columns[x].T >= 0.5


def _shares(low: float, high: float, cells: int, pixels: int) -> Float[np.ndarray, "pixels cells"]:
    """Which share of every pixel each of the cells between `low` and `high` covers."""
    edges, at = np.linspace(low, high, cells + 1), np.arange(pixels)[:, None]
    return np.clip(np.minimum(edges[1:], at + 1) - np.maximum(edges[:-1], at), 0, None)


def encode(
    codec: LabelCodec, masks: Bool[np.ndarray, "n H W"], boxes: Float[np.ndarray, "n 4"]
) -> Int[np.ndarray, "n K"]:
    """Codes of the masks in these boxes; -1 of a mask without a pixel, which is not known."""
    if not len(masks):
        return np.zeros((0, math.prod(codec.grid)), np.int32)
    codes, _ = codec.encode(crop(masks, boxes, codec.shape[0]))
    return np.where(masks.any(axis=(1, 2))[:, None], codes, -1)


def check(config: config_lib.Config, keys: Collection[str]) -> None:
    """InputError: there are no masks in records of these keys, or no codec of so many tokens."""
    settings = config.task.detect
    if not settings.masks:
        return
    if settings.mask_size / settings.masks**0.5 not in SIDES:
        possible = [(settings.mask_size // s) ** 2 for s in SIDES if settings.mask_size % s == 0]
        numbers = ", ".join(map(str, [0, *sorted(possible)]))
        reason = f"with config.task.detect.mask_size={settings.mask_size} it takes {numbers}"
        rules.refuse(config, "task.detect.masks", reason)
    if "masks" not in keys:
        reason = f"{config.data.name} has no masks of objects; take config.data.maps=masks or 0"
        rules.refuse(config, "task.detect.masks", reason)


def fit(records: Iterable[Record], settings: Detect, seed: int) -> LabelCodec:
    """The autoencoder of the masks of training records; InputError where they have none."""
    size, found = settings.mask_size, []
    for record in records:
        real = record["masks"].any(axis=(1, 2)) & np.logical_not(record.get("crowd", False))
        found.append(crop(record["masks"][real], record["boxes"][real], size))
    crops = np.concatenate(found)
    if not len(crops):
        raise InputError(
            f"of {len(found)} training images none has an object with a mask; take others by "
            "config.data.train_split, or config.task.detect.masks=0."
        )
    config = config_lib.Autoencoder(
        downsample=round(size / settings.masks**0.5),
        widths=WIDTHS,
        encoder_blocks=1,
        decoder_blocks=1,
        levels=settings.mask_levels,
    )
    return fit_learned(list(crops), CLASSES, config, settings.mask_steps, BATCH_SIZE, seed)
