"""Segmentation: a class for every pixel, read from the image's positions, or written as tokens.

Reading predicts all pixels at once, by a head on the positions of the image. Writing draws a token
for every square of pixels after the image, so a label map has a probability, and several maps can
be drawn of one image. One network does both.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, UInt8

from gptv_jax import sharding
from gptv_jax.config import rules
from gptv_jax.data import sources
from gptv_jax.data.records import Record, plane_to_original
from gptv_jax.model.gpt import GPT, Network, Output
from gptv_jax.model.layout import Part
from gptv_jax.model.parts import Reading, enlarge
from gptv_jax.tasks import map_facts, map_passes, map_pictures, rows, video_maps
from gptv_jax.tasks.map_facts import Facts
from gptv_jax.tasks.map_passes import NAME
from gptv_jax.tasks.map_scores import SCORES, MapScores
from gptv_jax.tasks.task import Records, Task
from gptv_jax.train import objective
from gptv_jax.train.step import Metric

LOG = logging.getLogger(__name__)
END = "end"  # the part after the image where nothing is written
SHOWN = 6  # test images of the picture


@dataclasses.dataclass(frozen=True)
class Segment(Task):
    """The class of every pixel; see `config.tasks.Segment`."""

    needs: ClassVar[tuple[str, ...]] = ("segmentation",)
    primary: ClassVar[dict[str, int]] = {"miou": 1, "nats_per_token": -1}
    validated: ClassVar[tuple[str, ...]] = SCORES[1:3]
    unreported: ClassVar[tuple[str, ...]] = ("written_miou",)
    pictures: ClassVar[dict[str, str]] = {
        "segmentation": "Test images, their label maps, and the classes that the network reads and "
        "writes. White: pixels without a class. Uncertainty: bright where maps that are drawn of "
        "one image disagree.",
        "class_iou": "Intersection over union of the most frequent classes, with their share of "
        "the pixels. A class that no test pixel has or was taken for has none.",
        "video_segmentation": "Frames of the first test video, from top to bottom in time, their "
        "label maps, and the maps that the network makes of the whole video.",
        "video_miou": "Mean IoU of every frame of the test videos.",
    }

    def check(self) -> None:
        settings, layers = self.settings, self.config.model.layers
        pairs = zip(self.config.data.size, self.config.grid[-2:], strict=True)
        side = [pixels // positions for pixels, positions in pairs]
        refuse = functools.partial(rules.refuse, self.config)
        if self.config.tokens.cell[0] > 1:
            refuse("tokens.patch", "every frame has a label map; take height and width alone")
        if side[0] != side[1]:
            reason = f"a position of the image is {side[0]} x {side[1]} pixels; take squares"
            refuse("tokens.patch", reason)
        if not (settings.read or settings.write):
            refuse("task.segment.read", "write is False too, so nothing is learned; take True")
        if settings.read and any(each % settings.read_cell for each in side):
            reason = f"a position of the image is {side[0]} x {side[1]} pixels; take a divisor"
            refuse("task.segment.read_cell", reason)
        if settings.read and max(settings.layers, default=0) > layers:
            reason = f"it takes numbers from 0 to config.model.layers = {layers}"
            refuse("task.segment.layers", reason)
        if settings.write and settings.labels == "learned" and settings.cell not in (4, 8, 16):
            refuse("task.segment.cell", "config.task.segment.labels=learned takes 4, 8 or 16")

    @property
    def names(self) -> tuple[str, ...]:
        return self.map_names

    @property
    def frames(self) -> tuple[int, ...]:
        """(F,), the number of frames of a clip; () where the data are images."""
        return self.config.grid[:-2]

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways that are on, of "read" and "written"; the metric scores the first way."""
        return ("read",) * self.settings.read + ("written",) * self.settings.write

    def parts(self) -> tuple[Part, ...]:
        if not self.settings.write:
            # The input of the last position is the image's last token.
            return (Part(END, 0, (1,), predicted=False),)
        sides = (-(-pixels // self.settings.cell) for pixels in self.config.data.size)
        vocabulary = {
            "cells": len(self.map_names),
            "patches": self.settings.codes,
            "learned": math.prod(self.settings.levels),
        }
        return (
            Part(NAME, vocabulary[self.settings.labels], (*self.frames, *sides), covers_image=True),
        )

    def network(self) -> Network:
        network, settings = super().network(), self.settings
        if not settings.read:
            return network
        cells = self.config.data.size[0] // network.grid[-2] // settings.read_cell
        reading = Reading(len(self.map_names), cells, settings.layers)
        return dataclasses.replace(network, reading=reading)

    def measure(self, records: Callable[[int], Iterable[Record]]) -> bytes:
        """The frequencies of the classes, the prior of each pixel, and the label tokens."""
        tokens = f" and makes their tokens ({self.settings.labels})" * self.settings.write
        found = self.settings.measured, tokens
        LOG.info("segment counts the classes of up to %d training label maps%s.", *found)
        count = max(self.settings.measured // math.prod(self.frames), 1)
        found = (record["segmentation"] for record in records(count))
        maps = [plane for each in found for plane in each.reshape(-1, *each.shape[-2:])]
        return map_facts.measure(maps, len(self.map_names), self.settings, self.config.seed)

    @functools.cached_property
    def facts(self) -> Facts:
        """What `measure` found."""
        return map_facts.load(self.measured, self.frames)

    @property
    def maps(self) -> MapScores:
        """The label maps in the metric's rows, and their scores."""
        return MapScores(self.facts, len(self.map_names), self.ways[0])

    @functools.cached_property
    def class_weights(self) -> Float[np.ndarray, " C"]:
        """See `Facts.class_weights`; ones where nothing is measured, as in a plan."""
        if not self.measured:
            return np.ones(len(self.map_names), np.float32)
        return self.facts.class_weights(self.settings.balance)

    def example(self, record: Record, rng: np.random.Generator | None = None) -> dict:
        truth, found = record["segmentation"], {"targets": {}}
        if self.settings.write:
            tokens, weights = self.facts.encode(truth[None])
            if self.settings.balance:  # the mean over the pixels of the cell that have a class
                maps, of_class = truth.reshape(-1, *truth.shape[-2:]), self.class_weights
                pixels = self.facts.codec.cells(maps)
                counts = np.maximum((pixels < len(of_class)).sum(axis=1), 1)
                weights *= (np.append(of_class, 0)[pixels].sum(axis=1) / counts).astype(np.float32)
            found = {"targets": {NAME: tokens[0]}, "weights": {NAME: weights[0]}}
            if rng is not None and self.settings.corruption:
                other = rng.integers(self.facts.codec.vocabulary, size=tokens.shape, dtype=np.int32)
                wrong = rng.random(tokens.shape) < self.settings.corruption
                found["inputs"] = {NAME: np.where(wrong, other, tokens)[0]}
        return {"segmentation": truth, **found}

    def allowed(
        self, part: str, position: int | Int[Array, ""], tokens: Int[Array, "B n"]
    ) -> Bool[Array, "1 V"] | None:
        """Patches are those of training maps; of cells, the classes of the training."""
        del position, tokens
        if part != NAME or self.settings.labels != "cells":
            return None
        return jnp.array(self.facts.frequencies > 0)[None]

    def read(self, model: GPT, output: Output) -> Float[Array, "B *F H W C"]:
        """Logits of the classes of every pixel at the network's size."""
        return enlarge(model.read(output), self.config.data.size)

    def most_likely(self, logits: Float[Array, "B *F H W C"]) -> Integer[Array, "B *F H W"]:
        """The class of every pixel, one of those in the training's maps."""
        known = jnp.array(self.facts.frequencies > 0).reshape((1,) * (logits.ndim - 1) + (-1,))
        small = len(self.map_names) < 256
        found = jnp.where(known, logits, -jnp.inf).argmax(axis=-1)
        return found.astype(jnp.uint8 if small else jnp.int32)

    def read_nats(
        self, logits: Float[Array, "B *F H W C"], truth: Integer[Array, "B *F H W"]
    ) -> tuple[Float[Array, "B *F H W"], Int[Array, "B *F H W"], Bool[Array, "B *F H W"]]:
        """Nats of every pixel's class, the class, and whether there is one; else both are 0."""
        label = truth.astype(jnp.int32)
        known = (label >= 0) & (label < len(self.map_names))
        label = jnp.where(known, label, 0)
        return objective.cross_entropy(logits, label) * known, label, known

    def loss(self, network: Network) -> Callable:
        """The weighted sum of the mean nats of a pixel that is read and of a token that is written.

        The means are over all pixels and tokens; those without a class have the weight 0.
        """
        settings = self.settings

        def loss(params, frozen, batch, key, step=None):
            del frozen, step
            model, losses = network.bind(params), {}
            output = map_passes.forward(model, batch, key)
            if settings.read:
                nats, label, _ = self.read_nats(self.read(model, output), batch["segmentation"])
                weights = (
                    jnp.array(self.class_weights).at[label].get(out_sharding=sharding.BATCH_FIRST)
                )
                losses["read"] = (nats * weights).mean() * settings.read_weight
            if settings.write:
                nats = map_passes.written_nats(model, output, batch) * batch["weights"][NAME]
                losses["write"] = nats.mean() * settings.write_weight
            total = sum(losses.values())
            return total, {"loss": total, **{f"{name}_loss": x for name, x in losses.items()}}

        return loss

    def metric(self, network: Network, annotations: Records, samples: int = 0) -> Metric:
        def result(total: dict) -> dict[str, float | None]:
            found = self.maps.scores(total, annotations, self.ways)
            numbers = {name: found[self.ways[0]][name] for name in SCORES}
            if len(self.ways) > 1:
                numbers["written_miou"] = found["written"]["miou"]
            first = [*rows.plain(total).values()]
            of_images = {name: total[name][first] for name in total if name.startswith("nats_per_")}
            return numbers | {name: float(x.mean()) for name, x in of_images.items()}

        step = _step(self, network, samples)
        return Metric(step, result, rows.collect, self.primary, rows.join)

    def whole(self, network, params, codec, videos) -> dict[str, object]:
        if not (self.frames and self.settings.videos):
            return {}
        return video_maps.measure(self, network, params, codec, videos(self.settings.videos))

    def test_metric(self, network: Network, annotations: Records) -> Metric:
        return self.metric(network, annotations, self.settings.samples)

    def details(self, total: dict, annotations: Records) -> dict[str, float | None]:
        """IoU of each class, None of a class that is nowhere; agreement of drawn maps."""
        scores = self.maps.scores(total, annotations, self.ways)[self.ways[0]]
        named = zip(self.map_names, scores["iou_by_class"], strict=True)
        found = {f"iou_of_{name}": value for name, value in named}
        if "samples" in total:
            each = [self.maps.agreement(total, row) for row in rows.plain(total).values()]
            found["agreement"] = float(np.mean(each))
        return found | video_maps.numbers(total).get(self.ways[-1], {})

    def bounds(self, total: dict, annotations: Records) -> dict[str, dict[str, float | None]]:
        """Scores of the prior, of another image's map, of the label tokens, and of written maps."""
        kinds = ["prior", "wrong_image", *self.ways[1:]]
        kinds += ["ceiling"] * self.settings.write + ["voted"] * ("samples" in total)
        found = self.maps.scores(total, annotations, kinds)
        if len(rows.plain(total)) == 1:  # there is no other image
            found["wrong_image"] = dict.fromkeys(SCORES)
        bounds = {kind: {name: found[kind][name] for name in SCORES} for kind in kinds}
        for way, numbers in video_maps.numbers(total).items():
            if way != self.ways[-1]:  # whose numbers are among the details
                bounds[way] = bounds.get(way, {}) | numbers
        return bounds

    def files(self, total: dict, annotations: Records) -> dict[str, object]:
        about = self.maps.report(total, annotations, self.ways, self.map_names)
        videos = (
            {"video_segmentation.json": total["video_scores"]} if "video_scores" in total else {}
        )
        return {"segmentation.json": about} | videos

    def show(self, records: Records, total: dict) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        shown, of_clip = [], math.prod(self.frames)
        for index, row in [*rows.plain(total).items()][: max(SHOWN // of_clip, 1)]:
            record = records(index)
            view, size = total["view"][row], record["segmentation"].shape[-2:]
            if "view" in record:  # of a token cache: the picture shows what the network reads
                view = np.array([0, 0, *size], np.float32)
            planes = {way: self.maps.map_of(total, row, way) for way in self.ways}
            if "samples" in total:
                planes["uncertain"] = 1 - self.maps.agreement(total, row)
            planes = {n: plane_to_original(p, view, size) for n, p in planes.items()}
            shown += map_pictures.by_frame(record, planes) if self.frames else [(record, planes)]
        about = self.files(total, sources.open_source(self.config.data, "test").annotations)
        found = {
            "segmentation": map_pictures.maps(shown, self.map_names),
            "class_iou": map_pictures.class_iou(about["segmentation.json"]["classes"]),
        }
        if "video_scores" in total:
            scores = {way: each["miou_by_frame"] for way, each in total["video_scores"].items()}
            found["video_segmentation"] = map_pictures.maps(total["video_shown"], self.map_names)
            found["video_miou"] = map_pictures.miou_by_frame(scores)
        return found


@functools.cache
def _step(task: Segment, network: Network, samples: int) -> Callable:
    """`(params, batch) -> arrays with a row for each image of the global batch`, jitted."""
    settings = task.settings

    def step(params: dict, batch: dict) -> dict[str, Array]:
        model = network.bind(params)
        output = map_passes.forward(model, batch)
        found = {}
        if settings.read:
            logits = task.read(model, output)
            nats, _, counts = task.read_nats(logits, batch["segmentation"])
            of_image = tuple(range(1, nats.ndim))
            pixels = jnp.maximum(counts.sum(axis=of_image), 1)
            found["nats_per_pixel"] = nats.sum(axis=of_image) / pixels
            found["read"] = task.most_likely(logits)
            found["nats_per_token"] = found["nats_per_pixel"]
        if settings.write:
            counts = batch["weights"][NAME] > 0
            nats = map_passes.written_nats(model, output, batch)
            found["nats_per_map"] = (nats * counts).sum(axis=1)
            found["nats_per_token"] = objective.masked_mean(nats, counts)
            key = jax.random.key(task.config.seed)
            images = batch.get("tokens"), batch.get("image"), key, batch["index"]
            found["targets"] = batch["targets"][NAME]
            found["written"] = map_passes.written(task, network, params, *images)[0]
        if settings.write and samples:
            drawn, _ = map_passes.written(task, network, params, *images, 1.0, samples)
            shape = (-1, samples, drawn.shape[1])
            found["samples"] = drawn.reshape(shape, out_sharding=sharding.BATCH_FIRST)
        return found

    return rows.compiled(step)
