"""Panoptic quality (Kirillov et al. 2019, arXiv:1801.00868): every pixel has a class and a segment.

Pixels without a segment and crowds are treated as by the paper's program, panopticapi
(`evaluation.py`). Letters: H and W pixels, n segments, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from gptv_jax.data.records import Record
from gptv_jax.tasks.average_precision import from_runs
from gptv_jax.tasks.boxes import Detections

QUALITY = ("pq", "sq", "rq", "pq_things", "pq_stuff")
LIKELY = 0.5  # score below which a detection is no segment
KEPT = 0.5  # share of a detection's mask that no more likely one covers; with less it is no segment


class Segments(NamedTuple):
    """The segments of an image: things one by one, and one for all the stuff of a class."""

    where: Integer[np.ndarray, "H W"]  # number of the segment, 0 .. n-1; below 0: none (void)
    labels: Integer[np.ndarray, " n"]  # classes of the segments
    crowd: Bool[np.ndarray, " n"] | None = None  # of the truth: segments of several things


def count(truth: Segments, predicted: Segments, classes: int) -> dict[str, np.ndarray]:
    """What an image adds to the sums of `scores`, arrays [C]: "tp", "fp", "fn" and "iou" (of tp).

    A predicted and a true segment of one class match where their IoU is above .5, without the
    predicted segment's pixels that are void in the truth. No crowd matches or is missed. A
    predicted segment is not wrong where more than half of it is void or a crowd of its class.
    """
    n, m = len(truth.labels), len(predicted.labels)
    # Row and column 0 are void.
    pairs = np.maximum(truth.where, -1).astype(np.int64) + 1, np.maximum(predicted.where, -1) + 1
    common = np.bincount((pairs[0] * (m + 1) + pairs[1]).ravel(), minlength=(n + 1) * (m + 1))
    common = common.reshape(n + 1, m + 1)
    true_area, area, void = common.sum(axis=1)[1:], common.sum(axis=0)[1:], common[0, 1:]
    inner = common[1:, 1:]
    crowd = np.zeros(n, bool) if truth.crowd is None else truth.crowd
    alike = truth.labels[:, None] == predicted.labels[None]
    union = true_area[:, None] + area[None] - inner - void[None]
    iou = np.where(alike & ~crowd[:, None], inner / np.maximum(union, 1), 0)
    matched = iou > 0.5
    excused = void + (inner * (alike & crowd[:, None])).sum(axis=0)
    wrong = ~matched.any(axis=0) & (area > 0) & (2 * excused <= area)
    missed = ~matched.any(axis=1) & (true_area > 0) & ~crowd

    def by_class(labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.bincount(labels, weights, minlength=classes)

    return {
        "tp": by_class(truth.labels, matched.sum(axis=1)),
        "fp": by_class(predicted.labels, wrong),
        "fn": by_class(truth.labels, missed),
        "iou": by_class(truth.labels, (iou * matched).sum(axis=1)),
    }


def scores(total: dict[str, np.ndarray], things: Sequence[bool]) -> dict[str, float | None]:
    """The numbers of the sums of `count` over all images.

    "pq" = sq * rq, "sq" (mean IoU of the matches) and "rq" (F1 of the matches) are means over the
    classes that have a true or a predicted segment; "pq_things", "pq_stuff" and so on are means
    over the classes of each kind; None without such a class.
    """
    tp, fp, fn, iou = (np.asarray(total[name], np.float64) for name in ("tp", "fp", "fn", "iou"))
    halves, kind = tp + (fp + fn) / 2, np.asarray(things, bool)
    by_class = {
        "pq": iou / np.maximum(halves, 0.5),
        "sq": iou / np.maximum(tp, 1),
        "rq": tp / np.maximum(halves, 0.5),
    }
    numbers = {}
    for suffix, chosen in (("", np.ones_like(kind)), ("_things", kind), ("_stuff", ~kind)):
        for name, values in by_class.items():
            known = values[chosen & (halves > 0)]
            numbers[name + suffix] = float(known.mean()) if len(known) else None
    return numbers


def of_objects(
    masks: Bool[np.ndarray, "n H W"], labels: Integer[np.ndarray, " n"], rest: int, kept: float = 0
) -> Segments:
    """Objects one by one, and the pixels of no object as a last segment of the class `rest`.

    A pixel in several masks is the first one's. An object of whose mask less than the share `kept`
    is its own has no pixel.
    """
    where = np.full(masks.shape[1:], len(masks))
    for number, mask in enumerate(masks):
        own = mask & (where == len(masks))
        if own.sum() >= kept * mask.sum():
            where[own] = number
    return Segments(where, np.append(labels, rest))


def of_detections(
    records: Sequence[Record],
    found: Sequence[Detections],
    object_names: Sequence[str],
    map_names: Sequence[str],
) -> dict[str, float | None]:
    """The QUALITY of detections; {} where these do not say the class of every pixel.

    Every pixel has a class where label maps have the classes of the objects and one more, such as
    the background, which is that of all other pixels. Detections become segments as in the paper
    (section 7): the likely ones, the most likely first. Records are those of `without_pixels`.
    """
    rest = [label for label, name in enumerate(map_names) if name not in object_names]
    if len(rest) != 1 or len(map_names) != len(object_names) + 1:
        return {}
    numbers, total = np.array([map_names.index(name) for name in object_names]), {}
    for record, each in zip(records, found, strict=True):
        likely = each.take(each.scores >= LIKELY)
        masks, plane = from_runs(record["masks"], record["shape"]), record["segmentation"]
        truth = of_objects(masks, numbers[record["box_labels"]], rest[0])
        truth.where[(truth.where == len(masks)) & (plane != rest[0])] = -1
        if "crowd" in record:
            truth = truth._replace(crowd=np.append(record["crowd"], False))
        guess = of_objects(np.asarray(likely.masks), numbers[likely.labels], rest[0], KEPT)
        for name, added in count(truth, guess, len(map_names)).items():
            total[name] = total.get(name, 0) + added
    things = [name in object_names for name in map_names]
    known = scores(total, things)
    return {name: known[name] for name in QUALITY}
