"""Data sets that lie in a few large files, whose names say which split each file belongs to.

WebDataset's tar files are such files; Parquet and Arrow files are read in data/parquet.py.
"""

import glob
import json
import os
import pathlib
import re
import tarfile

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import labels as labels_lib
from gptv_jax.data import limits, listing
from gptv_jax.data.arrays import ArraysSplit
from gptv_jax.data.data_set import SPLITS, DataSet, locate, spread_classes, starts
from gptv_jax.data.listing import split_name, split_of
from gptv_jax.errors import InputError, as_input_error

# Endings of images, in the order of preference where an example has several.
ENDINGS = (*listing.ENDINGS, ".avif", ".jp2")
LABELS = ("cls", "json")
JSON_LABELS = ("label", "cls", "class_id", "class")  # keys of a label in .json
MOST_LABEL = 2**20  # bytes of a file with a label
NAMES = "classnames.txt"  # beside the shards, a name a line
_NUMBERED = re.compile(r"([A-Za-z]\w*)-\d+-of-\d+(-[0-9a-f]+)?")  # unlabeled-00000-of-00005
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find(
    path: pathlib.Path, endings: tuple[str, ...], kind: str, name: str | None = None
) -> dict[str, list[pathlib.Path]]:
    """The files of each split, sorted: `{"train": [...], "test": [...]}`.

    `path` is a file, a folder, or a pattern such as `shards/train-{000000..000009}.tar` or
    `shards/*.tar`. A file's split is a name of a split in the file's name or in the name of a
    folder above it; where no file has one, all files are the split train. `kind` is for messages,
    `name` the `config.data.name` that reads these files. Raises InputError where there is no file,
    where only some files name a split, or where a split lies in several folders, so data sets.
    """
    given = f"config.data.path={path}"
    files, root = _list(path, endings)
    if not files:
        advice = listing.of_folder(path, name) if path.is_dir() else None
        found = advice or f"{path} has no {kind} file ({' or '.join(endings)})."
        raise InputError(f"config.data.path={found}")
    names = {file: file.name.partition(".")[0] for file in files}
    splits = {f: split_of(f.relative_to(root).parent / name) for f, name in names.items()}
    if not any(splits.values()):
        splits = dict.fromkeys(files, "train")
    found: dict[str, list[pathlib.Path]] = {}
    for file, split in splits.items():
        other = _NUMBERED.fullmatch(names[file])  # a split of another name
        if not split and not other:
            problem = f"{given} has files that name a split, and {file.name}, which names none"
            advice = f"name its split, as in train-{file.name}, or take the file away"
            raise InputError(f"{problem}; {advice}.")
        found.setdefault(split or other[1], []).append(file)
    for split, members in found.items():
        folders = sorted({str(file.parent.relative_to(root)) for file in members})
        if len(folders) > 1:
            raise InputError(
                f"{given} has files of the split {split} in {len(folders)} folders, {folders[0]} "
                f"and {folders[1]} among them; name one of these folders by config.data.path."
            )
    order = (*SPLITS, *sorted(found))
    return {split: found[split] for split in sorted(found, key=order.index)}


def _list(path: pathlib.Path, endings: tuple[str, ...]) -> tuple[list[pathlib.Path], pathlib.Path]:
    """The sorted files that `path` names, and the folder that their names are relative to."""
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        hidden = re.compile(r"(^|/)[._]")
        found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(endings))
        return [f for f in found if not hidden.search(f.relative_to(path).as_posix())], path
    found = sorted(
        {pathlib.Path(name) for text in _expand(str(path)) for name in glob.glob(text) or [text]}
    )
    for file in found:
        if not file.is_file():
            raise InputError(f"config.data.path={path}: {file} does not exist.")
    return found, pathlib.Path(os.path.commonpath([file.parent for file in found]))


def _expand(pattern: str) -> list[str]:
    """The patterns that one with ranges such as {000..009} stands for."""
    if not (span := _RANGE.search(pattern)):
        return [pattern]
    numbers = [f"{n:0{len(span[1])}}" for n in range(int(span[1]), int(span[2]) + 1)]
    before, after = pattern[: span.start()], _expand(pattern[span.end() :])
    return [before + number + rest for number in numbers for rest in after]


