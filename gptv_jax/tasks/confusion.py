"""Which class of pixels is taken for which: exact counts, mean IoU and accuracies from the counts.

The definitions are those of PASCAL VOC and ADE20K: one matrix over the whole split, pixels without
a class left out. C is the number of classes.
"""

import numpy as np
from jaxtyping import Int, Integer

from gptv_jax.tokens.label_maps import has_class


def count(
    truth: Integer[np.ndarray, "*any"], predicted: Integer[np.ndarray, "*any"], classes: int
) -> Int[np.ndarray, "C C"]:
    """Number of pixels of each class (row) that were taken for each class (column), int64.

    Pixels of the truth without a class do not count.
    """
    known = has_class(truth, classes)
    pairs = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def scores(matrix: Int[np.ndarray, "C C"]) -> dict[str, float | list | None]:
    """The numbers of a matrix of `count`; None where no pixel counts.

    "miou" is the mean over the "classes_scored" classes that occur in the truth or were predicted.
    "iou_by_class" and "accuracy_by_class" are lists with None for other classes.
    "mean_class_accuracy" is the mean over the classes of the truth.
    """
    matrix = np.asarray(matrix, np.float64)
    right, truth, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    iou = _shares(right, truth + predicted - right)
    accuracy = _shares(right, truth)
    known = [x for x in iou if x is not None]
    return {
        "miou": _mean(iou),
        "pixel_accuracy": _shares(right.sum()[None], truth.sum()[None])[0],
        "mean_class_accuracy": _mean(accuracy),
        "classes_scored": float(len(known)),
        "iou_by_class": iou,
        "accuracy_by_class": accuracy,
    }


def _shares(some: np.ndarray, whole: np.ndarray) -> list[float | None]:
    return [float(a / b) if b else None for a, b in zip(some, whole, strict=True)]


def _mean(values: list[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return float(np.mean(known)) if known else None
