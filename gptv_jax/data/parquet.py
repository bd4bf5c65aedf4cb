"""Images in Parquet files, as on the Hugging Face Hub, and in folders of `datasets.save_to_disk`.

An Arrow file is mapped into memory, and a row of it is read alone. Parquet gives no access to a
single row: the column of images is read for the row group that holds the row, and a process keeps
the row groups that it read last.
"""

import bisect
import collections
import functools
import itertools
import json
import pathlib
import threading

import numpy as np
from etils import epy

from gptv_jax import files
from gptv_jax.data import shards
from gptv_jax.data.images import DamagedImageError
from gptv_jax.errors import InputError, as_input_error, first_line

with epy.lazy_imports():  # slow to import, and only these data sets need it
    import pyarrow
    from pyarrow import ipc, parquet, types

KEPT_BYTES = 2**29  # of row groups that a process keeps in memory
LARGEST_GROUP = 2**29  # bytes of a row group
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels")


class Tables:
    """A data set of tables with a column of image files and, where labelled, a column of labels.

    `path` is a Parquet or Arrow file, a folder of such files, a pattern (see `shards.find`), or a
    folder that `datasets.save_to_disk` made. The column of images is called image or img, or is the
    only one of its type: the bytes of an image file, alone or in a structure with "bytes". The
    column of labels is called label or labels, or is the only one with names of classes. Rows that
    are sorted by class are mixed, so that `train[:90%]` holds nine tenths of every class.
    """

    stored_as = "encoded"

    def __init__(self, path: pathlib.Path, labels: bool = True):
        """Reads the labels but no image; `labels=False` makes the data set unlabelled."""
        splits = _saved(path) or shards.find(path, (".parquet", ".arrow"), "Parquet or Arrow")
        first = next(iter(splits.values()))[0]
        schema = _open(first)[0]
        self._column = _image_column(schema, first)
        column = _label_column(schema, first) if labels else None
        needed = [schema.field(name) for name in (self._column, column) if name]
        self._rows = {split: _count(paths, needed) for split, paths in splits.items()}
        self.class_names, self.classes, self._labels = (), 0, {}
        if column:
            read = {s: [t for path in paths for t in _labels(path, column)]
                    for s, paths in splits.items()}  # fmt: skip
            names = tuple(_features(schema).get(column, {}).get("names", ()))
            where = f"column {column} of {first.parent}"
            self.class_names, self.classes, self._labels = shards.number_labels(read, names, where)
            self._rows = {split: self._rows[split] for split in self._labels}
        self.lengths = {s: sum(rows for _, _, rows in groups) for s, groups in self._rows.items()}

    def open(self, split: str) -> "_TablesSplit":
        return _TablesSplit(self._rows[split], self._column, self._labels.get(split))


class _TablesSplit:
    def __init__(self, groups: list[tuple], column: str, labels: np.ndarray | None):
        """Takes the path, the number and the number of rows of every row group, in order."""
        self.groups, self.column = groups, column
        self._ends = list(itertools.accumulate(rows for _, _, rows in groups))
        self._order = None if labels is None else shards.mixed(labels)
        self.labels = labels if self._order is None else labels[self._order]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict:
        path, group, row = self._locate(index)
        try:
            images = _KEPT.read(path, group, self.column)
            image = images[row].as_py()
        except Exception as error:  # pyarrow raises several types for damaged bytes
            raise DamagedImageError(f"its row group is damaged ({first_line(error)})") from error
        image = image.get("bytes") if isinstance(image, dict) else image
        if image is None:
            raise DamagedImageError("the table holds no bytes of this image")
        if self.labels is None:
            return {"image": image}
        return {"image": image, "label": self.labels[index]}

    def name(self, index: int) -> str:
        path, group, row = self._locate(index)
        before = sum(rows for p, g, rows in self.groups if p == path and g < group)
        return f"{path}[{before + row}]"

    def _locate(self, index: int) -> tuple[pathlib.Path, int, int]:
        """The path, the row group, and the row in the row group."""
        number = index if self._order is None else int(self._order[index])
        part = bisect.bisect_right(self._ends, number)
        path, group, rows = self.groups[part]
        return path, group, number - self._ends[part] + rows


class _RowGroups:
    """The row groups that were read last; threads that need the same one wait for one reading."""

    def __init__(self):
        self._lock, self._bytes = threading.Lock(), 0
        # By place, the oldest first: a lock, and the column, once it is read.
        self._kept: collections.OrderedDict[tuple, tuple] = collections.OrderedDict()

    def read(self, path: pathlib.Path, group: int, column: str):
        """The column's values in a row group; an Arrow file is one row group."""
        if path.suffix == ".arrow":
            return _mapped(path).column(column)
        place = (path, group, column)
        with self._lock:
            lock, read = self._kept.setdefault(place, (threading.Lock(), []))
            self._kept.move_to_end(place)
        with lock:
            if not read:
                file = parquet.ParquetFile(path, metadata=_footer(path))
                read.append(file.read_row_group(group, [column]).column(column))
                self._make_room(read[0].nbytes)
        return read[0]

    def _make_room(self, added: int) -> None:
        with self._lock:
            self._bytes += added
            for place in list(self._kept)[:-1]:
                if self._bytes <= KEPT_BYTES:
                    break
                if self._kept[place][1]:  # it is not being read
                    self._bytes -= self._kept.pop(place)[1][0].nbytes


