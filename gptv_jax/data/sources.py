"""Where images come from: data sets with named splits, each a source of random access."""

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
from gptv_jax.errors import InputError, first_line

with epy.lazy_imports():  # heavy, and needed for digits alone
    from sklearn import datasets, model_selection

SPLITS = ("train", "validation", "test")  # what a run asks for; the config says what they are


@runtime_checkable
class Source(Protocol):
    """Examples by number."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> dict:
        """`{"image", "label"}`, the same one every time; without classes no label.

        The image is uint8 [H, W, C], or an image file's bytes, or a grid of tokens, uint16
        [rows, columns, 1]: `DataSet.stored_as` says which.
        """

    def name(self, index: int) -> str:
        """What to call example `index` in a message."""


@runtime_checkable
class DataSet(Protocol):
    """All splits of a data set."""

    stored_as: str  # of the images: "pixels", "encoded" or "tokens"
    classes: int  # number of classes; 0: unlabelled
    lengths: dict[str, int]  # examples by split

    def open(self, split: str) -> Source:
        """One of the splits, whole."""


class Arrays:
    """Images in memory.

    Args:
      splits: `{"train": (images, labels), ...}`, images uint8 [N, H, W, C] and labels int [N] from
        0, or None throughout.
    """

    stored_as = "pixels"

    def __init__(self, splits: dict[str, tuple[np.ndarray, np.ndarray | None]]):
        labelled = [labels for _, labels in splits.values() if labels is not None]
        if len(labelled) not in (0, len(splits)):
            raise InputError(f"some of the splits {', '.join(splits)} have labels and some none.")
        for name, (images, labels) in splits.items():
            if not _fits(images, labels):
                of_labels = "" if labels is None else f" and labels {labels.dtype} "
                raise InputError(
                    f"split {name} holds images {images.dtype} {list(images.shape)}{of_labels}"
                    f"{'' if labels is None else list(labels.shape)}; they must be uint8 "
                    "[N, H, W, C] and whole numbers [N] from 0."
                )
        self.classes = 1 + max(map(int, map(np.max, labelled))) if labelled else 0
        self.lengths = {name: len(images) for name, (images, _) in splits.items()}
        self._splits = splits

    def open(self, split: str) -> Source:
        """A split; see `DataSet`."""
        return _ArraysSplit(split, *self._splits[split])


def _fits(images: np.ndarray, labels: np.ndarray | None) -> bool:
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        return False
    if labels is None:
        return True
    whole = labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
    return whole and bool(labels.min() >= 0)


class _ArraysSplit:
    def __init__(self, split: str, images: np.ndarray, labels: np.ndarray | None):
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
    path = _existing(config)
    try:
        arrays = files.read_arrays(path)
    except files.UnreadableError as error:
        raise InputError(f"config.data.path={path} is no .npz file of arrays ({error}).") from error
    names = [key.removesuffix("_images") for key in arrays if key.endswith("_images")]
    splits = {n: (arrays[f"{n}_images"], arrays.get(f"{n}_labels")) for n in names}
    if not splits:
        raise InputError(
            f"config.data.path={path} is no .npz file that holds train_images or the like."
        )
    return Arrays(splits)


def digits() -> Arrays:
    """scikit-learn's handwritten digits: 1,797 real 8x8 images with the grey levels 0 to 16.

    Alpaydin and Kaynak (1998), UCI; shipped with scikit-learn, so nothing is downloaded. Split
    once and for all, stratified by class with seed 0, into 1,197 / 200 / 400.
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
    """A TensorFlow data set that was prepared as ArrayRecord, read without TensorFlow."""

    stored_as = "encoded"

    def __init__(self, name: str, folder: str | None):
        """Finds the prepared set.

        Args:
          name: as TFDS has it, with a configuration where it has several: `cifar10`, `a/b:1.0.0`.
          folder: the folder of all prepared sets, or that of this one; None: TFDS's own.

        Raises:
          InputError: there is none; the message has the command that makes it.
        """
        import tensorflow_datasets as tfds  # takes seconds; other data sets do without

        self._folder = folder
        self._decoders = {"image": tfds.decode.SkipDecoding()}
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
            shown = ", ".join(info.features)
            raise InputError(f"data set {name} has no feature called image; it has: {shown}.")
        self.name = info.name
        labelled = "label" in info.features
        self.classes = getattr(info.features["label"], "num_classes", 0) if labelled else 0
        self.lengths = {split: found.num_examples for split, found in info.splits.items()}

    def open(self, split: str) -> Source:
        """A split; see `DataSet`."""
        paths = [pathlib.Path(path) for path in self._builder.info.splits[split].filepaths]
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            raise InputError(f"data set {self.name} is not whole: there is no {missing[0]}.")
        try:
            data = self._builder.as_data_source(split=split, decoders=self._decoders)
        except NotImplementedError as error:  # in TFRecord form
            raise InputError(_unprepared(self.name, self._folder, error)) from error
        return _TfdsSplit(f"{self.name}/{split}", data, bool(self.classes))


