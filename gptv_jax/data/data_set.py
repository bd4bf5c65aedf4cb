"""What every data set has: its splits, and their records by number."""

import bisect
import functools
import itertools
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from gptv_jax.data.records import Record, Rng, annotations
from gptv_jax.errors import shorten

SPLITS = ("train", "validation", "test")  # of a run; `config.data` gives an expression for each
ORDER_SEED = 0  # fixed, so that a split expression selects the same images in every run


class Source:
    """The records of a split, or of a split expression, by number; see data/records.py.

    `source[number]` gives equal records every time; `read` may draw in training. All records of a
    split have equal keys.
    """

    labels: np.ndarray | None = None  # the labels of all records, int [N], where they are in memory
    where: str | pathlib.Path  # the split, or the file that holds the split, in messages

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        raise NotImplementedError

    def read(self, index: int, rng: Rng = None, place: float = 0.5) -> Record:
        """The record of training; a source of videos draws where its clip begins.

        Without a generator, in evaluation, a clip begins at the `place` between the first frame, 0,
        and the last one that a clip can begin with, 1. All other records do not depend on it.
        """
        del rng, place
        return self[index]

    def every(self, index: int) -> Iterable[Record]:
        """Of a video, the records of clips that together have all frames that a clip may have."""
        return (self[index],)

    def frames(self, index: int) -> Iterable[Record]:
        """Of a video, a clip of one frame for each frame, one of every `config.data.frame_stride`.

        Of an image, the record.
        """
        return (self[index],)

    def name(self, index: int) -> str:
        """The example's name in messages."""
        return f"{self.where}[{index}]"

    def annotations(self, index: int) -> Record:
        """The record without the picture, which some sources do not read."""
        return annotations(self[index])

    def image_id(self, index: int) -> int | str | None:
        """The id that the data give the image, such as a COCO file; None: it has none."""

    def known_objects(self, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Of all boxes of the images `rows`: the image, counted from 0, the class, whether a crowd.

        None where the boxes are not in memory.
        """


class DataSet:
    """A data set with all its splits; of `splits`, or with `lengths` and `open`."""

    classes: int = 0  # number of classes; 0: unlabelled
    class_names: tuple[str, ...] = ()  # in the order of the labels; () where classes have no names
    # In the order of the box_labels; () where there are no boxes.
    object_names: tuple[str, ...] = ()
    object_ids: tuple[int, ...] = ()  # of the data, for the classes of objects; (): 0, 1, 2, ...
    map_names: tuple[str, ...] = ()  # of the classes of label maps; () where there are none
    videos: bool = False  # whether the pictures of records are clips
    keys: tuple[str, ...] = ()  # what records have beside the picture, labels and boxes
    # Sentences: what a user may not expect, and what is not read.
    notes: Sequence[str] = ()
    left_out: Sequence[str] = ()
    other_names: dict[str, str] = {}  # noqa: RUF012 - of the splits, as files or folders call them
    splits: dict[str, Source]

    @functools.cached_property
    def lengths(self) -> dict[str, int]:
        """Number of examples by split."""
        return {split: len(source) for split, source in self.splits.items()}

    def open(self, split: str) -> Source:
        """The records of a split."""
        return self.splits[split]


def with_distinct_names(data_set: DataSet) -> DataSet:
    """The data set, in which equal names of classes are numbered, and noted.

    By a class's name its numbers stand in summaries, so no two may be equal.
    """
    for field in ("class_names", "object_names", "map_names"):
        names: dict[str, None] = {}
        for name in getattr(data_set, field):
            numbered = (f"{name} ({number})" for number in itertools.count(2))
            names[next(n for n in itertools.chain([name], numbered) if n not in names)] = None
        if changed := sorted({*names} - {*getattr(data_set, field)}):
            setattr(data_set, field, tuple(names))
            note = f"classes of one name are numbered: {shorten(changed)}"
            data_set.notes = [*dict.fromkeys([*data_set.notes, note])]
    return data_set


def starts(lengths: Iterable[int]) -> list[int]:
    """The first row of each of several parts, numbered throughout, and the number of all rows."""
    return list(itertools.accumulate(lengths, initial=0))


def locate(firsts: list[int], index: int) -> tuple[int, int]:
    """The part that holds a row, and the row's number in the part; `firsts` are of `starts`."""
    if not 0 <= index < firsts[-1]:
        raise IndexError(index)
    part = bisect.bisect_right(firsts, index) - 1
    return part, index - firsts[part]


def spread_classes(labels: np.ndarray) -> np.ndarray:
    """A shuffled order of all rows in which each class is spread evenly."""
    rng = np.random.default_rng(ORDER_SEED)
    place = np.empty(len(labels))
    rows = np.argsort(labels, kind="stable")
    for members in np.split(rows, np.flatnonzero(np.diff(labels[rows])) + 1):
        members = rng.permutation(members)
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")
