"""What a linear map reads from every position of a frozen network: the classes of its pixels.

Each position of the image predicts the classes of p x p cells of pixels by ridge regression on the
shares of the classes in each cell. Positions with a cell of no class are left out of the fit.
The class with the highest score, divided by a power of the class's share of the training pixels, is
the prediction: without such a power rare classes are hardly ever predicted, which mean IoU punishes
(Menon et al. 2021, arXiv:2007.07314). The power and the strength are chosen on validation.
Predictions are scored pixel by pixel at the size of the images that the network reads.

Letters: S strengths times powers, L layers, B images, T positions of an image, N = B * T, D width,
C classes, G = p * p cells of a position, K = G * C.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptv_jax import sharding
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.data.records import Record
from gptv_jax.model.gpt import Network
from gptv_jax.probe import ridge
from gptv_jax.probe.features import Batches
from gptv_jax.tasks import confusion
from gptv_jax.tokens import Codec
from gptv_jax.tokens.label_maps import Cells
from gptv_jax.train import objective
from gptv_jax.train.step import on_mesh

LOG = logging.getLogger(__name__)
CELL = 4  # pixels a side of a cell, or of a position where that stands for fewer
POWERS = (0.0, 0.5, 1.0)  # of the classes' shares
BYTES = 2**28  # of float32 features that a device holds at a time
# `split -> (features, counts, mask) ...`: features [1, L, N, D], "cells" of `Cut` [B, T, G, C],
# and the mask [B] of images that count.
Features = Callable[[str], Iterator[tuple[Array, Array, Array]]]


class Cut:
    """Counts pixels of each class in every cell of an image's or clip's positions, in workers."""

    def __init__(self, codec: Codec, classes: int):
        *_, height, width, _ = codec.image_shape
        *_, self.rows, self.columns = codec.grid
        side = height // self.rows
        self.split = max(side // CELL, 1)  # p
        self.cells = Cells(classes, (height, width), side // self.split)

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> dict:
        """{"cells": int32 [T, G, C]} of a transformed record."""
        del rng
        maps, p = record["segmentation"], self.split
        counts = self.cells.counts(maps.reshape(-1, *maps.shape[-2:]))  # of every frame
        by_place = counts.reshape(-1, p, self.columns, p, counts.shape[-1]).swapaxes(1, 2)
        return {"cells": by_place.reshape(-1, p * p, counts.shape[-1]).astype(np.int32)}


def batches(data: Pipeline, config, cut: Cut, network: Network) -> Batches:
    """The images that are probed, so many at a time that their features fit into BYTES."""
    mesh, size = jax.sharding.get_mesh().shape, network.config
    devices = mesh["data"] * mesh["fsdp"]
    image = 4 * (size.layers + 1) * network.length * size.width
    count = devices * max(min(config.batch_size // devices, BYTES // image), 1)
    limits = {"train": config.train_images}
    return lambda split: data.evaluation(split, count, limits.get(split), example=cut)


def of_network(network: Network, params: dict, batches: Batches, *, raw: bool) -> Features:
    """Features of all layers, under the first mask of a BERT network."""

    def features(split: str):
        before = None
        for batch in on_mesh(batches(split)):
            x = _read(network, params, batch, raw=raw)
            jax.block_until_ready(before)  # at most two batches are under way
            before = x
            yield x, batch["cells"], batch["mask"]

    return features


@functools.partial(jax.jit, static_argnames=("network", "raw"))
def _read(network: Network, params: dict, batch: dict, *, raw: bool) -> Float[Array, "1 L N D"]:
    keep = tuple(range(network.config.layers + 1))
    x = objective.evaluate_batch(network, params, batch, raw=raw, keep=keep)[0].kept
    x = jax.sharding.reshard(x, P(None, sharding.BATCH)).astype(jnp.float32)
    if network.layout.shift:  # position t + 1 is the first one that has read token t
        x = jnp.concatenate([x[:, :, 1:], x[:, :, -1:]], axis=2)
    shape, spec = (1, len(keep), -1, x.shape[-1]), P(None, None, sharding.BATCH)
    return x.reshape(shape, out_sharding=spec)


def of_pixels(codec: Codec, batches: Batches) -> Features:
    """The pixels that a position stands for, as the only layer."""
    *_, rows, columns = codec.grid

    def features(split: str):
        for batch in batches(split):
            pixels = codec.decode(batch["tokens"])
            *frames, height, width, channels = pixels.shape
            sides = rows, height // rows, columns, width // columns * channels
            squares = pixels.reshape(*frames, *sides).swapaxes(-3, -2)
            squares = squares.reshape(-1, sides[1] * sides[3])
            found = {
                "x": squares.astype(np.float32),
                "cells": batch["cells"],
                "mask": batch["mask"],
            }
            batch = sharding.global_batch(found)
            yield batch["x"][None, None], batch["cells"], batch["mask"]

    return features


@jax.jit
def _rows(counts: Int[Array, "B T G C"], mask: Float[Array, " B"]) -> tuple[dict, Array]:
    """What `ridge.add` reads of a batch, and the counts of images that count, int32 [N, G, C]."""
    counts *= (mask > 0).astype(counts.dtype)[:, None, None, None]
    counts = counts.reshape(-1, *counts.shape[2:], out_sharding=sharding.BATCH_FIRST)
    pixels = counts.sum(axis=-1)
    targets = counts / jnp.maximum(pixels, 1)[..., None]
    flat = targets.reshape(len(targets), -1, out_sharding=sharding.BATCH_FIRST)
    return {"mask": (pixels > 0).all(axis=-1).astype(jnp.float32), "targets": flat}, counts


@jax.jit
def _confusions(
    solution: tuple, features: Float[Array, "1 L N D"], counts: Int[Array, "N G C"]
) -> Int[Array, "L S C C"]:
    """Pixels of each class (row) in cells that were taken for each class (column), exactly."""
    weight, bias, shift = solution

    def layer(inputs):
        x, weight, bias, shift = inputs
        scores = jnp.einsum("nd,skd->snk", x - shift[None], weight, precision=ridge.EXACT)
        scores = (scores + bias[:, None]).reshape(
            len(weight), *counts.shape, out_sharding=P(None, sharding.BATCH)
        )
        taken = jax.nn.one_hot(jnp.argmax(scores, axis=-1), counts.shape[-1], dtype=jnp.int32)
        spec = P(None, None, None)
        return jnp.einsum("ngt,sngc->stc", counts, taken, out_sharding=spec)

    return jax.lax.map(layer, (features[0], weight.swapaxes(0, 1), bias.swapaxes(0, 1), shift))


def tabulate(features: Features, strengths: Sequence[float]) -> list[dict]:
    """For every layer {"ridge", "power", "validation_miou", "test_miou", "test_pixel_accuracy"}.

    Strength and power are the best on validation, of equals the largest strength and the least
    power; the numbers of the test split are those of a fit to train and validation. There is one
    pass over each split.
    """
    tried = np.array([(s, power) for s in sorted(strengths, reverse=True) for power in POWERS])
    moments, cells = None, 1

    def passed(split: str, solution: tuple | None = None, *, fit: bool) -> np.ndarray:
        nonlocal moments, cells
        total = np.zeros((), np.int64)
        for x, counts, mask in features(split):
            cells = counts.shape[2]
            batch, counts = _rows(counts, mask)
            if fit:
                width = batch["targets"].shape[1]
                moments = ridge.add(moments or ridge.empty(x.shape[1], x.shape[3], width), x, batch)
            if solution is not None:
                total = total + jax.device_get(_confusions(solution, x, counts)).astype(np.int64)
        return total

    def solved(settings: Float[np.ndarray, "S L 2"]) -> tuple:
        weight, bias, shift = ridge.solve(moments, settings[..., 0], cells)
        pixels = jax.device_get(moments.sums["images"]).astype(np.float64)
        share = pixels * cells / pixels.sum()
        # A class that no training pixel has keeps the score 0.
        power = np.maximum(share, 1e-9) ** -settings[..., 1:] * (share > 0)
        return jax.tree.map(ridge.replicated, (weight * power[..., None], bias * power, shift))

    passed("train", fit=True)
    layers = len(moments.shift)
    every = np.tile(tried[:, None], (1, layers, 1))
    validation = [
        [confusion.scores(matrix)["miou"] or 0.0 for matrix in layer]
        for layer in passed("validation", solved(every), fit=True)
    ]
    chosen = tried[np.argmax(validation, axis=1)]  # the first of equals
    rows = []
    for layer, [matrix] in enumerate(passed("test", solved(chosen[None]), fit=False)):
        row = dict(zip(("ridge", "power"), chosen[layer].tolist(), strict=True))
        row["validation_miou"], found = max(validation[layer]), confusion.scores(matrix)
        rows.append(row | {f"test_{name}": found[name] for name in ("miou", "pixel_accuracy")})
    return rows
