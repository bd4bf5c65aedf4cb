"""Folders of image files as data sets."""

import collections
import os
import pathlib

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files as files_lib
from gptv_jax.data import guess
from gptv_jax.data import labels as labels_lib
from gptv_jax.data.arrays import ArraysSplit
from gptv_jax.data.listing import ENDINGS, Listing, split_name
from gptv_jax.errors import InputError, shorten

APPLE_ENDINGS = (".heic", ".heif", ".hif")  # which Pillow opens by a plugin alone
MOST_STRAY = 0.05  # share of images outside all class folders up to which they are left out
ORDER_SEED = 0  # fixed, so that a split expression selects the same images in every run


class ImageFolder:
    """All image files below a folder.

    Sub-folders whose names are names of splits (`listing.split_name`), train among them, are the
    splits; otherwise all images are one split, train. Within a split, each sub-folder is a class,
    unless a CSV file gives the labels. The data set is unlabelled where all images lie in one
    folder, or a share of images above `MOST_STRAY` in no class folder. The images are shuffled
    class by class, so that `train[:90%]` holds nine tenths of every class. `notes` are sentences
    about what a user may not expect, and `left_out` says what is not read.
    """

    object_names = ()

    def __init__(
        self,
        path: pathlib.Path,
        labels: bool = True,
        labels_file: pathlib.Path | None = None,
        ignore_label: int | None = None,
    ):
        """Lists the files; `labels_file` is a CSV file of labels by file name.

        Images whose label or class folder is `ignore_label` are left out. Raises InputError where
        there is no image, the splits or classes are ambiguous, or a class has one training image.
        """
        if not path.is_dir():
            raise InputError(f"config.data.path={path} is not a folder.")
        self.notes: list[str] = []
        top = Listing(path, deep=False)
        # A class that is a link to another class is left out; a split may be a link to another.
        real = [os.path.realpath(path / n) for n in top.below if not (path / n).is_symlink()]
        known = {n: () if split_name(n, within=True) else real for n in top.below}
        below = {name: Listing(path / name, known=known[name]) for name in top.below}
        folders = _find_splits(path, below, self.notes)
        self.other_names = {f.name: split for split, f in folders.items() if f.name != split}
        files = {split: below[folder.name].files for split, folder in folders.items()}
        read = [below[folder.name] for folder in folders.values()]
        if not folders:
            _refuse_inner_splits(path, below)
            nested = [os.path.join(name, file) for name in below for file in below[name].files]
            folders, files, read = {"train": path}, {"train": top.files + nested}, [*below.values()]
        elif top.files:
            shown = shorten(top.files)
            self.notes.append(f"{path} has images beside its splits, which are left out: {shown}")
        endings = sum((listing.endings for listing in [top, *read]), collections.Counter())
        annotated = any(listing.endings[".json"] for listing in [top, *below.values()])
        if annotated and (coco := guess.coco_files(path)):
            self.notes.append(
                f"the boxes in {shorten(f.relative_to(path) for f in coco)} are not read; "
                "--config.data.name=coco reads them"
            )
        if bare := [folders[split] for split, found in files.items() if not found]:
            nothing = not any(listing.files for listing in [top, *below.values()])
            advice = guess.of_folder(path, "folder") if nothing else None
            refused = f"config.data.path={advice}" if advice else _no_image(bare[0], endings)
            raise InputError(refused)
        if apple := [ending for ending in APPLE_ENDINGS if endings[ending]]:
            self.notes.append(
                f"{', '.join(apple)} files are left out; they need pip install pillow-heif, and "
                "pillow_heif.register_heif_opener() in the configuration file"
            )
        empty = [name for name, listing in below.items() if not listing.files]
        system = sorted({name for listing in [top, *read] for name in listing.system})
        unread = {f"{endings.total()} files by their endings": _counted(endings)}
        unread |= {"folders without images": empty}
        unread |= {"folders of the system or of thumbnails": system}
        self.left_out = [f"{what}: {shorten(names)}" for what, names in unread.items() if names]
        if labels and labels_file:
            names = labels_lib.of_files(labels_file, path, folders, files, self.notes)
        else:
            names = self._class_folders(folders, files) if labels else None
        if names:
            texts = {split: np.array(each, str) for split, each in names.items()}
            rows = labels_lib.leave_out(texts, ignore_label, self.notes)
            files = {split: [files[split][i] for i in kept] for split, kept in rows.items()}
            names = {split: [names[split][i] for i in kept] for split, kept in rows.items()}
        counts = collections.Counter(names.get("train") if names else ())
        if labels_file and counts:
            labels_lib.check_texts(counts)
        if len(counts) == 1:
            self.notes.append(labels_lib.one_class(min(counts)))
        in_order = labels_lib.in_order if labels_file else sorted
        self.class_names = tuple(in_order(counts)) if len(counts) > 1 else ()
        self.classes = len(self.class_names)
        self._splits = {s: self._open(folders[s], files[s], names and names[s]) for s in files}
        self.lengths = {split: len(source) for split, source in self._splits.items()}
        if lone := [name for name in self.class_names if counts[name] == 1]:
            more = f" and {len(lone) - 3} more" if len(lone) > 3 else ""
            raise InputError(
                f"{folders['train']} has only one image of class {', '.join(lone[:3])}{more}, too "
                "few to train on some and evaluate on others; add images, remove the class, or "
                "ignore all classes by config.data.labels=False."
            )

    def open(self, split: str) -> "_FolderSplit":
        return self._splits[split]

    def _class_folders(
        self, folders: dict[str, pathlib.Path], files: dict[str, list[str]]
    ) -> dict[str, list[str]] | None:
        """The class folder of every image, by split; None: unlabelled. Strays leave `files`."""
        stray = {split: [f for f in found if os.sep not in f] for split, found in files.items()}
        mixed = {split for split in files if len(stray[split]) < len(files[split])}
        names = {_class(f) for split in mixed for f in files[split] if os.sep in f}
        if len(names) == 1:
            folder = folders["train"] / min(names)
            inner = any(f.count(os.sep) > 1 for f in files["train"])
            advice = f"; if its folders are classes, set config.data.path={folder}" if inner else ""
            self.notes.append(labels_lib.one_class(folder.name, "class folder") + advice)
        if len(names) < 2:
            return None
        if flat := [split for split in files if split not in mixed]:
            raise InputError(
                f"{folders[flat[0]]} has images without class folders, but the split {min(mixed)} "
                f"has the classes {shorten(sorted(names))}. Sort these images into class "
                "folders, move them away, or ignore all classes by config.data.labels=False."
            )
        outside = [str(folders[split] / f) for split in stray for f in stray[split]]
        total, shown = sum(map(len, files.values())), shorten(outside)
        strays = f"{len(outside)} of {total} images lie in no class folder"
        if len(outside) > MOST_STRAY * total:
            advice = "move or remove these images to have labels"
            self.notes.append(f"{strays} ({shown}), so all images are unlabelled; {advice}")
            return None
        if outside:
            self.notes.append(f"{strays} and are left out: {shown}")
        for split, found in files.items():
            files[split] = [f for f in found if os.sep in f]
        return {split: [_class(f) for f in found] for split, found in files.items()}

    def _open(
        self, folder: pathlib.Path, files: list[str], names: list[str] | None
    ) -> "_FolderSplit":
        numbers = {name: i for i, name in enumerate(self.class_names)}
        if numbers and (unknown := shorten(sorted(set(names) - set(numbers)))):
            raise InputError(f"{folder} has classes that no training image has: {unknown}.")
        labels = np.array([numbers[n] for n in names] if numbers else [0] * len(files), np.int32)
        order = spread_classes(labels)
        return _FolderSplit(folder, [files[i] for i in order], labels[order] if numbers else None)


