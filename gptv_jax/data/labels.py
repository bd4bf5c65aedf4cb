"""Labels as people have them: numbers with gaps, names, and a CSV file beside the images."""

import collections
import csv
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files as files_lib
from gptv_jax.errors import InputError, as_input_error, counted, cut, shorten

Vectors = dict[str, np.ndarray]  # of the splits: labels, or numbers of rows
NUMBERED = "np.unique(labels, return_inverse=True)[1]"  # the advice to number labels from 0
MARKS = (254, 255, 65534, 65535)  # labels that often mark pixels or images to leave out


def as_vector(split: str, labels: np.ndarray, count: int) -> np.ndarray:
    """The labels of `count` images, whole numbers or names [N], from the array of a user.

    An InputError about another shape or type has the expression that helps.
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


def leave_out(labels: Vectors, ignore_label: int | None, notes: list[str]) -> Vectors:
    """The rows of each split whose labels are not `ignore_label`, int [M]; `notes` get the counts.

    A split without such a row is absent. InputError: all splits are.
    """
    if ignore_label is None:
        return {split: np.arange(len(array)) for split, array in labels.items()}
    rows, total = {}, 0
    for split, array in labels.items():
        kept = array != (str(ignore_label) if array.dtype.kind == "U" else ignore_label)
        if count := np.count_nonzero(~kept):
            ignored = f"{count} of {len(kept)} images of the split {split}"
            notes.append(f"{ignored} have the label {ignore_label} and are left out")
        total += count
        if kept.any():
            rows[split] = np.flatnonzero(kept)
    if not rows:
        raise InputError(f"all images have the label config.data.ignore_label={ignore_label}.")
    if not total:
        notes.append(f"no image has the label config.data.ignore_label={ignore_label}")
    return rows


def number(
    labels: Vectors, ignore_label: int | None, notes: list[str], names: tuple[str, ...] = ()
) -> tuple[Vectors, Vectors, int, tuple[str, ...]]:
    """Rows that are kept and their labels as numbers from 0, by split; number and names of classes.

    `leave_out` chooses the rows. Labels that count from 0, with few numbers left out, stay as
    they are, and their classes have no names unless `names` are given. Other numbers and texts are
    numbered in order, and become the names of the classes. Where all labels are equal, the set is
    unlabelled: there are no labels and 0 classes. Raises InputError where labels are negative, have
    no name, or are texts in some splits only, or one of them seems to mark images to be left out.
    """
    rows = leave_out(labels, ignore_label, notes)
    labels = {split: labels[split][kept] for split, kept in rows.items()}
    texts = {array.dtype.kind == "U" for array in labels.values()}
    if len(texts) == 2:
        raise InputError(f"of the splits {', '.join(labels)} some have names as labels, not all.")
    names = () if True in texts else names
    present = np.unique(np.concatenate([np.unique(array) for array in labels.values()]))
    if names and present[-1] >= len(names):
        raise InputError(
            f"the labels reach from {present[0]} to {present[-1]}, but the {len(names)} names of "
            f"classes are for 0 to {len(names) - 1}. Where {present[-1]} marks images without a "
            f"label, config.data.ignore_label={present[-1]} leaves them out."
        )
    if len(present) == 1:
        notes.append(one_class(names[present[0]] if names else present[0]))
        return rows, {}, 0, ()
    if names and present[0] >= 0:
        return rows, labels, len(names), names
    if False in texts:
        sparse = _check_numbers(present)
        if present[0] == 0 and not sparse:
            return rows, labels, int(present[-1]) + 1, ()
        notes.append(
            f"the labels {shorten(present)} do not count from 0 without gaps, so they are numbered "
            f"0 to {len(present) - 1} and become the names of the classes"
        )
    numbered = {s: np.searchsorted(present, a).astype(np.int32) for s, a in labels.items()}
    return rows, numbered, len(present), tuple(map(str, present.tolist()))


def one_class(name: object, kind: str = "class") -> str:
    """What follows from data of a single class, as a note."""
    fact = f"there is a single {kind}, {name}, so the images are unlabelled"
    return f"{fact}: pretraining and samples need no labels, the probe and fine-tuning do"


def _check_numbers(present: np.ndarray) -> bool:
    """Whether most classes have no image. InputError: some labels seem to mark what to ignore."""
    low, high = int(present[0]), int(present[-1])
    if low < 0:
        raise InputError(
            f"the labels reach from {low} to {high}, but count from 0. Where {low} marks images "
            f"without a label, config.data.ignore_label={low} leaves them out; where it is a "
            f"class, store {NUMBERED}."
        )
    sparse = 2 * len(present) < high + 1 - min(low, 1)
    gap = int(np.argmax(np.diff(present))) + 1
    rest, marks = present[:gap], present[gap:]
    dense = len(rest) > 1 and 2 * len(rest) > rest[-1] - low
    known = np.isin(marks, MARKS).all() and marks[0] - rest[-1] > 2
    if dense and len(marks) <= 2 and (known or (sparse and low < 2 and len(marks) == 1)):
        shown, mark = shorten(marks), marks[0] if len(marks) == 1 else -1
        store = "" if len(marks) == 1 else "store -1 in their place and "
        raise InputError(
            f"the label {shown} stands beside {low} to {rest[-1]}, so {high + 1 - len(present)} "
            f"of {high + 1} classes would have no image. If it marks images to leave out, {store}"
            f"set config.data.ignore_label={mark}; if it is a class, store {NUMBERED}."
        )
    return sparse


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes, sorted; by value where all are whole numbers of one form."""
    found = sorted(names)
    return sorted(found, key=int) if all(str(n).isdecimal() for n in found) else found


