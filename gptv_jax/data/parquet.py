"""Images in Parquet files, as on the Hugging Face Hub, and in folders of `datasets.save_to_disk`.

An Arrow file is mapped into memory, so that a single row can be read. Parquet gives no access to a
single row: the column of images is read for the row group that holds the row, and a process keeps
the row groups that it read last.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import threading

from etils import epy

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.data import listing, shards
from gptv_jax.data.data_set import locate, starts
from gptv_jax.data.limits import DamagedImageError, as_damaged
from gptv_jax.data.listing import split_name, split_names
from gptv_jax.errors import InputError, as_input_error, shorten

with epy.lazy_imports():  # slow to import, and only these data sets need it
    import pyarrow
    from pyarrow import ipc, parquet, types

KEPT_BYTES = 2**29  # of row groups that a process keeps in memory
LARGEST_GROUP = 2**29  # bytes of a row group
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels")
# Row groups that were read last, the oldest first: a lock and, once they are read, [images, bytes].
_KEPT: collections.OrderedDict[tuple, tuple] = collections.OrderedDict()
_KEPT_LOCK = threading.Lock()


class Tables(shards.Shards):
    """A data set of tables with a column of image files and, where labelled, a column of labels.

    `config.path` is a Parquet or Arrow file, a folder of such files, a pattern (see `shards.find`),
    or a folder that `datasets.save_to_disk` made. The column of images is called image or img, or
    is the only one of its type: the bytes of an image file, alone or in a structure with "bytes".
    The column of labels is called label or labels, or is the only one with names of classes. Rows
    that are sorted by class are mixed, so that `train[:90%]` holds nine tenths of every class.
    """

    def __init__(self, config: config_lib.Data):
        path = listing.data_path(config, pattern=True)
        endings, kind = (".parquet", ".arrow"), "Parquet or Arrow"
        splits = _saved(path) or shards.find(path, endings, kind, "parquet")
        first = next(iter(splits.values()))[0]
        schema, features = _open(first).schema, _features(_open(first).schema)
        image = _image_column(schema, first)
        column = _label_column(schema, features, first) if config.labels else None
        needed = [schema.field(name) for name in (image, column) if name]
        parts = {split: _images(paths, needed) for split, paths in splits.items()}
        labels = column and {
            split: [label for file in paths for label in _labels(file, column)]
            for split, paths in splits.items()
        }
        names = tuple(features.get(column, {}).get("names", ()))
        where = f"column {column} of {first.parent}"
        super().__init__(parts, labels, names, where, config.ignore_label)


class _ArrowFile:
    """An Arrow file, mapped into memory; `datasets` writes Arrow's form of streams."""

    def __init__(self, path: pathlib.Path):
        with path.open("rb") as file:
            is_file = file.read(6) == b"ARROW1"
        source = pyarrow.memory_map(str(path))
        self.table = (ipc.open_file if is_file else ipc.open_stream)(source).read_all()
        self.schema, self.firsts = self.table.schema, starts([self.table.num_rows])
        self._checked: set[str] = set()  # names of columns

    def column(self, name: str, group: int | None = None) -> "pyarrow.ChunkedArray":
        """A column, whose rows lie inside the file; else reading a row would end the process."""
        column = self.table.column(name)
        if name not in self._checked:
            column.validate(full=True)  # reads where each row begins, not the images
            self._checked.add(name)
        return column


