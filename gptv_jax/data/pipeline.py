"""Batches of tokens, read by Grain.

The training data is one endless sequence of examples, shuffled anew in every epoch. Global batch k
is its elements k*B .. (k+1)*B, of which share i of n reads the i-th of n equal parts. So a position
in the training data is one number, the count of global batches read, which depends neither on the
number of hosts nor on workers.
"""

import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator

import grain
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import cached_tokens, sources, transforms
from gptv_jax.data.cache import TokenCache
from gptv_jax.data.clips import by_video, places
from gptv_jax.data.damage import NOT_DAMAGED, DamageLog, DecodedSource
from gptv_jax.data.images import Decode
from gptv_jax.data.mixup import mixed
from gptv_jax.data.reading import batches_ahead, read_ahead
from gptv_jax.data.records import PICTURE, Record, Rng, with_view
from gptv_jax.data.stills import Stills, images_of
from gptv_jax.data.teacher_draws import DRAWS
from gptv_jax.errors import InputError
from gptv_jax.tokens import Codec

LOG = logging.getLogger(__name__)
ENCODE_AHEAD = 2  # batches that a codec on devices encodes ahead of their use
# Makes the task's part of a batch from a record and a generator; the generator is None in
# evaluation.
ExampleOf = Callable[[Record, Rng], dict]
ALWAYS = ("label", "variant", "damaged", "still")  # keys of a record that any batch has
DROPS_FIRST = "drop_... entries stand before all others but decode()."
DECODE_FIRST = 'lists of transforms for image files begin with "decode()", and have it once.'


