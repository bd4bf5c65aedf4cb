"""Batches of tokens from a source, by Grain.

The position in the training data is one number, the count of global batches taken, whatever the
number of hosts and workers: batch k of the endless, per-epoch shuffled sequence is its elements
k*B .. (k+1)*B, and share i of n takes the i-th n-th of them.
"""

import copy
import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Iterator

import grain
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import sources, transforms
from gptv_jax.data.damage import SOUND, DamageLog, Decoded
from gptv_jax.data.images import Decode
from gptv_jax.data.reading import Padded, read_by
from gptv_jax.errors import InputError
from gptv_jax.tokens import Codec

LOG = logging.getLogger(__name__)
ENCODED_AHEAD = 2  # batches


class Pipeline:
    """The data of a run, as batches of NumPy arrays.

    A batch holds `"tokens": int32 [b, T]` or, without a codec, `"image": uint8 [b, H, W, C]`,
    `"variant": int32 [b]` and, of labelled data, `"label": int32 [b]`; b is the batch size over the
    number of shares.
    """

    def __init__(
        self,
        config: config_lib.Data,
        codec: Codec | None,
        seed: int,
        folder: pathlib.Path | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        """Nothing is read yet.

        Args:
          config: source, transforms and workers.
          codec: of the tokens; None: images stay what they are.
          seed: of order and augmentation.
          folder: of the run, for the record of damaged images.
          share: `(i, n)`: of every global batch the i-th n-th is read, as `sharding.batch_share`
            says.
        """
        self.config, self.codec, self.seed, self.share = config, codec, seed, share
        self.damage_log = DamageLog(config, folder)

    def with_codec(self, codec: Codec) -> "Pipeline":
        """The same data as tokens of another codec; damaged images are told of once."""
        other = copy.copy(self)
        other.codec = codec
        return other

    def train(
        self, batch_size: int, position: int = 0, entries: tuple[str, ...] = ()
    ) -> Iterator[dict]:
        """This process's share of every global batch from number `position` on, without end.

        Args:
          batch_size: of the global batch.
          position: global batches already taken.
          entries: transforms in place of the config's.
        """
        source, steps = _opened(self.config, "train", entries or self.config.train_transforms)
        data = grain.MapDataset.range(len(source)).seed(self.seed).shuffle().repeat()
        data = data.random_map(_Example(source, steps, self._of_workers("train")))
        read = read_by(self._share(data, batch_size)[position:], source, self.config.workers)
        return self._watched(self._encoded(read), "train", source, batch_size, position)

    def evaluation(self, split: str, batch_size: int, limit: int | None = None) -> Iterator[dict]:
        """This process's share of a split, in order, every example once, without augmentation.

        Every process gets the same number of batches; `"mask": float32 [b]` is 0 for what only
        fills the last one, and for what stands in for a damaged image. `"index": int32 [b]` is the
        example's number.

        Args:
          split: "train", "validation" or "test".
          batch_size: of the global batch.
          limit: examples, the first ones; None: all.
        """
        source, steps = _opened(self.config, split, self.config.eval_transforms)
        padded = Padded(source, batch_size, limit)
        example = _Example(padded, steps, self._of_workers(split))
        data = grain.MapDataset.range(len(padded)).map(example.map)
        read = read_by(self._share(data, batch_size), source, self.config.workers)
        return self._watched(self._encoded(read), split, source, batch_size)

    def _of_workers(self, split: str) -> Codec | None:
        """The codec, where each image becomes tokens by itself, not a batch of them here."""
        here = self.codec is not None and self.codec.on_devices and self.has_pixels(split)
        return None if here else self.codec

    def has_pixels(self, split: str) -> bool:
        """Whether the split's images are at hand, not their tokens alone."""
        return sources.open_source(self.config, split).stored_as != "tokens"

    def _share(self, data: grain.MapDataset, batch_size: int) -> grain.MapDataset:
        """This process's part of every global batch."""
        index, count = self.share
        # Nothing remains; asked for what does, Grain counts an endless source's batches in floats.
        return data.batch(batch_size // count, drop_remainder=True)[index::count]

    def _watched(self, batches, split, source, batch_size, position=0) -> Iterator[dict]:
        """The batches, with what they tell of damaged images entered in the damage_log."""
        for number, batch in enumerate(batches, start=position + 1):
            damaged = batch.pop("damaged", None)
            if damaged is not None:
                self.damage_log.enter(split, source, damaged, drawn=number * len(damaged))
            yield batch

    def _encoded(self, read: grain.IterDataset) -> grain.IterDataset:
        """The batches with tokens, where a codec makes them of whole batches on devices.

        In a thread of its own, a few batches ahead: what trains meanwhile does not wait for it.
        """
        if self.codec is None or not self.codec.on_devices:
            return read

        def encode(batch: dict) -> dict:
            if "image" not in batch:  # of a token cache
                return batch
            images = batch.pop("image")
            return {"tokens": self.codec.encode(images), **batch}

        return grain.experimental.ThreadPrefetchIterDataset(
            read.map(encode), prefetch_buffer_size=ENCODED_AHEAD
        )


def try_out(
    config: config_lib.Data,
    codec: Codec | None,
    shape: tuple[int, int, int],
    entries: tuple[str, ...],
    count: int,
) -> None:
    """Makes tokens of the first training images, so that what does not fit is found before work.

    Args:
      config: source.
      codec: of the tokens; None, or one that takes batches: only the shape is looked at.
      shape: H, W, C of the images that tokens are made of.
      entries: transforms.
      count: images to try.

    Raises:
      InputError: the transforms do not fit the data, or their result not the codec.
    """
    source, steps = _opened(config, "train", entries)
    rng = np.random.default_rng(0)
    for index in range(min(count, len(source))):
        image = source[index]["image"]
        for step in steps:
            image = step(image, rng)
        if codec is None or (codec.on_devices and image.dtype == np.uint8):
            _check_shape(image, shape)
        else:
            to_tokens(codec, image)


def images(
    config: config_lib.Data,
    split: str,
    damage_log: DamageLog,
    count: int | None = None,
    seed: int = 0,
) -> Iterator[dict]:
    """Elements of a split as they are before they become tokens, damaged ones left out.

    Args:
      config: source, transforms (those of evaluation) and workers.
      split: one of `sources.SPLITS`, or a split expression.
      damage_log: takes the damaged ones.
      count: how many, drawn without replacement; None: all, in order.
      seed: of the draw.

    Yields:
      `{"image": uint8 [H, W, C], "variant"}` or, from a cache, its grids of tokens; with "label" of
      labelled data.
    """
    source, steps = _opened(config, split, config.eval_transforms)
    data = grain.MapDataset.range(len(source))
    if count is not None and count < len(source):
        data = data.seed(seed).shuffle()[:count]
    data = data.map(_Example(source, steps).image)
    for number, element in enumerate(read_by(data, source, config.workers), start=1):
        damaged = element.pop("damaged", None)
        if damaged is not None:
            damage_log.enter(split, source, np.array([damaged]), drawn=number)
        if damaged in (None, SOUND):
            yield element


def _opened(config: config_lib.Data, split: str, entries: tuple[str, ...]):
    """The split's source of pixels or of grids of tokens, and the transforms left to do.

    Raises:
      InputError: the transforms do not fit the source.
    """
    source = sources.open_source(config, split)
    steps = [transforms.parse(entry) for entry in entries]
    at = [isinstance(step, Decode) for step in steps]
    if any(at[1:]) or (source.stored_as == "encoded") > any(at):
        raise InputError(
            f"the transforms of config.data are {entries}; where images come as files, as those of "
            f'{config.name} may, the list begins with "decode()", once.'
        )
    if source.stored_as == "encoded":
        return Decoded(source, steps[0]), steps[1:]
    if source.stored_as == "tokens":
        return source, _on_tokens(config, entries)
    return source, steps


@functools.cache
def _on_tokens(config: config_lib.Data, entries: tuple[str, ...]) -> list[transforms.Transform]:
    """The steps after the last one that needs pixels; what a cache lacks is said, once.

    Learned codes allow for none: moving a square about would leave as it is what lies within.
    """
    steps = [transforms.parse(entry) for entry in entries]
    learned = sources.open_data_set(config).tokens.kind == "learned"
    needing = [i for i, step in enumerate(steps) if learned or step.needs_pixels]
    first = max(needing, default=-1) + 1
    missed = [entry for entry in entries[:first] if entry not in config.eval_transforms]
    if missed:
        LOG.warning(
            "%s needs pixels, which a token cache has no more; it is made of %s.",
            ", ".join(missed),
            ", ".join(config.eval_transforms),
        )
    return steps[first:]


@dataclasses.dataclass(frozen=True)
class _Example(grain.transforms.RandomMap):
    """From the number of an example to its tokens, in one step, as each of Grain's has a price."""

    source: object
    steps: list[transforms.Transform]
    codec: Codec | None = None

    def random_map(self, index: int, rng: np.random.Generator) -> dict:
        """Of training; the generator is the example's own."""
        return self._with_tokens(self.image(index, rng))

    def map(self, index: int) -> dict:
        """Of evaluation, where nothing is random."""
        return self._with_tokens(self.image(index))

    def image(self, index: int, rng: np.random.Generator | None = None) -> dict:
        """Before it becomes tokens."""
        element = {**self.source[index], "variant": np.int32(0)}
        for step in self.steps:
            if getattr(step, "variants", 1) > 1:
                element["variant"] = np.int32(step.draw(rng))
                element["image"] = step.variant(element["image"], int(element["variant"]))
            else:
                element["image"] = step(element["image"], rng)
        return element

    def _with_tokens(self, element: dict) -> dict:
        if self.codec is None:
            return element
        return {"tokens": to_tokens(self.codec, element.pop("image")), **element}


def to_tokens(codec: Codec, image: np.ndarray) -> np.ndarray:
    """Int32 [T] of an image, or of the grid of tokens that a cache holds of it.

    Raises:
      InputError: the image has another shape, or values that the codec has no token for.
    """
    cached = image.dtype == np.uint16
    _check_shape(image, (*codec.grid, 1) if cached else codec.image_shape)
    if cached:
        return image.reshape(-1).astype(np.int32)
    try:
        return codec.encode(image[None])[0]
    except ValueError as error:
        raise InputError(f"config.tokens does not fit the images: {error}") from error


def tokenized(codec: Codec, elements: Iterator[dict], count: int = 64) -> Iterator[dict]:
    """Elements of `images` as batches of up to `count`, each with its "tokens", int32 [b, T].

    Raises:
      InputError: see `to_tokens`.
    """
    for batch in batched(elements, count):
        _check_shape(batch["image"][0], codec.image_shape)
        try:
            yield {**batch, "tokens": codec.encode(batch["image"])}
        except ValueError as error:
            raise InputError(f"config.tokens does not fit the images: {error}") from error


def batched(elements: Iterator[dict], count: int) -> Iterator[dict]:
    """Elements of `images` as batches of up to `count`."""
    while chunk := list(itertools.islice(elements, count)):
        yield {name: np.stack([element[name] for element in chunk]) for name in chunk[0]}


def _check_shape(image: np.ndarray, wanted: tuple[int, ...]) -> None:
    if image.shape != wanted:
        found, takes = (" x ".join(map(str, shape)) for shape in (image.shape, wanted))
        raise InputError(
            f"after the transforms of config.data an image is {found}, but tokens are made of "
            f"{takes} (config.data.image_size and config.tokens say so); change one of these."
        )
