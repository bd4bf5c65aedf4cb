"""Folders of image files as data sets."""

import collections
import os
import pathlib

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files as files_lib
from gptv_jax.data import labels as labels_lib
from gptv_jax.data import limits, listing
from gptv_jax.data.arrays import ArraysSplit
from gptv_jax.data.data_set import DataSet, spread_classes
from gptv_jax.data.listing import ENDINGS, Listing, split_name
from gptv_jax.errors import InputError, shorten

APPLE_ENDINGS = (".heic", ".heif", ".hif")  # which Pillow opens by a plugin alone
PLUGIN = "pip install pillow-heif, and pillow_heif.register_heif_opener() in the configuration file"
MOST_STRAY = 0.05  # share of images outside all class folders up to which they are left out


class ImageFolder(DataSet):
    """All image files below a folder, `config.path`.

    Sub-folders whose names are names of splits (`listing.split_name`), train among them, are the
    splits; otherwise all images are one split, train. Within a split, each sub-folder is a class,
    unless a CSV file gives the labels. The data set is unlabelled where all images lie in one
    folder, or a share of images above `MOST_STRAY` in no class folder. The images are shuffled
    class by class, so that `train[:90%]` holds nine tenths of every class. Raises InputError where
    there is no image, the splits or classes are ambiguous, or a class has one training image.
    """

    noun = "image"  # of an example, in messages

    def __init__(self, config: config_lib.Data):
        path = listing.data_path(config)
        if not path.is_dir():
            raise InputError(f"config.data.path={path} is not a folder.")
        self.notes, self.limits = [], config.limits
        top = Listing(path, deep=False)
        # A class that is a link to another class is left out; a split may be a link to another.
        real = [os.path.realpath(path / n) for n in top.below if not (path / n).is_symlink()]
        known = {n: () if split_name(n, within=True) else real for n in top.below}
        below = {name: Listing(path / name, known=known[name]) for name in top.below}
        folders = _find_splits(path, below, self.notes)
        self.other_names = {f.name: split for split, f in folders.items() if f.name != split}
        files = {split: below[folder.name].files for split, folder in folders.items()}
        read = [top, *([below[folder.name] for folder in folders.values()] or below.values())]
        if not folders:
            _refuse_inner_splits(path, below)
            nested = [os.path.join(name, file) for name in below for file in below[name].files]
            folders, files = {"train": path}, {"train": top.files + nested}
        elif top.files:
            shown = shorten(top.files)
            self.notes.append(f"{path} has images beside its splits, which are left out: {shown}")
        everything = [top, *below.values()]
        if any(each.endings[".json"] for each in everything) and (coco := listing.coco_files(path)):
            self.notes.append(
                f"the boxes in {shorten(f.relative_to(path) for f in coco)} are not read; "
                "--config.data.name=coco reads them"
            )
        endings = sum((each.endings for each in read), collections.Counter())
        counted = [f"{ending} {count}" for ending, count in endings.most_common()]
        apple = [ending for ending in APPLE_ENDINGS if endings[ending]]
        if bare := [folders[split] for split, found in files.items() if not found]:
            nothing = not any(each.files for each in everything)
            if nothing and (advice := listing.of_folder(path, "folder")):
                raise InputError(f"config.data.path={advice}")
            has = f"; it has {shorten(counted, room=60)}" * bool(counted)
            has += f", which needs {PLUGIN}" * bool(apple)
            has += f"; {listing.VIDEO_ADVICE}" * any(endings[e] for e in listing.VIDEO_ENDINGS)
            known = f"{', '.join(ENDINGS[:4])} or another ending of images that Pillow reads"
            raise InputError(f"{bare[0]} holds no image (no file ending in {known}{has}).")
        if apple:
            self.notes.append(f"{', '.join(apple)} files are left out; they need {PLUGIN}")
        unread = {
            f"{endings.total()} files by their endings": counted,
            "folders without images": [name for name, found in below.items() if not found.files],
            "folders of the system or of thumbnails": sorted({n for e in read for n in e.system}),
        }
        self.left_out = [f"{what}: {shorten(names)}" for what, names in unread.items() if names]
        self._label(config, folders, {s: self._examples(folders[s], files[s]) for s in files})

    def _examples(self, folder: pathlib.Path, files: list[str]) -> list[str]:
        """The examples that the image files below the folder of a split are."""
        return files

    def _split(
        self, folder: pathlib.Path, examples: list[str], labels: np.ndarray | None
    ) -> "FolderSplit":
        found = FolderSplit(folder, examples, labels)
        found.limits = self.limits
        return found

    def _label(
        self, config: config_lib.Data, folders: dict[str, pathlib.Path], files: dict[str, list[str]]
    ) -> None:
        """Finds the classes, and makes the splits of the examples `files` that have one."""
        names = None
        if config.labels and config.labels_file:
            names = labels_lib.of_files(config, folders, files, self.notes)
        elif config.labels:
            names = self._class_folders(folders, files)
        if names:
            texts = {split: np.array(each, str) for split, each in names.items()}
            rows = labels_lib.leave_out(texts, config.ignore_label, self.notes)
            files = {split: [files[split][i] for i in kept] for split, kept in rows.items()}
            names = {split: [names[split][i] for i in kept] for split, kept in rows.items()}
        counts = collections.Counter(names and names.get("train"))
        if config.labels_file:
            labels_lib.check_texts(counts)
        if len(counts) == 1:
            self.notes.append(labels_lib.one_class(min(counts)))
        in_order = labels_lib.in_order if config.labels_file else sorted
        self.class_names = tuple(in_order(counts)) if len(counts) > 1 else ()
        self.classes, self.splits = len(self.class_names), {}
        numbers = {name: i for i, name in enumerate(self.class_names)}
        for split, found in files.items():
            folder, given = folders[split], names[split] if numbers else ()
            if unknown := shorten(sorted(set(given) - set(numbers))):
                raise InputError(f"{folder} has classes that no training image has: {unknown}.")
            labels = np.array([numbers[n] for n in given] or [0] * len(found), np.int32)
            order = spread_classes(labels)
            chosen = [found[i] for i in order]
            self.splits[split] = self._split(folder, chosen, labels[order] if numbers else None)
        if lone := [name for name in self.class_names if counts[name] == 1]:
            shown = ", ".join(lone[:3]) + (f" and {len(lone) - 3} more" if len(lone) > 3 else "")
            raise InputError(
                f"{folders['train']} has only one {self.noun} of class {shown}, too few to train "
                f"on some and evaluate on others; add {self.noun}s, remove the class, or ignore "
                "all classes by config.data.labels=False."
            )

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
                f"{folders[flat[0]]} has {self.noun}s without class folders, but the split "
                f"{min(mixed)} has the classes {shorten(sorted(names))}. Sort them into class "
                "folders, move them away, or ignore all classes by config.data.labels=False."
            )
        outside = [str(folders[split] / f) for split in stray for f in stray[split]]
        total, shown = sum(map(len, files.values())), shorten(outside)
        strays = f"{len(outside)} of {total} {self.noun}s lie in no class folder"
        if len(outside) > MOST_STRAY * total:
            advice = f"move or remove these {self.noun}s to have labels"
            self.notes.append(f"{strays} ({shown}), so all {self.noun}s are unlabelled; {advice}")
            return None
        if outside:
            self.notes.append(f"{strays} and are left out: {shown}")
        for split, found in files.items():
            files[split] = [f for f in found if os.sep in f]
        return {split: [_class(f) for f in found] for split, found in files.items()}


class FolderSplit(ArraysSplit):
    """The image files `images` below the folder `where`."""

    key = "encoded"
    limits: config_lib.Limits  # of the files

    def content(self, index: int) -> bytes:
        return limits.read(self.where / self.images[index], self.limits)

    def name(self, index: int) -> str:
        return str(self.where / self.images[index])


def _find_splits(
    path: pathlib.Path, below: dict[str, Listing], notes: list[str]
) -> dict[str, pathlib.Path]:
    """The folder of every split; {}: the folders are classes. InputError: they may be both."""
    full = [name for name, each in below.items() if each.files]
    within = {split_name(name, within=True) for name in full} - {None}
    loose = "train" in within and len(within) > 1  # as in birds_train beside birds_test
    named = {name: split for name in full if (split := split_name(name, within=loose))}
    for name, found in below.items():  # a split whose images are missing
        split = split_name(name)
        if split not in (None, *named.values()) and found.endings:
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
    full = {name: each.inner for name, each in below.items() if each.files}
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
    if config.name not in ("folder", "camera_motions") or not config.path:
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


def _class(file: str) -> str:
    return file.split(os.sep)[0]
