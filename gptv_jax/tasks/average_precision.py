"""COCO's average precision of detections by pycocotools, and the calibration of their scores."""

import contextlib
import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from gptv_jax.data.records import Record
from gptv_jax.errors import InputError
from gptv_jax.tasks.boxes import Detections

# Name: IoU (None: the mean over .5, .55, ... .95), sizes of objects, detections an image. An object
# is small below 32^2 pixels of the original image, large above 96^2.
PRECISIONS = {
    "ap": (None, "all", 100),
    "ap50": (0.5, "all", 100),
    "ap75": (0.75, "all", 100),
    "ap_small": (None, "small", 100),
    "ap_medium": (None, "medium", 100),
    "ap_large": (None, "large", 100),
}
RECALLS = {
    "ar1": (None, "all", 1),
    "ar10": (None, "all", 10),
    "ar100": (None, "all", 100),
    "ar_small": (None, "small", 100),
    "ar_medium": (None, "medium", 100),
    "ar_large": (None, "large", 100),
}
BINS = 15  # of scores, for the calibration error (Guo et al. 2017, arXiv:1706.04599)


@dataclasses.dataclass(frozen=True)
class Scores:
    """How good detections are; None where no object counts."""

    numbers: dict[str, float | None]  # COCO's twelve numbers and "calibration_error"
    by_class: list[dict[str, float | int | None]]  # "ap", "ap50", "objects" of every class
    precision: Float[np.ndarray, " 101"]  # at recall 0, .01, ... 1 and IoU .5, mean over classes


def check_installed() -> None:
    """Raises InputError where pycocotools is not installed."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError as error:
        raise InputError(
            "average precision is computed by pycocotools, which is not installed; "
            "pip install -e '.[coco]' installs it."
        ) from error


def score(
    records: Sequence[Record], found: Sequence[Detections], classes: int, kind: str = "bbox"
) -> Scores:
    """COCO's numbers over all the images, those without objects or detections included.

    IoUs are of boxes (`kind` "bbox") or of masks ("segm"), where records are `without_pixels`.

    A record has "boxes", "box_labels" and, where known, "crowd" and "area", in pixels of the
    original image, as have the detections. Objects in crowds count neither as found nor as missed.
    """
    check_installed()
    from pycocotools.cocoeval import COCOeval

    masks = kind == "segm"
    truth = [_annotations(image, record, masks) for image, record in enumerate(records)]
    guesses = [_results(image, each, masks) for image, each in enumerate(found)]
    with contextlib.redirect_stdout(io.StringIO()):
        sets = _coco(truth, len(records), classes), _coco(guesses, len(records), classes)
        run = COCOeval(*sets, kind)
        # Images without detections, and classes without objects, are evaluated as well.
        run.params.imgIds, run.params.catIds = list(range(len(records))), list(range(classes))
        if len(records) and classes:
            run.evaluate()
            run.accumulate()
    if not run.eval:
        empty = np.full((10, 101, max(classes, 1), 4, 3), -1.0)
        run.eval = {"precision": empty, "recall": empty[:, 0]}
    numbers = {name: _mean(run, "precision", *what) for name, what in PRECISIONS.items()}
    numbers |= {name: _mean(run, "recall", *what) for name, what in RECALLS.items()}
    numbers["calibration_error"] = calibration_error(*_matches(run))
    labels = [np.asarray(record["box_labels"])[~_crowd(record)] for record in records]
    counts = np.bincount(np.concatenate([*labels, []]).astype(int), minlength=classes)
    by_class = [
        {n: _mean(run, "precision", *PRECISIONS[n], only=c) for n in ("ap", "ap50")}
        | {"objects": int(counts[c])}
        for c in range(classes)
    ]
    curve = run.eval["precision"][0, :, :, 0, 2]
    known = curve[:, curve[0] > -1]
    return Scores(numbers, by_class, known.mean(axis=1) if known.size else np.zeros(101))


def without_pixels(record: Record, masks: bool) -> Record:
    """The record with its masks as run lengths and their "shape", (H, W), or without masks."""
    rest = {name: value for name, value in record.items() if name != "masks"}
    if not masks:
        return rest
    return rest | {"masks": _runs(record["masks"]), "shape": record["masks"].shape[1:]}


def _runs(masks: Bool[np.ndarray, "n H W"]) -> list[dict]:
    from pycocotools import mask

    return mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))


def from_runs(runs: Sequence[dict], shape: tuple[int, int]) -> Bool[np.ndarray, "n H W"]:
    """The masks of the run lengths of `without_pixels`."""
    from pycocotools import mask

    return np.array([mask.decode(each) for each in runs], bool).reshape(-1, *shape)


def calibration_error(
    scores: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"]
) -> float | None:
    """Expected calibration error: mean distance of score and share of correct ones in 15 bins."""
    if not len(scores):
        return None
    where = np.minimum((scores * BINS).astype(int), BINS - 1)
    gaps = np.bincount(where, scores - correct, BINS)  # of each bin, times its detections
    return float(np.abs(gaps).sum() / len(scores))


def results(
    found: Sequence[Detections], image_ids: Sequence[int | str], category_ids: Sequence[int]
) -> list[dict]:
    """The detections in COCO's form for results, for a JSON file."""
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[row["category_id"]],
            **{name: row[name] for name in ("bbox", "score", "segmentation") if name in row},
        }
        for image_id, each in zip(image_ids, found, strict=True)
        for row in _results(image_id, each, each.masks is not None)
    ]