def of_files(
    config: config_lib.Data,
    folders: dict[str, pathlib.Path],
    files: dict[str, list[str]],
    notes: list[str],
) -> dict[str, list[str]]:
    """The label of every image by split, from `config.labels_file`, a CSV file: file and label.

    A row names a file by its path below the data folder, with or without the name of that folder
    and the ending, or by its name alone. Images without a row are removed from `files`. Raises
    InputError where the CSV file cannot be read, has no row for any image, two labels for one
    image, or a name that several images have.
    """
    path, data = files_lib.user_path(config.labels_file), files_lib.user_path(config.path)
    rows = _read(path, data)
    found: dict[str, list[str]] = {}
    users: dict[str, str] = {}  # the image that each row of the CSV file is of
    unlabelled = []
    for split, names in files.items():
        prefix = folders[split].relative_to(data).as_posix() + "/"
        prefix, labelled = "" if prefix == "./" else prefix, {}
        for name in names:
            below = unicodedata.normalize("NFC", prefix + name.replace(os.sep, "/"))
            stem, base = os.path.splitext(below)[0], below.rpartition("/")[2]
            keys = [below, stem, f"{data.name}/{below}", f"{data.name}/{stem}"]
            keys += [base, os.path.splitext(base)[0]]
            matching = [key for key in dict.fromkeys(keys) if key in rows]
            for key in matching:
                if users.setdefault(key, below) != below:
                    raise InputError(
                        f"the row {key} of config.data.labels_file={path} fits {users[key]} and "
                        f"{below}; write the path below {data}."
                    )
            given = sorted(set().union(*(rows[key] for key in matching)))
            if len(given) > 1:
                raise InputError(
                    f"config.data.labels_file={path} gives {below} the labels {shorten(given)}; "
                    "keep one of these rows."
                )
            if given:
                labelled[name] = given[0]
            else:
                unlabelled.append(below)
        if not labelled:
            raise InputError(
                f"{path} has a label for none of {len(names)} images in {folders[split]}, such as "
                f"{cut(names[0], 40)}; its rows are {shorten(rows, room=40)}. Ignore all labels by "
                "config.data.labels=False, or move these images away."
            )
        files[split], found[split] = list(labelled), list(labelled.values())
    if unlabelled:
        left_out = f"{counted(len(unlabelled), 'image')} left out"
        notes.append(f"{left_out}, without a row or a label in {path}: {shorten(unlabelled)}")
    if lost := [key for key in rows if key not in users]:
        notes.append(f"{counted(len(lost), 'row')} of {path} without an image: {shorten(lost)}")
    return found


def check_texts(names: Iterable[str]) -> None:
    """Raises InputError where all names are whole numbers, one of which seems to mark images."""
    if all(re.fullmatch(r"-?\d{1,18}", name) for name in names):
        present = np.unique([int(name) for name in names])
        if len(present) > 1:
            _check_numbers(present)


def _read(path: pathlib.Path, data: pathlib.Path) -> dict[str, set[str]]:
    """The labels of a CSV file by path below `data`, or by name; rows without one are absent."""
    where = f"config.data.labels_file={path}"
    with (
        as_input_error(f"{where} is not UTF-8; save it as UTF-8", UnicodeDecodeError),
        as_input_error(f"{where} cannot be read", (OSError, csv.Error)),
        path.open(newline="", encoding="utf-8-sig") as file,  # Excel begins UTF-8 with a mark
    ):
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = [str(name).strip() for name in reader.fieldnames or ()]
        if not {"file", "label"} <= set(columns):
            given = shorten(columns) or "nothing"
            raise InputError(f"{where} needs the header file,label; it begins with {given}.")
        reader.fieldnames = columns
        labels = collections.defaultdict(set)
        for row in reader:
            name, label = ((row[column] or "").strip() for column in ("file", "label"))
            if name and label:
                name = pathlib.PurePath(name.replace("\\", "/")).as_posix()
                name = name.removeprefix(f"{data.as_posix()}/")
                labels[unicodedata.normalize("NFC", name)].add(label)
    if all(re.fullmatch(r"-?\d+\.0", label) for label in set().union(*labels.values())):
        # So pandas writes whole numbers.
        labels = {name: {each.removesuffix(".0") for each in own} for name, own in labels.items()}
    return labels
