"""Data sets that lie in a few large files, whose names say which split each file belongs to."""

import bisect
import glob
import itertools
import os
import pathlib
import re
from collections.abc import Iterable

import numpy as np

from gptv_jax.data import guess
from gptv_jax.data import labels as labels_lib
from gptv_jax.data.folder import spread_classes
from gptv_jax.data.listing import split_name
from gptv_jax.errors import InputError

_NUMBERED = re.compile(r"([A-Za-z]\w*)-\d+-of-\d+(-[0-9a-f]+)?")  # unlabeled-00000-of-00005
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find(
    path: pathlib.Path, endings: tuple[str, ...], kind: str, name: str | None = None
) -> dict[str, list[pathlib.Path]]:
    """The files of each split, sorted: `{"train": [...], "test": [...]}`.

    `path` is a file, a folder, or a pattern such as `shards/train-{000000..000009}.tar` or
    `shards/*.tar`. A file's split is a name of a split in the file's name or in the name of a
    folder above it; where no file has one, all files are the split train. `kind` is for messages,
    `name` the `config.data.name` that reads these files.

    Raises:
      InputError: there is no file; some files name a split and others do not; or the files of a
        split lie in several folders, which are several data sets.
    """
    given = f"config.data.path={path}"
    files, root = _list(path, endings)
    if not files:
        advice = guess.of_folder(path, name) if path.is_dir() else None
        advice = advice and f"config.data.path={advice}"
        raise InputError(advice or f"{given} has no {kind} file ({' or '.join(endings)}).")
    splits = {file: _split(file.relative_to(root)) for file in files}
    if not any(splits.values()):
        splits = dict.fromkeys(files, "train")
    for file in [file for file, split in splits.items() if split is None]:
        other = _NUMBERED.fullmatch(file.name.partition(".")[0])  # a split of another name
        if other is None:
            raise InputError(
                f"{given} has files that name a split, and {file.name}, which names none; name "
                f"its split, as in train-{file.name}, or take the file away."
            )
        splits[file] = other[1]
    found: dict[str, list[pathlib.Path]] = {}
    for file, split in splits.items():
        found.setdefault(split, []).append(file)
    order = {name: i for i, name in enumerate(("train", "validation", "test"))}
    for split, members in found.items():
        folders = sorted({str(file.parent.relative_to(root)) for file in members})
        if len(folders) > 1:
            raise InputError(
                f"{given} has files of the split {split} in {len(folders)} folders, {folders[0]} "
                f"and {folders[1]} among them; name one of these folders by config.data.path."
            )
    return {split: found[split] for split in sorted(found, key=lambda s: (order.get(s, 3), s))}


def _list(path: pathlib.Path, endings: tuple[str, ...]) -> tuple[list[pathlib.Path], pathlib.Path]:
    """The sorted files that `path` names, and the folder that their names are relative to."""
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        hidden = re.compile(r"(^|/)[._]")
        found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(endings))
        return [f for f in found if not hidden.search(f.relative_to(path).as_posix())], path
    found = sorted(
        {pathlib.Path(name) for text in _expand(str(path)) for name in glob.glob(text) or [text]}
    )
    for file in found:
        if not file.is_file():
            raise InputError(f"config.data.path={path}: {file} does not exist.")
    return found, pathlib.Path(os.path.commonpath([file.parent for file in found]))


def _expand(pattern: str) -> list[str]:
    """The patterns that one with ranges such as {000..009} stands for."""
    if not (span := _RANGE.search(pattern)):
        return [pattern]
    numbers = [f"{n:0{len(span[1])}}" for n in range(int(span[1]), int(span[2]) + 1)]
    before, after = pattern[: span.start()], _expand(pattern[span.end() :])
    return [before + number + rest for number in numbers for rest in after]


def _split(file: pathlib.Path) -> str | None:
    """The split that a path names; None: none."""
    # The name of the file says more than the names of folders, the nearest folder the most.
    names = [file.name.partition(".")[0], *reversed(file.parts[:-1])]
    return next(filter(None, (split_name(name, within=True) for name in names)), None)


class Rows:
    """The rows of several parts, numbered throughout."""

    def __init__(self, lengths: Iterable[int]):
        self._ends = list(itertools.accumulate(lengths))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the part that holds a row, and the row's number in the part."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)


