"""Mixup: pairs of training images, blended (Zhang et al. 2018, arXiv:1710.09412)."""

import numpy as np

from gptv_jax.data.records import Record


def mixed(record: Record, other: Record, concentration: float, rng: np.random.Generator) -> Record:
    """The record with a blend of both images, whose shares are from Beta(concentration, ...).

    Pixels are blended, before they become tokens: tokens are names of colours or patches, and have
    no mean. So a teacher and a student of any widths read one blended image. The
    label and all else stay that of `record`, whose share is the larger one.
    """
    share = rng.beta(concentration, concentration)
    share = max(share, 1 - share)
    pixels = share * record["image"] + (1 - share) * other["image"]
    return record | {"image": np.rint(pixels).astype(record["image"].dtype)}
