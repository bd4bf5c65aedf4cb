"""Which settings fit the data that a user names, where the given ones do not."""

import pathlib
import re

from gptv_jax import files
from gptv_jax.data.listing import ENDINGS

HUB = re.compile(r"(?:hf://|https?://huggingface\.co/)(?:datasets/)?([\w.-]+/[\w.-]+)")
KINDS = {  # by the ending of a file
    ".parquet": "parquet",
    ".arrow": "parquet",
    ".tar": "webdataset",
    ".npz": "arrays",
}
PACKED = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
SAVED = ("dataset_dict.json", "state.json")  # of datasets.save_to_disk


def hub_advice(name: str) -> str:
    """The command that downloads a data set `user/name` of the Hugging Face Hub, and the fields."""
    return (
        f"download it by hf download {name} --repo-type=dataset --local-dir=FOLDER, then take "
        "--config.data.name=parquet --config.data.path=FOLDER"
    )


def advice(place: str | None, name: str | None = None) -> str | None:
    """What to do to read the data at `place`, a path or an address.

    None where `place` is neither, or where `config.data.name`, if given, fits already.
    """
    if place is None:
        return None
    if hub := HUB.match(place):
        return f"{place} is on the Hugging Face Hub; {hub_advice(hub[1])}."
    if "://" in place:
        return f"{place} is an address; download it, and name the folder by config.data.path."
    path = files.user_path(place)
    if place.lower().endswith(PACKED):
        return f"{place} is packed; unpack it, and name the folder by config.data.path."
    if path.is_dir() and (path / "features.json").exists():  # of a prepared TFDS set
        kind, field = path.parent.name, "dir"
    else:
        kind, field = _kind(path), "path"
    if kind in (None, name):
        return None
    found = f"is not what config.data.name={name} reads" if name else "is a path"
    return f"{place} {found}; take --config.data.name={kind} --config.data.{field}={path}."


def _kind(path: pathlib.Path) -> str | None:
    """The name of the data set that reads a path; None where nothing does."""
    if not path.is_dir():
        return KINDS.get(path.suffix.lower())
    if (path / "header.json").exists():
        return "tokens"
    if any((path / name).exists() for name in SAVED):
        return "parquet"
    endings = {found.suffix.lower() for found in path.rglob("*") if found.is_file()}
    tables = [KINDS[ending] for ending in KINDS if ending in endings]
    return tables[0] if tables else "folder" if endings & set(ENDINGS) else None
