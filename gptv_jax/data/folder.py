"""Folders of image files as data sets."""

import collections
import functools
import os
import pathlib
import re

import numpy as np
from PIL import Image

from gptv_jax.data import labels as labels_lib
from gptv_jax.errors import InputError, shorten

# Endings of the commonest formats; `_known` adds all others that the installed Pillow opens.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# Formats of pictures that have no MIME type in Pillow; other formats without one are stubs, fonts
# of games, or documents.
UNTYPED_FORMATS = ("QOI", "DDS", "FITS", "SUN")
# Names of splits, in lower case, without punctuation and without a year ("Train_Set", "val2017").
SPLIT_NAMES = {
    "train": ("train", "training", "trainset", "trainingset"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation", "validationset"),
    "test": ("test", "testing", "testset", "testingset"),
}
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}
# Folders that operating systems, file servers and viewers add, in lower case; folders whose names
# begin with a dot, an @ or a $ are left out as well.
SYSTEM_FOLDERS = ("__macosx", "system volume information", "lost+found", "#recycle", "__pycache__")
SYSTEM_FOLDERS += ("thumbnails", "thumbs", "_thumbs")
MOST_STRAY = 0.05  # share of images outside all class folders up to which they are left out
ORDER_SEED = 0  # fixed, so that a split expression selects the same images in every run


class ImageFolder:
    """All image files below a folder.

    Sub-folders whose names are names of splits (`SPLIT_NAMES`, in any case), train among them, are
    the splits; otherwise all images are one split, train. Within a split, each sub-folder is a
    class, unless a CSV file gives the labels. The data set is unlabelled where all images lie in
    one folder, or more than `MOST_STRAY` of them in no class folder. The images are shuffled class
    by class, so that `train[:90%]` holds nine tenths of every class.

    `notes` are sentences about what a user may not expect, and `left_out` says what is not read.
    """

    stored_as = "encoded"

    def __init__(
        self,
        path: pathlib.Path,
        labels: bool = True,
        labels_file: pathlib.Path | None = None,
        ignore_label: int | None = None,
    ):
        """Lists the files without opening them.

        `labels=False` makes the data set unlabelled. `labels_file` is a CSV file of labels by file
        name; images with the label `ignore_label` are left out.

        Raises:
          InputError: there is no image, the splits or the classes are ambiguous, or a class has a
            single training image.
        """
        if not path.is_dir():
            raise InputError(f"config.data.path={path} is not a folder.")
        self.notes: list[str] = []
        top = _Listing(path, deep=False)
        below = {name: _Listing(path / name) for name in top.below}
        folders = _find_splits(path, below, self.notes)
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
        for split, found in files.items():
            if not found:
                raise InputError(_no_image(folders[split], endings))
        empty = [name for name, listing in below.items() if not listing.files]
        system = sorted({name for listing in [top, *read] for name in listing.system})
        self.left_out = [
            f"{what} {shorten(names, 8)}"
            for what, names in (
                (f"{endings.total()} files by their endings:", _counted(endings)),
                ("folders without images:", empty),
                ("folders of the system or of thumbnails:", system),
            )
            if names
        ]
        if labels and labels_file:
            names = labels_lib.of_files(labels_file, path, folders, files, ignore_label, self.notes)
        else:
            names = self._class_folders(folders, files) if labels else None
        counts = collections.Counter(names["train"] if names else ())
        in_order = labels_lib.in_order if labels_file else sorted
        self.class_names = tuple(in_order(counts)) if len(counts) > 1 else ()
        self.classes = len(self.class_names)
        self._splits = {
            split: self._open(folders[split], files[split], names and names[split])
            for split in files
        }
        self.lengths = {split: len(source) for split, source in self._splits.items()}
        lone = [name for name in self.class_names if counts[name] == 1]
        if lone:
            raise InputError(
                f"{folders['train']} has only one image of class {shorten(lone)}, too "
                "few to train on some and evaluate on others; add images, remove the class, or "
                "ignore all classes by config.data.labels=False."
            )

    def open(self, split: str) -> "_FolderSplit":
        return self._splits[split]

    def _class_folders(
        self, folders: dict[str, pathlib.Path], files: dict[str, list[str]]
    ) -> dict[str, list[str]] | None:
        """The class folder of every image, by split; None: the images are unlabelled.

        Images outside all class folders are removed from `files` where they are few.
        """
        stray = {split: [f for f in found if os.sep not in f] for split, found in files.items()}
        mixed = {split for split in files if len(stray[split]) < len(files[split])}
        names = {_class(f) for split in mixed for f in files[split] if os.sep in f}
        if len(names) == 1:
            folder = folders["train"] / min(names)
            inner = any(f.count(os.sep) > 1 for f in files["train"])
            advice = f"; if its folders are classes, set config.data.path={folder}" if inner else ""
            self.notes.append(
                f"there is a single class folder, {folder.name}, so the images are unlabelled: "
                f"pretraining and samples need no labels, the probe and fine-tuning do{advice}"
            )
        if len(names) < 2:
            return None
        if flat := [split for split in files if split not in mixed]:
            raise InputError(
                f"{folders[flat[0]]} has images without class folders, but the split {min(mixed)} "
                f"has the classes {shorten(sorted(names))}. Sort these images into class "
                "folders, move them away, or ignore all classes by config.data.labels=False."
            )
        outside = [str(folders[split] / f) for split in stray for f in stray[split]]
        total = sum(map(len, files.values()))
        if len(outside) > MOST_STRAY * total:
            self.notes.append(
                f"{len(outside)} of {total} images lie in no class folder ({shorten(outside)}), so "
                "all images are unlabelled; move or remove these images to have labels"
            )
            return None
        if outside:
            self.notes.append(
                f"{len(outside)} of {total} images lie in no class folder and are left out: "
                f"{shorten(outside)}"
            )
        for split, found in files.items():
            files[split] = [f for f in found if os.sep in f]
        return {split: [_class(f) for f in found] for split, found in files.items()}

    def _open(
        self, folder: pathlib.Path, files: list[str], names: list[str] | None
    ) -> "_FolderSplit":
        numbers = {name: i for i, name in enumerate(self.class_names)}
        unknown = sorted(set(names or ()) - set(numbers)) if numbers else []
        if unknown:
            raise InputError(
                f"{folder} has classes that no training image has: {shorten(unknown, 10)}."
            )
        labels = np.array([numbers[n] for n in names] if numbers else [0] * len(files), np.int32)
        order = _shuffle(labels)
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


