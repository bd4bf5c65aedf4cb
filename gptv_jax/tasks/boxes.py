"""Objects as tokens and back, after Pix2seq (Chen et al. 2022, arXiv:2109.10852), on NumPy arrays.

Constants and the kinds of noise come from Pix2seq's code, github.com/google-research/pix2seq:
`utils.quantize`, `data_utils.augment_bbox`, `object_detection.build_response_seq_from_bbox`.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from gptv_jax.config.tasks import Detect
from gptv_jax.tasks.masks import Masks

CLASS = 4  # place of the class among an object's tokens: y0 x0 y1 x1 class, then the mask's tokens
JITTER, RANDOM_SIDE = 0.05, 0.5  # deviations: of an edge, in sides of its box; of a random side
END_WEIGHT = 0.1  # in the loss, of tokens after the last object where there are no noise objects
SAME_OBJECT = 0.55  # IoU from which boxes of two views are of one object (Solovyev et al. 2021)


class Detections(NamedTuple):
    """The objects found in an image, the most likely one first."""

    boxes: Float[np.ndarray, "n 4"]  # y0, x0, y1, x1 in pixels of the image
    labels: Int[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"]  # probabilities
    masks: Masks | None = None  # np.asarray(masks) is bool [n, H, W]; None: boxes are found alone

    def take(self, which: slice | np.ndarray) -> "Detections":
        """The detections of these numbers, or those where `which` is True."""
        return Detections(*(None if each is None else each[which] for each in self))


@dataclasses.dataclass(frozen=True)
class BoxTokens:
    """The tokens of objects.

    Heights are 0 .. bins-1, widths bins .. 2 bins - 1, then come the classes and the token "noise",
    which positions after the last object have as well, and last the codes of masks.
    """

    bins: int  # bin k lies at k / (bins - 1) of the image's height or width
    classes: int
    masks: int = 0  # K, the mask tokens of an object
    codes: int = 0  # that a mask token can be

    @property
    def slots(self) -> int:
        """Tokens of an object."""
        return CLASS + 1 + self.masks

    @property
    def noise(self) -> int:
        return 2 * self.bins + self.classes

    @property
    def vocabulary(self) -> int:
        return self.noise + 1 + self.codes

    def quantize(self, boxes: Float[np.ndarray, "n 4"], size: tuple[int, int]):
        """Tokens int32 [n, 4] of boxes in pixels of an image of this height and width."""
        shares = boxes / np.array([*size, *size])
        bins = np.clip(np.rint(shares * (self.bins - 1)), 0, self.bins - 1)
        return bins.astype(np.int32) + np.array([0, self.bins] * 2, np.int32)

    def dequantize(self, tokens: Int[np.ndarray, "n 4"], size: tuple[int, int]):
        """Boxes float32 [n, 4] in pixels, at most half a bin away from the quantized boxes."""
        bins = tokens - np.array([0, self.bins] * 2)
        return (bins / (self.bins - 1) * np.array([*size, *size])).astype(np.float32)

    def objects(
        self, tokens: Int[np.ndarray, " T"], probabilities: Float[np.ndarray, " T"]
    ) -> tuple[Int[np.ndarray, "n slots"], Float[np.ndarray, " n"]]:
        """Tokens and scores of the objects with a real class, the most likely first.

        An object's score is the probability of its class.
        """
        rows = tokens.reshape(-1, self.slots)
        scores = probabilities.reshape(-1, self.slots)[:, CLASS].astype(np.float32)
        real = np.flatnonzero((rows[:, CLASS] >= 2 * self.bins) & (rows[:, CLASS] < self.noise))
        real = real[np.argsort(-scores[real], kind="stable")]
        return rows[real], scores[real]

    def detections(
        self,
        tokens: Int[np.ndarray, " T"],
        probabilities: Float[np.ndarray, " T"],
        size: tuple[int, int],
    ) -> Detections:
        """The `objects` without their masks."""
        rows, scores = self.objects(tokens, probabilities)
        labels = (rows[:, CLASS] - 2 * self.bins).astype(np.int32)
        return Detections(self.dequantize(rows[:, :4], size), labels, scores)

    def sequence(
        self,
        boxes: Float[np.ndarray, "n 4"],
        labels: Int[np.ndarray, " n"],
        size: tuple[int, int],
        settings: Detect,
        rng: np.random.Generator | None = None,
        codes: Int[np.ndarray, "n K"] | None = None,
    ) -> dict[str, np.ndarray]:
        """Targets, inputs (int32) and weights (float32), [N slots], of N = settings.objects.

        The objects come in random order or by y0, then x0; the noise objects after them or, see
        `Detect.noise_among`, among them. Of more than N objects, N random ones are taken. Without a
        generator, in evaluation, the boxes themselves seed one, so the sequence of an image never
        changes. `codes` are those of the objects' masks; a mask of codes below 0 has no loss.
        """
        count, edges = settings.objects, np.array([*size, *size], np.float32)
        rng = rng or np.random.default_rng(zlib.crc32(boxes.tobytes()))
        chosen = rng.permutation(len(boxes))[:count]
        places, real = self.quantize(boxes, size), len(chosen)
        if settings.order == "position":
            chosen = chosen[np.lexsort(places[chosen, 1::-1].T)]
        tokens = np.full((count, self.slots), self.noise, np.int32)
        tokens[:real, :4] = places[chosen]
        tokens[:real, CLASS] = 2 * self.bins + labels[chosen]
        weights = np.full((count, self.slots), 1, np.float32)
        weights[:, CLASS] = settings.class_weight
        if settings.noise:
            added = noise_boxes(boxes[chosen] / edges, count - real, settings.noise_kinds, rng)
            tokens[real:, :4] = self.quantize(added * edges, size)
            weights[real:, :4] = 0
        else:
            weights[real:] = END_WEIGHT
        if self.masks:
            tokens[:real, CLASS + 1 :] = self.noise + 1 + np.maximum(codes[chosen], 0)
            weights[:real, CLASS + 1 :] = settings.mask_weight * (codes[chosen] >= 0)
            weights[real:, CLASS + 1 :] = 0
        inputs, random = tokens.copy(), 2 * self.bins + rng.integers(self.classes, size=(2, count))
        if settings.noise:  # decoding takes a real class for every object
            inputs[real:, CLASS] = random[0, real:]
        wrong = rng.random(count) < settings.class_corruption
        wrong[real:] &= settings.noise
        corrupted = np.where(rng.random(count) < 0.5, random[1], self.noise)
        inputs[:, CLASS] = np.where(wrong, corrupted, inputs[:, CLASS])
        if self.masks and settings.noise:  # decoding draws a mask for every object
            drawn = rng.integers(self.codes, size=(count - real, self.masks))
            inputs[real:, CLASS + 1 :] = self.noise + 1 + drawn
        arrays = {"targets": tokens, "inputs": inputs, "weights": weights}
        # At noise_among = 0 no random number is drawn here: the sequences of such settings do not
        # change by the field.
        if settings.noise and settings.noise_among and rng.random() < settings.noise_among:
            random = settings.order == "random"
            order = rng.permutation(count) if random else np.lexsort(tokens[:, 1::-1].T)
            arrays = {name: array[order] for name, array in arrays.items()}
        return {name: array.reshape(-1) for name, array in arrays.items()}


def noise_boxes(
    boxes: Float[np.ndarray, "n 4"],
    count: int,
    kinds: Sequence[float],
    rng: np.random.Generator,
) -> Float[np.ndarray, "count 4"]:
    """Boxes of no object, as shares of the image's height and width, like `boxes`.

    `kinds` are the shares of jittered boxes, of shifted boxes (one of `boxes`, centred anywhere)
    and of random boxes. Where there are no boxes all are random.
    """
    if len(boxes):
        kind, base = rng.choice(3, size=count, p=kinds), boxes[rng.integers(len(boxes), size=count)]
    else:
        kind, base = np.full(count, 2), np.zeros((count, 4))
    side = base[:, 2:] - base[:, :2]
    jittered = base + JITTER * _truncated_normal(rng, (count, 4)) * np.tile(side, 2)
    random_side = np.abs(RANDOM_SIDE * _truncated_normal(rng, (count, 2)))
    half, center = np.where(kind[:, None] == 1, side, random_side) / 2, rng.random((count, 2))
    moved = np.concatenate([center - half, center + half], axis=1)
    return np.clip(np.where(kind[:, None] == 0, jittered, moved), 0, 1)


def _truncated_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers, drawn anew outside of -2 .. 2, as TensorFlow's."""
    drawn = rng.standard_normal(shape)
    while (beyond := np.abs(drawn) > 2).any():
        drawn[beyond] = rng.standard_normal(beyond.sum())
    return drawn


