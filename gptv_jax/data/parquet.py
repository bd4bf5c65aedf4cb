"""Images in Parquet files, as on the Hugging Face Hub, and in folders of `datasets.save_to_disk`.

An Arrow file is mapped into memory, so that a single row can be read. Parquet gives no access to a
single row: the column of images is read for the row group that holds the row, and a process keeps
the row groups that it read last.
"""

import collections
import dataclasses
import functools
import itertools
import json
import pathlib
import threading

from etils import epy

from gptv_jax import files
from gptv_jax.data import shards
from gptv_jax.data.images import DamagedImageError
from gptv_jax.data.listing import split_name, split_names
from gptv_jax.errors import InputError, as_input_error, first_line, shorten

with epy.lazy_imports():  # slow to import, and only these data sets need it
    import pyarrow
    from pyarrow import ipc, parquet, types

KEPT_BYTES = 2**29  # of row groups that a process keeps in memory
LARGEST_GROUP = 2**29  # bytes of a row group
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels")


class Tables(shards.Shards):
    """A data set of tables with a column of image files and, where labelled, a column of labels.

    `path` is a Parquet or Arrow file, a folder of such files, a pattern (see `shards.find`), or a
    folder that `datasets.save_to_disk` made. The column of images is called image or img, or is the
    only one of its type: the bytes of an image file, alone or in a structure with "bytes". The
    column of labels is called label or labels, or is the only one with names of classes. Rows that
    are sorted by class are mixed, so that `train[:90%]` holds nine tenths of every class. Images
    with the label `ignore_label` are left out; `labels=False` ignores all labels.
    """

    def __init__(self, path: pathlib.Path, labels: bool = True, ignore_label: int | None = None):
        endings, kind = (".parquet", ".arrow"), "Parquet or Arrow"
        splits = _saved(path) or shards.find(path, endings, kind, "parquet")
        first = next(iter(splits.values()))[0]
        schema = _open(first)[0]
        image = _image_column(schema, first)
        column = _label_column(schema, first) if labels else None
        needed = [schema.field(name) for name in (image, column) if name]
        parts = {split: _row_groups(paths, needed) for split, paths in splits.items()}
        read = column and {
            s: [t for path in paths for t in _labels(path, column)] for s, paths in splits.items()
        }
        names = tuple(_features(schema).get(column, {}).get("names", ()))
        super().__init__(parts, read, names, f"column {column} of {first.parent}", ignore_label)


@dataclasses.dataclass(frozen=True)
class _RowGroup:
    """A row group of a file, as the file was at the time `changed`; an Arrow file is one."""

    path: pathlib.Path
    changed: int
    number: int
    first: int  # row of the file
    rows: int
    column: str  # of the images

    def __len__(self) -> int:
        return self.rows

    def read(self, row: int) -> bytes:
        try:
            image = _KEPT.read(self)[row].as_py()
        except Exception as error:  # pyarrow raises several types for damaged bytes
            raise DamagedImageError(f"its row group is damaged ({first_line(error)})") from error
        image = image.get("bytes") if isinstance(image, dict) else image
        if image is None:
            raise DamagedImageError("the table holds no bytes of this image")
        return image

    def name(self, row: int) -> str:
        return f"{self.path}[{self.first + row}]"


class _RowGroups:
    """The row groups that were read last; a row group is read once for all threads."""

    def __init__(self):
        self._lock, self._bytes = threading.Lock(), 0
        # The oldest first: a lock, and the column, once it is read.
        self._kept: collections.OrderedDict[_RowGroup, tuple] = collections.OrderedDict()

    def read(self, group: _RowGroup):
        """The images of a row group."""
        if group.path.suffix == ".arrow":
            return _mapped(group.path, group.changed).column(group.column)
        with self._lock:
            lock, read = self._kept.setdefault(group, (threading.Lock(), []))
            self._kept.move_to_end(group)
        with lock:
            if not read:
                footer = _footer(group.path, group.changed)
                file = parquet.ParquetFile(group.path, metadata=footer)
                columns = file.read_row_group(group.number, [group.column])
                read.append(columns.column(group.column))
                self._make_room(read[0].nbytes)
        return read[0]

    def _make_room(self, added: int) -> None:
        with self._lock:
            self._bytes += added
            for place in list(self._kept)[:-1]:
                if self._bytes > KEPT_BYTES and self._kept[place][1]:  # it is not being read
                    self._bytes -= self._kept.pop(place)[1][0].nbytes


