"""Data sets: where images come from.

`SETS` has the data sets that `config.data.name` can name; any other name is a TFDS set. A data set
has named splits, and each split gives its examples by number.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import listing
from gptv_jax.data.arrays import Arrays as Arrays  # a name of this module for its users
from gptv_jax.data.arrays import open_npz
from gptv_jax.data.cache import TokenCache
from gptv_jax.data.camera_motions import CameraMotions
from gptv_jax.data.coco import Coco
from gptv_jax.data.data_set import SPLITS, DataSet, Source, locate, starts, with_distinct_names
from gptv_jax.data.digit_scenes import DigitScenes
from gptv_jax.data.digits import digits
from gptv_jax.data.folder import ImageFolder
from gptv_jax.data.label_maps import MapFolder
from gptv_jax.data.limits import DamagedImageError, check_formats
from gptv_jax.data.moving_digits import MovingDigits
from gptv_jax.data.parquet import Tables
from gptv_jax.data.prepared import Tfds
from gptv_jax.data.records import OBJECTS, Record, Rng
from gptv_jax.data.shards import WebDataset
from gptv_jax.data.videos import VideoFolder
from gptv_jax.errors import InputError, counted, shorten

SETS: dict[str, Callable[[config_lib.Data], DataSet]] = {
    "digits": lambda config: digits(),
    "arrays": open_npz,
    "folder": lambda config: _open_folder(config),
    "coco": Coco,
    "digit_scenes": lambda config: DigitScenes(),
    "moving_digits": MovingDigits,
    "camera_motions": CameraMotions,
    "two_moving_digits": lambda config: MovingDigits(config, digits=2),
    "parquet": Tables,
    "webdataset": WebDataset,
    "tokens": lambda config: TokenCache(listing.data_path(config)),
}
PLAIN, MAPPED = "folder without config.data.maps", "folder with config.data.maps"
OF_TFDS = "a TFDS set"
# Fields that only some data sets read. A token cache has the label maps of the data that it was
# made of.
FIELDS = {
    "labels_file": (PLAIN,),
    "ignore_label": (PLAIN, "arrays", "parquet", "webdataset"),
    "annotations": ("coco",),
    "images": ("coco", MAPPED),
    "maps": ("folder", "coco", "tokens", OF_TFDS),
    "label": ("moving_digits",),
}


class Selected(Source):
    """The examples that a split expression such as `train[:96%]` or `train+test` selects."""

    def __init__(self, data_set: DataSet, expression: str, labels: bool = True):
        self.classes = data_set.classes if labels else 0
        self.class_names = data_set.class_names if labels else ()
        self.object_names, self.map_names = data_set.object_names, data_set.map_names
        self.object_ids = data_set.object_ids or tuple(range(len(self.object_names)))
        # What records have beside the picture.
        self.keys = {*data_set.keys, *(OBJECTS[:3] if self.object_names else ())}
        self.keys |= {"label"} if self.classes else set()
        self.keys |= {"segmentation"} if self.map_names else set()
        parts = _resolve(expression, data_set)
        self._firsts = starts(len(rows) for _, rows in parts)
        if not len(self):
            raise InputError(f"split {expression!r} names no image of: {_shown(data_set.lengths)}.")
        self.expression, self.splits = expression, {split for split, _ in parts}
        self._parts = [(data_set.open(split), rows) for split, rows in parts]
        self.labels = None
        if self.classes and all(source.labels is not None for source, _ in self._parts):
            found = [source.labels[rows.start : rows.stop] for source, rows in self._parts]
            self.labels = np.concatenate(found)

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, rng: Rng = None, place: float = 0.5) -> Record:
        source, row = self._locate(index)
        return self._labelled(source.read(row, rng, place))

    def every(self, index: int) -> Iterable[Record]:
        source, row = self._locate(index)
        return map(self._labelled, source.every(row))

    def frames(self, index: int) -> Iterable[Record]:
        source, row = self._locate(index)
        return map(self._labelled, source.frames(row))

    def annotations(self, index: int) -> Record:
        source, row = self._locate(index)
        return self._labelled(source.annotations(row))

    def _labelled(self, record: Record) -> Record:
        """The record without its label where there are no classes."""
        return {k: v for k, v in record.items() if self.classes or k != "label"}

    def label_counts(self) -> np.ndarray | None:
        """Number of examples of each class, int64 [C]; examples with a negative label are left out.

        None where there are no classes, or where the labels are not in memory, as in TFDS's files.
        """
        if self.labels is None:
            return None
        known = (self.labels >= 0) & (self.labels < self.classes)
        return np.bincount(self.labels[known], minlength=self.classes)

    def object_counts(self) -> dict[str, int | list[int]] | None:
        """Numbers of boxes and of images without a box; None where these are not in memory.

        "boxes" counts all boxes, "crowd" boxes around groups, "by_class" the boxes of each class;
        "empty" is the number of images.
        """
        if (found := self._objects()) is None:
            return None
        images, classes, crowd = found
        return {
            "boxes": len(images),
            "crowd": int(crowd.sum()),
            "empty": len(self) - len(np.unique(images)),
            "by_class": np.bincount(classes, minlength=len(self.object_names)).tolist(),
        }

    def objects_by_image(self) -> np.ndarray | None:
        """Number of objects of each image, crowds left out, int64 [N]; None: not in memory."""
        if (found := self._objects()) is None:
            return None
        images, _, crowd = found
        return np.bincount(images[~crowd], minlength=len(self))

    def _objects(self) -> list[np.ndarray] | None:
        """As `Source.known_objects`, of all images."""
        found = [source.known_objects(rows) for source, rows in self._parts]
        if any(each is None for each in found):
            return None
        images, *others = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        first = np.repeat(self._firsts[:-1], [len(images) for images, *_ in found])
        return [images + first, *others]

    def map_counts(self, limit: int | None = None) -> dict[str, int | list[int]] | None:
        """Numbers of pixels in the label maps of `limit` examples from all over; None: of all.

        "pixels" are the pixels of each class, "none" the pixels without a class, "maps" is the
        number of label maps, "empty" the number of maps in which no pixel has a class. None where
        there are no classes of label maps. Maps that cannot be read are left out.
        """
        if not self.map_names:
            return None
        count, sums = len(self), np.zeros(len(self.map_names) + 1, np.int64)
        maps = empty = 0
        for index in np.unique(np.linspace(0, count - 1, min(limit or count, count)).astype(int)):
            with contextlib.suppress(DamagedImageError, OSError):
                found = self.annotations(int(index))["segmentation"].astype(np.int64).ravel()
                found[(found < 0) | (found >= len(self.map_names))] = len(self.map_names)
                own = np.bincount(found, minlength=len(sums))
                sums += own
                maps, empty = maps + 1, empty + (not own[:-1].any())
        *pixels, none = sums.tolist()
        return {"pixels": pixels, "none": none, "maps": maps, "empty": empty}

    def name(self, index: int) -> str:
        source, row = self._locate(index)
        return source.name(row)

    def image_id(self, index: int) -> int | str:
        """The id that the data give the image, such as a COCO file; else the index."""
        source, row = self._locate(index)
        found = source.image_id(row)
        return index if found is None else found

    def _locate(self, index: int) -> tuple[Source, int]:
        part, row = locate(self._firsts, index)
        source, rows = self._parts[part]
        return source, rows[row]


def _resolve(expression: str, data_set: DataSet) -> list[tuple[str, range]]:
    """Names of splits and their selected rows, which may be none, read as TFDS reads expressions.

    A split has the name that the data give it, such as valid, and the one it has for a run.
    """
    lengths = data_set.lengths
    names = {s: own for own, s in listing.split_names(lengths).items()} | data_set.other_names
    taken = expression
    expression = re.sub(r"(?:^|(?<=\+))[^\[+]+", lambda m: names.get(m[0], m[0]), expression)
    if expression in lengths:  # without importing TFDS, which takes seconds
        return [(expression, range(lengths[expression]))]
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.splits import SplitInfo

    infos = {s: SplitInfo(name=s, shard_lengths=[n], num_bytes=0) for s, n in lengths.items()}
    try:
        found = tfds.core.ReadInstruction.from_spec(expression).to_absolute(infos)
    except (ValueError, AssertionError) as error:
        problem = f"split {taken!r} cannot be read; "
        if taken in SPLITS and "train" in lengths:
            held = next((split for split in ("test", "validation") if split in lengths), None)
            own = ("train[:95%]", "train[95%:]", held)
            own = own if held else ("train[:90%]", "train[90%:95%]", "train[95%:]")
            raise InputError(
                f"{problem}the data have: {_shown(lengths)}; take {_flags(own)}."
            ) from error
        raise InputError(
            f'{problem}it takes an expression such as "train[:90%]" over the splits of this data '
            f"set: {_shown(lengths)}."
        ) from error
    return [(p.splitname, range(lengths[p.splitname])[p.from_ : p.to]) for p in found]


def _flags(expressions: tuple[str, ...]) -> str:
    """The flags that make these the splits of a run."""
    pairs = zip(SPLITS, expressions, strict=True)
    return " ".join(f"--config.data.{split}_split={each}" for split, each in pairs)


def _shown(lengths: dict[str, int]) -> str:
    return shorten(f"{split} ({counted(count, 'image')})" for split, count in lengths.items())


@functools.lru_cache(maxsize=8)
def open_data_set(config: config_lib.Data) -> DataSet:
    """The data set that the config names; a process opens each data set once."""
    of_folder = MAPPED if config.maps else PLAIN
    kinds = {config.name, of_folder if config.name == "folder" else config.name}
    kinds |= {OF_TFDS} if config.name not in SETS else set()
    for field, names in FIELDS.items():
        if getattr(config, field) is not None and not kinds & {*names}:
            raise InputError(
                f"config.data.{field}={getattr(config, field)} is for config.data.name="
                f"{'|'.join(names)}, but config.data.name={config.name}; leave the field out."
            )
    check_formats(config.limits)
    if config.name in SETS:
        return with_distinct_names(_fitting(SETS[config.name](config), config))
    if advice := listing.advice(config.name):
        raise InputError(f"config.data.name={advice}")
    try:
        return with_distinct_names(_fitting(Tfds(config, SETS), config))
    except InputError as error:
        if config.path and (advice := listing.advice(config.path)):  # TFDS reads no data.path
            problem = f"config.data.name={config.name} does not read config.data.path"
            raise InputError(f"{problem}; {advice}") from error
        raise


def _open_folder(config: config_lib.Data) -> DataSet:
    if config.maps:
        return MapFolder(config)
    return (VideoFolder if config.frames else ImageFolder)(config)


def _fitting(data_set: DataSet, config: config_lib.Data) -> DataSet:
    """The data set; InputError where it has videos and the config asks for images, or reversed."""
    if data_set.videos and not config.frames:
        raise InputError(
            f"config.data.name={config.name} has videos, and config.data.frames is 0, which is for "
            "images; set config.data.frames to the number of frames of a clip, 8, say."
        )
    if config.frames and not data_set.videos:
        raise InputError(
            f"config.data.frames={config.frames} is for clips of videos, but config.data.name="
            f"{config.name} has images; set config.data.frames=0."
        )
    return data_set


def open_source(config: config_lib.Data, split: str) -> Selected:
    """The examples of a split of `SPLITS` as the config defines it, or of a split expression."""
    expression = getattr(config, f"{split}_split") if split in SPLITS else split
    return Selected(open_data_set(config), expression, config.labels)


def open_splits(config: config_lib.Data) -> dict[str, Selected]:
    """The examples of every split of `SPLITS`.

    Raises:
      InputError: a split has no image; the message has the number of images of every split.
    """
    data_set = open_data_set(config)
    lengths = data_set.lengths
    taken = {f"{split}_split": getattr(config, f"{split}_split") for split in SPLITS}
    counts = {n: sum(len(rows) for _, rows in _resolve(e, data_set)) for n, e in taken.items()}
    if not all(counts.values()):
        own = ("train[:-2]", "train[-2:-1]", "train[-1:]")  # of three images or more
        enough = lengths.get("train", 0) >= len(own)
        advice = f", or set {_flags(own)}" if enough else f": {len(own)} are the fewest to run with"
        found = ", ".join(f"{n}={taken[n]} takes {count}" for n, count in counts.items())
        raise InputError(
            f"each split needs 1 image, but of {_shown(lengths)} {found}. Add images{advice}."
        )
    return {split: open_source(config, split) for split in SPLITS}


def check_objects(config: config_lib.Data, validated: int | None) -> None:
    """Raises InputError where a split of `SPLITS` has no object; a crowd counts as no object.

    Of validation the first `validated` images count, None: all. Boxes that are not in memory, as in
    TFDS's files, are not looked at.
    """
    for split, limit in zip(SPLITS, (None, validated, None), strict=True):
        counts = open_source(config, split).objects_by_image()
        if counts is not None and not counts[:limit].any():
            first = f"the first {limit} images" if limit and limit < len(counts) else "the images"
            given = f"config.data.{split}_split={getattr(config, f'{split}_split')}"
            more = ", or more by config.task.detect.validation_images" * (limit is not None)
            raise InputError(
                f"{first} of {given} have no object (crowds are none), so there is nothing to find "
                f"there; take other images by config.data.{split}_split{more}."
            )


def check_labels(
    config: config_lib.Data, opened: dict[str, Selected], lists: Iterable[Iterable[str]] = ()
) -> None:
    """Raises InputError where a split has other labels than numbers of classes, or train one.

    Other labels are left out where all `lists` of transforms that the run uses say so.
    """
    counts = opened["train"].label_counts() if "train" in opened else None
    if counts is not None and np.count_nonzero(counts) == 1:
        raise InputError(
            f"config.data.train_split={config.train_split} has images of a single class. Take "
            "images of several classes, or ignore all classes by config.data.labels=False."
        )
    if lists and all(any(e.startswith("drop_unlabelled") for e in entries) for entries in lists):
        return
    for split, source in opened.items():
        labels = source.labels
        if labels is None:  # in files, of which the first and the last example are looked at
            labels = np.array([source[i].get("label", -1) for i in (0, len(source) - 1)])
        if labels.min() < 0 or labels.max() >= source.classes:
            given = f"config.data.{split}_split={getattr(config, f'{split}_split')}"
            raise InputError(
                f"{given} has images without a label (-1, or no number of the {source.classes} "
                "classes). Take a split with labels, put drop_unlabelled() into every list of "
                "transforms, or ignore all by config.data.labels=False."
            )