def iou(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Intersection over union of every pair of boxes; 0 where both have no area."""
    common = intersection(a, b)
    areas = [(x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b)]
    return common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-9)


def intersection(
    a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]
) -> Float[np.ndarray, "n m"]:
    """The area that every pair of boxes has in common."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.maximum(high - low, 0)
    return sides[..., 0] * sides[..., 1]


def vote(views: Sequence[Detections]) -> Detections:
    """Weighted box fusion (Solovyev et al. 2021, arXiv:1910.13302) of several views of an image.

    A box joins the object of its class that it overlaps most, from an IoU of .55 on, among objects
    without a box of its view; else the box begins an object. An object's box is the mean of its
    boxes weighted by score; its score is the sum of the boxes' scores over the number of views. Its
    mask is the mask of its most likely box.
    """
    if len(views) == 1:
        return views[0]
    # Best first; boxes of equal scores and of equal ranks in their views are neighbours.
    order = sorted(
        (-float(score), rank, number)
        for number, view in enumerate(views)
        for rank, score in enumerate(view.scores)
    )
    count = len(order)
    boxes, sums = np.zeros((count, 4)), np.zeros(count)
    labels, seen = np.full(count, -1, np.int32), np.zeros((count, len(views)), bool)
    found, first = 0, []  # the row of each object's most likely box, among the rows of all views
    starts = np.cumsum([0, *(len(view.labels) for view in views)])
    for score, rank, number in order:
        box, label = views[number].boxes[rank].astype(float), views[number].labels[rank]
        free = np.flatnonzero((labels[:found] == label) & ~seen[:found, number])
        overlap = iou(boxes[free], box[None])[:, 0]
        at = int(free[overlap.argmax()]) if max(overlap, default=0) >= SAME_OBJECT else found
        if at == found:
            found, first = found + 1, [*first, starts[number] + rank]
        weight = max(-score, 1e-9)
        boxes[at] += (box - boxes[at]) * (weight / (sums[at] + weight))
        sums[at] += weight
        labels[at], seen[at, number] = label, True
    order = np.argsort(-sums[:found], kind="stable")
    scores = (sums[order] / len(views)).astype(np.float32)
    boxes, masks = boxes[order].astype(np.float32), None
    if views[0].masks is not None:
        masks = Masks.join([view.masks for view in views])[np.array(first, int)[order]]
        masks = dataclasses.replace(masks, boxes=boxes)
    return Detections(boxes, labels[order], scores, masks)
