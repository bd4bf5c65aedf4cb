"""Object detection: the objects of an image as tokens after the image, scored by COCO's AP."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from gptv_jax import sharding
from gptv_jax.data import cached_tokens, sources, transforms
from gptv_jax.data.records import Record, to_original
from gptv_jax.decode import answers, generation
from gptv_jax.decode.restriction import Restriction
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import Part
from gptv_jax.tasks import average_precision, drawing, masks, panoptic, rows
from gptv_jax.tasks.average_precision import PRECISIONS, RECALLS, Scores
from gptv_jax.tasks.boxes import CLASS, BoxTokens, Detections, vote
from gptv_jax.tasks.masks import Masks
from gptv_jax.tasks.task import Grammar, Records, Task
from gptv_jax.tokens import label_maps
from gptv_jax.train import objective
from gptv_jax.train.step import Metric

LOG = logging.getLogger(__name__)
NAME = "boxes"  # of the part
SHOWN = 8  # test images of the picture
BOUNDED = ("ap", "ap50", "ap75")  # numbers with a floor and a ceiling
OF_MASKS = tuple(f"mask_{name}" for name in BOUNDED)


@dataclasses.dataclass(frozen=True)
class Detect(Task):
    """The boxes and classes of the objects in the image; see `config.tasks.Detect`."""

    needs: ClassVar[tuple[str, ...]] = ("boxes", "box_labels")
    primary: ClassVar[dict[str, int]] = {"ap": 1, "nats_per_token": -1}
    validated: ClassVar[tuple[str, ...]] = (*PRECISIONS, *RECALLS)
    pictures: ClassVar[dict[str, str]] = {
        "detections": "Test images: the annotated objects (left), and the detected ones with their "
        f"scores, from {drawing.SHOWN_SCORE:g} on (right); with votes, those of the vote.",
        "average_precision": "Precision and recall at an IoU of .5, and AP of the classes with "
        "most objects; with config.task.detect.votes, of the vote of all views.",
    }

    def check(self) -> None:
        average_precision.check_installed()
        transforms.parse_views(self.settings.votes, "config.task.detect.votes")
        for entry in (step for view in self.views() for step in view):
            if not cached_tokens.takes(self.config.data, entry):
                raise InputError(
                    f"config.task.detect.votes has {entry}, which needs pixels, and the tokens of "
                    f"{self.config.data.path} have none; take votes of a data set of images, or ()."
                )
        most, training = self.settings.objects, sources.open_source(self.config.data, "train")
        masks.check(self.config, training.keys)
        sources.check_objects(self.config.data, self.validation_images)
        held = training.objects_by_image()
        if held is not None and held.max() > most and jax.process_index() == 0:
            LOG.warning(
                "%d of %d training images have more objects than config.task.detect.objects=%d, up "
                "to %d; in each epoch such an image is learned with that many random objects.",
                *((held > most).sum(), len(held), most, held.max()),
            )

    @property
    def names(self) -> tuple[str, ...]:
        return self.object_names

    @property
    def box_tokens(self) -> BoxTokens:
        settings, codes = self.settings, math.prod(self.settings.mask_levels)
        own = (settings.masks, codes) if settings.masks else ()
        return BoxTokens(settings.bins, len(self.object_names), *own)

    def parts(self) -> tuple[Part, ...]:
        tokens = self.box_tokens
        shape = (self.settings.objects, tokens.slots)
        return (Part(NAME, tokens.vocabulary, shape, bins=tokens.bins, summed=True),)

    def measure(self, records: Callable[[int], Iterable[Record]]) -> bytes:
        """The autoencoder whose codes are mask tokens."""
        if not self.settings.masks:
            return b""
        found = records(self.settings.masks_measured)
        return masks.fit(found, self.settings, self.config.seed).to_bytes()

    @functools.cached_property
    def mask_codec(self) -> label_maps.LabelCodec:
        """What `measure` made."""
        return label_maps.from_bytes(self.measured)

    def example(self, record: Record, rng: np.random.Generator | None = None) -> dict:
        """Crowds are no targets, since one box there stands for many objects."""
        single = ~record["crowd"] if "crowd" in record else slice(None)
        boxes, labels = record["boxes"][single], record["box_labels"][single]
        size, tokens, codes = self.config.data.size, self.box_tokens, None
        if tokens.masks:  # in the boxes that will be drawn
            places = tokens.dequantize(tokens.quantize(boxes, size), size)
            codes = masks.encode(self.mask_codec, record["masks"][single], places)
        found = tokens.sequence(boxes, labels, size, self.settings, rng, codes)
        return {name: {NAME: array} for name, array in found.items()}

    def allowed(
        self, part: str, position: int | Int[Array, ""], tokens: Int[Array, "B n"]
    ) -> Bool[Array, "B V"] | None:
        """By slot: a height, a width, both not below the first ones, a real class, codes of a mask.

        Without noise objects "noise" is possible in place of an object, and nothing else after.
        """
        if part != NAME:
            return None
        bins, noise, slots = self.settings.bins, self.box_tokens.noise, self.box_tokens.slots
        slot, ids = position % slots, jnp.arange(self.box_tokens.vocabulary)[None]
        row = jax.lax.dynamic_slice_in_dim(tokens, position - slot, slots, axis=1)
        zero = jnp.zeros_like(row[:, :1])
        # Without a row before, this is the first one, which has no end before it.
        before = jax.lax.dynamic_slice_in_dim(
            tokens, jnp.maximum(position - slot - slots, 0), slots, axis=1
        )
        low = [zero, zero + bins, row[:, :1], row[:, 1:2], zero + 2 * bins, zero + noise + 1]
        high = [zero + end for end in (bins, 2 * bins, bins, 2 * bins, noise, ids.size)]
        kind = jnp.minimum(slot, CLASS + 1)
        mask = (ids >= jax.lax.select_n(kind, *low)) & (ids < jax.lax.select_n(kind, *high))
        if self.settings.noise:
            return mask
        ended = (row[:, :1] == noise) & (slot > 0)
        ended |= (before[:, :1] == noise) & (position >= slots)
        return jnp.where(ended, ids == noise, mask | ((ids == noise) & (slot == 0)))

    def restriction(self, network: Network) -> Restriction:
        """Coordinates are drawn from the nucleus; classes and codes are the most likely ones."""
        top_p, start = self.settings.top_p, network.layout.slices[NAME].start
        likely = (np.arange(network.length) - start) % self.box_tokens.slots >= CLASS
        temperature = np.where(likely | (top_p == 0), 0, 1).astype(np.float32)
        return Restriction(
            temperature, np.int32(self.box_tokens.vocabulary), np.float32(top_p or 1)
        )

    @property
    def soft(self) -> dict[str, float]:
        return {NAME: self.settings.soft}

    def loss(self, network: Network) -> Callable:
        return objective.make_parts_loss(network, self.soft)

    def metric(self, network: Network, annotations: Records, true_boxes: bool = False) -> Metric:
        known = functools.cache(annotations)

        def result(total: dict) -> dict[str, float | None]:
            numbers = self._scored(total, known, "plain")[1].numbers
            first = [*rows.plain(total).values()]
            return {**numbers, "nats_per_token": float(total["nats"][first].mean())}

        return Metric(
            _step(self, network, true_boxes), result, rows.collect, self.primary, rows.join
        )

    def test_metric(self, network: Network, annotations: Records) -> Metric:
        return self.metric(network, annotations, true_boxes=self.settings.masks > 0)

    def views(self) -> tuple[tuple[str, ...], ...]:
        return ((), *(tuple(entry.split("|")) for entry in self.settings.votes))

    def details(self, total: dict, annotations: Records) -> dict[str, float | None]:
        """AP of each class, None of a class without an object; from one view, as the metric's."""
        return self._of_classes(self._scored(total, annotations, "plain")[1])

    def _of_classes(self, scores: Scores) -> dict[str, float | None]:
        named = zip(self.object_names, scores.by_class, strict=True)
        return {f"ap_of_{name}": row["ap"] for name, row in named}

    def bounds(self, total: dict, annotations: Records) -> dict[str, dict[str, float | None]]:
        """The ceiling: annotations as tokens and back. The floor: detections of another image.

        With further views, their vote and its AP of each class as well. Of masks, also those drawn
        in the true boxes.
        """
        of_masks = (*OF_MASKS, *panoptic.QUALITY)
        bounded = dict.fromkeys(("ceiling", "wrong_image"), (*BOUNDED, *of_masks))
        bounded |= {"true_boxes": of_masks} if self.settings.masks else {}
        scored = functools.partial(self._scored, total, annotations)
        scores = {
            name: {n: value for n, value in scored(name)[1].numbers.items() if n in numbers}
            for name, numbers in bounded.items()
        }
        if self.settings.votes:
            voted = scored("voted")[1]
            scores["voted"] = voted.numbers | self._of_classes(voted)
        if len(rows.plain(total)) == 1:  # there is no other image
            scores["wrong_image"] = dict.fromkeys(scores["wrong_image"])
        return scores

    def files(self, total: dict, annotations: Records) -> dict[str, object]:
        """The detections in COCO's form, with the data's own numbers; and the AP of each class."""
        source = sources.open_source(self.config.data, "test")
        found, scores = self._final(total, annotations)
        ids = [source.image_id(index) for index in found]
        results = average_precision.results(list(found.values()), ids, source.object_ids)
        classes = zip(self.object_names, scores.by_class, strict=True)
        about = {
            "classes": [{"name": name, **row} for name, row in classes],
            "precision_at_iou_50_by_recall": [round(float(p), 4) for p in scores.precision],
        }
        return {"detections-test.json": results, "average_precision.json": about}

    def show(self, records: Records, total: dict) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        source = sources.open_source(self.config.data, "test")
        found, scores = self._final(total, source.annotations)
        pairs = [(records(index), found[index]) for index in list(found)[:SHOWN]]
        pairs = [(record, drawing.as_shown(each, record)) for record, each in pairs]
        return {
            "detections": drawing.detections(pairs, self.object_names),
            "average_precision": drawing.average_precision(scores, self.object_names),
        }

    def found(
        self,
        tokens: Int[np.ndarray, "samples n"],
        probabilities: Float[np.ndarray, "samples n"],
        view: Float[np.ndarray, " 4"],
        shape: tuple[int, int],
    ) -> Detections:
        """The `most` likely objects, by the vote of all samples, in pixels of the original image.

        `shape` is the original's height and width, and `view` the part that was read.
        """
        samples = zip(tokens, probabilities, strict=True)
        return self.best(vote([self._found(*each, view, shape) for each in samples]))

    def _found(self, tokens, probabilities, view, shape) -> Detections:
        """The `most` likely objects of one sample."""
        size, given = self.config.data.size, (tokens, probabilities)
        found = self.best(self.box_tokens.detections(*given, size))
        boxes = to_original(found.boxes, size, view)
        # The outermost bins lie on the edges of what was read; rounding may not move them beyond.
        edges = np.stack([view[:2], view[2:]])
        low, high = np.tile(edges.min(axis=0), 2), np.tile(edges.max(axis=0), 2)
        found = found._replace(boxes=np.clip(boxes, low, high))
        if not self.settings.masks:
            return found
        objects = self.box_tokens.objects(*given)[0][: len(boxes)]
        mirrored = np.tile(view[2:] < view[:2], (len(boxes), 1))
        codes = objects[:, CLASS + 1 :] - self.box_tokens.noise - 1
        return found._replace(masks=Masks(self.mask_codec, codes, boxes, mirrored, shape))

    def best(self, found: Detections) -> Detections:
        """The detections that count, the `most` likely ones."""
        return found.take(slice(self.settings.most))

    def _detections(self, total, row: int, record: Record, view=None, given=None) -> Detections:
        """What a row of the metric holds, placed as in the row `view`; `given`: of sure tokens."""
        tokens = total[given][row][None] if given else total["drawn"][row]
        probabilities = np.ones(tokens.shape) if given else total["probabilities"][row]
        view = total["view"][row if view is None else view]
        return self.found(tokens, probabilities, view, record.get("shape", (0, 0)))

    def _final(self, total: dict, annotations: Records) -> tuple[dict[int, Detections], Scores]:
        """The detections by image, and their scores, from all views."""
        return self._scored(total, annotations, "voted" if self.settings.votes else "plain")

    def _scored(
        self, total: dict, annotations: Records, kind: str
    ) -> tuple[dict[int, Detections], Scores]:
        """Detections by image and scores: plain, voted, ceiling, wrong_image or true_boxes.

        They are computed once for the rows of a `Metric`.
        """
        known = rows.known(total)
        if kind not in known:
            views, other = rows.by_image(total), rows.others(total)
            masked, of = self.settings.masks > 0, functools.partial(self._detections, total)
            find = {
                "plain": lambda found, record: of(found[0], record),
                "voted": lambda found, record: self.best(vote([of(row, record) for row in found])),
                "ceiling": lambda found, record: of(found[0], record, given="targets"),
                "wrong_image": lambda found, record: of(other[found[0]], record, view=found[0]),
                "true_boxes": lambda found, record: of(found[0], record, given="true_boxes"),
            }[kind]
            if "records" not in known:
                kept = functools.partial(average_precision.without_pixels, masks=masked)
                known["records"] = [kept(annotations(index)) for index in views]
            records = known["records"]
            pairs = zip(views.items(), records, strict=True)
            found = {index: find(views, record) for (index, views), record in pairs}
            given = records, list(found.values()), len(self.object_names)
            scores = average_precision.score(*given)
            if masked:
                numbers = average_precision.score(*given, "segm").numbers
                of_masks = {own: numbers[n] for own, n in zip(OF_MASKS, BOUNDED, strict=True)}
                names = self.object_names, self.map_names
                of_masks |= panoptic.of_detections(*given[:2], *names)
                scores = dataclasses.replace(scores, numbers=scores.numbers | of_masks)
            known[kind] = found, scores
        return known[kind]


