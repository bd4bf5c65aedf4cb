"""Filters: transforms that leave images out, each for a reason that is counted and logged.

A filter stands in a list of transforms right behind `decode()`, or first where the data are arrays.
Another image takes the place of one that is left out, as of a damaged one, see data/damage.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.config.fields import POSITIVE, field
from gptv_jax.data.data_set import Source
from gptv_jax.data.images import Decode, Transform
from gptv_jax.data.limits import DamagedImageError
from gptv_jax.data.records import Record, shape, to_picture

VALUES = np.arange(256.0)  # of pixels


class DroppedImageError(DamagedImageError):
    """A filter leaves an image out; the message says why."""


class _Filter(Transform):
    """Changes no record; `reason` says whether an image is left out."""

    named: ClassVar = {}  # all filters by their entries' names
    drops: ClassVar = True

    def __call__(self, record, rng=None):
        """The record; only a source of training or evaluation leaves images out."""
        return record

    def bound(
        self,
        config: config_lib.Data,
        split: str,
        decode: Decode | None,
        filters: Sequence["_Filter"],
    ) -> "_Filter":
        """The filter of a split of the data, which may have to be looked at before.

        `decode` and `filters` are the steps of the list: None or the first one, and all filters.
        """
        del config, split, decode, filters
        return self

    def reason(self, index: int, record: Record, source: Source) -> str | None:
        """Why the example of this number is left out; None: it is not."""
        raise NotImplementedError


FILTERS = _Filter.named


class DropSmall(_Filter):
    """Leaves out images whose shorter side has fewer than `side` pixels."""

    side: int = field(32, POSITIVE)

    def reason(self, index, record, source):
        height, width = shape(record) if record["image"].ndim == 3 else record["image"].shape[1:3]
        if min(height, width) < self.side:
            return f"{width} x {height} pixels are less than drop_small(side={self.side})"
        return None


class DropBlank(_Filter):
    """Leaves out images with nearly one colour.

    Over an image, or all frames of a clip, the standard deviation of every channel is below
    `deviation`, of values from 0 to 255.
    """

    deviation: float = field(4.0, ("more than 0, up to 128", lambda v: 0 < v <= 128))

    def reason(self, index, record, source):
        image = record["image"]
        picture = to_picture(image if image.ndim == 3 else np.concatenate(image))
        # By counts of the 256 values, exact at any size: sums of float32 stop to grow at 2^24.
        counts = np.reshape(picture.histogram(), (-1, 256)) / (picture.width * picture.height)
        mean, square = counts @ VALUES, counts @ VALUES**2
        found = np.sqrt((square - mean**2).clip(0)).max()
        if found < self.deviation:
            return f"its values deviate by {found:.2g}, below drop_blank({self.deviation:g})"
        return None


class DropUnlabelled(_Filter):
    """Leaves out images whose label is no number of a class, such as -1."""

    def reason(self, index, record, source):
        label = int(record.get("label", -1))
        if not 0 <= label < source.classes:
            return f"its label {label} is none of {source.classes} classes (drop_unlabelled)"
        return None


class DropDuplicates(_Filter):
    """Leaves out images that are nearly equal to an image of test or validation, or to one before.

    Two images are nearly equal where at most `distance` of 63 bits of their perceptual hashes
    differ and small grey copies of both correlate, see data/duplicates.py. Of images that are
    nearly equal within one split the first one stays that `decode()` and the other filters of the
    list keep. The log says how many images of test and validation stand in training, and which
    images have another label than the nearly equal one. All images of all splits are read before
    the first step.
    """

    distance: int = field(6, ("0 to 8", lambda v: 0 <= v <= 8))

    def bound(self, config, split, decode, filters):
        from gptv_jax.data import duplicates  # with SciPy, and the data sets

        others = tuple(each for each in filters if not isinstance(each, DropDuplicates))
        return _Listed(duplicates.find(config, split, self.distance, decode, others))

    def reason(self, index, record, source):
        raise NotImplementedError("the filter is not bound to a split.")


class _Listed(_Filter):
    """Leaves out the examples of the numbers in `reasons`."""

    reasons: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def reason(self, index, record, source):
        return self.reasons.get(index)
