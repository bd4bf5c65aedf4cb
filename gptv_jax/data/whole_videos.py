"""Whole videos, frame after frame, for what is measured beyond clips."""

import dataclasses
import logging
from collections.abc import Iterator

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import pipeline
from gptv_jax.data.limits import DamagedImageError
from gptv_jax.data.records import Record
from gptv_jax.errors import shorten

LOG = logging.getLogger(__name__)
JOINED = ("image", "segmentation", "original")  # of all frames


def records(config: config_lib.Data, split: str, limit: int) -> Iterator[Record]:
    """The first `limit` videos of a split after the transforms of evaluation.

    Frames are as `Source.frames` gives them, in one clip of N frames: "image" [N, h, w, C],
    "segmentation" [N, h, w], and "original" [N, H, W], the label maps before the transforms. A
    video that cannot be read is left out with a warning.
    """
    opened = pipeline.open_examples(config, split, config.eval_transforms)
    make = dataclasses.replace(opened, annotated=True)
    for index in range(min(limit, len(make.source))):
        try:
            frames = [
                make.transformed(frame, index) | {"original": frame["segmentation"]}
                for frame in make.source.frames(index)
            ]
            if len(sizes := {frame["original"].shape[1:] for frame in frames}) > 1:
                raise DamagedImageError(f"its frames have several sizes: {shorten(sizes)}")
        except (DamagedImageError, OSError) as error:
            LOG.warning("%s is not segmented whole: %s.", make.source.name(index), error)
            continue
        names = [name for name in JOINED if name in frames[0]]
        yield frames[0] | {n: np.concatenate([frame[n] for frame in frames]) for n in names}
