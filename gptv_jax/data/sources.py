"""Data sets: where images come from.

`SETS` has the data sets that `config.data.name` can name; any other name is a TFDS set. A data set
has named splits, and each split gives its examples by number.
"""

import bisect
import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from etils import epy

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.data.cache import TokenCache
from gptv_jax.data.folder import ImageFolder
from gptv_jax.data.parquet import Tables
from gptv_jax.errors import InputError, as_input_error, cut, first_line, shorten

with epy.lazy_imports():  # slow to import, and only the digits need it
    from sklearn import datasets, model_selection

SPLITS = ("train", "validation", "test")  # of a run; `config.data` gives an expression for each


@runtime_checkable
class Source(Protocol):
    """The examples of a split, or of a split expression, by number.

    An example is `{"image", "label"}`, always the same; without "label" where unlabelled. The image
    is uint8 [H, W, C], the bytes of an image file, or a grid of tokens, uint16 [rows, columns, 1],
    depending on `DataSet.stored_as`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...

    def name(self, index: int) -> str: ...  # the example's name in messages


@runtime_checkable
class DataSet(Protocol):
    """A data set with all its splits."""

    stored_as: str  # how images are stored: "pixels", "encoded" or "tokens"
    classes: int  # number of classes; 0: unlabelled
    class_names: tuple[str, ...]  # in the order of the labels; empty where classes have no names
    lengths: dict[str, int]  # number of examples by split

    def open(self, split: str) -> Source: ...


class Arrays:
    """A data set in memory: `{"train": (images, labels), ...}`.

    Images are uint8 [N, H, W, C], labels int [N] from 0, all None where the set is unlabelled.
    """

    stored_as = "pixels"

    def __init__(self, splits: dict[str, tuple[np.ndarray, np.ndarray | None]]):
        labels = [labels for _, labels in splits.values() if labels is not None]
        if len(labels) not in (0, len(splits)):
            raise InputError(f"of the splits {', '.join(splits)} some have labels and some do not.")
        for name, (images, numbers) in splits.items():
            accepted = images.ndim == 4 and images.dtype == np.uint8 and len(images) > 0
            if accepted and numbers is not None:
                accepted = numbers.shape == images.shape[:1] and numbers.dtype.kind in "iu"
                accepted = accepted and numbers.min() >= 0
            if not accepted:
                shown = [f"{a.dtype} {list(a.shape)}" for a in splits[name] if a is not None]
                raise InputError(
                    f"split {name} holds images {' and labels '.join(shown)}; images must be uint8 "
                    "[N, H, W, C] and labels whole numbers [N] from 0."
                )
        self.classes = 1 + max(int(array.max()) for array in labels) if labels else 0
        self.class_names = ()
        self.lengths = {name: len(images) for name, (images, _) in splits.items()}
        self._splits = splits

    def open(self, split: str) -> Source:
        return _ArraysSplit(split, *self._splits[split])


class _ArraysSplit:
    def __init__(self, split: str, images, labels):
        self.split, self.images, self.labels = split, images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        image = {"image": self.images[index]}
        return image if self.labels is None else {**image, "label": np.int32(self.labels[index])}

    def name(self, index: int) -> str:
        return f"{self.split}[{index}]"


def open_npz(config: config_lib.Data) -> Arrays:
    """`Arrays` of an `.npz` file with `train_images`, `train_labels`, `test_images`, ..."""
    path = _path(config)
    with as_input_error(f"config.data.path={path} is no .npz file of arrays"):
        arrays = files.read_arrays(path)
    names = [key.removesuffix("_images") for key in arrays if key.endswith("_images")]
    if not names:
        found = shorten(key or "a single unnamed array" for key in arrays) or "no array"
        raise InputError(
            f"config.data.path={path} is no .npz file with an array called train_images; it holds "
            f"{found}."
        )
    return Arrays({n: (arrays[f"{n}_images"], arrays.get(f"{n}_labels")) for n in names})


def digits() -> Arrays:
    """scikit-learn's handwritten digits: 1,797 real 8x8 images with the grey levels 0 to 16.

    Alpaydin and Kaynak (1998), UCI; part of scikit-learn, so nothing is downloaded. The split into
    1,197 / 200 / 400 is fixed: stratified by class, with seed 0.
    """
    data = datasets.load_digits()
    images, labels = data.images.astype(np.uint8)[..., None], data.target.astype(np.int32)
    rest, test = model_selection.train_test_split(
        np.arange(len(labels)), test_size=400, stratify=labels, random_state=0
    )
    train, validation = model_selection.train_test_split(
        rest, test_size=200, stratify=labels[rest], random_state=0
    )
    splits = {"train": train, "validation": validation, "test": test}
    return Arrays({name: (images[rows], labels[rows]) for name, rows in splits.items()})


class Tfds:
    """A TFDS data set that was prepared as ArrayRecord, read without TensorFlow.

    The name may have a configuration, `a/b:1.0.0`. `folder` has all prepared sets, or this one;
    None: TFDS's default.
    """

    stored_as = "encoded"

    def __init__(self, name: str, folder: str | None):
        import tensorflow_datasets as tfds  # takes seconds

        self._folder, self._decoders = folder, {"image": tfds.decode.SkipDecoding()}
        try:
            if folder and (pathlib.Path(folder) / "dataset_info.json").exists():
                self._builder = tfds.builder_from_directory(folder)
            else:
                self._builder = tfds.builder(name, data_dir=folder)
            info = self._builder.info
            if not info.splits:
                raise FileNotFoundError("it is not prepared")
        except Exception as error:  # TFDS raises what its readers do
            raise InputError(_unprepared(name, folder, error)) from error
        if info.name != name.partition("/")[0].partition(":")[0]:
            raise InputError(
                f"config.data.dir={folder} holds {info.name}, but config.data.name is {name}."
            )
        if "image" not in info.features:
            shown = shorten(info.features)
            raise InputError(f"data set {name} has no feature called image; it has: {shown}.")
        self.name = info.name
        labelled = "label" in info.features
        self.classes = getattr(info.features["label"], "num_classes", 0) if labelled else 0
        self.class_names = tuple(info.features["label"].names or ()) if self.classes else ()
        self.lengths = {split: found.num_examples for split, found in info.splits.items()}

    def open(self, split: str) -> Source:
        paths = [pathlib.Path(path) for path in self._builder.info.splits[split].filepaths]
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            raise InputError(f"data set {self.name} is incomplete: {missing[0]} does not exist.")
        try:
            data = self._builder.as_data_source(split=split, decoders=self._decoders)
        except NotImplementedError as error:  # prepared as TFRecord
            raise InputError(_unprepared(self.name, self._folder, error)) from error
        return _TfdsSplit(f"{self.name}/{split}", data, bool(self.classes))


def _tfds(config: config_lib.Data) -> Tfds:
    return Tfds(config.name, config.dir and str(files.user_place(config.dir)))


class _TfdsSplit(_ArraysSplit):
    """TFDS reads an image and its label together, as one element of `images`."""

    def __getitem__(self, index: int) -> dict:
        example = self.images[index]
        image = {"image": example["image"]}
        return {**image, "label": np.int32(example["label"])} if self.labels else image


def _unprepared(name: str, folder: str | None, error: Exception) -> str:
    where = f" --data_dir={folder}" if folder else ""
    return (
        f"config.data.name={name} is none of {', '.join(SETS)} and no prepared TFDS set "
        f"({cut(first_line(error), 60)}); this prepares it: pip install -e '.[prepare]' && "
        f"tfds build {name} --file_format=array_record{where}"
    )


class Selected:
    """The examples that a split expression such as `train[:96%]` or `train+test` selects."""

    def __init__(self, data_set: DataSet, expression: str, labels: bool = True):
        self.stored_as = data_set.stored_as
        self.classes = data_set.classes if labels else 0
        self.class_names = data_set.class_names if labels else ()
        parts = _resolve(expression, data_set.lengths)
        self._parts = [(data_set.open(split), rows) for split, rows in parts]
        self._ends = list(itertools.accumulate(len(rows) for _, rows in self._parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict:
        source, row = self._locate(index)
        example = source[row]
        return example if self.classes else {"image": example["image"]}

    def label_counts(self) -> np.ndarray | None:
        """Number of examples of each class, int64 [C].

        None where there are no classes, or where the labels are not in memory, as in TFDS's files.
        """
        labels = [getattr(source, "labels", None) for source, _ in self._parts]
        if not self.classes or not all(isinstance(each, np.ndarray) for each in labels):
            return None
        rows = [each[list(rows)] for each, (_, rows) in zip(labels, self._parts, strict=True)]
        return np.bincount(np.concatenate(rows), minlength=self.classes)

    def name(self, index: int) -> str:
        source, row = self._locate(index)
        return source.name(row)

    def _locate(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        source, rows = self._parts[part]
        return source, rows[index - self._ends[part]]  # negative: counted from the part's end


def _resolve(expression: str, lengths: dict[str, int]) -> list[tuple[str, range]]:
    """Names of splits and their selected rows, read as TFDS reads the expression."""
    if expression in lengths:  # without importing TFDS, which takes seconds
        return [(expression, range(lengths[expression]))]
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.splits import SplitInfo

    infos = {s: SplitInfo(name=s, shard_lengths=[n], num_bytes=0) for s, n in lengths.items()}
    shown = shorten(f"{split} ({n} images)" for split, n in lengths.items())
    try:
        found = tfds.core.ReadInstruction.from_spec(expression).to_absolute(infos)
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"split {expression!r} cannot be read; it takes an expression such as "
            f'"train[:90%]" over the splits of this data set: {shown}.'
        ) from error
    parts = [(p.splitname, range(lengths[p.splitname])[p.from_ : p.to]) for p in found]
    if not sum(len(rows) for _, rows in parts):
        raise InputError(f"split {expression!r} names no image of: {shown}.")
    return parts


def _path(config: config_lib.Data, pattern: bool = False) -> pathlib.Path:
    """`config.data.path`, which exists unless it may be a pattern of file names."""
    if config.path is None:
        raise InputError(f"config.data.name={config.name} needs config.data.path.")
    path = files.user_path(config.path)
    if not path.exists() and not (pattern and set("*?{") & set(path.name)):
        raise InputError(f"config.data.path={path} does not exist.")
    return path


SETS: dict[str, Callable[[config_lib.Data], DataSet]] = {
    "digits": lambda config: digits(),
    "arrays": open_npz,
    "folder": lambda config: ImageFolder(_path(config), labels=config.labels),
    "parquet": lambda config: Tables(_path(config, pattern=True), labels=config.labels),
    "tokens": lambda config: TokenCache(_path(config)),
}


@functools.lru_cache(maxsize=8)
def open_data_set(config: config_lib.Data) -> DataSet:
    """The data set that the config names; a process opens each data set once."""
    return SETS[config.name](config) if config.name in SETS else _tfds(config)


def open_source(config: config_lib.Data, split: str) -> Selected:
    """The examples of a split of `SPLITS` as the config defines it, or of a split expression."""
    expression = getattr(config, f"{split}_split") if split in SPLITS else split
    return Selected(open_data_set(config), expression, config.labels)
