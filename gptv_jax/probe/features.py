"""The features that a probe reads: every layer of a frozen network, or the pixels themselves."""

import collections
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
from gptv_jax import sharding
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.model.gpt import Network
from gptv_jax.tokens import Codec
from gptv_jax.train import objective
from gptv_jax.train.step import on_mesh

LOG = logging.getLogger(__name__)
MEASURED = 2_000  # training images, rounded up to whole batches, that `statistics` reads
MIN_DEVIATION = 1e-6  # a feature with a smaller standard deviation counts as constant
REPORT_EVERY = 60  # seconds between log lines about a long pass over a split

# `split -> (features, batch) ...`: for each batch of the split, as global arrays, the float32
# features [votes, L+1, B, D].
Features = Callable[[str], Iterator[tuple[Array, dict]]]
Batches = Callable[[str], Iterator[dict]]  # `split -> batches`, this process's rows as NumPy
Split = tuple[np.ndarray, np.ndarray]  # features [votes * N, D], vote by vote, and labels [N]


@functools.partial(jax.jit, static_argnames=("network", "raw", "votes"))
def read(
    network: Network, params: dict, batch: dict, *, raw: bool, votes: int
) -> Float[Array, "votes layers B D"]:
    """Every layer's features, averaged over positions, under each of the first `votes` masks."""
    outputs = [objective.evaluate_batch(network, params, batch, v, raw=raw) for v in range(votes)]
    return jnp.stack([output.pooled for output, _ in outputs])


def batches(data: Pipeline, config: config_lib.Probe) -> Batches:
    """The images that are probed, without augmentation, split by split."""
    limits = {"train": config.train_images}
    return lambda split: data.evaluation(split, config.batch_size, limits.get(split))


def of_network(network: Network, params: dict, batches: Batches, *, raw: bool) -> Features:
    """Features of all layers; every call for a split is a pass over its images.

    `raw` reads the layers' inputs h^l instead of the normed inputs n^l. With several votes,
    training images have the first alone.
    """

    def features(split: str) -> Iterator[tuple[Array, dict]]:
        votes = 1 if split == "train" else network.votes
        reported, images, before = time.monotonic(), 0, None
        for batch in on_mesh(batches(split)):
            x = read(network, params, batch, raw=raw, votes=votes)
            # At most two batches are under way: a faster host would pile up more.
            jax.block_until_ready(before)
            before = x
            yield x, batch
            images += len(batch["mask"])
            if time.monotonic() - reported > REPORT_EVERY and jax.process_index() == 0:
                LOG.info("features of %s: %d images read.", split, images)
                reported = time.monotonic()

    return features


def of_pixels(codec: Codec, batches: Batches) -> Features:
    """The pixels, in the data's own range, as the only layer.

    The pixels of a batch without images are decoded from its tokens.
    """

    def features(split: str) -> Iterator[tuple[Array, dict]]:
        for batch in batches(split):
            images = batch["image"] if "image" in batch else codec.decode(batch["tokens"])
            pixels = images.reshape(len(images), -1).astype(np.float32)
            batch = sharding.global_batch(batch | {"pixels": pixels})
            yield batch.pop("pixels")[None, None], batch

    return features


class Kept:
    """Passes features on, and keeps some layers' features of the real rows in host memory."""

    def __init__(self, features: Features, layers: Sequence[int]):
        self.features, self.layers, self._kept = features, list(layers), {}

    def __call__(self, split: str) -> Iterator[tuple[Array, dict]]:
        features, labels = self._kept[split] = [], []
        for x, batch in self.features(split):
            if self.layers:
                whole = (x, batch["mask"], batch["label"])
                every, mask, label = multihost_utils.process_allgather(whole, tiled=True)
                features.append(every[:, self.layers][:, :, mask > 0])
                labels.append(label[mask > 0])
            yield x, batch

    def taken(self, layers: Sequence[int]) -> dict[str, Split]:
        """For each split that was read: the layers' features side by side, and the labels."""
        found, at = {}, [self.layers.index(layer) for layer in layers]
        for split, (features, labels) in self._kept.items():
            x = np.moveaxis(np.concatenate([x[:, at] for x in features], axis=2), 1, 2)
            found[split] = x.reshape(-1, len(at) * x.shape[-1]), np.concatenate(labels)
        return found


def kept(features: Features, layers: Sequence[int]) -> Kept:
    """Reads all three splits and keeps the features of `layers`."""
    keeper = Kept(features, layers)
    for split in ("train", "validation", "test"):
        collections.deque(keeper(split), maxlen=0)
    return keeper


def statistics(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (1 for a constant), [L+1, D], over the first training images."""
    seen: list[np.ndarray] = []
    for x, batch in features("train"):
        every, mask = multihost_utils.process_allgather((x, batch["mask"]), tiled=True)
        seen.append(every[0][:, mask > 0])
        if sum(each.shape[1] for each in seen) >= MEASURED:
            break
    joined = np.concatenate(seen, axis=1).astype(np.float64)
    mean, deviation = joined.mean(axis=1), joined.std(axis=1)
    # Relative to a large mean, because float32 rounds its values by a part in 10^7.
    varies = deviation > MIN_DEVIATION * np.maximum(np.abs(mean), 1)
    return mean, np.where(varies, deviation, 1.0)


def around(layer: int, count: int, layers: int) -> tuple[int, ...]:
    """`count` neighbouring layers of 0 .. layers-1, `layer` in the middle where possible."""
    first = min(max(layer - count // 2, 0), layers - count)
    return tuple(range(first, first + count))
