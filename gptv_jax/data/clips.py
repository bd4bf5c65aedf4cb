"""Which frames of a video are a clip, and the base class of sources of videos."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from gptv_jax import config as config_lib
from gptv_jax.data.data_set import Source
from gptv_jax.data.limits import DamagedImageError
from gptv_jax.data.records import Record, Rng
from gptv_jax.errors import counted, shorten


@dataclasses.dataclass(frozen=True)
class Clips:
    """A clip has `frames` frames, one of every `stride` frames of the video.

    A video that is shorter than a clip repeats its last frame.
    """

    frames: int
    stride: int = 1

    @classmethod
    def of(cls, config: config_lib.Data) -> "Clips":
        """The clips that the config asks for."""
        return cls(config.frames, config.frame_stride)

    @property
    def span(self) -> int:
        """Number of frames from the first to the last frame of a clip."""
        return (self.frames - 1) * self.stride + 1

    def choose(self, length: int, rng: Rng = None, place: float = 0.5) -> Int[np.ndarray, " F"]:
        """Numbers of the frames of a clip of a video with `length` frames.

        The generator draws where the clip begins; without one, see `Source.read`: by default the
        clip lies in the middle.
        """
        last_start = self._last_start(length)
        start = rng.integers(last_start + 1) if rng else last_start * place
        return self._from(int(start), length)

    def cover(self, length: int) -> Iterator[Int[np.ndarray, " F"]]:
        """Clips that have every frame, and every two successive frames, of any clip."""
        last_start, step = self._last_start(length), max(self.span - 1, self.stride)
        for first in range(min(self.stride, last_start + 1)):
            last = last_start - (last_start - first) % self.stride
            for start in sorted({*range(first, last, step), last}):
                yield self._from(start, length)

    def short(self, lengths: Iterable[tuple[str, int]]) -> list[str]:
        """A note on videos shorter than a clip, of their names and lengths; [] without any."""
        found = [f"{name} {length}" for name, length in lengths if length < self.span]
        if not found:
            return []
        shorter = f"{counted(len(found), 'video')} with fewer frames than the {self.span} of a clip"
        return [f"{shorter}, so the last frame is repeated: {shorten(found)}"]

    def _last_start(self, length: int) -> int:
        if not length:
            raise DamagedImageError("the video has no frame")
        return max(length - self.span, 0)

    def _from(self, start: int, length: int) -> Int[np.ndarray, " F"]:
        return np.minimum(start + np.arange(self.frames) * self.stride, length - 1)


def places(count: int) -> list[float]:
    """Where `count` clips of a video begin, evenly spaced, see `Source.read`; one: the middle."""
    return [(clip + 0.5) / count for clip in range(count)]


def by_video(batch: dict, clips: int) -> dict:
    """A batch of videos from the batch of their clips: "tokens" [b, clips, T], all other by row.

    A video counts where all of its clips do: a clip with a damaged frame is one of another video.
    """
    rows = {name: array.reshape(-1, clips, *array.shape[1:]) for name, array in batch.items()}
    found = {name: array if name == "tokens" else array[:, 0] for name, array in rows.items()}
    return found | {"mask": rows["mask"].min(axis=1)}


class Video(NamedTuple):
    """A video that is open, none of whose frames is decoded."""

    length: int  # number of frames
    # The picture of a record, see data/records.py, of the frames with these numbers.
    take: Callable[[Int[np.ndarray, " F"]], Any]
    known: Record  # what records of the video have beside the picture


class VideoSource(Source):
    """A source of clips, one of each video; subclasses open a video by its number."""

    key = "encoded"  # of a record: frames that are not decoded yet, or "image" for pixels
    clips: Clips

    def video(self, index: int) -> Video:
        """Opens a video; DamagedImageError where the file cannot be read."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def record(self, video: Video, numbers: Int[np.ndarray, " F"]) -> Record:
        """The record of the clip of these frames."""
        return {self.key: video.take(numbers), **video.known}

    def read(self, index: int, rng: Rng = None, place: float = 0.5) -> Record:
        video = self.video(index)
        return self.record(video, self.clips.choose(video.length, rng, place))

    def every(self, index: int) -> Iterator[Record]:
        video = self.video(index)
        for numbers in self.clips.cover(video.length):
            yield self.record(video, numbers)

    def frames(self, index: int) -> Iterator[Record]:
        video = self.video(index)
        for number in range(0, video.length, self.clips.stride):
            yield self.record(video, np.array([number]))


def natural(name: str) -> list[str | int]:
    """A key by which 2.png comes before 10.png."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]