def _mean(run, kind: str, overlap, size, most, only: int | None = None) -> float | None:
    """One of COCO's numbers, as `COCOeval.summarize` prints it; of one class with `only`."""
    values, sizes = run.eval[kind], run.params.areaRngLbl
    values = values[..., sizes.index(size), run.params.maxDets.index(most)]
    if overlap is not None:
        values = values[np.isclose(run.params.iouThrs, overlap)]
    values = values if only is None else values[..., only]
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def _matches(run) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the detections, and whether each is an object of its class with an IoU of .5."""
    everything = run.params.areaRng[0]
    kept = [each for each in run.evalImgs if each and each["aRng"] == everything]
    counts = np.concatenate([*(~each["dtIgnore"][0].astype(bool) for each in kept), []]).astype(
        bool
    )
    scores = np.concatenate([*(each["dtScores"] for each in kept), []])
    matched = np.concatenate([*(each["dtMatches"][0] > 0 for each in kept), []])
    return scores[counts], matched[counts].astype(bool)


def _coco(annotations: list[list[dict]], images: int, classes: int):
    from pycocotools.coco import COCO

    rows = [row for each in annotations for row in each]
    for number, row in enumerate(rows, start=1):  # pycocotools takes the id 0 for "no match"
        row["id"] = number
    data_set = COCO()
    data_set.dataset = {
        # Sizes are asked for and not used.
        "images": [{"id": number, "height": 0, "width": 0} for number in range(images)],
        "categories": [{"id": number} for number in range(classes)],
        "annotations": rows,
    }
    data_set.createIndex()
    return data_set


def _annotations(image: int, record: Record, masks: bool) -> list[dict]:
    boxes, crowd = record["boxes"], _crowd(record)
    areas = record.get("area", np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1))
    return [
        {
            "image_id": image,
            "category_id": int(record["box_labels"][i]),
            "bbox": _xywh(boxes[i]),
            "area": float(areas[i]),
            "iscrowd": int(crowd[i]),
            **({"segmentation": record["masks"][i]} if masks else {}),
        }
        for i in range(len(boxes))
    ]


def _crowd(record: Record) -> np.ndarray:
    return record.get("crowd", np.zeros(len(record["boxes"]), bool))


def _results(image: int | str, found: Detections, masks: bool) -> list[dict]:
    rows = [
        {
            "image_id": image,
            "category_id": int(label),
            "bbox": _xywh(box),
            "area": float(np.prod(box[2:] - box[:2])),
            "score": _shortest(score),
            "iscrowd": 0,
        }
        for box, label, score in zip(found.boxes, found.labels, found.scores, strict=True)
    ]
    if masks:
        from pycocotools import mask

        for row, runs in zip(rows, _runs(np.asarray(found.masks)), strict=True):
            row["area"] = float(mask.area(runs))
            row["segmentation"] = {**runs, "counts": runs["counts"].decode()}
    return rows


def _xywh(box: Float[np.ndarray, " 4"]) -> list[float]:
    return [_shortest(x) for x in (box[1], box[0], box[3] - box[1], box[2] - box[0])]


def _shortest(x: np.float32) -> float:
    """The shortest decimal number that rounds to a float32, as JSON files hold the score."""
    return float(str(x))
