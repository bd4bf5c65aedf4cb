"""The features that a probe reads: of every layer of a frozen network, or the pixels themselves."""

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from gptv_jax import config as config_lib
from gptv_jax import hosts, sharding
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.model.gpt import Network
from gptv_jax.tokens import Codec
from gptv_jax.train import objective

LOG = logging.getLogger(__name__)
MEASURED = 2_000  # training images, or a batch more, that features are standardised by
MIN_DEVIATION = 1e-6
TOLD_EVERY = 60  # seconds between two lines of the log, in a pass that takes longer

# A split's batches, global, each with its features [votes, L+1, B, D], float32.
Features = Callable[[str], Iterator[tuple[Array, dict]]]
Batches = Callable[[str], Iterator[dict]]  # a split's batches, this process's rows of them
Split = tuple[np.ndarray, np.ndarray]  # features [votes * N, D], vote by vote, and labels [N]


@functools.partial(jax.jit, static_argnames=("network", "raw", "votes"))
def read(
    network: Network, params: dict, batch: dict, *, raw: bool, votes: int
) -> Float[Array, "votes layers B D"]:
    """Means over positions of every layer's features, under each of the first `votes` masks."""
    outputs = (objective.evaluated(network, params, batch, v, raw=raw)[0] for v in range(votes))
    return jnp.stack([output.pooled for output in outputs])


def batches(data: Pipeline, config: config_lib.Probe) -> Batches:
    """The images that are probed, as they are, split by split."""

    def of_split(split: str) -> Iterator[dict]:
        limit = config.train_images if split == "train" else None
        return data.evaluation(split, config.batch_size, limit)

    return of_split


def of_network(network: Network, params: dict, batches: Batches, *, raw: bool) -> Features:
    """Features of all layers, one pass each time a split is asked for.

    Args:
      network: which.
      params: its weights, which are only read.
      batches: as `Pipeline.evaluation` gives them.
      raw: of the layers' inputs h^l, not of the normed n^l.

    Returns:
      Features; where the network is judged by votes, training has the first alone.
    """

    def features(split: str) -> Iterator[tuple[Array, dict]]:
        votes = 1 if split == "train" else network.votes
        told, images, before = time.monotonic(), 0, None
        for batch in hosts.until_stop(batches(split)):
            batch = sharding.global_batch(batch)
            x = read(network, params, batch, raw=raw, votes=votes)
            # Two batches under way are enough; more would pile up where the host is the faster.
            jax.block_until_ready(before)
            before = x
            yield x, batch
            images += len(batch["mask"])
            if time.monotonic() - told > TOLD_EVERY and jax.process_index() == 0:
                LOG.info("features of %s: %d images read.", split, images)
                told = time.monotonic()

    return features


def of_pixels(codec: Codec, batches: Batches) -> Features:
    """The pixels, 0 .. 255 or whatever the data have, as the one layer of a network of none."""

    def features(split: str) -> Iterator[tuple[Array, dict]]:
        for batch in batches(split):
            pixels = codec.decode(batch["tokens"]).reshape(len(batch["tokens"]), -1)
            batch = sharding.global_batch(batch | {"pixels": pixels.astype(np.float32)})
            yield batch.pop("pixels")[None, None], batch

    return features


class Kept:
    """Passes features on and keeps those of some layers, of real rows, in host memory."""

    def __init__(self, features: Features, layers: Sequence[int]):
        """Nothing is read yet.

        Args:
          features: passed on.
          layers: kept.
        """
        self.features, self.layers = features, list(layers)
        self._kept: dict[str, tuple[list, list]] = {}

    def __call__(self, split: str) -> Iterator[tuple[Array, dict]]:
        """The features of a split; when all have passed, they are there to be taken."""
        features, labels = self._kept[split] = [], []
        for x, batch in self.features(split):
            if self.layers:
                whole = (x, batch["mask"], batch["label"])
                every, mask, label = multihost_utils.process_allgather(whole, tiled=True)
                features.append(every[:, self.layers][:, :, mask > 0])
                labels.append(label[mask > 0])
            yield x, batch

    def taken(self, layers: Sequence[int]) -> dict[str, Split]:
        """Of each split that has passed: the layers' features side by side, and the labels."""
        found, at = {}, [self.layers.index(layer) for layer in layers]
        for split, (features, labels) in self._kept.items():
            each = [np.concatenate([x[:, i] for x in features], axis=1) for i in at]
            joined = np.concatenate(each, axis=-1)
            found[split] = joined.reshape(-1, joined.shape[-1]), np.concatenate(labels)
        return found


def kept(features: Features, layers: Sequence[int]) -> Kept:
    """Features of some layers, of all three splits."""
    keeper = Kept(features, layers)
    for split in ("train", "validation", "test"):
        for _ in keeper(split):
            pass
    return keeper


def statistics(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, each [L+1, D] in float64, of the first training images' features.

    Where a feature hardly varies its deviation is given as 1: it is only centred.
    """
    seen: list[np.ndarray] = []
    for x, batch in features("train"):
        every, mask = multihost_utils.process_allgather((x, batch["mask"]), tiled=True)
        seen.append(every[0][:, mask > 0])
        if sum(each.shape[1] for each in seen) >= MEASURED:
            break
    joined = np.concatenate(seen, axis=1).astype(np.float64)
    deviation = joined.std(axis=1)
    return joined.mean(axis=1), np.where(deviation > MIN_DEVIATION, deviation, 1.0)


def around(layer: int, count: int, layers: int) -> tuple[int, ...]:
    """`count` neighbouring layers of 0 .. layers-1, `layer` in their middle, but at the ends."""
    first = min(max(layer - count // 2, 0), layers - count)
    return tuple(range(first, first + count))
