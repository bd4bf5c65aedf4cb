"""Object detection: the objects of an image as tokens after the image, scored by COCO's AP."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, UInt8

from gptv_jax.data import sources
from gptv_jax.data.records import Record, to_original
from gptv_jax.decode import answers
from gptv_jax.decode.restriction import Restriction
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import Part
from gptv_jax.tasks import average_precision, drawing
from gptv_jax.tasks.average_precision import Scores
from gptv_jax.tasks.boxes import SLOTS, BoxTokens, Detections, vote
from gptv_jax.tasks.task import Records, Task
from gptv_jax.train import objective
from gptv_jax.train.step import Metric

NAME = "boxes"  # of the part
SHOWN = 8  # test images of the picture
BOUNDED = ("ap", "ap50", "ap75")  # numbers with a floor and a ceiling


@dataclasses.dataclass(frozen=True)
class Detect(Task):
    """The boxes and classes of the objects in the image; see `config.tasks.Detect`."""

    needs: ClassVar[tuple[str, ...]] = ("boxes", "box_labels")
    primary: ClassVar[dict[str, int]] = {"ap": 1, "nats_per_token": -1}
    pictures: ClassVar[dict[str, str]] = {
        "detections": "Test images: the annotated objects (left), and the detected ones with their "
        f"scores, from {drawing.SHOWN_SCORE:g} on (right).",
        "average_precision": "Precision and recall at an IoU of .5, and AP of the classes with "
        "most objects.",
    }

    @property
    def names(self) -> tuple[str, ...]:
        return self.object_names

    @property
    def settings(self):
        return self.config.task.detect

    @property
    def tokens(self) -> BoxTokens:
        return BoxTokens(self.settings.bins, len(self.object_names))

    @property
    def validation_images(self) -> int | None:
        return self.settings.validation_images or None

    def parts(self) -> tuple[Part, ...]:
        shape, bins = (self.settings.objects, SLOTS), self.settings.bins
        return (Part(NAME, self.tokens.vocabulary, shape, bins=bins, summed=True),)

    def example(self, record: Record, rng: np.random.Generator | None = None) -> dict:
        """Crowds are no targets, since one box there stands for many objects."""
        boxes, labels = record["boxes"], record["box_labels"]
        if "crowd" in record:
            boxes, labels = boxes[~record["crowd"]], labels[~record["crowd"]]
        size = self.config.data.size
        found = self.tokens.sequence(boxes, labels, size, self.settings, rng)
        return {name: {NAME: array} for name, array in found.items()}

    def allowed(
        self, part: str, position: int | Int[Array, ""], tokens: Int[Array, "B n"]
    ) -> Bool[Array, "B V"] | None:
        """By slot: a height, a width, a height and a width not below the first, a real class.

        Without noise objects "noise" is possible in place of an object, and nothing else after.
        """
        if part != NAME:
            return None
        bins, noise = self.settings.bins, self.tokens.noise
        slot, ids = position % SLOTS, jnp.arange(noise + 1)[None]
        row = jax.lax.dynamic_slice_in_dim(tokens, position - slot, SLOTS, axis=1)
        zero = jnp.zeros_like(row[:, :1])
        # Without a row before, this is the first one, which has no end before it.
        before = jax.lax.dynamic_slice_in_dim(
            tokens, jnp.maximum(position - slot - SLOTS, 0), SLOTS, axis=1
        )
        low = [zero, zero + bins, row[:, :1], row[:, 1:2], zero + 2 * bins]
        high = [zero + end for end in (bins, 2 * bins, bins, 2 * bins, noise)]
        mask = (ids >= jax.lax.select_n(slot, *low)) & (ids < jax.lax.select_n(slot, *high))
        if self.settings.noise:
            return mask
        ended = (row[:, :1] == noise) & (slot > 0)
        ended |= (before[:, :1] == noise) & (position >= SLOTS)
        return jnp.where(ended, ids == noise, mask | ((ids == noise) & (slot == 0)))

    def restriction(self, network: Network) -> Restriction:
        """Coordinates are drawn from the nucleus; of the classes the most likely one is taken."""
        top_p, start = self.settings.top_p, network.layout.slices[NAME].start
        is_class = (np.arange(network.length) - start) % SLOTS == SLOTS - 1
        temperature = np.where(is_class | (top_p == 0), 0, 1).astype(np.float32)
        return Restriction(temperature, np.int32(self.tokens.vocabulary), np.float32(top_p or 1))

    @property
    def soft(self) -> dict[str, float]:
        return {NAME: self.settings.soft}

    def loss(self, network: Network) -> Callable:
        return objective.make_parts_loss(network, self.soft)

    def metric(self, network: Network, annotations: Records) -> Metric:
        average_precision.check_installed()
        known = functools.cache(annotations)

        def result(total: dict) -> dict[str, float | None]:
            views = self.by_image(total)
            numbers = self._score(views, known, lambda rows: self._detections(total, rows[0]))
            if numbers["ap"] is None:
                raise InputError(
                    "no image of a split has an object, so there is no average precision; take "
                    "other images by config.data.validation_split and config.data.test_split."
                )
            first = [rows[0] for rows in views.values()]
            return {**numbers, "nats_per_token": float(total["nats"][first].mean())}

        return Metric(_step(self, network), result, _join, self.primary)

    def views(self) -> tuple[tuple[str, ...], ...]:
        return ((), *((entry,) for entry in self.settings.votes))

    def bounds(self, total: dict, annotations: Records) -> dict[str, dict[str, float | None]]:
        """The ceiling: annotations as tokens and back. The floor: detections of another image.

        With further views, their vote as well.
        """
        known, views = functools.cache(annotations), self.by_image(total)
        plain = [rows[0] for rows in views.values()]
        other = dict(zip(plain, plain[-1:] + plain[:-1], strict=True))
        found = {
            "ceiling": lambda rows: self._detections(total, rows[0], truth=True),
            "wrong_image": lambda rows: self._detections(total, other[rows[0]], view=rows[0]),
        }
        if self.settings.votes:
            found["voted"] = lambda rows: self._voted(total, rows)
        scores = {name: self._score(views, known, find) for name, find in found.items()}
        for name in ("ceiling", "wrong_image"):
            scores[name] = {number: scores[name][number] for number in BOUNDED}
        return scores

    def files(self, total: dict, annotations: Records) -> dict[str, object]:
        """The detections in COCO's form, with the data's own numbers; and the AP of each class."""
        source = sources.open_source(self.config.data, "test")
        found, scores = self._final(total, annotations)
        ids = [source.image_id(index) for index in found]
        results = average_precision.results(list(found.values()), ids, source.object_ids)
        named = zip(self.object_names, scores.by_class, strict=True)
        classes = [{"name": name, **row} for name, row in named]
        precision = [round(float(p), 4) for p in scores.precision]
        about = {"classes": classes, "precision_at_iou_50_by_recall": precision}
        return {"detections-test.json": results, "average_precision.json": about}

    def show(self, records: Records, total: dict) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        source = sources.open_source(self.config.data, "test")
        found, scores = self._final(total, source.annotations)
        pairs = [(records(index), found[index]) for index in list(found)[:SHOWN]]
        return {
            "detections": drawing.detections(pairs, self.object_names),
            "average_precision": drawing.average_precision(scores, self.object_names),
        }

    def by_image(self, total: dict) -> dict[int, list[int]]:
        """The rows of the metric's sums that show each image, by its number, the plain view first.

        Padding and damaged images are left out.
        """
        rows: dict[int, list[int]] = {}
        for row, (index, counts) in enumerate(zip(total["index"], total["mask"], strict=True)):
            if counts:
                rows.setdefault(int(index), []).append(row)
        return dict(sorted(rows.items()))

    def found(self, tokens, probabilities, view: np.ndarray) -> Detections:
        """The `most` likely objects of one sequence, in pixels of the original image."""
        size = self.config.data.size
        boxes, *rest = self.best(self.tokens.detections(tokens, probabilities, size))
        boxes = to_original(boxes, size, view)
        edges = np.stack([view[:2], view[2:]])
        low, high = np.tile(edges.min(axis=0), 2), np.tile(edges.max(axis=0), 2)
        return Detections(np.clip(boxes, low, high), *rest)

    def best(self, found: Detections) -> Detections:
        """The detections that count, the `most` likely ones."""
        return Detections(*(array[: self.settings.most] for array in found))

    def _detections(self, total, row: int, view: int | None = None, truth=False) -> Detections:
        """What was found in a row of the metric's sums, placed as in the row `view`."""
        tokens = total["targets" if truth else "drawn"][row]
        sure = np.ones(len(tokens), np.float32)
        probabilities = sure if truth else total["probabilities"][row]
        return self.found(tokens, probabilities, total["view"][row if view is None else view])

    def _voted(self, total: dict, rows: list[int]) -> Detections:
        return self.best(vote([self._detections(total, row) for row in rows]))

    def _final(self, total: dict, annotations: Records) -> tuple[dict[int, Detections], Scores]:
        """The detections by image, and their scores, from all views."""
        views = self.by_image(total)
        found = {index: self._voted(total, rows) for index, rows in views.items()}
        records = [annotations(index) for index in found]
        classes = len(self.object_names)
        return found, average_precision.score(records, list(found.values()), classes)

    def _score(self, views: dict[int, list[int]], annotations: Records, find: Callable) -> dict:
        records = [annotations(index) for index in views]
        found = [find(rows) for rows in views.values()]
        return average_precision.score(records, found, len(self.object_names)).numbers


@functools.cache
def _step(task: Detect, network: Network) -> Callable:
    """`(params, batch) -> arrays with a row for each image of the global batch`, jitted."""

    def step(params: dict, batch: dict) -> dict[str, Array]:
        key = jax.random.fold_in(jax.random.key(task.config.seed), batch["index"].min())
        images, places = (batch.get("tokens"), batch.get("image")), network.layout.slices[NAME]
        drawn, probabilities = answers.answer(
            network, params, *images, key, task.restriction(network), task.allowed
        )
        rows = {
            "nats": objective.parts_nats(network, params, batch),
            "drawn": drawn[:, places],
            "probabilities": probabilities[:, places],
            "targets": batch["targets"][NAME],
            **{name: batch[name] for name in ("index", "mask", "view")},
        }
        whole = {name: jax.sharding.reshard(x, P(*[None] * x.ndim)) for name, x in rows.items()}
        return whole | {"images": batch["mask"].sum()}

    return jax.jit(step)


def _join(total: dict, part: dict) -> dict:
    """The rows of `total` and of `part`, on the host."""
    total, part = jax.device_get((total, part))
    joined = {name: np.concatenate([total[name], rows]) for name, rows in part.items() if rows.ndim}
    return joined | {"images": total["images"] + part["images"]}
