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
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterator

import grain
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import depths, sources, transforms
from gptv_jax.data.damage import NOT_DAMAGED, DamageLog, DecodedSource
from gptv_jax.data.images import Decode
from gptv_jax.errors import InputError
from gptv_jax.tokens import Codec, GreyCodec

LOG = logging.getLogger(__name__)
ENCODE_AHEAD = 2  # batches that a codec on devices encodes ahead of their use
TRIED = 32  # images that the transforms and the codec are tried on
# An image of a standard deviation below BLANK looks blank, one of no value above DARK dark; of 255.
BLANK, DARK = 4, 64


@dataclasses.dataclass(eq=False)
class Pipeline:
    """The data of a run, as batches of NumPy arrays.

    A batch holds "tokens", int32 [b, T], or "image", uint8 [b, H, W, C], if there is no codec; the
    "variant" that a shift drew, int32 [b]; and the "label", int32 [b], of labelled data. Of every
    global batch, `share=(i, n)` reads the i-th of n equal parts. The log of damaged images is kept
    in the run folder, if one is given.
    """

    config: config_lib.Data
    codec: Codec | None
    seed: int
    folder: pathlib.Path | None = None
    share: tuple[int, int] = (0, 1)
    damage_log: DamageLog | None = None

    def __post_init__(self):
        self.damage_log = self.damage_log or DamageLog(self.config, self.folder)

    def train(
        self, batch_size: int, position: int = 0, entries: tuple[str, ...] = ()
    ) -> Iterator[dict]:
        """This process's share of every global batch from number `position` on, without end.

        `entries` are transforms in place of the config's.
        """
        example = self._example("train", entries or self.config.train_transforms)
        data = grain.MapDataset.range(len(example.source)).seed(self.seed).shuffle().repeat()
        data = data.random_map(example)
        return self._batches(data, "train", example, batch_size, position)

    def evaluation(self, split: str, batch_size: int, limit: int | None = None) -> Iterator[dict]:
        """This process's share of the first `limit` examples of a split, without augmentation.

        Every process gets equally many batches. "mask", float32 [b], is 1 once for every example,
        and 0 for padding and for examples that replace a damaged image; "index", int32 [b], is the
        number of the example.
        """
        example = self._example(split, self.config.eval_transforms)
        length = len(example.source)
        examples = length if limit is None else min(limit, length)
        padded = -(-examples // batch_size) * batch_size
        data = grain.MapDataset.range(padded).map(functools.partial(example.masked, examples))
        return self._batches(data, split, example, batch_size)

    def has_pixels(self, split: str) -> bool:
        """Whether the split's images can be read; a token cache has only tokens."""
        return sources.open_source(self.config, split).stored_as != "tokens"

    def _example(self, split: str, entries: tuple[str, ...]) -> "_Example":
        """What Grain's workers do; a codec that encodes on devices gets the workers' batches."""
        on_devices = self.codec is not None and self.codec.on_devices and self.has_pixels(split)
        return _open(self.config, split, entries, None if on_devices else self.codec)

    def _batches(self, data, split, example, batch_size, position=0) -> Iterator[dict]:
        """This process's share of the batches; numbers of damaged images move into the log."""
        index, count = self.share
        # No remainder is dropped. With drop_remainder=False Grain counts the batches of an endless
        # source in floating point.
        data = data.batch(batch_size // count, drop_remainder=True)[index::count][position:]
        read = _read_ahead(data, example.source, self.config.workers)
        if example.codec is not self.codec:  # which encodes whole batches, on devices
            read = read.map(lambda b: {"tokens": self.codec.encode(b.pop("image")), **b})
            ahead = grain.experimental.ThreadPrefetchIterDataset
            read = ahead(read, prefetch_buffer_size=ENCODE_AHEAD)
        for number, batch in enumerate(read, start=position + 1):
            damaged = batch.pop("damaged", NOT_DAMAGED)
            self.damage_log.record(split, example.source, damaged, number)
            yield batch


def try_out(
    config: config_lib.Data, codec: Codec | None, shape: tuple[int, ...], entries: tuple[str, ...]
) -> None:
    """Makes tokens of the first training images, so that misfits are found before any work.

    Without a codec, or if the codec encodes on devices, only `shape` is checked, [H, W, C], or
    [H, W] of grey and RGB images. Files of more than 8 bits are looked at before. After the
    transforms of evaluation, images that all look blank or dark are warned of.
    """
    example, rng = _open(config, "train", entries), np.random.default_rng(0)
    evaluated, warned = entries == config.eval_transforms, False
    # Another list that decodes files as that of evaluation does is not told of twice.
    if isinstance(example.source, DecodedSource) and (
        evaluated or example.source.decode not in map(transforms.parse, config.eval_transforms[:1])
    ):
        warned = depths.check(config, example.source)
    shown = []
    for index in range(min(TRIED, len(example.source))):
        image = example.random_map(index, rng)["image"]
        if codec is None or (codec.on_devices and image.dtype == np.uint8):
            grey_or_rgb = (*shape, 1 if image.shape[-1] == 1 else 3)
            _check_shape(image, shape if len(shape) == 3 else grey_or_rgb)
        else:
            to_tokens(codec, image)
        if image.dtype == np.uint8:  # not tokens of a cache
            shown.append(codec.picture(image[None])[0] if codec else image)
    if shown and evaluated and not warned:
        _warn_of_blank(config, codec, shown)


def _warn_of_blank(
    config: config_lib.Data, codec: Codec | None, pictures: list[np.ndarray]
) -> None:
    """Warns where no picture, uint8 [H, W, C] in 0..255, has contrast, or all are dark."""
    deviation = max(picture.std(axis=(0, 1)).max() for picture in pictures)
    low = min(picture.min() for picture in pictures)
    high = max(picture.max() for picture in pictures)
    if deviation >= BLANK and high > DARK:
        return
    look = "have nearly one value each" if deviation < BLANK else "are all dark"
    cure = ""
    if high <= DARK and not (isinstance(codec, GreyCodec) and codec.vocabulary < 256):
        cure = ' The transform "normalize()" makes dark images bright.'
    LOG.warning(
        "the first %d images of %s %s: values %d to %d of 255, deviating by %.1f at most. Look at "
        "the files and at the transforms.%s",
        *(len(pictures), config.path or config.name, look, low, high, deviation, cure),
    )


def images(
    config: config_lib.Data,
    split: str,
    damage_log: DamageLog,
    count: int | None = None,
    seed: int = 0,
) -> Iterator[dict]:
    """The examples of a split after the transforms of evaluation, damaged images left out.

    With `count`, so many examples are drawn without replacement; otherwise all come in order. An
    example has "image", uint8 [H, W, C] or from a token cache the grid of tokens, uint16 [rows,
    columns, 1]; "variant"; and "label" of labelled data.
    """
    example = _open(config, split, config.eval_transforms)
    source = example.source
    data = grain.MapDataset.range(len(source))
    if count is not None and count < len(source):
        data = data.seed(seed).shuffle()[:count]
    data = data.map(example.random_map)
    for number, element in enumerate(_read_ahead(data, source, config.workers), start=1):
        damaged = element.pop("damaged", NOT_DAMAGED)
        damage_log.record(split, source, damaged, number)
        if damaged == NOT_DAMAGED:
            yield element


def _open(
    config: config_lib.Data, split: str, entries: tuple[str, ...], codec: Codec | None = None
) -> "_Example":
    """The split's source, with the transforms to apply to its pixels or grids of tokens."""
    source = sources.open_source(config, split)
    steps = [transforms.parse(entry) for entry in entries]
    decodes = [isinstance(step, Decode) for step in steps]
    if any(decodes[1:]) or (source.stored_as == "encoded" and not any(decodes)):
        raise InputError(
            f"a list of transforms of config.data is {entries}; lists for image files, such as "
            f'those of {config.name}, begin with "decode()", and have it once.'
        )
    if source.stored_as == "encoded":
        source, steps = DecodedSource(source, steps[0]), steps[1:]
    elif source.stored_as == "tokens":
        steps = _token_steps(config, entries)
    return _Example(source, steps, codec)


@functools.cache
def _token_steps(config: config_lib.Data, entries: tuple[str, ...]) -> list[transforms.Transform]:
    """The transforms after the last one that needs pixels; warns of those that are left out.

    Learned tokens cannot be transformed: moving a code does not mirror the pixels it stands for.
    """
    steps = [transforms.parse(entry) for entry in entries]
    learned = sources.open_data_set(config).tokens.kind == "learned"
    on_pixels = [i for i, step in enumerate(steps) if learned or step.needs_pixels]
    first = max(on_pixels, default=-1) + 1
    left_out = [entry for entry in entries[:first] if entry not in config.eval_transforms]
    if left_out:
        LOG.warning(
            "left out: %s, which needs pixels, and a token cache has none; the cache was made "
            "with %s.",
            ", ".join(left_out),
            ", ".join(config.eval_transforms),
        )
    return steps[first:]


@dataclasses.dataclass(frozen=True)
class _Example(grain.transforms.RandomMap):
    """Reads, transforms and tokenises an example, in one Grain operation, as each takes time."""

    source: object
    steps: list[transforms.Transform]
    codec: Codec | None = None

    def random_map(self, index: int, rng: np.random.Generator | None = None) -> dict:
        element = {**self.source[index], "variant": np.int32(0)}
        for step in self.steps:
            if getattr(step, "variants", 1) > 1:
                element["variant"] = np.int32(step.draw(rng))
                element["image"] = step.variant(element["image"], int(element["variant"]))
            else:
                element["image"] = step(element["image"], rng)
        if self.codec is None:
            return element
        return {"tokens": to_tokens(self.codec, element.pop("image")), **element}

    def masked(self, examples: int, index: int) -> dict:
        """The example, or padding where `index` is not below the number of examples."""
        padding = index >= examples
        element = self.random_map(0 if padding else index)
        counts = not padding and element.get("damaged", NOT_DAMAGED) == NOT_DAMAGED
        return {**element, "mask": np.float32(counts), "index": np.int32(index)}


def to_tokens(codec: Codec, image: np.ndarray) -> np.ndarray:
    """Tokens, int32 [T], of an image or of a grid of tokens from a cache."""
    cached = image.dtype == np.uint16
    _check_shape(image, (*codec.grid, 1) if cached else codec.image_shape)
    if cached:
        return image.reshape(-1).astype(np.int32)
    return _encode(codec, image[None])[0]


def tokenized(codec: Codec, elements: Iterator[dict], count: int = 64) -> Iterator[dict]:
    """Examples of `images` as batches of up to `count`, with their "tokens", int32 [b, T]."""
    for batch in batched(elements, count):
        _check_shape(batch["image"][0], codec.image_shape)
        yield {**batch, "tokens": _encode(codec, batch["image"])}


def _encode(codec: Codec, images: np.ndarray) -> np.ndarray:
    try:
        return codec.encode(images)
    except ValueError as error:
        raise InputError(f"config.tokens does not fit the images: {error}") from error


def batched(elements: Iterator[dict], count: int) -> Iterator[dict]:
    """Examples of `images` as batches of up to `count`."""
    while chunk := list(itertools.islice(elements, count)):
        yield {name: np.stack([element[name] for element in chunk]) for name in chunk[0]}


def _check_shape(image: np.ndarray, expected: tuple[int, ...]) -> None:
    if image.shape != expected:
        found, takes = (" x ".join(map(str, shape)) for shape in (image.shape, expected))
        cure = "change one of these"
        if image.shape[:2] == expected[:2]:
            kinds = "config.tokens.kind (palette takes RGB, grey 1 channel)"
            cure = f'take "decode(channels={expected[2]})" or another {kinds}'
        raise InputError(
            f"after the transforms of config.data an image is {found}, but tokens are made of "
            f"{takes} (config.data.image_size and config.tokens say so); {cure}."
        )


def _read_ahead(data: grain.MapDataset, source, workers: int) -> grain.IterDataset:
    """Reads elements of `data` ahead, by `workers` processes; 0: by threads of this process."""
    # Image files are decoded without Python's global lock; tokens are unpacked with it.
    threads = min(os.cpu_count(), 16) if source.stored_as == "encoded" else 1
    read = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16))
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers)
        read = read.mp_prefetch(options, worker_init_fn=_end_with_parent)
    return read


def _end_with_parent(*_) -> None:
    """Makes a worker end when its parent process ends, and not before.

    A scheduler's SIGTERM may reach the workers while the parent still takes a last training step.
    """

    def wait_for_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=wait_for_parent, daemon=True).start()
