"""Folders of image files as data sets."""

import collections
import os
import pathlib

import numpy as np

from gptv_jax.errors import InputError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# Names of sub-folders that are splits.
SPLIT_FOLDERS = {n: n for n in ("train", "validation", "test")} | {"val": "validation"}
ORDER_SEED = 0  # fixed, so that a split expression selects the same images in every run


class ImageFolder:
    """All image files below a folder.

    Sub-folders called train, validation (or val) and test, train among them and no others, are the
    splits; otherwise all images are one split, train. Within a split, each sub-folder is a class.
    The data set is unlabelled where an image lies in no sub-folder, or all lie in the same one. The
    images are shuffled class by class, so that `train[:90%]` holds nine tenths of every class.
    """

    stored_as = "encoded"

    def __init__(self, path: pathlib.Path, labels: bool = True):
        """Lists the files without opening them; `labels=False` makes the data set unlabelled."""
        if not path.is_dir():
            raise InputError(f"config.data.path={path} is not a folder.")
        folders = {"train": path}
        below = {f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith(".")}
        if "train" in below and below <= set(SPLIT_FOLDERS):
            folders = {SPLIT_FOLDERS[name]: path / name for name in sorted(below)}
            if len(folders) < len(below):
                raise InputError(f"{path} has both val and validation; keep one of them.")
        files = {split: _files(folder) for split, folder in folders.items()}
        for split, found in files.items():
            if not found:
                shown = ", ".join(ENDINGS)
                raise InputError(f"{folders[split]} holds no image (no file ending in {shown}).")
        labelled = labels and all(os.sep in name for found in files.values() for name in found)
        counts = collections.Counter(map(_class, files["train"]))
        self.class_names = tuple(sorted(counts)) if labelled and len(counts) > 1 else ()
        self.classes = len(self.class_names)
        self._splits = {split: self._open(folders[split], found) for split, found in files.items()}
        self.lengths = {split: len(source) for split, source in self._splits.items()}
        lone = [name for name in self.class_names if counts[name] == 1]
        if lone:
            more = f" and {len(lone) - 3} more" if len(lone) > 3 else ""
            raise InputError(
                f"{folders['train']} has only one image of class {', '.join(lone[:3])}{more}, too "
                "few to train on some and evaluate on others; add images, remove the class, or "
                "ignore all classes by config.data.labels=False."
            )

    def open(self, split: str) -> "_FolderSplit":
        return self._splits[split]

    def _open(self, folder: pathlib.Path, files: list[str]) -> "_FolderSplit":
        numbers = {name: i for i, name in enumerate(self.class_names)}
        unknown = sorted({_class(f) for f in files} - set(numbers)) if numbers else []
        if unknown:
            raise InputError(
                f"{folder} has classes that no training image has: {', '.join(unknown[:10])}."
            )
        labels = np.array([numbers[_class(f)] if numbers else 0 for f in files], np.int32)
        order = spread_classes(labels)
        return _FolderSplit(folder, [files[i] for i in order], labels[order] if numbers else None)


class _FolderSplit:
    def __init__(self, folder: pathlib.Path, files: list[str], labels: np.ndarray | None):
        self.folder, self.files, self.labels = folder, files, labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        image = {"image": (self.folder / self.files[index]).read_bytes()}
        return image if self.labels is None else {**image, "label": self.labels[index]}

    def name(self, index: int) -> str:
        return str(self.folder / self.files[index])


def _files(folder: pathlib.Path) -> list[str]:
    """Sorted paths, relative to `folder`, of the image files below it that are not hidden."""
    found, visited = [], set()
    for path, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if real in visited:  # symbolic links form a circle
            folders[:] = []
            continue
        visited.add(real)
        found += [
            os.path.relpath(os.path.join(path, name), folder)
            for name in sorted(names)
            if name.lower().endswith(ENDINGS) and not name.startswith(".")
        ]
    return found


def _class(file: str) -> str:
    return file.split(os.sep)[0]


def spread_classes(labels: np.ndarray) -> np.ndarray:
    """A shuffled order of all rows in which each class is spread evenly."""
    rng = np.random.default_rng(ORDER_SEED)
    place = np.empty(len(labels))
    rows = np.argsort(labels, kind="stable")
    for members in np.split(rows, np.flatnonzero(np.diff(labels[rows])) + 1):
        members = rng.permutation(members)
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")
