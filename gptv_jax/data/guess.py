"""Which settings fit the data that a user names, where the given ones do not."""

import pathlib
import re

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.data.listing import ENDINGS
from gptv_jax.errors import InputError

HUB = re.compile(r"(?:hf://|https?://huggingface\.co/)(?:datasets/)?([\w.-]+/[\w.-]+)")
# The data set that reads a file, by the file's ending.
KINDS = {".parquet": "parquet", ".arrow": "parquet", ".tar": "webdataset", ".npz": "arrays"}
KINDS[".json"] = "coco"
PACKED = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
SAVED = ("dataset_dict.json", "state.json")  # of datasets.save_to_disk
# How a COCO file begins, and the first letters of names of COCO files without boxes.
_COCO = re.compile(rb'\s*\{\s*"(info|images|annotations|categories|licenses|type)"')
_BOXLESS = ("captions", "image_info", "panoptic", "stuff", ".")


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
