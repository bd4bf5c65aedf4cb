"""Data sets that lie in a few large files, whose names say which split each file belongs to."""

import glob
import itertools
import logging
import os
import pathlib
import re

import numpy as np

from gptv_jax.data import labels as labels_lib
from gptv_jax.data.folder import spread_classes
from gptv_jax.data.listing import SPLIT_OF
from gptv_jax.errors import InputError

LOG = logging.getLogger(__name__)
_NUMBERED = re.compile(r"([A-Za-z]\w*)-\d+-of-\d+(-[0-9a-f]+)?")  # unlabeled-00000-of-00005
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find(path: pathlib.Path, endings: tuple[str, ...], kind: str) -> dict[str, list[pathlib.Path]]:
    """The files of each split, sorted: `{"train": [...], "test": [...]}`.

    `path` is a file, a folder, or a pattern such as `shards/train-{000000..000009}.tar` or
    `shards/*.tar`. A file's split is a name of a split in the file's name or in the name of a
    folder above it; where no file has one, all files are the split train.

    Raises:
      InputError: there is no file; some files name a split and others do not; or the files of a
        split lie in several folders, which are several data sets.
    """
    given = f"config.data.path={path}"
    files, root = _list(path, endings)
    if not files:
        raise InputError(f"{given} has no {kind} file ({' or '.join(endings)}).")
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
    texts = [""]
    for part in re.split(r"(\{\d+\.\.\d+\})", str(path)):
        span = _RANGE.fullmatch(part)
        if span is None:
            choices = [part]
        else:
            first, last = map(int, span.groups())
            choices = [f"{n:0{len(span[1])}}" for n in range(first, last + 1)]
        texts = [a + b for a, b in itertools.product(texts, choices)]
    found = sorted({pathlib.Path(name) for text in texts for name in glob.glob(text) or [text]})
    for file in found:
        if not file.is_file():
            raise InputError(f"config.data.path={path}: {file} does not exist.")
    return found, pathlib.Path(os.path.commonpath([file.parent for file in found]))


def _split(file: pathlib.Path) -> str | None:
    """The split that a path names; None: none."""
    # The name of the file says more than the names of folders, the nearest folder the most.
    for name in (file.name.partition(".")[0], *reversed(file.parts[:-1])):
        words = re.split(r"[^a-z]+", name.lower())
        named = {SPLIT_OF[word] for word in words if word in SPLIT_OF}
        if len(named) == 1:
            return named.pop()
    return None


def number_labels(
    found: dict[str, list], names: tuple[str, ...], where: str
) -> tuple[tuple[str, ...], int, dict[str, np.ndarray]]:
    """Names of the classes, their count, and the labels of each split as int32 numbers.

    `found` has the labels of each split as they are stored: numbers, which `names` may name or
    which `labels.number` numbers from 0, or texts, which become the names. A split without any
    label (only -1 or None, as in test splits whose labels are kept secret) is left out, with a
    warning.

    Raises:
      InputError: labels are of mixed or other types, only some are missing, or one has no name.
        `where` says where they are stored.
    """
    advice = "ignore all labels by config.data.labels=False"
    found = {s: [None if t == -1 else t for t in labels] for s, labels in found.items()}
    kinds = {type(label) for labels in found.values() for label in labels} - {type(None)}
    if kinds not in ({int}, {str}, {bool}, set()):
        shown = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError(f"{where} holds {shown}; it must hold whole numbers or texts; {advice}.")
    if kinds != {int}:
        texts = {label for labels in found.values() for label in labels if label is not None}
        names = tuple(str(text) for text in sorted(texts))
        numbers = {text: i for i, text in enumerate(sorted(texts))}
        found = {s: [numbers.get(label) for label in labels] for s, labels in found.items()}
    numbered = {}
    for split, labels in found.items():
        missing = labels.count(None)
        if missing == len(labels):
            LOG.warning("split %s is left out: %s holds no label; or %s.", split, where, advice)
            continue
        if missing:
            raise InputError(
                f"{where} holds no label (-1 or nothing) in {missing} of {len(labels)} rows of "
                f"split {split}; take these rows away, or {advice}."
            )
        numbered[split] = np.array(labels, np.int64)
        low, high = int(numbered[split].min()), int(numbered[split].max())
        if low < 0 or (names and high >= len(names)):
            takes = f"0 to {len(names) - 1}" if names else "0 or more"
            raise InputError(
                f"{where} holds labels from {low} to {high} in split {split}; it must hold {takes}."
            )
    if names or not numbered:
        numbered = {s: rows.astype(np.int32) for s, rows in numbered.items()}
        return names, len(names), numbered
    notes: list[str] = []
    numbered, classes, names = labels_lib.number(numbered, notes)
    for note in notes:
        LOG.warning("%s: %s.", where, note)
    return names, classes, {s: rows.astype(np.int32) for s, rows in numbered.items()}


def mixed(labels: np.ndarray) -> np.ndarray | None:
    """An order of the rows that spreads every class evenly; None where the rows are mixed already.

    Rows are sorted where the label changes from row to row less than half as often as at random.
    """
    shares = np.bincount(labels) / len(labels)
    changes = np.count_nonzero(np.diff(labels))
    expected = (1 - np.square(shares).sum()) * (len(labels) - 1)
    return spread_classes(labels) if changes < expected / 2 else None
