"""The methods of `Model` that answer with what a task taught the network, on images of any size."""

import dataclasses
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from gptv_jax import sharding, validation
from gptv_jax.data import records, transforms
from gptv_jax.data.images import Decode
from gptv_jax.data.limits import DamagedImageError, check_array, check_image
from gptv_jax.errors import InputError, as_input_error, cut
from gptv_jax.tasks.boxes import Detections, vote
from gptv_jax.tasks.detect import Detect, draw
from gptv_jax.tasks.map_passes import classes_read, map_nats, written
from gptv_jax.tasks.segment import Segment
from gptv_jax.tasks.video_maps import Videos
from gptv_jax.tokens.codec import AnyArray
from gptv_jax.tokens.label_maps import has_class

AT_ONCE = 64  # views that are read in one batch
SIZES = (1, 4, 16, AT_ONCE)  # of batches, as every size is compiled
Picture = np.ndarray | jax.Array | Image.Image | records.Record  # a record's pixels are decoded
Steps = Sequence[transforms.Transform]


def _read(
    method: str,
    decode: Decode,
    channels: tuple[int, ...],
    converts: bool,
    image: Picture,
) -> UInt8[np.ndarray, "H W C"]:
    """The pixels of an image as training has them before the next transform; a record has them.

    With `converts` arrays are decoded, too. InputError: an image is none, or cannot be decoded.
    """
    if isinstance(image, dict):
        return image["image"]
    if isinstance(image, Image.Image):
        with as_input_error(f"{method} cannot read an image", DamagedImageError):
            check_image(image, dataclasses.replace(decode.limits, min_side=1))
            pixels = decode.pixels(image)
    else:
        pixels = np.asarray(image)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    whole = pixels.ndim == 3 and pixels.size and pixels.shape[-1] in channels
    if pixels.dtype != np.uint8 or not whole:
        array = f"{pixels.dtype} {list(np.shape(image))}"
        found = cut(repr(image), 60) if isinstance(image, str | os.PathLike) else array
        raise InputError(
            f"an image is {found}; {method} takes Pillow images, such as PIL.Image.open(path), and "
            f"uint8 arrays [H, W, {' or '.join(map(str, channels))}] of any height and width "
            "from 1 on."
        )
    with as_input_error(f"{method} refuses an image", DamagedImageError):
        check_array(pixels, decode.limits)
    return decode.pixels(pixels) if converts and not isinstance(image, Image.Image) else pixels


def _view(
    pixels: np.ndarray, steps: Steps, size: tuple[int, int], plane: np.ndarray | None = None
) -> records.Record:
    """The record of an image, and of its label map, after the transforms, of the network's size."""
    original = np.array(pixels.shape[:2])
    record = records.with_view({"image": pixels, "original": original}, *pixels.shape[:2])
    if plane is not None:
        if plane.shape != pixels.shape[:2]:
            size = f"{list(plane.shape)}; its image is {list(pixels.shape[:2])}"
            raise InputError(f"a label map is {size}, and both must have one height and width.")
        record["segmentation"] = plane
    for step in steps:
        record = step(record, None)
    return records.resize(record, *size)


def _known(plane: AnyArray, classes: int) -> Int[np.ndarray, "H W"]:
    """A label map that a user gives, with -1 for no class; InputError: it has no integers."""
    plane = np.asarray(plane)
    if plane.dtype.kind not in "iu":
        raise InputError(f"a label map is {plane.dtype}; it takes whole numbers, such as uint8.")
    return np.where(has_class(plane, classes), plane.astype(np.int32), -1)


def _pixels(shown: Sequence[records.Record]) -> UInt8[np.ndarray, "B H W C"]:
    """The pixels of records of one size."""
    views = [record["image"] for record in shown]
    depth = max(view.shape[-1] for view in views)  # a grey image has three equal ones
    return np.stack([np.broadcast_to(x, (*x.shape[:2], depth)) for x in views])


