"""What lies in a folder of images, and what names of files and folders stand for."""

import collections
import functools
import os
import pathlib
import re
from collections.abc import Iterable

from PIL import Image

# Endings of the commonest formats; `_known` adds all others that the installed Pillow opens.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# Formats of pictures that have no MIME type in Pillow; other formats without one are stubs, fonts
# of games, or documents.
UNTYPED_FORMATS = ("QOI", "DDS", "FITS", "SUN")
# A name of a split: a word for the split, and words such as images or data before or after it.
# Names of classes such as trains, testudo or validators have other letters beside the word.
_FILLING = "(?:(?:image|img|picture|photo|file|sample|set|split|folder)s?|data)*"
_SPLIT = re.compile(
    rf"{_FILLING}(?:(?P<train>train|training|trn)|(?P<validation>validation|valid|val|vld|dev|eval"
    rf"|evaluation)|(?P<test>tests?|testing|tst)){_FILLING}"
)
# Folders that operating systems, file servers and viewers add, in lower case; folders whose names
# begin with a dot, an @ or a $ are left out as well.
SYSTEM_FOLDERS = ("__macosx", "system volume information", "lost+found", "#recycle", "__pycache__")
SYSTEM_FOLDERS += ("thumbnails", "thumbs", "_thumbs")


class Listing:
    """What lies in a folder, and if `deep` below the folder; hidden files and folders apart."""

    def __init__(self, folder: pathlib.Path, deep: bool = True, known: Iterable[str] = ()):
        """Lists the folder; a symbolic link to one of the real paths `known` is left out."""
        self.files: list[str] = []  # sorted paths, relative to the folder, of the image files
        self.below: list[str] = []  # names of the sub-folders
        self.inner: set[str] = set()  # names of the sub-folders that hold images
        self.endings = collections.Counter()  # of files that are no images: their number
        self.system: list[str] = []  # names of folders of the system
        # Links back to the parent would read the folders beside this one as parts of this one.
        known, visited = {*known, *([os.path.realpath(folder.parent)] if deep else ())}, set()
        for path, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(path)
            shown = sorted(name for name in folders if not name.startswith("."))
            system = [n for n in shown if n[0] in "@$" or n.lower() in SYSTEM_FOLDERS]
            folders[:] = [name for name in shown if name not in system]
            if real in visited or (os.path.islink(path) and real in known):
                folders[:] = []
                continue
            visited.add(real)
            inner = (os.path.join(real, name) for name in folders)
            known.update(each for each in inner if not os.path.islink(each))
            self.system += system
            relative = os.path.relpath(path, folder)
            prefix = "" if relative == os.curdir else relative + os.sep
            self.below = self.below or list(folders)
            before = len(self.files)
            for name in sorted(name for name in names if not name.startswith(".")):
                ending = os.path.splitext(name)[1].lower()
                if ending in ENDINGS or ending in _known():
                    self.files.append(prefix + name)
                else:
                    self.endings[ending or "no ending"] += 1
            if prefix and len(self.files) > before:
                self.inner.add(prefix.split(os.sep)[0])
            if not deep:
                break


def split_name(name: str, within: bool = False) -> str | None:
    """The split that a name stands for, such as validation for "Valid" or "02_val-images".

    None where the name is of no split. With `within`, the name may have other words, as names of
    files do: "imagenet-train-000" is of the split train.
    """
    if within:
        found = {split_name(word) for word in re.split(r"[\W\d_]+", name)} - {None}
        return found.pop() if len(found) == 1 else split_name(name)
    match = _SPLIT.fullmatch(re.sub(r"[\W\d_]+", "", name.lower()))
    return match and match.lastgroup


def split_of(file: pathlib.PurePath) -> str | None:
    """The split that a file's name, or else the name of the nearest of its folders, stands for."""
    names = (split_name(name, within=True) for name in reversed(file.parts))
    return next(filter(None, names), None)


def split_names(names: Iterable[str]) -> dict[str, str]:
    """The split train, validation or test that each name of a data set's split stands for.

    A name keeps its meaning where it stands for no split, or for one that another name has.
    """
    names = list(names)
    known = {name: split_name(name) or name for name in names}
    taken = collections.Counter(known.values())
    return {n: n if n != split and taken[split] > 1 else split for n, split in known.items()}


@functools.cache
def _known() -> frozenset[str]:
    """Endings of all image formats that the installed Pillow, with its plugins, opens.

    Asking takes 0.1 s, so it is done only where a file has none of `ENDINGS`.
    """
    return frozenset(
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in Image.OPEN or kind == "MPO"  # which the JPEG plugin opens
        if Image.MIME.get(kind, "").startswith("image/") or kind in UNTYPED_FORMATS
    )