def draw(
    task: Detect,
    network: Network,
    params: dict,
    tokens: Int[Array, "B N"] | None,
    pixels: UInt8[Array, "B height width C"] | None,
    numbers: Int[Array, " B"],
    known: Int[Array, "B T"] | None = None,
) -> tuple[Int[Array, "B samples n"], Float[Array, "B samples n"]]:
    """Tokens of the objects in numbered images, and their probabilities, see `answers.answer`.

    With `known` tokens there is one sample of every image.
    """
    key, settings = jax.random.key(task.config.seed), task.restriction(network)
    given = (tokens, pixels, key, jax.tree.map(jnp.asarray, settings), Grammar(task))
    samples = task.settings.samples if known is None else 1
    found = answers.answer(network, params, *given, samples, numbers=numbers, known=known)
    shape = (-1, samples, network.length)
    by_image = (x.reshape(shape, out_sharding=sharding.BATCH_FIRST) for x in found)
    return tuple(x[:, :, network.layout.slices[NAME]] for x in by_image)


@functools.cache
def _step(task: Detect, network: Network, true_boxes: bool) -> Callable:
    """`(params, batch) -> arrays with a row for each image of the global batch`, jitted."""

    def step(params: dict, batch: dict) -> dict[str, Array]:
        images = batch.get("tokens"), batch.get("image"), batch["index"]
        drawn, probabilities = draw(task, network, params, *images)
        truth, nats = batch["targets"][NAME], objective.parts_nats(network, params, batch)
        found = {"targets": truth, "drawn": drawn, "probabilities": probabilities, "nats": nats}
        if true_boxes:
            slot = np.arange(truth.shape[1]) % task.box_tokens.slots
            given, noise = jnp.array(slot <= CLASS)[None], task.box_tokens.noise
            # Decoding takes a real class for every object, also for a noise object.
            known = given & ((truth != noise) | (slot < CLASS)[None])
            known = jnp.where(known, truth, generation.UNKNOWN)
            masked = draw(task, network, params, *images, known)[0][:, 0]
            found["true_boxes"] = jnp.where(given, truth, masked)
        return found

    return rows.compiled(step)