class OfTasks:
    """Methods of `Model` for networks that were fine-tuned for a task."""

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of the classes of objects, in the order of the labels that `detect` gives."""
        return self._described.object_names

    def detect(
        self,
        images: AnyArray | Sequence[Picture],
        threshold: float = 0.0,
        votes: Sequence[str] | None = None,
    ) -> list[Detections]:
        """The objects in each image, in the image's own pixels, the most likely first.

        Images are Pillow images or uint8 arrays [H, W, C] of any sizes; they are decoded and
        transformed as the test images were, and resized to the size of the network's images.
        Objects of a score below `threshold` are left out. `votes` are transforms such as
        "flip(1.0)", under which each image is read as well; the objects of all views vote. None: as
        in the test. Where the network has learned masks, `np.asarray(found.masks)` is bool
        [n, H, W], and `found.masks[0]` is the first object's.

        Where config.task.detect.top_p is above 0 boxes are drawn at random. What is drawn depends
        on the image's own pixels and config.seed alone: equal images have equal boxes, wherever
        they stand in `images`. The run's own test draws by the number of the test image.
        """
        task = self._described.learned_task
        if not isinstance(task, Detect):
            raise InputError(
                "this model does not detect objects; load a run with config.task.name=detect whose "
                "stage finetune has finished."
            )
        threshold = validation.share("threshold", threshold)
        votes = task.settings.votes if votes is None else votes
        if isinstance(votes, str) or not all(isinstance(entry, str) for entry in votes):
            advice = "it takes a list of texts, as in votes=['flip(1.0)']"
            raise InputError(f"votes is {cut(repr(votes), 60)}; {advice}.")
        extra, found = [[], *transforms.parse_views(votes, "votes")], []
        with jax.set_mesh(self.mesh):
            for inputs, shown in self._views("detect", images, extra):
                drawn = map(np.asarray, draw(task, self.network, self.params, *inputs))
                for *row, record in zip(*drawn, shown, strict=False):  # without the padding
                    size = tuple(record["original"].tolist())
                    found.append(task.found(*row, record["view"], size))
        by_image = (found[at : at + len(extra)] for at in range(0, len(found), len(extra)))
        best = [task.best(vote(views)) for views in by_image]
        return [each.take(each.scores >= threshold) for each in best]

    @property
    def map_classes(self) -> tuple[str, ...]:
        """Names of the classes of label maps, in the order of the numbers that `segment` gives."""
        return self._described.map_names

    def segment(
        self,
        images: AnyArray | Sequence[Picture],
        by: str | None = None,
        *,
        samples: int | None = None,
        temperature: float | int = 1.0,
        seed: int = 0,
    ) -> Int[np.ndarray, "B *samples H W"] | list[Int[np.ndarray, "*samples H W"]]:
        """The class of every pixel, int32, at each image's own size.

        Of an array of images the result is an array [B, H, W], of a list a list of arrays [H, W].
        Images are Pillow images or uint8 arrays [H, W, C] of any sizes; they are decoded and
        transformed as the test images were. `by` is "read", all pixels at once, or "written", token
        by token, the most likely one each time; None: "read" where the network has learned both.

        With `samples`, so many maps of each image are written by drawing the tokens at the
        `temperature`, and the shapes are [B, samples, H, W] and [samples, H, W]. A seed always
        gives equal maps of equal images. Where the maps disagree, the network is unsure.
        """
        temperature, seed = validation.setting("temperature", temperature), validation.seed(seed)
        count = 1 if samples is None else validation.whole(samples, "samples", least=1)
        if samples is None:
            temperature = 0.0  # the most likely tokens
        elif by == "read":
            raise InputError(f"samples is {samples}, but by='read' gives one map; leave by out.")
        else:
            by = by or "written"
        task = self._segmenter(by)
        way = by or task.ways[0]
        key, found = jax.random.key(seed), []
        model = task, self.network, self.params
        with jax.set_mesh(self.mesh):
            for (*pictures, numbers), shown in self._views("segment", images):
                if way == "read":
                    planes = np.asarray(classes_read(*model, *pictures))
                else:
                    tokens, _ = written(*model, *pictures, key, numbers, temperature, count)
                    planes = task.facts.codec.decode(np.asarray(tokens))
                planes = planes.reshape(-1, count, *planes.shape[1:])
                for maps, record in zip(planes, shown, strict=False):  # without the padding
                    size = tuple(record["original"].tolist())
                    maps = [records.plane_to_original(x, record["view"], size) for x in maps]
                    found.append(np.array(maps, np.int32)[0 if samples is None else slice(None)])
        if not hasattr(images, "ndim"):
            return found
        several = () if samples is None else (samples,)
        return np.stack(found) if found else np.zeros((0, *several, *images.shape[1:3]), np.int32)

    def segment_video(
        self,
        frames: AnyArray | Sequence[Picture],
        first_map: AnyArray | None = None,
        *,
        by: str | None = None,
        carry: bool = True,
    ) -> Int[np.ndarray, "N H W"]:
        """The class of every pixel of a video's N frames, int32, of a model of clips.

        Frames are as the images of `segment`, and of one size. A window of the F frames of training
        (config.data.frames) moves on frame by frame. A frame's map is written given the maps of the
        frames before it in its window, so that classes are carried along; with carry=False each map
        is written alone. `first_map`, integers [H, W] as in `map_log_likelihood`, is the first
        frame's map, from which all later maps follow; the result has it unchanged. `by` is
        "written", or "read", from the images alone; None: "written" where the model has learned it.
        """
        given = carry and first_map is not None
        task = self._segmenter(by or ("written" if given else None))
        by, size = by or task.ways[-1], task.frames
        if not size:
            raise InputError("this model reads images (config.data.frames=0); take segment.")
        if first_map is not None and not (by == "written" and carry):
            raise InputError(
                "first_map is for maps that are carried along: by='written', carry=True."
            )
        first = None if first_map is None else _known(first_map, len(self.map_classes))
        if first is not None and (first < 0).all():
            raise InputError(
                f"first_map has no class, so nothing can be carried along; it takes the numbers 0 "
                f"to {len(self.map_classes) - 1} of model.map_classes."
            )
        maps = itertools.chain([first], itertools.repeat(None))
        shown = [record for _, record in self._shown("segment_video", frames, maps=maps)]
        if not shown:
            raise InputError("segment_video was given no frame; it takes 1 or more.")
        if len(sizes := {tuple(record["original"].tolist()) for record in shown}) > 1:
            raise InputError(
                f"the frames of a video have one size; these have {sorted(sizes)[:3]}."
            )
        with jax.set_mesh(self.mesh):
            video = Videos(task, self.network, self.params, self.codec, [_pixels(shown)])
            if by == "read":
                [planes] = video.read()
            else:
                if first is not None:
                    first = task.facts.encode(shown[0]["segmentation"][None])[0]
                [tokens] = video.carried(first) if carry else video.alone()
                planes = task.facts.codec.decode(tokens)
        [whole] = sizes
        found = records.plane_to_original(planes, shown[0]["view"], whole).astype(np.int32)
        if first_map is not None:
            found[0] = first_map
        return found

    def map_log_likelihood(
        self, images: AnyArray | Sequence[Picture], maps: AnyArray | Sequence[AnyArray]
    ) -> Float[np.ndarray, " B"]:
        """Float32 log-probability of each label map given its image, in nats, as written tokens.

        The result is the sum over the map's tokens; cells that have no class do not count. Label
        maps of equal tokens are equally likely. `maps` are an array [B, H, W], or a list of arrays
        [H, W] of the images' heights and widths, with the numbers of classes; 255 in uint8, and any
        other number without a class, such as -1, stand for no class. `images` are as in `segment`.
        """
        task, found = self._segmenter("written"), []
        planes = [_known(plane, len(self.map_classes)) for plane in maps]
        views = self._views("map_log_likelihood", images, maps=planes)
        with jax.set_mesh(self.mesh):
            for (tokens, pixels, numbers), shown in views:
                rows = [task.example(record) for record in shown]
                rows += rows[-1:] * (len(numbers) - len(rows))
                rows = jax.tree.map(lambda *each: sharding.shard_rows(np.stack(each)), *rows)
                given = {"tokens": tokens, "image": pixels}
                batch = rows | {name: x for name, x in given.items() if x is not None}
                nats = np.asarray(map_nats(self.network, self.params, batch))
                found.append(nats[: len(shown)])
        return -np.concatenate([np.zeros(0, np.float32), *found])

    def _segmenter(self, by: str | None = None) -> Segment:
        """The task of this model; InputError where it does not segment, or not in the way `by`."""
        task = self._described.learned_task
        if not isinstance(task, Segment):
            raise InputError(
                "this model has no label maps; load a run with config.task.name=segment whose "
                "stage finetune has finished."
            )
        if by not in (None, *task.ways):
            raise InputError(
                f"by is {by!r}; this model takes {' or '.join(task.ways)}, the ways that "
                "config.task.segment of its run has switched on."
            )
        return task

    def _shown(
        self,
        method: str,
        images: AnyArray | Sequence[Picture],
        extra: Sequence[Steps] = ((),),
        maps: Iterable[np.ndarray | None] | None = None,
    ) -> Iterator[tuple[int, records.Record]]:
        """The number of each image, a hash of its pixels, and its record of the network's size.

        There is a record after the transforms of evaluation and each of `extra`; "original" is the
        height and width before. `maps` are the images' label maps, or None, which the records then
        have as well. InputError names the `method` that was called: an image is no image.
        """
        one = isinstance(images, str | os.PathLike | Image.Image)
        if one or (hasattr(images, "ndim") and images.ndim != 4):
            found = f"one {type(images).__name__}" if one else list(images.shape)
            raise InputError(
                f"{method} was given {found}; it takes a list of images, as in {method}([image]), "
                "or an array [B, H, W, C]."
            )
        if isinstance(maps, list) and len(maps) != len(images):
            raise InputError(f"there are {len(images)} images, but {len(maps)} label maps.")
        data = self._described.learned_task.config.data
        channels = (1, 3) if self.codec is None else self.codec.image_shape[2:]
        decode, *steps = transforms.with_decode(data.eval_transforms, channels[-1])
        decode = decode.within(data.limits)
        converts = len(steps) < len(data.eval_transforms)  # the first entry is the run's own decode
        taken = (1, 3) if converts else channels

        planes = itertools.repeat(None) if maps is None else maps
        for image, plane in zip(images, planes, strict=False):
            pixels = _read(method, decode, taken, converts, image)
            number = zlib.crc32(np.ascontiguousarray(pixels)) >> 1  # an int32
            for more in extra:
                yield number, _view(pixels, [*steps, *more], data.size, plane)

    def _views(
        self, method: str, *shown, **options
    ) -> Iterator[tuple[tuple, tuple[records.Record, ...]]]:
        """Tokens, pixels and numbers on the mesh, and the records of the first rows, of `_shown`.

        Rows are padded to one of SIZES.
        """
        if frames := self._described.learned_task.config.data.frames:
            raise InputError(
                f"this model reads clips of {frames} frames, and {method} takes images; of videos, "
                "segment_video gives the label maps."
            )
        numbered = self._shown(method, *shown, **options)
        while batch := list(itertools.islice(numbered, AT_ONCE)):
            size = next(size for size in SIZES if size >= len(batch))
            numbers, shown = zip(*batch, *batch[-1:] * (size - len(batch)), strict=True)
            pixels = _pixels(shown)
            tokens = None if self.codec is None else self.codec.encode(pixels)
            inputs = tokens, pixels if self.network.stem else None, np.array(numbers, np.int32)
            yield jax.tree.map(sharding.shard_rows, inputs), shown[: len(batch)]
