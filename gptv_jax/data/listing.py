"""What lies in a folder of images, and what names of files and folders stand for."""

import collections
import functools
import os
import pathlib
import re

from PIL import Image

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


class Listing:
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