class Shards:
    """A data set of large files; rows that are sorted by class are mixed.

    A part holds some rows of a file: it has a length, `read(row)`, the bytes of an image file, and
    `name(row)`.
    """

    def __init__(
        self,
        parts: dict[str, list],
        labels: dict[str, list] | None,
        names: tuple[str, ...],
        where: str,
        ignore_label: int | None,
    ):
        """Takes the parts and the stored labels of each split; see `number_labels`."""
        self.notes: list[str] = []
        # As the names of files and folders call the splits.
        self.other_names = {
            word: split
            for split, found in parts.items()
            for word in {w for part in found for w in re.split(r"[\W\d_]+", part.name(0))}
            if split_name(word) == split
        }
        rows = {split: np.arange(sum(map(len, found))) for split, found in parts.items()}
        numbers, self.classes, self.class_names = {}, 0, ()
        if labels is not None:
            rows, numbers, self.classes, self.class_names = number_labels(
                labels, names, where, ignore_label, self.notes
            )
        self._splits = {s: _Split(parts[s], rows[s], numbers.get(s)) for s in rows}
        self.lengths = {split: len(kept) for split, kept in rows.items()}

    def open(self, split: str) -> "_Split":
        return self._splits[split]


class _Split:
    """The rows of a split that are read, int [N], and their labels, int32 [N], or None."""

    def __init__(self, parts: list, rows: np.ndarray, labels: np.ndarray | None):
        order = None if labels is None else mixed(labels)
        self.parts, self._places = parts, Rows(map(len, parts))
        self._order = rows if order is None else rows[order]
        self.labels = labels if order is None else labels[order]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict:
        part, row = self._locate(index)
        image = {"encoded": part.read(row)}
        return image if self.labels is None else {**image, "label": self.labels[index]}

    def name(self, index: int) -> str:
        part, row = self._locate(index)
        return part.name(row)

    def _locate(self, index: int) -> tuple:
        part, row = self._places.locate(int(self._order[index]))
        return self.parts[part], row


def number_labels(
    found: dict[str, list],
    names: tuple[str, ...],
    where: str,
    ignore_label: int | None,
    notes: list[str],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int, tuple[str, ...]]:
    """The rows to read and their labels by split, the number of classes, and their names.

    `found` has the labels of each split as they are stored: whole numbers, which `names` may name,
    or texts. They are numbered as arrays are (see `labels.number`). A split without any label (only
    -1 or None, as in test splits whose labels are kept secret) is left out, with a note.

    Raises:
      InputError: labels are of mixed or other types, only some are missing, or one has no name.
        `where` says where they are stored.
    """
    advice = "ignore all labels by config.data.labels=False"
    kinds = {type(label) for labels in found.values() for label in labels} - {type(None)}
    if not (kinds <= {int, float, bool} or kinds == {str}):
        shown = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError(f"{where} holds {shown}; it must hold whole numbers or texts; {advice}.")
    absent, vectors = "-1" if kinds == {str} else -1, {}
    for split, labels in found.items():
        filled = [absent if t is None or t != t else t for t in labels]  # NaN differs from itself
        vector = labels_lib.as_vector(split, np.array(filled), len(labels))
        missing = np.count_nonzero(vector == absent)
        if missing == len(labels):
            notes.append(f"the split {split} is left out: {where} holds no label; or {advice}")
            continue
        if missing and ignore_label != -1:
            raise InputError(
                f"{where} holds no label (-1 or nothing) in {missing} of {len(labels)} rows of "
                f"split {split}; config.data.ignore_label=-1 leaves these rows out, or {advice}."
            )
        vectors[split] = vector
    if not vectors:
        raise InputError(f"{where} holds no label at all; {advice}.")
    rows = labels_lib.leave_out(vectors, ignore_label, notes)
    numbers = {split: vectors[split][kept] for split, kept in rows.items()}
    numbers, classes, names = labels_lib.number(numbers, notes, names if kinds != {str} else ())
    return rows, {s: each.astype(np.int32) for s, each in numbers.items()}, classes, names


def mixed(labels: np.ndarray) -> np.ndarray | None:
    """An order of the rows that spreads every class evenly; None where the rows are mixed already.

    Rows are sorted where the label changes from row to row less than half as often as at random.
    """
    shares = np.bincount(labels) / len(labels)
    changes = np.count_nonzero(np.diff(labels))
    expected = (1 - np.square(shares).sum()) * (len(labels) - 1)
    return spread_classes(labels) if changes < expected / 2 else None
