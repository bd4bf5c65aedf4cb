"""How far accuracies can be trusted: standard errors, counts and accuracies by class, warnings."""

import json
import logging
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.data import sources
from gptv_jax.errors import counted, shorten

LOG = logging.getLogger(__name__)
FEW_TEST, FEW_TRAINING = 100, 10  # images: of a test split in all, and of a class in training
FILE = "confusion.json"
# For each stage: its accuracy in words, and the accuracy that it should exceed.
PROBE, RAW = "probe/test_accuracy", "probe/raw_pixels_test_accuracy"
COMPARED = {
    "probe": ("The probe's test accuracy", "the same classifier on raw pixels", RAW),
    "finetune": ("The fine-tuned network's test accuracy", "the linear probe's", PROBE),
}
# What is said of classes, and which rows of `write` it concerns.
CAUTIONS = {
    "test images but no training image, so they are always counted as wrong": lambda row: (
        row["training_images"] == 0 and row["test_images"]
    ),
    f"{FEW_TRAINING} training images or fewer, too few to learn a class reliably": lambda row: (
        0 < (row["training_images"] or 0) <= FEW_TRAINING
    ),
    "no test image, so nothing is known": lambda row: row["test_images"] == 0,
}


def images(config: config_lib.Data) -> dict[str, int]:
    """`{"train_images": count, ...}`: the images of each split of a run, by a summary's keys."""
    return {f"{s}_images": len(sources.open_source(config, s)) for s in sources.SPLITS}


def standard_error(accuracy: float, images: int) -> float:
    """The standard deviation of an accuracy over random sets of so many images.

    Where no or every image is classified correctly, one more of either kind is assumed (Laplace's
    rule), since 0 would promise certainty.
    """
    if accuracy in (0, 1):
        accuracy, images = 1 / (images + 2), images + 2
    return math.sqrt(accuracy * (1 - accuracy) / images)


def share(value: float | None, images: int | None) -> str:
    """An accuracy and, where the number of images is known, its standard error."""
    if value is None:
        return ""
    error = f" ± {standard_error(value, images):.2%}" if images else ""
    return f"{value:.2%}{error}"


def with_standard_errors(numbers: dict) -> dict:
    """A stage's numbers, with `NAME_standard_error` after each number called `..._accuracy`.

    An accuracy of a split whose count the numbers lack has none.
    """
    found = {}
    for name, value in numbers.items():
        found[name], count = value, images_of(name, numbers)
        if name.endswith("_accuracy") and count and value is not None:
            found[f"{name}_standard_error"] = standard_error(value, count)
    return found


def images_of(name: str, numbers: dict) -> int | None:
    """Number of images of an accuracy, by its name: test_images for `..._test_accuracy`."""
    split = name.removesuffix("_accuracy").rpartition("_")[2]
    return numbers.get(f"{split}_images")


def write(
    folder: pathlib.Path,
    confusion: Int[np.ndarray, "C C"],
    names: Sequence[str],
    training: Int[np.ndarray, " classes"] | None,
    **about,
) -> None:
    """Writes confusion.json: counts and accuracy of every class of the test split, and the matrix.

    `confusion` has a row for each class of the images and a column for each predicted class;
    it may lack the last classes. `training` are the training images of each class, where
    known, `names` the names of the classes, if they have any. `about` is written as it is.
    """
    size = max(len(confusion), len(names), 0 if training is None else len(training))
    missing = size - len(confusion)
    matrix = np.pad(np.asarray(confusion, np.int64), ((0, missing), (0, missing)))
    totals, classes = matrix.sum(axis=1), []
    for c in range(size):
        row = {"class": c, "name": names[c] if names else str(c)}
        row["training_images"] = None if training is None else int(training[c])
        row["test_images"] = int(totals[c])
        row["test_accuracy"] = float(matrix[c, c] / totals[c]) if totals[c] else None
        classes.append(row)
    # A line for each class, so that people can read the file.
    lists = {"classes": classes, "confusion": matrix.tolist()}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in about.items()]
    for name, rows in lists.items():
        shown = ",\n  ".join(json.dumps(row) for row in rows)
        lines.append(f'"{name}": [\n  {shown}\n ]')
    files.replace(folder / FILE, ("{\n " + ",\n ".join(lines) + "\n}\n").encode())


def read(folder: pathlib.Path) -> dict:
    """What `write` wrote, {"classes": rows, "confusion": matrix, ...}, or {} without the file."""
    return files.read_json(folder / FILE, {})


def cautions(summary: dict, classes: Sequence[dict] = ()) -> list[str]:
    """Sentences on what a reader of the summary's accuracies may miss; often there is none.

    `classes` are the rows that `write` makes.
    """
    images = summary.get("probe/test_images") or summary.get("finetune/test_images")
    found = []
    accurate = any(name.endswith("/test_accuracy") for name in summary)
    if images and images < FEW_TEST and accurate:
        few = f"The test split has only {counted(images, 'image')}"
        error = f"a standard error of up to {standard_error(0.5, images):.1%}"
        found.append(f"{few}, so an accuracy has {error}: small differences mean nothing.")
    for stage, (words, floor_words, floor) in COMPARED.items():
        above, below = summary.get(floor), summary.get(f"{stage}/test_accuracy")
        if above is not None and below is not None and below < above:
            close = images and above - below < 2 * standard_error(above, images)
            added = ", by less than two standard errors" if close else ""
            found.append(f"{words} ({below:.2%}) is below {floor_words} ({above:.2%}){added}.")
    for words, concerned in CAUTIONS.items():
        if names := [row["name"] for row in classes if concerned(row)]:
            kind = "Class" if len(names) == 1 else "Classes"
            found.append(f"{kind} {shorten(names, room=80)}: {words}.")
    return found


def tell(stage: str, before: dict, summary: dict, folder: pathlib.Path) -> None:
    """Logs a finished stage's accuracy, and the warnings that its numbers add to the summary."""
    accuracy, images = (summary.get(f"{stage}/test_{n}") for n in ("accuracy", "images"))
    if accuracy is None or not images:
        return
    error = standard_error(accuracy, images)
    line = (
        "%s: accuracy %.2f%% of %d test images, standard error %.2f%% (%s training, %s validation)."
    )
    others = (summary.get(f"{stage}/{split}_images") for split in ("train", "validation"))
    LOG.info(line, stage, 100 * accuracy, images, 100 * error, *others)
    told = any(name.endswith("/test_accuracy") for name in before)
    for sentence in cautions(summary, classes(folder)):
        if not told or sentence.startswith(COMPARED[stage][0]):
            LOG.warning("%s", sentence)


def classes(folder: pathlib.Path) -> list[dict]:
    """A row for each class, of the run's fine-tuning or else probe; [] where neither has run."""
    found = read(folder / "finetune") or read(folder / "probe") or {"classes": []}
    return found["classes"]