@dataclasses.dataclass(eq=False)
class Pipeline:
    """The data of a run, as batches of NumPy arrays.

    A batch holds "tokens", int32 [b, T], and with `pixels` or without a codec "image", uint8
    [b, H, W, C]; the "variant" that a shift drew, int32 [b]; the "label", int32 [b], of labelled
    data; and what `example(record, rng)` makes of a transformed record, such as
    `tasks.Task.example`: dicts of arrays of fixed shapes. Without `example`, boxes and other
    annotations are left out. Of every global batch, `share=(i, n)` reads the i-th of n equal parts.
    The log of damaged images is kept in the run folder, if one is given.
    """

    config: config_lib.Data
    codec: Codec | None
    seed: int
    folder: pathlib.Path | None = None
    share: tuple[int, int] = (0, 1)
    damage_log: DamageLog | None = None
    pixels: bool = False  # whether every batch holds "image" beside "tokens"

    def __post_init__(self):
        self.damage_log = self.damage_log or DamageLog(self.config, self.folder)

    def train(
        self,
        batch_size: int,
        position: int = 0,
        entries: tuple[str, ...] = (),
        example: ExampleOf | None = None,
        pixels: bool = False,
        stills: bool = False,
        mixup: float = 0.0,
        taught: bool = False,
    ) -> Iterator[dict]:
        """This process's share of every global batch from number `position` on, without end.

        `entries` are transforms in place of the config's. With `stills`, the images that the config
        mixes with clips are among them; "still", bool [b], says which they are. With `mixup`, every
        image is blended with another training image, see data/mixup.py. With `taught`, the ids that
        a teacher drew are "teacher_ids" [b, T, K], each drawn "teacher_counts" times, see
        `cached_tokens.taught_by`.
        """
        make = self._example("train", entries or self.config.train_transforms, example, pixels)
        most = cached_tokens.taught_by(self.config).distinct if taught else 0
        make = dataclasses.replace(make, mixup=mixup, taught=most)
        if stills and self.config.still_share:
            images = open_examples(*images_of(self.config))
            make = dataclasses.replace(make, stills=Stills(images, make.source, self.config))
        data = grain.MapDataset.range(len(make.source)).seed(self.seed).shuffle().repeat()
        return self._batches(data.random_map(make), "train", make, batch_size, position)

    def evaluation(
        self,
        split: str,
        batch_size: int,
        limit: int | None = None,
        example: ExampleOf | None = None,
        extra: tuple[str, ...] = (),
        pixels: bool = False,
        clips: int = 1,
        entries: tuple[str, ...] = (),
    ) -> Iterator[dict]:
        """This process's share of the first `limit` examples of a split, without augmentation.

        Every process gets equally many batches. "mask", float32 [b], is 1 once for every example,
        and 0 for padding and for examples that replace a damaged image; "index", int32 [b], is the
        number of the example. With `example`, "view", float32 [b, 4], is the part of the original
        that an image shows, see data/records.py. `extra` are transforms after the config's, and
        `entries` transforms in place of the config's.
        With several `clips` of each video, evenly spaced, "tokens" are [b, clips, T].
        """
        entries = (*(entries or self.config.eval_transforms), *extra)
        make = self._example(split, entries, example, pixels)
        length = len(make.source)
        examples = length if limit is None else min(limit, length)
        padded = -(-examples // batch_size) * batch_size
        masked = functools.partial(make.masked, examples, places(clips))
        data = grain.MapDataset.range(padded * clips).map(masked)
        batches = self._batches(data, split, make, batch_size * clips)
        return batches if clips == 1 else (by_video(batch, clips) for batch in batches)

    def has_pixels(self) -> bool:
        """Whether the images can be read; a token cache has only tokens."""
        return not isinstance(sources.open_data_set(self.config), TokenCache)

    def _example(self, split, entries, example, pixels) -> "_Example":
        """What Grain's workers do; a codec that encodes on devices gets the workers' batches."""
        pixels = pixels or self.pixels
        if pixels and not self.has_pixels():
            field = "model" if self.pixels else "task"
            raise InputError(
                f"config.data.path={self.config.path} is a token cache, which has no pixels for "
                f"config.{field}.image_input=pixels; name a data set of images."
            )
        codec = self.codec
        if codec is not None and codec.on_devices and self.has_pixels():
            codec = None
        made = open_examples(self.config, split, entries)
        return dataclasses.replace(made, codec=codec, example=example, pixels=pixels)

    def _batches(self, data, split, example, batch_size, position=0) -> Iterator[dict]:
        """This process's share of the batches; numbers of damaged images move into the log."""
        index, count = self.share
        # No remainder is dropped. With drop_remainder=False Grain counts the batches of an endless
        # source in floating point.
        rows = batch_size // count
        data = data.batch(rows, drop_remainder=True)[index::count][position:]
        ahead = batches_ahead(self.config, rows)
        read = read_ahead(data, example.source, self.config.workers, ahead)
        if example.codec is not self.codec:  # which encodes whole batches, on devices
            take = dict.get if example.pixels else dict.pop
            read = read.map(lambda b: {"tokens": self.codec.encode(take(b, "image")), **b})
            prefetch = grain.experimental.ThreadPrefetchIterDataset
            read = prefetch(read, prefetch_buffer_size=ENCODE_AHEAD)
        for number, batch in enumerate(read, start=position + 1):
            damaged = batch.pop("damaged", NOT_DAMAGED)
            self.damage_log.record(split, example.stills or example.source, damaged, number)
            yield batch


def images(
    config: config_lib.Data,
    split: str,
    damage_log: DamageLog,
    count: int | None = None,
    seed: int = 0,
    annotated: bool = False,
    anywhere: bool = False,
) -> Iterator[Record]:
    """The records of a split after the transforms of evaluation, damaged images left out.

    With `count`, so many records are drawn without replacement; otherwise all come in order. Boxes
    and the like are left out, unless `annotated`. `anywhere` draws `count` clips that begin at
    random frames, several of a video where there are fewer videos.
    """
    make = dataclasses.replace(
        open_examples(config, split, config.eval_transforms), annotated=annotated
    )
    source = make.source
    data = grain.MapDataset.range(len(source))
    if anywhere or (count is not None and count < len(source)):
        data = data.seed(seed).shuffle()
        data = (data.repeat() if anywhere else data)[:count]
    data = data.random_map(make.record) if anywhere else data.map(make.record)
    for number, record in enumerate(read_ahead(data, source, config.workers), start=1):
        damaged = record.pop("damaged", NOT_DAMAGED)
        damage_log.record(split, source, damaged, number)
        if damaged == NOT_DAMAGED:
            yield record


def open_examples(config: config_lib.Data, split: str, entries: tuple[str, ...]) -> "_Example":
    """The split's source, with the transforms to apply to its pixels or grids of tokens."""
    source = sources.open_source(config, split)
    steps = [transforms.parse(entry) for entry in entries]
    if any(isinstance(step, Decode) for step in steps[1:]):
        raise InputError(f"a list of transforms of config.data is {entries}; {DECODE_FIRST}")
    decode = steps[0].within(config.limits) if steps and isinstance(steps[0], Decode) else None
    others = steps[1:] if decode else steps
    filters = list(itertools.takewhile(lambda step: step.drops, others))
    if any(step.drops for step in others[len(filters) :]):
        raise InputError(f"a list of transforms of config.data is {entries}; {DROPS_FIRST}")
    if isinstance(sources.open_data_set(config), TokenCache):
        return _Example(source, cached_tokens.steps_of(config, entries))
    if decode or filters:
        bound = [each.bound(config, split, decode, filters) for each in filters]
        source = DecodedSource(source, decode, bound)
    return _Example(source, others[len(filters) :])


@dataclasses.dataclass(frozen=True)
class _Example(grain.transforms.RandomMap):
    """Reads, transforms and tokenises an example, in one Grain operation, as each takes time."""

    source: object
    steps: list[transforms.Transform]
    codec: Codec | None = None
    example: ExampleOf | None = None
    pixels: bool = False
    annotated: bool = False
    stills: Stills | None = None
    mixup: float = 0.0
    taught: int = 0  # K, see `Draws.padded`; 0: a teacher's draws are not read

    def record(self, index: int, rng: Rng = None, place: float = 0.5) -> Record:
        """The transformed record, without annotations unless they are used.

        Of a video, a generator draws where the clip begins; without one, see `Source.read`.
        """
        record = self.transformed(self.source.read(index, rng, place), index, rng)
        if self.annotated:
            record["image_id"] = self.source.image_id(index)
        return record

    def transformed(self, record: Record, index: int, rng: Rng = None) -> Record:
        """What `record` makes of a record of the source, which has this number."""
        record = record | {"variant": np.int32(0)}
        if "encoded" in record:
            raise InputError(f"{self.source.name(index)} is an image file; {DECODE_FIRST}")
        if not (self.example or self.annotated):
            record = {n: record[n] for n in (*PICTURE, *ALWAYS, DRAWS) if n in record}
        elif "view" not in record:
            size = record["image"].shape if "image" in record else self.codec.image_shape
            record = with_view(record, *size[-3:-1])
        for step in self.steps:
            record = step(record, step.generator(index, rng))
        return record

    def random_map(self, index: int, rng: Rng = None, place: float = 0.5) -> dict:
        read = functools.partial(self.record, index, rng, place)
        record = self.stills.draw(rng, read) if self.stills else read()
        if self.mixup and rng is not None:
            other = self.record(int(rng.integers(len(self.source))), rng)
            record = mixed(record, other, self.mixup, rng)
        found = {name: record[name] for name in ALWAYS if name in record}
        if self.codec is not None:
            found["tokens"] = to_tokens(self.codec, record)
        if self.codec is None or self.pixels:
            found["image"] = record["image"]
        if self.taught:
            pair = record[DRAWS].padded(self.taught)
            found["teacher_ids"], found["teacher_counts"] = pair
        if self.example is not None:
            found |= self.example(record, rng)
            if rng is None:
                found["view"] = record["view"]
        return found

    def masked(self, examples: int, starts: list[float], number: int) -> dict:
        """The example, or padding where its index is not below the number of examples.

        The clips of an example, which begin at `starts`, follow each other; see `Source.read`.
        """
        index, clip = divmod(number, len(starts))
        padding = index >= examples
        element = self.random_map(0 if padding else index, None, starts[clip])
        counts = not padding and element.get("damaged", NOT_DAMAGED) == NOT_DAMAGED
        return {**element, "mask": np.float32(counts), "index": np.int32(index)}


def to_tokens(codec: Codec, record: Record) -> np.ndarray:
    """Tokens, int32 [T], of the record's image or of its tokens from a cache."""
    return all_tokens(codec, [record])[0]


def all_tokens(codec: Codec, records: list[Record]) -> np.ndarray:
    """As `to_tokens`, int32 [B, T]; a codec on devices encodes all records together."""
    name, shape = ("tokens", codec.grid) if "tokens" in records[0] else ("image", codec.image_shape)
    for record in records:
        check_shape(record[name], shape)
    rows = np.stack([record[name] for record in records])
    if name == "tokens":
        return rows.reshape(len(rows), -1).astype(np.int32)
    try:
        return codec.encode(rows)
    except ValueError as error:
        raise InputError(f"config.tokens does not fit the images: {error}") from error


def tokenized(codec: Codec, elements: Iterator[Record], count: int = 64) -> Iterator[list[Record]]:
    """Records of `images`, up to `count` at a time, with their "tokens", int32 [T]."""
    while chunk := list(itertools.islice(elements, count)):
        rows = all_tokens(codec, chunk)
        yield [record | {"tokens": row} for record, row in zip(chunk, rows, strict=True)]


def batched(elements: Iterator[dict], count: int) -> Iterator[dict]:
    """Examples of `images` as batches of up to `count`."""
    while chunk := list(itertools.islice(elements, count)):
        yield {name: np.stack([element[name] for element in chunk]) for name in chunk[0]}


def check_shape(image: np.ndarray, expected: tuple[int, ...]) -> None:
    """Raises InputError where an image, or a grid of tokens, has another shape."""
    if image.shape != expected:
        found, takes = (" x ".join(map(str, shape)) for shape in (image.shape, expected))
        size = expected[-3:-1]
        cure = f'end the transforms by "resize({size})", or change config.data.image_size'
        if image.ndim != len(expected):
            cure = "take config.data.frames=0 for images, and 1 or more for videos"
        elif image.shape[:-1] == expected[:-1]:
            kinds = "config.tokens.kind (palette takes RGB, grey 1 channel)"
            cure = f'take "decode(channels={expected[-1]})" or another {kinds}'
        raise InputError(
            f"after the transforms of config.data an image is {found}, but {takes} is needed; "
            f"{cure}."
        )