_KEPT = _RowGroups()


@functools.cache
def _mapped(path: pathlib.Path, changed: int) -> "pyarrow.Table":
    """The table of an Arrow file, mapped into memory; `datasets` writes Arrow's form of streams."""
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
    source = pyarrow.memory_map(str(path))
    return (ipc.open_file if is_file else ipc.open_stream)(source).read_all()


@functools.cache
def _footer(path: pathlib.Path, changed: int) -> "parquet.FileMetaData":
    return parquet.read_metadata(path)


def _open(path: pathlib.Path) -> tuple["pyarrow.Schema", list[int]]:
    """The columns of a file and the number of rows of each row group; Arrow files have one."""
    with as_input_error(f"{path} is damaged, or no Parquet or Arrow file"):
        changed = path.stat().st_mtime_ns
        if path.suffix == ".arrow":
            table = _mapped(path, changed)
            return table.schema, [table.num_rows]
        footer = _footer(path, changed)
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


def _row_groups(paths: list[pathlib.Path], needed: list) -> list[_RowGroup]:
    """The row groups of a split; the first column that is `needed` has the images."""
    found = []
    for path in paths:
        schema, groups = _open(path)
        for column in needed:
            if column.name not in schema.names or schema.field(column.name).type != column.type:
                raise InputError(
                    f"{path} has no column {column.name} of the type {column.type}, which other "
                    "files of the data set have; name a folder of one data set."
                )
        firsts = itertools.accumulate(groups, initial=0)
        found += [
            _RowGroup(path, path.stat().st_mtime_ns, number, first, rows, needed[0].name)
            for number, (first, rows) in enumerate(zip(firsts, groups, strict=False))
            if rows
        ]
    if not found:
        raise InputError(f"{paths[0]} has no row; take the file away.")
    return found


def _labels(path: pathlib.Path, column: str) -> list:
    with as_input_error(f"column {column} of {path} is damaged"):
        if path.suffix == ".arrow":
            return _mapped(path, path.stat().st_mtime_ns).column(column).to_pylist()
        return parquet.ParquetFile(path).read([column]).column(column).to_pylist()


def _features(schema) -> dict[str, dict]:
    """What `datasets` stores of the columns: {"label": {"_type": "ClassLabel", "names": ...}}."""
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
        needs = "one column of image files, called image: bytes, or a structure with bytes"
        raise InputError(f"{path} needs {needs}; its columns are {shown}.")
    return (named or found)[0]


def _label_column(schema, path: pathlib.Path) -> str | None:
    features = _features(schema)
    found = [name for name in schema.names if name.lower() in LABEL_COLUMNS]
    found = found or [n for n in schema.names if features.get(n, {}).get("_type") == "ClassLabel"]
    if len(found) > 1:
        problem = f"{path} has {len(found)} columns of labels, {shorten(found)}"
        advice = "call the one to learn label, or ignore all labels by config.data.labels=False"
        raise InputError(f"{problem}; {advice}.")
    return found[0] if found else None


def _saved(path: pathlib.Path) -> dict[str, list[pathlib.Path]] | None:
    """The files by split of a folder of `datasets.save_to_disk`; None for any other path."""
    splits = files.read_json(path / "dataset_dict.json", {}).get("splits")
    if splits is None and not (path / "state.json").exists():
        return None
    found, own = {}, split_names(splits or ())
    for folder in [path / split for split in splits] if splits else [path]:
        state = files.read_json(folder / "state.json", {})
        with as_input_error(f"{folder} is no whole folder of datasets.save_to_disk"):
            alone = state.get("_split") or "train"
            split = own[folder.name] if splits else split_name(alone) or alone
            paths = [folder / entry["filename"] for entry in state["_data_files"]]
        if missing := [path for path in paths if not path.exists()]:
            raise InputError(f"{folder} is incomplete: {missing[0]} does not exist.")
        found[split] = paths
    return found
