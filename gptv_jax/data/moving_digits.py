"""Clips of handwritten digits that move and bounce, drawn on the fly.

scikit-learn's digits (`digits.digits`, with the same split) move over a black canvas, each by a
constant number of whole pixels a frame, and turn around at the edges, after Moving MNIST
(Srivastava et al. 2015, arXiv:1502.04681). The motions of a split are drawn once, by a generator
seeded by the split.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from gptv_jax import config as config_lib
from gptv_jax.data import digits as digits_lib
from gptv_jax.data.data_set import SPLITS, DataSet, Source
from gptv_jax.data.records import Record
from gptv_jax.errors import InputError

SIDE, DIGIT = 16, 8  # height and width of the canvas and of a digit, pixels
LENGTHS = (20_000, 400, 400)  # clips of each split
FASTEST = 2  # pixels a frame, in each direction
ROOM = SIDE - DIGIT  # places of a digit are 0 .. ROOM
# Rows and columns a frame; a digit never stands still.
VELOCITIES = [
    (dy, dx)
    for dy in range(-FASTEST, FASTEST + 1)
    for dx in range(-FASTEST, FASTEST + 1)
    if dy or dx
]
DOWN, RIGHT = {-1: "up", 0: "", 1: "down"}, {-1: "left", 0: "", 1: "right"}
LABELS = {  # the classes of each label
    "digit": tuple("0123456789"),
    "direction": tuple(
        f"{DOWN[dy]}_{RIGHT[dx]}".strip("_") for dy in DOWN for dx in RIGHT if dy or dx
    ),
    "speed": ("slow", "fast"),
}


class MovingDigits(DataSet):
    """Clips of one moving digit, whose label is the digit, its direction or its speed; or of more.

    The direction is the one that the digit begins with. Slow is one pixel a frame. Clips of several
    digits have no label.
    """

    videos = True

    def __init__(self, config: config_lib.Data, digits: int = 1):
        if config.label and config.label not in LABELS:
            raise InputError(
                f"config.data.label={config.label}, but config.data.name={config.name} has the "
                f"labels {', '.join(LABELS)}."
            )
        label = config.label or "digit"
        self.classes = len(LABELS[label]) if digits == 1 else 0
        self.class_names = LABELS[label] if digits == 1 else ()
        shape = config.frames, config.frame_stride
        self.splits = {
            split: MovingClips(split, length, *shape, digits, label if digits == 1 else None)
            for split, length in zip(SPLITS, LENGTHS, strict=True)
        }


@dataclasses.dataclass(frozen=True)
class MovingClips(Source):
    """The clips of a split, by number; see `clip`."""

    where: str  # the split
    length: int
    frames: int
    stride: int = 1
    digits: int = 1
    label: str | None = "digit"

    @functools.cached_property
    def motions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each clip's digits: their numbers, [N, D], first places and velocities, [N, D, 2]."""
        rng, shape = np.random.default_rng(SPLITS.index(self.where)), (self.length, self.digits)
        chosen = rng.integers(len(_digits(self.where)), size=shape)
        starts = rng.integers(ROOM, size=(*shape, 2), endpoint=True)
        velocities = np.array(VELOCITIES)[rng.integers(len(VELOCITIES), size=shape)]
        after = starts + velocities
        beyond = (after < 0) | (after > ROOM)  # no digit turns around in the first step
        return chosen, starts, np.where(beyond, -velocities, velocities)

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        if self.label is None:
            return None
        chosen, _, velocities = self.motions
        fast = np.abs(velocities[:, 0]).max(axis=1) > 1
        # Rows of three by down, columns by right, without the middle, which is no motion.
        direction = np.sign(velocities[:, 0]) @ (3, 1) + 4
        found = {
            "digit": _digits(self.where).labels[chosen[:, 0]],
            "direction": direction - (direction > 4),
            "speed": fast,
        }
        return found[self.label].astype(np.int32)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        """The record of a clip: "image" uint8 [F, 16, 16, 1], 0 to 255, and the label."""
        times = np.arange(self.frames) * self.stride
        clip = np.zeros((self.frames, SIDE, SIDE), np.uint8)
        for chosen, start, velocity in zip(*(each[index] for each in self.motions), strict=True):
            drawing = (_digits(self.where).images[chosen, ..., 0] * 15.9375).astype(np.uint8)
            for frame, (y, x) in zip(clip, places(start, velocity, times), strict=True):
                part = frame[y : y + DIGIT, x : x + DIGIT]
                np.maximum(part, drawing, out=part)
        label = {} if self.labels is None else {"label": self.labels[index]}
        return {"image": clip[..., None], **label}


@functools.cache
def _digits(split: str) -> Source:
    return digits_lib.digits().open(split)


def places(
    start: Int[np.ndarray, " 2"], velocity: Int[np.ndarray, " 2"], times: Int[np.ndarray, " F"]
) -> Int[np.ndarray, "F 2"]:
    """Row and column of a digit at each time; it turns around at the edges."""
    way = (start + np.outer(times, velocity)) % (2 * ROOM)
    return np.where(way > ROOM, 2 * ROOM - way, way)
