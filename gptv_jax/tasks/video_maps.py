"""Label maps of whole videos: a window of frames moves on, and maps before are carried along.

The network reads clips of F frames. A frame's map is written in the window that ends with the
frame, or in the first window of the video, given the maps of the frames before it in the window.
Letters: N frames of a video, h x w pixels that the network reads, T tokens of a map.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Int, Integer, UInt8

from gptv_jax import sharding
from gptv_jax.data.records import Record, plane_to_original
from gptv_jax.decode.generation import UNKNOWN
from gptv_jax.model.gpt import Network
from gptv_jax.tasks import map_passes, map_pictures, video_scores
from gptv_jax.tasks.task import Task
from gptv_jax.tokens import Codec
from gptv_jax.tokens.label_maps import has_class

SIZES = (1, 4, 16)  # of batches, as every size is compiled
SHOWN = 6  # frames of the picture
GIVEN = ("propagated", "copied")  # ways that are given the first frame's map
Place = tuple[int, int, int]  # a video, the frame to be segmented, and its place in the window


@dataclasses.dataclass(frozen=True, eq=False)
class Videos:
    """Several videos, of which a network of clips makes label maps; to be used on a mesh."""

    task: Task
    network: Network
    params: dict
    codec: Codec | None
    frames: Sequence[UInt8[np.ndarray, "_ h w C"]]

    def read(self) -> list[Integer[np.ndarray, "_ h w"]]:
        """The maps of all frames, read from the images alone."""

        def ask(places: list[Place]) -> np.ndarray:
            maps = jax.device_get(_read(self.task, self.network, self.params, *self._see(places)))
            return np.stack([row[place] for row, (*_, place) in zip(maps, places, strict=False)])

        return self._split(np.concatenate([ask(batch) for batch in _batches(self._ends())]))

    def carried(
        self, first: Int[np.ndarray, "videos T"] | None = None
    ) -> list[Int[np.ndarray, "_ T"]]:
        """The tokens of all frames, written given the tokens that were written before.

        `first` has the tokens of every video's first map, which are then kept.
        """
        count = self.network.layout.parts[1].size // self.network.frames
        found = [np.zeros((len(each), count), np.int32) for each in self.frames]
        if first is not None:
            for video, tokens in zip(found, first, strict=True):
                video[0] = tokens
        ends = sorted(self._ends(), key=lambda place: place[1])
        for frame in range(first is not None, max(map(len, self.frames))):
            places = [place for place in ends if place[1] == frame]
            for batch in _batches(places):
                for (video, *_), row in zip(batch, self._write(batch, found), strict=True):
                    found[video][frame] = row
        return found

    def given(self, maps: Sequence[Int[np.ndarray, "_ T"]]) -> list[Int[np.ndarray, "_ T"]]:
        """The tokens of all frames, each given the tokens of `maps` before it in its window."""
        ends = self._ends()
        rows = {}
        for place in range(self.network.frames):
            for batch in _batches([each for each in ends if each[2] == place]):
                rows |= zip(batch, self._write(batch, maps), strict=True)
        return self._split(np.stack([rows[end] for end in ends]))

    def alone(self) -> list[Int[np.ndarray, "_ T"]]:
        """The tokens of all frames, each written first in the window that begins with the frame."""
        starts = [(video, frame, 0) for video, frame, _ in self._ends()]
        rows = [self._write(batch, self.frames) for batch in _batches(starts)]
        return self._split(np.concatenate(rows))

    def _ends(self) -> list[Place]:
        """Every frame of every video, in the window that ends with the frame."""
        last, lengths = self.network.frames - 1, enumerate(map(len, self.frames))
        return [(video, t, min(t, last)) for video, length in lengths for t in range(length)]

    def _split(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows of every video."""
        return np.split(rows, np.cumsum([len(each) for each in self.frames])[:-1])

    def _write(self, places: list[Place], before: Sequence[np.ndarray]) -> Int[np.ndarray, "n T"]:
        """The tokens of the frames at `places`, which have one place in their windows."""
        place, size = places[0][2], self.network.layout.parts[1].size // self.network.frames
        known = [before[video][t - place : t].reshape(-1) for video, t, _ in places]
        known = np.stack(known) if place else np.zeros((len(places), 0), np.int32)
        known = np.pad(known, ((0, 0), (0, size)), constant_values=UNKNOWN)
        known = sharding.shard_rows(_padded(known))
        tokens = _written(
            self.task, self.network, place * size, self.params, *self._see(places), known
        )
        return jax.device_get(tokens)[: len(places), -size:]

    def _see(self, places: list[Place]) -> tuple[jax.Array | None, jax.Array | None]:
        """Tokens and pixels of the windows, on the mesh; a short video repeats its last frame."""
        steps = np.arange(self.network.frames)
        shown = [(self.frames[video], t - place + steps) for video, t, place in places]
        pixels = _padded(np.stack([video[at.clip(max=len(video) - 1)] for video, at in shown]))
        tokens = None if self.codec is None else self.codec.encode(pixels)
        inputs = tokens, pixels if self.network.stem else None
        return jax.tree.map(sharding.shard_rows, inputs)