class _FolderSplit(ArraysSplit):
    """The image files `images` below the folder `where`."""

    key = "encoded"

    def read(self, index: int) -> bytes:
        return (self.where / self.images[index]).read_bytes()

    def name(self, index: int) -> str:
        return str(self.where / self.images[index])


def _find_splits(
    path: pathlib.Path, below: dict[str, Listing], notes: list[str]
) -> dict[str, pathlib.Path]:
    """The folder of every split; {}: the folders are classes. InputError: they may be both."""
    full = [name for name, listing in below.items() if listing.files]
    within = {split_name(name, within=True) for name in full} - {None}
    loose = "train" in within and len(within) > 1  # as in birds_train beside birds_test
    named = {name: split for name in full if (split := split_name(name, within=loose))}
    for name, listing in below.items():  # a split whose images are missing
        split = split_name(name)
        if split not in (None, *named.values()) and listing.endings:
            named[name] = split
    splits = [name for name in named if name in full]
    others = [name for name in full if name not in named]
    if not splits:
        return {}
    if others:
        if [named[name] for name in splits] == ["train"] and not below[splits[0]].inner:
            reason = f"images lie right in the folder and beside {shorten(others)}"
            notes.append(f"{path / splits[0]} is taken as a class, since {reason}")
            return {}
        raise InputError(
            f"{path} has splits by their names, {shorten(splits)}, beside images in "
            f"{shorten(others)}. If these are classes of the training images, move them into "
            f"{path.name}/train; if {splits[0]} is a class, rename it; else move the others away."
        )
    chosen: dict[str, pathlib.Path] = {}
    for name, split in named.items():
        if (other := chosen.setdefault(split, path / name)).name != name:
            both = f"both {other.name} and {name}"
            maps = "{split}_labels"
            raise InputError(
                f"{path} has {both} for the split {split}; keep or rename one, or name the folders "
                f"of label maps by config.data.maps, such as {maps}."
            )
    if "train" not in chosen:
        raise InputError(
            f"{path} has {shorten(splits)}, but no folder called train. Call the folder of the "
            "training images train, or name the one folder to use in config.data.path."
        )
    return chosen


