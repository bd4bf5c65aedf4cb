"""Batches of tokens from a source, by Grain.

The position in the training data is one number, the count of global batches taken, whatever the
number of hosts and workers: batch k of the endless, per-epoch shuffled sequence is its elements
k*B .. (k+1)*B, and host i of n takes the i-th n-th of them.
"""

import dataclasses
from collections.abc import Iterator

import grain
import jax
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import sources, transforms
from gptv_jax.tokens import Codec


@dataclasses.dataclass(frozen=True)
class _Augment(grain.transforms.RandomMap):
    transform: transforms.Transform

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        return self.transform(element, rng)


@dataclasses.dataclass(frozen=True)
class _Tokenize(grain.transforms.Map):
    codec: Codec

    def map(self, element: dict) -> dict:
        tokens = self.codec.encode(element["image"][None])[0]
        rest = {k: v for k, v in element.items() if k != "image"}
        return {"tokens": tokens, **rest}


class _WithVariant(grain.transforms.Map):
    def map(self, element: dict) -> dict:
        return {**element, "variant": np.int32(0)}


class _Padded:
    """A source of a whole number of batches; what was added to fill the last has mask 0."""

    def __init__(self, source: sources.Source, batch_size: int):
        self.source = source
        self.length = -(-len(source) // batch_size) * batch_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        real = index < len(self.source)
        return {**self.source[index if real else 0], "mask": np.float32(real)}


def train_batches(
    config: config_lib.Data, codec: Codec, batch_size: int, seed: int, position: int = 0
) -> Iterator[dict]:
    """This process's share of every global batch from number `position` on, without end.

    Args:
      config: source, augmentation and workers.
      codec: of the tokens.
      batch_size: of the global batch.
      seed: of order and augmentation.
      position: global batches already taken.

    Yields:
      NumPy `{"tokens": int32 [b, T], "label": int32 [b], "variant": int32 [b]}`, b the batch size
      over the number of processes.
    """
    source = sources.open_source(config, "train")
    data = grain.MapDataset.source(source).seed(seed).shuffle().repeat().map(_WithVariant())
    for entry in config.augmentation:
        data = data.random_map(_Augment(transforms.parse(entry)))
    data = data.map(_Tokenize(codec)).batch(batch_size // jax.process_count())
    return iter(_read(_share(data)[position:], config.workers))


def evaluation_batches(
    config: config_lib.Data, codec: Codec, split: str, batch_size: int
) -> Iterator[dict]:
    """This process's share of a split, in order, every example once, without augmentation.

    Yields:
      As `train_batches`, with `"mask": float32 [b]`, 0 for what only fills the last batch. Every
      process gets the same number of batches.
    """
    source = _Padded(sources.open_source(config, split), batch_size)
    data = grain.MapDataset.source(source).map(_WithVariant()).map(_Tokenize(codec))
    data = data.batch(batch_size // jax.process_count())
    return iter(_read(_share(data), config.workers))


def _share(batched: grain.MapDataset) -> grain.MapDataset:
    return batched[jax.process_index() :: jax.process_count()]


def _read(data: grain.MapDataset, workers: int) -> grain.IterDataset:
    read = data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16))
    if workers:
        read = read.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return read