class _Listing:
    """What lies in a folder, and if `deep` below the folder; hidden files and folders apart."""

    def __init__(self, folder: pathlib.Path, deep: bool = True):
        self.files: list[str] = []  # sorted paths, relative to the folder, of the image files
        self.below: list[str] = []  # names of the sub-folders
        self.inner: set[str] = set()  # names of those sub-folders that hold images
        self.endings = collections.Counter()  # of files that are no images: their number
        self.system: list[str] = []  # names of folders of the system
        # Links back to the parent would read the folders beside this one as parts of this one.
        visited = {os.path.realpath(folder.parent)} if deep else set()
        for path, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(path)
            shown = sorted(name for name in folders if not name.startswith("."))
            system = [name for name in shown if _is_system(name)]
            folders[:] = [name for name in shown if name not in system]
            if real in visited:  # symbolic links form a circle
                folders[:] = []
                continue
            visited.add(real)
            self.system += system
            relative = os.path.relpath(path, folder)
            prefix = "" if relative == os.curdir else relative + os.sep
            self.below = self.below or list(folders)
            before = len(self.files)
            for name in sorted(names):
                ending = os.path.splitext(name)[1].lower()
                if name.startswith("."):
                    continue
                if ending in ENDINGS or ending in _known():
                    self.files.append(prefix + name)
                else:
                    self.endings[ending or "no ending"] += 1
            if prefix and len(self.files) > before:
                self.inner.add(prefix.split(os.sep)[0])
            if not deep:
                break


def split_name(name: str) -> str | None:
    """The split that a name stands for, such as validation for "Valid"; None: it is no split."""
    plain = re.sub(r"[\W_]+|(19|20)\d\d$", "", name.lower())
    return SPLIT_OF.get(plain)