class _TfdsSplit:
    def __init__(self, split: str, data, labelled: bool):
        self.split, self.data, self.labelled = split, data, labelled

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        example = self.data[index]
        image = {"image": example["image"]}
        return {**image, "label": np.int32(example["label"])} if self.labelled else image

    def name(self, index: int) -> str:
        return f"{self.split}[{index}]"


class Selected:
    """The examples that a split expression names, in order."""

    def __init__(self, data_set: DataSet, expression: str, labels: bool = True):
        """Resolves the expression (`train[:96%]`, `train+test`), as TFDS does.

        Raises:
          InputError: the data set has no such split, the expression is none, or names nothing.
        """
        self.stored_as = data_set.stored_as
        self.classes = data_set.classes if labels else 0
        self._parts = [
            (data_set.open(split), rows) for split, rows in _resolve(expression, data_set.lengths)
        ]
        self._ends = list(itertools.accumulate(len(rows) for _, rows in self._parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict:
        source, row = self._at(index)
        example = source[row]
        return example if self.classes else {"image": example["image"]}

    def name(self, index: int) -> str:
        """What to call example `index` in a message."""
        source, row = self._at(index)
        return source.name(row)

    def _at(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        source, rows = self._parts[part]
        return source, rows[index - self._ends[part]]  # from the end of the part


def _resolve(expression: str, lengths: dict[str, int]) -> list[tuple[str, range]]:
    if expression in lengths:  # the usual case does not wait for TFDS
        return [(expression, range(lengths[expression]))]
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.splits import SplitInfo

    infos = {s: SplitInfo(name=s, shard_lengths=[n], num_bytes=0) for s, n in lengths.items()}
    shown = ", ".join(f"{split} ({n} images)" for split, n in lengths.items())
    try:
        found = tfds.core.ReadInstruction.from_spec(expression).to_absolute(infos)
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"split {expression!r} cannot be read; it takes an expression such as "
            f'"train[:90%]" over the splits of this data set: {shown}.'
        ) from error
    parts = [
        (part.splitname, range(lengths[part.splitname])[part.from_ : part.to]) for part in found
    ]
    if not sum(len(rows) for _, rows in parts):
        raise InputError(f"split {expression!r} names no image of: {shown}.")
    return parts


def _unprepared(name: str, folder: str | None, error: Exception) -> str:
    where = f" --data_dir={folder}" if folder else ""
    accepted = ", ".join(SETS)
    return (
        f"config.data.name={name} with config.data.dir={folder} is neither one of {accepted} nor a "
        f"prepared TFDS set ({first_line(error)}); this downloads and prepares it: "
        f"pip install -e '.[prepare]' && tfds build {name} --file_format=array_record{where}"
    )


def _existing(config: config_lib.Data) -> pathlib.Path:
    if config.path is None:
        raise InputError(f"config.data.name={config.name} needs config.data.path.")
    path = pathlib.Path(config.path).absolute()
    if not path.exists():
        raise InputError(f"config.data.path={path} does not exist.")
    return path


SETS: dict[str, Callable[[config_lib.Data], DataSet]] = {
    "digits": lambda config: digits(),
    "arrays": open_npz,
    "folder": lambda config: ImageFolder(_existing(config), labels=config.labels),
    "tokens": lambda config: TokenCache(_existing(config)),
}


@functools.lru_cache(maxsize=8)
def open_data_set(config: config_lib.Data) -> DataSet:
    """The data set that the config names; opened once a process.

    Raises:
      InputError: there is none, or it cannot be read.
    """
    if config.name in SETS:
        return SETS[config.name](config)
    return Tfds(config.name, config.dir)


def open_source(config: config_lib.Data, split: str) -> Selected:
    """A split of the config's data set.

    Args:
      config: names the data set and its splits.
      split: "train", "validation" or "test" as the config has them, or a split expression.

    Raises:
      InputError: no such data set or split.
    """
    expression = getattr(config, f"{split}_split") if split in SPLITS else split
    return Selected(open_data_set(config), expression, config.labels)
