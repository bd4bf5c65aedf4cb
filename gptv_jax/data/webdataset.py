"""WebDataset: tar files in which the files of one example have one name and several endings.

A pass over the headers of the tar files, made when the data set is opened, finds where every image
lies. Tar does not compress, so that an image is then read alone, in any order.
"""

import json
import pathlib
import tarfile

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import guess, listing, shards
from gptv_jax.data.images import DamagedImageError
from gptv_jax.errors import InputError, as_input_error

# Endings of images, in the order of preference where an example has several.
ENDINGS = (*listing.ENDINGS, ".avif", ".jp2")
LABELS = ("cls", "json")
JSON_LABELS = ("label", "cls", "class_id", "class")  # keys of a label in .json
NAMES = "classnames.txt"  # beside the shards, a name a line


class WebDataset(shards.Shards):
    """The images of tar files; `config.path` as in `shards.find`.

    The files of an example are `NAME.jpg`, `NAME.cls`, ...; the ending begins at the first dot. The
    label is the content of .cls, a whole number or a text, or in .json a field of `JSON_LABELS`.
    Other files, such as captions in .txt, are not read. Examples stay in the order of the shards,
    unless they are sorted by class; then they are mixed.
    """

    def __init__(self, config: config_lib.Data):
        path = guess.data_path(config, pattern=True)
        splits, parts = shards.find(path, (".tar",), "tar", "webdataset"), {}
        for split, paths in splits.items():
            parts[split] = [shard for p in paths if len(shard := _Shard(p, config.labels))]
            if not parts[split]:
                shown = ", ".join(ENDINGS[:4])
                problem = f"{paths[0]} has no image (no file ending in {shown}, ...)"
                raise InputError(f"{problem}; a WebDataset's tar files hold image files.")
        read = {s: [t for shard in found for t in shard.labels] for s, found in parts.items()}
        labelled = any(label is not None for found in read.values() for label in found)
        file = (path if path.is_dir() else path.parent) / NAMES
        names = tuple(file.read_text().splitlines()) if labelled and file.exists() else ()
        where = f".cls or .json of {path}"
        super().__init__(parts, read if labelled else None, names, where, config.ignore_label)


class _Shard:
    """Where the images of a tar file lie, and their labels as they are stored."""

    def __init__(self, path: pathlib.Path, labels: bool):
        self.path = path
        problem = f"{path} is damaged, compressed, or no tar file"
        with as_input_error(problem, (OSError, tarfile.TarError)), tarfile.open(path, "r:") as tar:
            examples = self._read(tar, labels)
        self.keys = list(examples)
        self.places = np.array([f["image"] for f in examples.values()], np.int64).reshape(-1, 2)
        self.labels = [self._label(key, files) for key, files in examples.items()]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, row: int) -> bytes:
        place, size = self.places[row].tolist()
        with self.path.open("rb") as file:
            file.seek(place)
            image = file.read(size)
        if len(image) < size:
            raise DamagedImageError("the tar file has become shorter")
        return image

    def name(self, row: int) -> str:
        return f"{self.path}:{self.keys[row]}"

    def _read(self, tar: tarfile.TarFile, labels: bool) -> dict[str, dict]:
        """The place of each example's image, [offset, size], and the files with labels."""
        examples: dict[str, dict] = {}
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            key, _, ending = name.partition(".")
            if member.isfile() and key:
                files = examples.setdefault(folder + slash + key, {})
                if f".{ending.lower()}" in ENDINGS:
                    files[f".{ending.lower()}"] = (member.offset_data, member.size)
                elif labels and ending in LABELS:
                    files[ending] = tar.extractfile(member).read()
        # The library takes a header that it cannot read for the end, which has zeros.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"unreadable from byte {tar.offset} on")
        for files in examples.values():
            files["image"] = next((files[ending] for ending in ENDINGS if ending in files), None)
        return {key: files for key, files in examples.items() if files["image"]}

    def _label(self, key: str, files: dict) -> object:
        with as_input_error(f"the label of {key} in {self.path} is damaged", ValueError):
            if "cls" in files:
                text = files["cls"].decode().strip()
                return int(text) if text.lstrip("-").isdecimal() else text or None
            fields = json.loads(files.get("json", b"{}"))
            found = fields if isinstance(fields, dict) else {}
            return next((found[name] for name in JSON_LABELS if name in found), None)