def _batches(places: list[Place]) -> Iterator[list[Place]]:
    return (places[at : at + SIZES[-1]] for at in range(0, len(places), SIZES[-1]))


def _padded(rows: np.ndarray) -> np.ndarray:
    """The rows, with the last one repeated up to one of SIZES."""
    size = next(size for size in SIZES if size >= len(rows))
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(task, network, params, tokens, pixels) -> jax.Array:
    """`map_passes.classes_read`, whole on every process."""
    maps = map_passes.classes_read(task, network, params, tokens, pixels)
    return jax.sharding.reshard(maps, P(*[None] * maps.ndim))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _written(task, network, read: int, params, tokens, pixels, known) -> jax.Array:
    """The most likely tokens in place of the unknown ones, whole on every process."""
    key = jax.random.key(0)  # which the most likely tokens do not depend on
    given = (tokens, pixels, key, None, 0.0, 1, known, read)
    drawn, _ = map_passes.written(task, network, params, *given)
    return jax.sharding.reshard(drawn, P(None, None))


def numbers(total: dict) -> dict[str, dict[str, float | None]]:
    """The summary's numbers of each way, of what `measure` found; {} where it found nothing."""
    return {
        way: {f"video_{name}": value for name, value in each.items() if name != "miou_by_frame"}
        for way, each in total.get("video_scores", {}).items()
    }


def measure(
    task: Task, network: Network, params: dict, codec: Codec | None, records: Iterable[Record]
) -> dict[str, object]:
    """{"video_scores": `video_scores.scores` by way, "video_shown": what the picture shows}.

    The ways of making maps of whole videos are "read"; "written", from the network's own maps
    before; "alone"; "previous", from the true maps before; "propagated", from the first frame's
    true map alone; and the floors "prior" (of each pixel) and "copied", the first map in all
    frames, with the prior where that map has no class. `records` are of `whole_videos.records`. {}:
    there is no video with pixels.
    """
    videos = [record for record in records if "image" in record]
    if not videos:
        return {}
    facts, made = task.facts, {}
    seen = Videos(task, network, params, codec, [record["image"] for record in videos])
    if "read" in task.ways:
        made["read"] = seen.read()
    if "written" in task.ways:
        true = [facts.encode(record["segmentation"])[0] for record in videos]
        found = {"written": seen.carried(), "alone": seen.alone(), "previous": seen.given(true)}
        found["propagated"] = seen.carried(np.stack([tokens[0] for tokens in true]))
        made |= {way: [*map(facts.codec.decode, rows)] for way, rows in found.items()}
    made["prior"] = [np.broadcast_to(facts.prior, r["segmentation"].shape) for r in videos]
    made = {
        way: [
            plane_to_original(maps, record["view"], record["original"].shape[-2:])
            for maps, record in zip(each, videos, strict=True)
        ]
        for way, each in made.items()
    }
    truths, classes = [record["original"] for record in videos], len(task.map_names)
    made["copied"] = [
        np.broadcast_to(np.where(has_class(truth[0], classes), truth[0], usual[0]), truth.shape)
        for truth, usual in zip(truths, made["prior"], strict=True)
    ]
    for truth, maps in zip(truths, made.get("propagated", ()), strict=False):
        maps[0] = truth[0]
    scores = {}
    for way, each in made.items():
        pairs = [*zip(truths, each, strict=True)]
        scores[way] = video_scores.scores(pairs, classes)
        if way in GIVEN:
            regions = [video_scores.davis(*pair, classes) for pair in pairs]
            regions = [each for each in regions if each]
            means = {n: float(np.mean([each[n] for each in regions])) for n in (regions or [{}])[0]}
            scores[way] |= means
    at = np.unique(np.linspace(0, len(truths[0]) - 1, SHOWN).astype(int))
    pixels, view = np.moveaxis(videos[0]["image"][at], -1, 1), videos[0]["view"]
    image = np.moveaxis(plane_to_original(pixels, view, truths[0].shape[-2:]), 1, -1)
    first = {"image": image, "segmentation": truths[0][at]}
    shown = map_pictures.by_frame(first, {way: maps[0][at] for way, maps in made.items()})
    return {"video_scores": scores, "video_shown": shown}
