"""The methods of `Model` that answer with what a task taught the network, on images of any size."""

import itertools
import os
import zlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from gptv_jax import sharding, validation
from gptv_jax.data import records, transforms
from gptv_jax.data.images import DamagedImageError, Decode
from gptv_jax.errors import InputError, as_input_error, cut
from gptv_jax.tasks.boxes import Detections, vote
from gptv_jax.tasks.detect import Detect, draw
from gptv_jax.tasks.segment import Segment, classes_read, written
from gptv_jax.tokens.codec import AnyArray

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
    return decode.pixels(pixels) if converts and not isinstance(image, Image.Image) else pixels


def _view(pixels: np.ndarray, steps: Steps, size: tuple[int, int]) -> records.Record:
    """The record of an image after the transforms, of the size that the network takes."""
    original = np.array(pixels.shape[:2])
    record = records.with_view({"image": pixels, "original": original}, *pixels.shape[:2])
    for step in steps:
        record = step(record, None)
    return records.resize(record, *size)


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
        self, images: AnyArray | Sequence[Picture], by: str | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """The class of every pixel, int32, at each image's own size.

        Of an array of images the result is an array [B, H, W], of a list a list of arrays [H, W].
        Images are Pillow images or uint8 arrays [H, W, C] of any sizes; they are decoded and
        transformed as the test images were. `by` is "read", all pixels at once, or "written", token
        by token, the most likely one each time; None: "read" where the network has learned both.
        """
        task = self._described.learned_task
        if not isinstance(task, Segment):
            raise InputError(
                "this model has no label maps; load a run with config.task.name=segment whose "
                "stage finetune has finished."
            )
        way = task.ways[0] if by is None else by
        if way not in task.ways:
            raise InputError(f"by is {by!r}; this model takes {' or '.join(task.ways)}.")
        key, found = jax.random.key(task.config.seed), []
        model = task, self.network, self.params
        with jax.set_mesh(self.mesh):
            for (*pictures, numbers), shown in self._views("segment", images):
                if way == "read":
                    planes = np.asarray(classes_read(*model, *pictures))
                else:
                    tokens, _ = written(*model, *pictures, key, numbers)
                    planes = task.facts.codec.decode(np.asarray(tokens))
                for plane, record in zip(planes, shown, strict=False):  # without the padding
                    size = tuple(record["original"].tolist())
                    plane = records.plane_to_original(plane, record["view"], size)
                    found.append(plane.astype(np.int32))
        if not hasattr(images, "ndim"):
            return found
        return np.stack(found) if found else np.zeros((0, *images.shape[1:3]), np.int32)

    def _views(
        self,
        method: str,
        images: AnyArray | Sequence[Picture],
        extra: Sequence[Steps] = ((),),
    ) -> Iterator[tuple[tuple, tuple[records.Record, ...]]]:
        """Tokens, pixels and numbers of images on the mesh, and the records of the first rows.

        There is a record of each image after the transforms of evaluation and each of `extra`, of
        the size that the network takes; "original" is the height and width before. Rows are padded
        to one of SIZES. An image's number is a hash of its pixels. InputError names the `method`
        that was called: an image is no image.
        """
        one = isinstance(images, str | os.PathLike | Image.Image)
        if one or (hasattr(images, "ndim") and images.ndim != 4):
            found = f"one {type(images).__name__}" if one else list(images.shape)
            raise InputError(
                f"{method} was given {found}; it takes a list of images, as in {method}([image]), "
                "or an array [B, H, W, C]."
            )
        data = self._described.learned_task.config.data
        channels = (1, 3) if self.codec is None else self.codec.image_shape[2:]
        decode, *steps = transforms.with_decode(data.eval_transforms, channels[-1])
        converts = len(steps) < len(data.eval_transforms)  # the first entry is the run's own decode
        taken = (1, 3) if converts else channels

        def views() -> Iterator[tuple[int, records.Record]]:
            for image in images:
                pixels = _read(method, decode, taken, converts, image)
                number = zlib.crc32(np.ascontiguousarray(pixels)) >> 1  # an int32
                yield from ((number, _view(pixels, [*steps, *more], data.size)) for more in extra)

        numbered = views()
        while batch := list(itertools.islice(numbered, AT_ONCE)):
            size = next(size for size in SIZES if size >= len(batch))
            numbers, shown = zip(*batch, *batch[-1:] * (size - len(batch)), strict=True)
            views = [record["image"] for record in shown]
            depth = max(view.shape[-1] for view in views)  # a grey image has three equal ones
            pixels = np.stack([np.broadcast_to(x, (*x.shape[:2], depth)) for x in views])
            tokens = None if self.codec is None else self.codec.encode(pixels)
            inputs = tokens, pixels if self.network.stem else None, np.array(numbers, np.int32)
            yield jax.tree.map(sharding.shard_rows, inputs), shown[: len(batch)]