class Shards(DataSet):
    """A data set of image files in parts; rows that are sorted by class are mixed.

    A part has some of a split's images: its length, `read(row)`, the bytes of an image file, and
    `name(row)`.
    """

    def __init__(
        self,
        parts: dict[str, list],
        labels: dict[str, list] | None,
        names: tuple[str, ...],
        where: str,
        ignore_label: int | None,
    ):
        """Takes the parts and the labels of each split, which are stored at `where`.

        The labels are whole numbers, which `names` may name, or texts, and are numbered by
        `labels.number`, like the labels of arrays. A split without any label (only -1 or None, as
        in test splits whose labels are kept secret) is left out, with a note. Raises InputError
        where labels are of mixed or other types, only some are missing, or one has no name.
        """
        self.notes = []
        # As the names of files and folders call the splits.
        self.other_names = {
            word: split
            for split, found in parts.items()
            for word in {w for part in found for w in re.split(r"[\W\d_]+", part.name(0))}
            if split_name(word) == split
        }
        rows = {split: np.arange(sum(map(len, found))) for split, found in parts.items()}
        numbers = {}
        if labels is not None:
            vectors = self._vectors(labels, where, ignore_label)
            rows, numbers, self.classes, self.class_names = labels_lib.number(
                vectors, ignore_label, self.notes, names
            )
        for split, given in numbers.items():
            # Rows are sorted where the label changes less than half as often as at random.
            shares = np.bincount(given) / len(given)
            expected = (1 - np.square(shares).sum()) * (len(given) - 1)
            if np.count_nonzero(np.diff(given)) < expected / 2:
                order = spread_classes(given)
                rows[split], numbers[split] = rows[split][order], given[order]
        self.splits = {s: _Split(parts[s], kept, numbers.get(s)) for s, kept in rows.items()}

    def _vectors(
        self, found: dict[str, list], where: str, ignore_label: int | None
    ) -> dict[str, np.ndarray]:
        """The labels [N] of the splits that have any, as whole numbers or texts."""
        advice = "ignore all labels by config.data.labels=False"
        kinds = {type(label) for labels in found.values() for label in labels} - {type(None)}
        if not (kinds <= {int, float, bool} or kinds == {str}):
            problem = f"{where} holds {', '.join(sorted(kind.__name__ for kind in kinds))}"
            raise InputError(f"{problem}; it must hold whole numbers or texts; {advice}.")
        absent, vectors = "-1" if kinds == {str} else -1, {}
        for split, labels in found.items():
            filled = [absent if t is None or t != t else t for t in labels]  # NaN is not itself
            vector = labels_lib.as_vector(split, np.array(filled), len(labels))
            missing = np.count_nonzero(vector == absent)
            if missing == len(labels):
                note = f"the split {split} is left out: {where} holds no label"
                self.notes.append(f"{note}; or {advice}")
                continue
            if missing and ignore_label != -1:
                raise InputError(
                    f"{where} holds no label (-1 or nothing) in {missing} of {len(labels)} rows of "
                    f"split {split}; config.data.ignore_label=-1 leaves these rows out, or "
                    f"{advice}."
                )
            vectors[split] = vector
        if not vectors:
            raise InputError(f"{where} holds no label at all; {advice}.")
        return vectors


class _Split(ArraysSplit):
    """The images `rows`, int [N], of parts that are numbered throughout, and their labels."""

    key = "encoded"

    def __init__(self, parts: list, rows: np.ndarray, labels: np.ndarray | None):
        super().__init__("", rows, labels)
        self.parts, self._firsts = parts, starts(map(len, parts))

    def content(self, index: int) -> bytes:
        part, row = self._locate(index)
        return part.read(row)

    def name(self, index: int) -> str:
        part, row = self._locate(index)
        return part.name(row)

    def _locate(self, index: int) -> tuple:
        part, row = locate(self._firsts, int(self.images[index]))
        return self.parts[part], row


class WebDataset(Shards):
    """The images of tar files, in which the files of one example have one name and several endings.

    A pass over the headers of the tar files finds where every image lies. Tar does not compress, so
    that an image is then read alone, in any order. `config.path` is as in `find`.

    The files of an example are `NAME.jpg`, `NAME.cls`, ...; the ending begins at the first dot. The
    label is the content of .cls, a whole number or a text, or in .json a field of `JSON_LABELS`.
    Other files, such as captions in .txt, are not read. Examples stay in the order of the shards,
    unless they are sorted by class; then they are mixed.
    """

    def __init__(self, config: config_lib.Data):
        path = listing.data_path(config, pattern=True)
        splits, parts = find(path, (".tar",), "tar", "webdataset"), {}
        for split, paths in splits.items():
            parts[split] = [s for p in paths if len(s := _Shard(p, config.labels, config.limits))]
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

    def __init__(self, path: pathlib.Path, labels: bool, given: config_lib.Limits):
        self.path, self.limits = path, given
        problem = f"{path} is damaged, compressed, or no tar file"
        with as_input_error(problem, (OSError, tarfile.TarError)), tarfile.open(path, "r:") as tar:
            examples = self._read(tar, labels)
        self.keys = list(examples)
        self.places = np.array([f["image"] for f in examples.values()], np.int64).reshape(-1, 2)
        self.labels = [self._label(key, files) for key, files in examples.items()]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, row: int) -> bytes:
        return limits.read(self.path, self.limits, *self.places[row].tolist())

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
                    if member.size > MOST_LABEL:
                        problem = f"the label {member.name} in {self.path} has {member.size} bytes"
                        advice = f"it may have {MOST_LABEL}; or set config.data.labels=False"
                        raise InputError(f"{problem}; {advice}.")
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
