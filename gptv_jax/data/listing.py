"""What lies in a folder, what its names stand for, and which settings fit the data in a place."""

import collections
import functools
import os
import pathlib
import re
from collections.abc import Iterable

from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.data.limits import is_picture
from gptv_jax.errors import InputError

# Endings of the commonest formats; `_known` adds all others that the installed Pillow opens.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# Endings of video files, which gptv_jax.prepare turns into folders of frames.
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts")
VIDEO_ENDINGS += (".mts", ".wmv", ".flv", ".ogv", ".3gp")
VIDEO_ADVICE = "python -m gptv_jax.prepare --videos=FOLDER --out=FRAMES reads video files"
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
HUB = re.compile(r"(?:hf://|https?://huggingface\.co/)(?:datasets/)?([\w.-]+/[\w.-]+)")
# The data set that reads a file, by the file's ending.
KINDS = {".parquet": "parquet", ".arrow": "parquet", ".tar": "webdataset", ".npz": "arrays"}
KINDS[".json"] = "coco"
PACKED = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
SAVED = ("dataset_dict.json", "state.json")  # of datasets.save_to_disk
# How a COCO file begins, and the first letters of names of COCO files without boxes.
_COCO = re.compile(rb'\s*\{\s*"(info|images|annotations|categories|licenses|type)"')
_BOXLESS = ("captions", "image_info", "panoptic", "stuff", ".")


class Listing:
    """What lies in a folder, and if `deep` below the folder; hidden files and folders apart."""

    def __init__(
        self,
        folder: pathlib.Path,
        deep: bool = True,
        known: Iterable[str] = (),
        taken: tuple[str, ...] = (),
    ):
        """Lists the folder; a symbolic link to one of the real paths `known` is left out.

        `taken` are the endings of files to list, (): of all images.
        """
        self.files: list[str] = []  # sorted paths, relative to the folder, of the image files
        self.below: list[str] = []  # names of the sub-folders
        self.inner: set[str] = set()  # names of the sub-folders that hold images
        self.endings = collections.Counter()  # of files that are not listed: their number
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
                if ending in taken or (not taken and (ending in ENDINGS or ending in _known())):
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
        if is_picture(kind)
    )


def hub_advice(name: str) -> str:
    """The command that downloads a data set `user/name` of the Hugging Face Hub, and the fields."""
    command = f"download it by hf download {name} --repo-type=dataset --local-dir=FOLDER"
    return f"{command}, then take --config.data.name=parquet --config.data.path=FOLDER"


def advice(place: str, name: str | None = None) -> str | None:
    """What to do to read the data at `place`, a path or an address.

    None where `place` is neither, or where `config.data.name`, if given, fits the place. Whether a
    folder fits is left to the data sets that read folders; see `of_folder`.
    """
    if hub := HUB.match(place):
        return f"{place} is on the Hugging Face Hub; {hub_advice(hub[1])}."
    if "://" in place:
        return f"{place} is an address; download it, and name the folder by config.data.path."
    path = files.user_path(place)
    if path.is_dir():
        return of_folder(path, name) if name in (None, "arrays", "tokens") else None
    if place.lower().endswith(PACKED):
        return f"{place} is packed; unpack it, and name the folder by config.data.path."
    kind = KINDS.get(path.suffix.lower())
    return _take(path, name, kind, path) if path.exists() or name is None else None


def data_path(config: config_lib.Data, pattern: bool = False) -> pathlib.Path:
    """`config.data.path`, which exists unless it may be a pattern of file names."""
    if config.path is None:
        raise InputError(f"config.data.name={config.name} needs config.data.path.")
    path = files.user_path(config.path)
    if fitting := advice(config.path, config.name):
        raise InputError(f"config.data.path={fitting}")
    if not path.exists() and not (pattern and set("*?{") & set(path.name)):
        raise InputError(f"config.data.path={path} does not exist.")
    return path


def of_folder(path: pathlib.Path, name: str | None) -> str | None:
    """What to do to read a folder in which `config.data.name` finds no data; None: nothing fits.

    The files in the folder and in its sub-folders say which data set reads the folder.
    """
    endings = {f.suffix.lower() for pattern in ("*", "*/*") for f in path.glob(pattern)}
    if (path / "features.json").exists():  # of a prepared TFDS set
        return _take(path, name, path.parent.name, path, "dir")
    found = {
        "tokens": (path / "header.json").exists(),
        "coco": bool(coco_files(path)),
        "parquet": any((path / each).exists() for each in SAVED)
        or endings & {".parquet", ".arrow"},
        "webdataset": ".tar" in endings,
        "folder": endings & set(ENDINGS),
    }
    return _take(path, name, next((kind for kind in found if found[kind]), None), path)


def coco_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Sorted COCO files with boxes in a folder and its sub-folders: instances_*.json, or others."""
    found = [f for pattern in ("*.json", "*/*.json") for f in sorted(folder.glob(pattern))]
    named = [f for f in found if f.name.startswith("instances")]
    return named or [f for f in found if not f.name.startswith(_BOXLESS) and _begins_as_coco(f)]


def _begins_as_coco(path: pathlib.Path) -> bool:
    try:
        if not path.is_file():  # opening a pipe waits for a writer
            return False
        with path.open("rb") as file:
            return _COCO.match(file.read(200).removeprefix(b"\xef\xbb\xbf")) is not None
    except OSError:
        return False


def _take(
    place: pathlib.Path, name: str | None, kind: str | None, path: pathlib.Path, field: str = "path"
) -> str | None:
    if kind in (None, name):
        return None
    found = f"is not what config.data.name={name} reads" if name else "is a path"
    return f"{place} {found}; take --config.data.name={kind} --config.data.{field}={path}."