_KEPT = _RowGroups()


@functools.cache
def _mapped(path: pathlib.Path) -> "pyarrow.Table":
    """The table of an Arrow file, mapped into memory; `datasets` writes Arrow's form of streams."""
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
    source = pyarrow.memory_map(str(path))
    return (ipc.open_file if is_file else ipc.open_stream)(source).read_all()


@functools.cache
def _footer(path: pathlib.Path) -> "parquet.FileMetaData":
    return parquet.read_metadata(path)


def _open(path: pathlib.Path) -> tuple["pyarrow.Schema", list[int]]:
    """The columns of a file and the number of rows of each row group; Arrow files have one."""
    with as_input_error(f"{path} is damaged, or no Parquet or Arrow file"):
        if path.suffix == ".arrow":
            return _mapped(path).schema, [_mapped(path).num_rows]
        footer = _footer(path)
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > LARGEST_GROUP:
            raise InputError(
                f"{path} has a row group of {largest / 2**20:,.1f} MiB, and a row group is read "
                f"whole for each image; write the table in row groups of 100 rows or so "
                "(pyarrow.parquet.write_table(table, path, row_group_size=100))."
            )
        schema = parquet.ParquetFile(path, metadata=footer).schema_arrow
        return schema, [group.num_rows for group in groups]


def _count(paths: list[pathlib.Path], needed: list) -> list[tuple]:
    """The path, the number and the number of rows of every row group of a split.

    InputError: a file lacks one of the columns `needed` or has another type there, or the split is
    empty.
    """
    found = []
    for path in paths:
        schema, groups = _open(path)
        for column in needed:
            if column.name not in schema.names or schema.field(column.name).type != column.type:
                raise InputError(
                    f"{path} has no column {column.name} of the type {column.type}, which other "
                    "files of the data set have; name a folder of one data set."
                )
        found += [(path, number, rows) for number, rows in enumerate(groups) if rows]
    if not found:
        raise InputError(f"{paths[0]} has no row; take the file away.")
    return found


def _labels(path: pathlib.Path, column: str) -> list:
    with as_input_error(f"column {column} of {path} is damaged"):
        if path.suffix == ".arrow":
            return _mapped(path).column(column).to_pylist()
        return parquet.ParquetFile(path).read([column]).column(column).to_pylist()


def _features(schema) -> dict[str, dict]:
    """What `datasets` has stored of each column: {"label": {"_type": "ClassLabel", "names": ...}}.

    Empty for the files of other programs.
    """
    stored = (schema.metadata or {}).get(b"huggingface", b"{}")
    with as_input_error("the columns' description, in the file's metadata, is damaged"):
        return json.loads(stored).get("info", {}).get("features", {})


def _image_column(schema, path: pathlib.Path) -> str:
    def holds_bytes(kind) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return types.is_binary(kind) or types.is_large_binary(kind)

    found = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in found if name.lower() in IMAGE_COLUMNS]
    if len(named or found) != 1:
        shown = ", ".join(f"{field.name} ({str(field.type)[:30]})" for field in list(schema)[:5])
        raise InputError(
            f"{path} needs one column of image files, called image: bytes, or a structure with "
            f"bytes; its columns are {shown}."
        )
    return (named or found)[0]


def _label_column(schema, path: pathlib.Path) -> str | None:
    features = _features(schema)
    found = [name for name in schema.names if name.lower() in LABEL_COLUMNS]
    found = found or [n for n in schema.names if features.get(n, {}).get("_type") == "ClassLabel"]
    if len(found) > 1:
        raise InputError(
            f"{path} has {len(found)} columns of labels, {', '.join(found[:5])}; call the one to "
            "learn label, or ignore all labels by config.data.labels=False."
        )
    return found[0] if found else None


def _saved(path: pathlib.Path) -> dict[str, list[pathlib.Path]] | None:
    """The files by split of a folder of `datasets.save_to_disk`; None for any other path."""
    splits = files.read_json(path / "dataset_dict.json", {}).get("splits")
    if splits is None and not (path / "state.json").exists():
        return None
    found = {}
    for folder in [path / split for split in splits] if splits else [path]:
        state = files.read_json(folder / "state.json", {})
        with as_input_error(f"{folder} is no whole folder of datasets.save_to_disk"):
            split = folder.name if splits else state.get("_split") or "train"
            paths = [folder / entry["filename"] for entry in state["_data_files"]]
        if missing := [path for path in paths if not path.exists()]:
            raise InputError(f"{folder} is incomplete: {missing[0]} does not exist.")
        found[shards.SPLIT_OF.get(split.lower(), split)] = paths
    return found