def _refuse_inner_splits(path: pathlib.Path, below: dict[str, Listing]) -> None:
    full = {name: listing.inner for name, listing in below.items() if listing.files}
    for name, inner in full.items():
        splits = sorted(each for each in inner if split_name(each))
        found = {split_name(each) for each in splits}
        if "train" not in found or len(found) == 1:
            continue
        if len(full) == 1:
            problem = f"the splits {shorten(splits)} lie in {path / name}"
            raise InputError(f"{problem}; set config.data.path={path / name}.")
        raise InputError(
            f"{path / name} has splits by their names, {shorten(splits)}, inside what would be a "
            "class. Put the classes inside the splits, as in train/cat, or rename these folders."
        )


def refuse_inside(config: config_lib.Data, places: dict[str, str | pathlib.Path | None]) -> None:
    """Raises InputError where files that a run writes would become images of a data folder.

    `places` has the folders to be written, by the flag or field that named each.
    """
    if config.name != "folder" or not config.path:
        return
    data = files_lib.user_path(config.path).resolve()
    for setting, given in places.items():
        if given is None or "://" in str(given):
            continue
        place = files_lib.user_path(given).resolve()
        inside = place.is_relative_to(data)
        hidden = inside and any(part.startswith(".") for part in place.relative_to(data).parts)
        pictures = any(data.is_relative_to(place / name) for name in ("samples", "probe"))
        if (inside and not hidden) or pictures:
            raise InputError(
                f"{setting}={given} and config.data.path={config.path} lie in one another, so "
                "files of this program would become data; take a folder outside the data."
            )


def _no_image(folder: pathlib.Path, endings: collections.Counter) -> str:
    has = f"; it has {shorten(_counted(endings), room=60)}" if endings else ""
    if any(endings[ending] for ending in APPLE_ENDINGS):
        has += ", which needs pip install pillow-heif, registered in the configuration file"
    known = f"{', '.join(ENDINGS[:4])} or another ending of images that Pillow reads"
    return f"{folder} holds no image (no file ending in {known}{has})."


def _counted(counts: collections.Counter) -> list[str]:
    return [f"{name} {count}" for name, count in counts.most_common()]


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
