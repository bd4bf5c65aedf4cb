"""Labels as people have them: numbers with gaps, names, and a CSV file beside the images."""

import collections
import csv
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from gptv_jax.errors import InputError, as_input_error, shorten

NUMBERED = "np.unique(labels, return_inverse=True)[1]"  # the advice to number labels from 0


def as_vector(split: str, labels: np.ndarray, count: int) -> np.ndarray:
    """The labels of `count` images, whole numbers or names [N], from the array of a user.

    Raises:
      InputError: the array has another shape or type; the message has the expression that helps.
    """
    have = f"split {split} has labels {labels.dtype} {list(labels.shape)} for {count} images"
    wanted = "; labels are whole numbers from 0 or names, one for each image [N]"
    if labels.ndim == 2 and labels.shape[1] == 1:
        raise InputError(f"{have}{wanted}: store labels[:, 0].")
    if labels.ndim == 2 and labels.dtype.kind in "biuf":
        one_hot = ((labels != 0).sum(1) == 1).all()
        advice = "store labels.argmax(1)" if one_hot else "images have one class each"
        raise InputError(f"{have}{wanted}: {advice}.")
    if labels.shape != (count,):
        raise InputError(f"{have}{wanted}.")
    if labels.dtype.kind == "S":
        with as_input_error(f"{have}, which are no UTF-8 text", UnicodeDecodeError):
            return np.char.decode(labels, "utf-8")
    if labels.dtype.kind == "f" and not (np.isfinite(labels) & (labels % 1 == 0)).all():
        raise InputError(f"{have}, some of which are not whole{wanted}.")
    if labels.dtype.kind not in "biufU":
        raise InputError(f"{have}{wanted}.")
    return labels if labels.dtype.kind == "U" else labels.astype(np.int64)


def number(
    labels: dict[str, np.ndarray], notes: list[str]
) -> tuple[dict[str, np.ndarray], int, tuple[str, ...]]:
    """The labels of every split as numbers from 0, the number of classes, and their names.

    Labels that count from 0, with few numbers left out, stay as they are, and their classes have no
    names. Other numbers and names are numbered in order, and become the names of the classes.

    Raises:
      InputError: labels are negative or names in some splits only, or one of them seems to mark
        images to be left out.
    """
    if len({array.dtype.kind == "U" for array in labels.values()}) == 2:
        raise InputError(f"of the splits {', '.join(labels)} some have names as labels, not all.")
    present = np.unique(np.concatenate([np.unique(array) for array in labels.values()]))
    if present.dtype.kind != "U":
        low, high = int(present[0]), int(present[-1])
        if low < 0:
            raise InputError(
                f"the labels reach from {low} to {high}, but count from 0. Where {low} marks "
                f"images without a label, config.data.ignore_label={low} leaves them out; where it "
                f"is a class, store {NUMBERED}."
            )
        sparse = 2 * len(present) < high + 1 - min(low, 1)
        if low == 0 and not sparse:
            return labels, high + 1, ()
        rest = present[:-1]
        if sparse and len(rest) > 1 and low < 2 and 2 * len(rest) > rest[-1]:
            raise InputError(
                f"the label {high} stands beside {low} to {rest[-1]}, so most of {high + 1} "
                f"classes would have no image. If it marks images to leave out, set "
                f"config.data.ignore_label={high}; if it is a class, store {NUMBERED}."
            )
        notes.append(
            f"the labels {shorten(present)} do not count from 0 without gaps, so they are numbered "
            f"0 to {len(present) - 1} and become the names of the classes"
        )
    numbered = {s: np.searchsorted(present, a).astype(np.int32) for s, a in labels.items()}
    return numbered, len(present), tuple(map(str, present.tolist()))


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes, sorted; by value where all are whole numbers of one form."""
    found = sorted(names)
    return sorted(found, key=int) if all(str(n).isdecimal() for n in found) else found


def of_files(
    path: pathlib.Path,
    data: pathlib.Path,
    folders: dict[str, pathlib.Path],
    files: dict[str, list[str]],
    ignore_label: int | None,
    notes: list[str],
) -> dict[str, list[str]]:
    """The label of every image by split, from a CSV file with the columns file and label.

    A row names a file by its path below the data folder, with or without the name of that folder
    and the ending, or by its name alone. Images without a row are removed from `files`.

    Raises:
      InputError: the CSV file cannot be read, has no row for any image, two labels for one image,
        or a name that several images have.
    """
    rows = _read(path)
    found: dict[str, list[str]] = {}
    users: dict[str, str] = {}  # the image that each row of the CSV file is of
    unlabelled, ignored = [], 0
    for split, names in files.items():
        kept, found[split] = [], []
        for name in names:
            below = pathlib.PurePath(os.path.relpath(folders[split] / name, data))
            keys = [below, below.with_suffix(""), data.name / below]
            keys += [data.name / below.with_suffix(""), below.name, below.stem]
            matching = [key for each in keys if (key := pathlib.PurePath(each).as_posix()) in rows]
            if not matching:
                unlabelled.append(str(below))
                continue
            for key in matching:
                if users.setdefault(key, str(below)) != str(below):
                    raise InputError(
                        f"the row {key} of config.data.labels_file={path} fits {users[key]} and "
                        f"{below}; write the path below {data}."
                    )
            given = {rows[key] for key in matching}
            if len(given) > 1:
                raise InputError(
                    f"config.data.labels_file={path} gives {below} the labels "
                    f"{shorten(sorted(given))}; keep one of these rows."
                )
            if given == {str(ignore_label)}:
                ignored += 1
                continue
            kept.append(name)
            found[split] += given
        if not kept:
            raise InputError(
                f"config.data.labels_file={path} has a label for none of {len(names)} images in "
                f"{folders[split]}, such as {names[0]}; its rows are {shorten(rows)}."
            )
        files[split] = kept
    if unlabelled:
        notes.append(
            f"{len(unlabelled)} images without a row in {path} are left out: {shorten(unlabelled)}"
        )
    if lost := [key for key in rows if key not in users]:
        notes.append(f"{len(lost)} rows of {path} name no image: {shorten(lost)}")
    if ignored:
        notes.append(f"{ignored} images with the label {ignore_label} are left out")
    return found


def _read(path: pathlib.Path) -> dict[str, str]:
    """The labels of a CSV file by the name in its column `file`; rows without a label are absent.

    InputError: the file cannot be read, or two rows give one name different labels.
    """
    where = f"config.data.labels_file={path}"
    with (
        as_input_error(f"{where} cannot be read", (OSError, UnicodeDecodeError, csv.Error)),
        path.open(newline="", encoding="utf-8-sig") as file,  # Excel begins UTF-8 with a mark
    ):
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = [str(name).strip() for name in reader.fieldnames or ()]
        if not {"file", "label"} <= set(columns):
            raise InputError(
                f"{where} needs the header file,label (separated by a comma); it begins with "
                f"{shorten(columns) or 'nothing'}."
            )
        reader.fieldnames = columns
        labels = collections.defaultdict(set)
        for row in reader:
            name, label = ((row[column] or "").strip() for column in ("file", "label"))
            if name and label:
                labels[pathlib.PurePath(name.replace("\\", "/")).as_posix()].add(label)
    if twice := [name for name, given in labels.items() if len(given) > 1]:
        raise InputError(
            f"{where} gives different labels to {shorten(twice)}; keep one row for each file."
        )
    return {name: label for name, (label,) in labels.items()}
