"""Arrays in memory as data sets, as of `.npz` files."""

import pathlib

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.data import labels as labels_lib
from gptv_jax.data import listing
from gptv_jax.data.clips import Clips, Video, VideoSource
from gptv_jax.data.data_set import DataSet, Source
from gptv_jax.data.listing import split_names
from gptv_jax.data.records import Record
from gptv_jax.errors import InputError, as_input_error, shorten


class Arrays(DataSet):
    """A data set in memory: `{"train": (images, labels), ...}`.

    Images are uint8 [N, H, W, C], or videos [N, F, H, W, C], which are read as `clips`. Labels are
    whole numbers or names [N], all None where the set is unlabelled. Images with the label
    `ignore_label` are left out. Numbers that do not count from 0 and names are numbered (see
    `labels.number`); the original values become `class_names`.
    """

    def __init__(
        self,
        splits: dict[str, tuple[np.ndarray, np.ndarray | None]],
        ignore_label: int | None = None,
        clips: Clips | None = None,
    ):
        self.notes = []
        for name, (images, _) in splits.items():
            _check_images(name, images)
        self.videos = next(iter(splits.values()))[0].ndim == 5
        if len({images.ndim for images, _ in splits.values()}) > 1:
            shown = shorten(f"{name} {list(images.shape)}" for name, (images, _) in splits.items())
            raise InputError(f"some splits hold images and others videos: {shown}; store one kind.")
        given = {name: array for name, (_, array) in splits.items() if array is not None}
        if len(given) not in (0, len(splits)):
            without = shorten(name for name in splits if name not in given)
            raise InputError(
                f"of the splits {', '.join(splits)} some have labels and some do not: {without}. "
                "Store the labels of all, or ignore all by config.data.labels=False."
            )
        images, labels = {name: array for name, (array, _) in splits.items()}, {}
        if given:
            vectors = {n: labels_lib.as_vector(n, a, len(images[n])) for n, a in given.items()}
            rows, labels, self.classes, self.class_names = labels_lib.number(
                vectors, ignore_label, self.notes
            )
            if ignore_label is not None:
                images = {name: images[name][kept] for name, kept in rows.items()}
        if not self.videos:
            self.splits = {n: ArraysSplit(n, array, labels.get(n)) for n, array in images.items()}
            return
        self.splits = {
            n: ArrayVideos(n, array, labels.get(n), clips) for n, array in images.items()
        }
        if clips:
            self.notes += clips.short((f"those of {n}", a.shape[1]) for n, a in images.items())


class ArraysSplit(Source):
    """The images of a split, and its labels, int [N], or None."""

    key = "image"  # of a record: pixels, or "encoded" for the bytes of a file

    def __init__(self, where: str | pathlib.Path, images, labels: np.ndarray | None):
        self.where, self.images, self.labels = where, images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return {self.key: self.content(index), **self.known(index)}

    def content(self, index: int) -> np.ndarray | bytes:
        return self.images[index]

    def known(self, index: int) -> Record:
        """The label, if there is one."""
        return {} if self.labels is None else {"label": np.int32(self.labels[index])}


class ArrayVideos(VideoSource, ArraysSplit):
    """The videos of a split, uint8 [N, F, H, W, C]."""

    key = "image"

    def __init__(self, where: str, videos, labels: np.ndarray | None, clips: Clips | None):
        super().__init__(where, videos, labels)
        self.clips = clips

    def video(self, index: int) -> Video:
        frames = self.images[index]
        return Video(len(frames), frames.__getitem__, self.known(index))


def _check_images(split: str, images: np.ndarray) -> None:
    """Raises InputError, with the expression that helps, unless images are uint8 [N, H, W, C]."""
    shape, kind = images.shape, images.dtype.kind
    wanted = "images must be uint8 [N, H, W, C], videos [N, F, H, W, C], with 1 to 4 channels C"
    if images.ndim == 3:
        advice = "; store images[..., None] of grey images"
    elif images.ndim == 4 and shape[-1] > 4 and shape[1] <= 4:
        advice = "; with channels first, store images.transpose(0, 2, 3, 1)"
    elif images.ndim == 4 and shape[-1] > 4 and shape[2] <= 4:  # as in MATLAB
        advice = "; with images last, store images.transpose(3, 0, 1, 2)"
    elif images.ndim == 5 and shape[-1] > 4 and shape[2] <= 4:
        advice = "; with channels before rows, store videos.transpose(0, 1, 3, 4, 2)"
    elif images.ndim == 4 and shape[-1] > 4:
        advice = "; store videos[..., None] of grey videos"
    elif not (images.ndim in (4, 5) and 1 <= shape[-1] <= 4 and images.size and kind in "biuf"):
        advice = ""
    elif images.dtype == np.uint8:
        return
    else:
        low, high = float(images.min()), float(images.max())
        advice = f", and their values reach from {low:g} to {high:g}"
        if kind in "bf" and low >= 0 and high <= 1:
            advice += "; store (images * 255).round().astype('uint8')"
        elif kind == "f" and low >= -1 and high <= 1:
            advice += "; store ((images + 1) * 127.5).round().astype('uint8')"
        elif low >= 0 and high <= 255:
            advice += "; store images.round().astype('uint8')"
        elif low >= 0 and high <= 65535:
            advice += "; if white is 65535, store (images / 257).round().astype('uint8')"
    raise InputError(f"split {split} holds images {images.dtype} {list(shape)}{advice}; {wanted}.")


def open_npz(config: config_lib.Data) -> Arrays:
    """`Arrays` of an `.npz` file with `train_images`, `train_labels`, `test_images`, ..."""
    path = listing.data_path(config)
    with as_input_error(f"config.data.path={path} is no .npz file of arrays"):
        try:
            arrays = files.read_arrays(path)
        except ValueError as error:
            if "Object arrays" not in str(error):
                raise
            raise InputError(
                f"config.data.path={path} holds arrays of Python objects. Store images of one size "
                "as uint8 [N, H, W, C] by np.stack, labels as numbers or text; or store images of "
                "several sizes as files and take config.data.name=folder."
            ) from error
    names = [key.removesuffix("_images") for key in arrays if key.endswith("_images")]
    if not names:
        found = shorten(key or "a single unnamed array" for key in arrays) or "no array"
        problem = f"config.data.path={path} is no .npz file with an array called train_images"
        raise InputError(f"{problem}; it holds {found}.")
    own = split_names(names)  # MedMNIST calls a split val
    labels = {n: arrays.get(f"{n}_labels") if config.labels else None for n in names}
    splits = {split: (arrays[f"{n}_images"], labels[n]) for n, split in own.items()}
    found = Arrays(splits, config.ignore_label, Clips.of(config) if config.frames else None)
    found.other_names = own
    return found