class _ParquetFile:
    """A Parquet file; `firsts` are the first rows of its row groups, see `data_set.starts`."""

    def __init__(self, path: pathlib.Path):
        self.path, self.footer = path, parquet.read_metadata(path)
        groups = [self.footer.row_group(i) for i in range(self.footer.num_row_groups)]
        self.firsts = starts(group.num_rows for group in groups)
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > LARGEST_GROUP:
            raise InputError(
                f"{path} has a row group of {largest / 2**20:,.1f} MiB, and a row group is read "
                f"whole for each image; write the table in row groups of 100 rows or so "
                "(pyarrow.parquet.write_table(table, path, row_group_size=100))."
            )
        self.schema = parquet.ParquetFile(path, metadata=self.footer).schema_arrow
        columns = (self.footer.schema.column(i) for i in range(len(self.footer.schema.names)))
        self.leaves = [each.path for each in columns if each.physical_type == "BYTE_ARRAY"]

    def column(self, name: str, group: int | None = None) -> "pyarrow.ChunkedArray":
        """A column of a row group, or of the whole file (None)."""
        # An image that several rows have, and that the file has once, is then in memory once.
        kept = [path for path in self.leaves if path.partition(".")[0] == name]
        file = parquet.ParquetFile(self.path, metadata=self.footer, read_dictionary=kept)
        table = file.read([name]) if group is None else file.read_row_group(group, [name])
        return table.column(name)


@functools.cache
def _file(path: pathlib.Path, changed: int) -> _ArrowFile | _ParquetFile:
    """The file as it was at the time `changed`."""
    return (_ArrowFile if path.suffix == ".arrow" else _ParquetFile)(path)


def _open(path: pathlib.Path) -> _ArrowFile | _ParquetFile:
    with as_input_error(f"{path} is damaged, or no Parquet or Arrow file"):
        return _file(path, path.stat().st_mtime_ns)


@dataclasses.dataclass(frozen=True)
class _Images:
    """The column of images of a file, as the file was at the time `changed`."""

    path: pathlib.Path
    changed: int
    column: str

    def __len__(self) -> int:
        return _file(self.path, self.changed).firsts[-1]

    def read(self, row: int) -> bytes:
        with as_damaged("its row group is damaged: "):
            group, place = locate(_file(self.path, self.changed).firsts, row)
            image = self._group(group)[place].as_py()
        image = image.get("bytes") if isinstance(image, dict) else image
        if image is None:
            raise DamagedImageError("the table holds no bytes of this image")
        return image

    def _group(self, number: int) -> "pyarrow.ChunkedArray":
        """The images of a row group, which is read once for all threads."""
        file = _file(self.path, self.changed)
        if isinstance(file, _ArrowFile):
            return file.column(self.column)
        group = (self, number)
        with _KEPT_LOCK:
            lock, read = _KEPT.setdefault(group, (threading.Lock(), []))
            _KEPT.move_to_end(group)
        with lock:
            if not read:
                images = file.column(self.column, number)
                with _KEPT_LOCK:
                    read += [images, images.nbytes]
                    kept = [(each, found[1]) for each, (_, found) in _KEPT.items() if found]
                    excess = sum(size for _, size in kept) - KEPT_BYTES
                    for oldest, size in kept[:-1]:
                        if excess > 0:
                            excess -= size
                            del _KEPT[oldest]
        return read[0]

    def name(self, row: int) -> str:
        return f"{self.path}[{row}]"


def _images(paths: list[pathlib.Path], needed: list) -> list[_Images]:
    """The images of a split; the first column that is `needed` has the images."""
    for path in paths:
        schema = _open(path).schema
        for column in needed:
            if column.name not in schema.names or schema.field(column.name).type != column.type:
                raise InputError(
                    f"{path} has no column {column.name} of the type {column.type}, which other "
                    "files of the data set have; name a folder of one data set."
                )
    found = [_Images(path, path.stat().st_mtime_ns, needed[0].name) for path in paths]
    if not sum(map(len, found)):
        raise InputError(f"{paths[0]} has no row; take the file away.")
    return [images for images in found if len(images)]


def _labels(path: pathlib.Path, column: str) -> list:
    with as_input_error(f"column {column} of {path} is damaged"):
        return _open(path).column(column).to_pylist()


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


def _label_column(schema, features: dict[str, dict], path: pathlib.Path) -> str | None:
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