def _find_splits(
    path: pathlib.Path, below: dict[str, _Listing], notes: list[str]
) -> dict[str, pathlib.Path]:
    """The folder of every split; {}: the folders are no splits, but classes.

    Raises:
      InputError: the folders can be read in more than one way.
    """
    named = {name: split for name in below if (split := split_name(name))}
    full = [name for name, listing in below.items() if listing.files]
    splits = [name for name in named if name in full]
    others = [name for name in full if name not in named]
    if not splits:
        return {}
    if others:
        if [named[name] for name in splits] == ["train"] and not below[splits[0]].inner:
            notes.append(
                f"{path / splits[0]} is taken as a class, since images lie right in the folder and "
                f"beside {shorten(others)}"
            )
            return {}
        raise InputError(
            f"{path} has {shorten(splits)}, which are names of splits, beside images in "
            f"{shorten(others)}. If these are classes of the training images, move them into "
            f"{path.name}/train; if {splits[0]} is a class, rename it; else move the others away."
        )
    chosen: dict[str, pathlib.Path] = {}
    for name, split in named.items():
        if split in chosen:
            raise InputError(
                f"{path} has both {chosen[split].name} and {name}, which are names of the split "
                f"{split}; keep one of them, or rename one."
            )
        chosen[split] = path / name
    if "train" not in chosen:
        raise InputError(
            f"{path} has {shorten(splits)}, but no folder called train. Call the folder of the "
            "training images train, or name the one folder to use in config.data.path."
        )
    return chosen


def _refuse_inner_splits(path: pathlib.Path, below: dict[str, _Listing]) -> None:
    """Raises InputError where folders that would be classes hold the splits."""
    full = {name: listing.inner for name, listing in below.items() if listing.files}
    for name, inner in full.items():
        splits = sorted(each for each in inner if split_name(each))
        found = {split_name(each) for each in splits}
        if "train" not in found or len(found) == 1:
            continue
        if len(full) == 1:
            raise InputError(
                f"the splits {shorten(splits)} lie in {path / name}; set "
                f"config.data.path={path / name}."
            )
        raise InputError(
            f"{path / name} has {shorten(splits)}, which are names of splits, inside what would be "
            "a class. Put the classes inside the splits, as in train/cat, or rename these folders."
        )


def refuse_inside(config, places: dict[str, str | pathlib.Path | None]) -> None:
    """Raises InputError where files that a run writes would become images of a data folder.

    `config` is a `config.Data`; `places` has the folders to be written by the flag or field that
    named them.
    """
    if config.name != "folder" or not config.path:
        return
    data = pathlib.Path(config.path).expanduser().resolve()
    for setting, given in places.items():
        if given is None or "://" in str(given):
            continue
        place = pathlib.Path(given).expanduser().resolve()
        inside = place.is_relative_to(data)
        hidden = inside and any(part.startswith(".") for part in place.relative_to(data).parts)
        pictures = any(data.is_relative_to(place / name) for name in ("samples", "probe"))
        if (inside and not hidden) or pictures:
            raise InputError(
                f"{setting}={given} and config.data.path={config.path} lie in one another, so "
                "pictures of the run would become data; take a folder outside the data."
            )


def _is_system(name: str) -> bool:
    return name.startswith(("@", "$")) or name.lower() in SYSTEM_FOLDERS


@functools.cache
def _known() -> frozenset[str]:
    """Endings of all image formats that the installed Pillow, with its plugins, opens.

    Asking takes 0.1 s, so it is done only where a file has none of `ENDINGS`.
    """
    formats = {
        kind
        for kind in [*Image.registered_extensions().values()]
        if kind in Image.OPEN or kind == "MPO"  # which the JPEG plugin opens
        if Image.MIME.get(kind, "").startswith("image/") or kind in UNTYPED_FORMATS
    }
    return frozenset(e for e, kind in Image.registered_extensions().items() if kind in formats)


def _no_image(folder: pathlib.Path, endings: collections.Counter) -> str:
    has = f"; it has {shorten(_counted(endings), 5)}" if endings else ""
    return (
        f"{folder} holds no image (no file ending in {', '.join(ENDINGS[:4])} or another ending of "
        f"images that Pillow reads{has})."
    )


def _counted(counts: collections.Counter) -> list[str]:
    return [f"{name} {count}" for name, count in counts.most_common()]


def _class(file: str) -> str:
    return file.split(os.sep)[0]


def _shuffle(labels: np.ndarray) -> np.ndarray:
    """A shuffled order of all rows in which each class is spread evenly."""
    rng = np.random.default_rng(ORDER_SEED)
    place = np.empty(len(labels))
    rows = np.argsort(labels, kind="stable")
    for members in np.split(rows, np.flatnonzero(np.diff(labels[rows])) + 1):
        members = rng.permutation(members)
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")
