"""The token cache: a data set stored as tokens, one ArrayRecord file for each split.

A token cache is a folder with

    header.json              how the tokens were made and which fields a record has
    palette.npz              the colours, where tokens are colours
    tokenizer.safetensors    the encoder and decoder, where tokens are learned codes
    <split>.array_record     one record for each example

A record is a NumPy structured scalar, deflated (zlib): `header["fields"]` lists the name, type and
shape of each of its arrays. In format 3, for images with boxes or label maps, a structured scalar
for each object follows, with the fields of `header["objects"]`; boxes are in pixels of the image
after the transforms, and `view` is the part of the original that the image shows. Last comes the
image's id, number or text, as JSON of `id_bytes` bytes. In format 4, a teacher's draws follow the
first structured scalar, see `teacher_draws.Packing`; `header["teacher"]` has the fields of
`teacher_draws.Taught`.

Before tokens are stored, they are renumbered so that tokens that look alike have neighbouring
numbers; a record holds the low byte of these numbers in `low` and each higher bit as one plane of
`high`. Of CIFAR-10 this makes records smaller than zstd or brotli over the tokens. ArrayRecord
finds a record by its number, and checks its bytes when it is read.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shlex
import zlib
from collections.abc import Iterable

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Int, UInt8, UInt16

from gptv_jax import config as config_lib
from gptv_jax import files, tokens
from gptv_jax.config import fields
from gptv_jax.config.data import image_size
from gptv_jax.data.data_set import DataSet, Source
from gptv_jax.data.records import OBJECTS, Record, to_original
from gptv_jax.data.teacher_draws import DISTINCT, DRAWS, Packing, Taught
from gptv_jax.errors import InputError, as_input_error, first_line, naming, shorten

# Formats of the folder: images and labels, what lies in the images as well, and with a teacher's
# draws.
FORMATS = PLAIN, ANNOTATED, TAUGHT = 2, 3, 4
UNFINISHED = ".unfinished"  # a file in the folder until all is written
# Patterns of all files that making a cache may leave in the folder; a kill leaves temporary ones.
NAMES = ("header.json", *(name for name, *_ in tokens.DEFINITIONS.values()))
DRAWN = ".drawn-*"  # files with a teacher's draws, until the cache is finished
WRITTEN = (
    *NAMES, *(f".{name}.tmp" for name in NAMES), "*.array_record", "skipped*.jsonl",
    UNFINISHED, files.LOCK, DRAWN, f".{DRAWN}.tmp",
)  # fmt: skip
# Eight records share one checksum and header: 46 bytes a record less than alone, read as quickly.
WRITER_OPTIONS = "group_size:8,uncompressed"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # as ArrayRecord advises for shuffling


def claim(folder: pathlib.Path, holder: object = None) -> None:
    """Makes the folder, and locks it while there is a `holder`.

    The files of a cache that was not finished are deleted, a teacher's draws apart. InputError
    where the folder cannot be written to, or holds anything else.
    """
    files.claim(folder, "--out")
    left = _left_over(folder)  # before the lock, which adds a file to the folder
    if holder is not None:
        files.lock(folder, "--out", holder)
        left = _left_over(folder, files.LOCK)
    (folder / UNFINISHED).touch()
    for path in left:
        if path.name not in (UNFINISHED, files.LOCK) and not path.match(DRAWN):
            path.unlink()


def _left_over(folder: pathlib.Path, *ignored: str) -> list[pathlib.Path]:
    """The files of a cache that was not finished; InputError where the folder holds others."""
    found = [path for path in folder.iterdir() if path.name not in ignored]
    begun = folder / UNFINISHED in found
    others = [p.name for p in found if p.is_dir() or not any(map(p.match, WRITTEN))]
    if found and (others or not begun):
        advice = f", or move {shorten(others)} to another place" if begun else ""
        raise InputError(f"--out={folder} is not empty; name a new folder{advice}.")
    return found


def write(
    folder: pathlib.Path, codec: tokens.Codec, splits: dict[str, Iterable[dict]], header: dict
) -> None:
    """Writes every split into an empty folder (see `claim`), then the header.

    Examples are records with the codec's "tokens", int32 [T], and "label" if labelled; boxes and
    what belongs to them, masks apart, and label maps are kept. The header has "source", "tokens"
    (the fields of `config.Tokens`), "image_size", "transforms", "classes", "class_names",
    "object_names" if there are boxes, "map_names" if there are label maps, and whatever else should
    be recorded. With a `Taught` as "teacher", examples have `Draws` as well.
    """
    planes, lengths, taught, most = _TokenPlanes(codec), {}, header.get("teacher"), 0
    packing = taught and Packing(planes.length, codec.vocabulary, taught.samples)
    plain = planes.fields + [("label", "<i4", ())] * bool(header["classes"])
    plain += packing.fields if taught else []
    record, objects = np.dtype(plain), np.dtype([])
    for split, examples in splits.items():
        lengths[split] = 0
        path = str(folder / f"{split}.array_record")
        with naming(path), contextlib.closing(ArrayRecordWriter(path, WRITER_OPTIONS)) as writer:
            for example in examples:
                if not sum(lengths.values()) and {"boxes", "segmentation"} & set(example):
                    maps = {n: example[n] for n in ("view", "segmentation") if n in example}
                    record = np.dtype([*plain, *_fields(maps), ("id_bytes", "<u4", ())])
                    kept = {n: example[n][:0] for n in OBJECTS if n in example and n != "masks"}
                    objects = np.dtype([(n, kind, shape[1:]) for n, kind, shape in _fields(kept)])
                name = json.dumps(example.get("image_id")).encode()
                values = example | planes.split(example["tokens"]) | {"id_bytes": len(name)}
                draws = b""
                if taught:
                    field, draws = packing.split(example[DRAWS])
                    values, most = values | field, max(most, int(field[DISTINCT].max()))
                packed = np.array(tuple(values[name] for name in record.names), record).tobytes()
                packed += draws
                if objects.names:
                    rows = zip(*(example[name] for name in objects.names), strict=True)
                    packed += np.array(list(rows), objects).tobytes()
                if "id_bytes" in record.names:
                    packed += name
                # Raw deflate, without zlib's own header and checksum.
                writer.write(zlib.compress(packed, 9, -zlib.MAX_WBITS))
                lengths[split] += 1
    tokens.save_definition(codec.definition, folder)
    listed = {"fields": record, "objects": objects}
    stored = {k: [[n, d[n].base.str, d[n].shape] for n in d.names or ()] for k, d in listed.items()}
    if len(record) == len(plain) and not objects.names:
        del stored["objects"]
    made = {"format": ANNOTATED if "objects" in stored else PLAIN, "lengths": lengths, **stored}
    if taught:
        made["format"] = TAUGHT
        header = header | {"teacher": dataclasses.asdict(taught) | {"distinct": most}}
    files.write_json(folder / "header.json", made | header)
    for path in (folder / UNFINISHED, *folder.glob(DRAWN)):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # Windows keeps an open file
        (folder / files.LOCK).unlink()


class TokenCache(DataSet):
    """A folder of `write`; any other folder raises InputError."""

    def __init__(self, folder: pathlib.Path):
        self.folder, path = folder, folder / "header.json"
        absent = f"{folder} is no token cache: gptv_jax.prepare writes its header.json last"
        damaged = as_input_error(f"{path} is damaged", (KeyError, TypeError, ValueError))
        with damaged, as_input_error(absent, OSError):
            header = json.loads(path.read_text())
            self.classes: int = header["classes"]
            self.class_names = tuple(header.get("class_names", ()))  # absent in older caches
            self.lengths: dict[str, int] = header["lengths"]
            settings = config_lib.recorded(config_lib.Tokens, header["tokens"], "tokens")
            self.tokens = fields.from_dict(config_lib.Tokens, settings, "tokens")
            self.image_size = image_size(*np.broadcast_to(header["image_size"], 2).tolist())
            self.frames = int(header.get("frames", 0))  # older caches are of images
            self.stride = int(header.get("frame_stride", 1))
            self.videos = self.frames > 0
            self.transforms: tuple[str, ...] = tuple(header["transforms"])
            if header["format"] not in FORMATS:
                raise InputError(
                    f"{folder} is a token cache of format {header['format']}, but this version of "
                    f"gptv_jax reads format {FORMATS[0]} to {FORMATS[-1]}. Make it anew, FILE "
                    f"being your configuration: {self._command(header['source'])}"
                )
            self.taught = None  # without a teacher's draws
            if header["format"] == TAUGHT:
                given = header["teacher"]
                lists = {name: tuple(given[name]) for name in ("names", "digests")}
                self.taught = Taught(**given | lists)
            listed = header["fields"], header.get("objects", ())
            self.record, self.objects = (
                np.dtype([(n, kind, tuple(s)) for n, kind, s in each]) for each in listed
            )
            self.keys = tuple(n for n in ("segmentation",) if n in self.record.names)
            self.object_names = tuple(header.get("object_names", ()))
            self.object_ids = tuple(header.get("object_ids", ()))
            self.map_names = tuple(header.get("map_names", ()))

    def _command(self, source: dict) -> str:
        """The command that makes this cache anew, with the palette or tokenizer of this folder."""
        settings = {f"data.{name}": value for name, value in source.items() if value is not None}
        settings |= {"data.image_size": self.image_size, "data.eval_transforms": self.transforms}
        if self.frames:
            settings |= {"data.frames": self.frames, "data.frame_stride": self.stride}
        settings |= {name: value for name, value, _ in self.tokens.pairs(self.tokens)}
        if not self.classes:
            settings["data.labels"] = False
        if self.tokens.kind in tokens.DEFINITIONS:
            field = {"palette": "tokens.palette", "learned": "tokens.tokenizer"}[self.tokens.kind]
            settings[field] = str(self.folder / tokens.DEFINITIONS[self.tokens.kind][0])
        flags = [f"--config.{name}={value}" for name, value in settings.items()]
        command = ["python", "-m", "gptv_jax.prepare", "--config=FILE", f"--out={self.folder}-new"]
        return shlex.join(command + flags)

    def codec(self) -> tokens.Codec:
        """The codec that made the tokens; InputError where its definition is lost or damaged."""
        kind = self.tokens.kind
        definition = tokens.load_definition(kind, self.folder)
        if kind in tokens.DEFINITIONS and definition is None:
            raise InputError(f"{self.folder} has lost its {tokens.DEFINITIONS[kind][0]}.")
        return tokens.make_codec(self.tokens, self.image_size, definition, self.frames)

    def open(self, split: str) -> "_CachedSplit":
        path = self.folder / f"{split}.array_record"
        codec = self.codec()
        planes, packing = _TokenPlanes(codec), None
        if self.taught:
            packing = Packing(planes.length, codec.vocabulary, self.taught.samples)
        return _CachedSplit(path, self.lengths[split], self.record, self.objects, planes, packing)


class _CachedSplit(Source):
    def __init__(
        self,
        path: pathlib.Path,
        length: int,
        record: np.dtype,
        objects: np.dtype,
        planes: "_TokenPlanes",
        packing: Packing | None = None,
    ):
        self.path, self.length, self.planes, self.packing = path, length, planes, packing
        self.where = path.with_suffix("")
        self.record, self.objects = record, objects
        with as_input_error(f"{path} is damaged"):
            self._reader = ArrayRecordReader(str(path), READER_OPTIONS)
            found = self._reader.num_records()
        if found != length:
            raise InputError(
                f"{path} is damaged: it has {found} records, but header.json says {length}."
            )

    def __reduce__(self) -> tuple:  # a worker process opens the file itself
        own = self.path, self.length, self.record, self.objects, self.planes, self.packing
        return _CachedSplit, own

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        values, _ = self._values(index)
        return {"tokens": self.planes.join(values.pop("low"), values.pop("high")), **values}

    def annotations(self, index: int) -> Record:
        """The record without tokens; the boxes are in pixels of the original image."""
        values, _ = self._values(index)
        record = {n: v for n, v in values.items() if n not in ("low", "high", "view", DRAWS)}
        if "boxes" in record:
            shape, view = self.planes.image_shape, values["view"]
            record["boxes"] = to_original(record["boxes"], shape, view)
        return record

    def image_id(self, index: int) -> int | str | None:
        """The id that the data gave the image; None in older caches."""
        return self._values(index)[1]

    def _values(self, index: int) -> tuple[dict[str, np.ndarray], int | str | None]:
        """The arrays of a record, and the image's id."""
        size = self.record.itemsize
        try:
            (packed,) = self._reader.read(index, index + 1)
            content = zlib.decompress(packed, -zlib.MAX_WBITS)
            (values,) = np.frombuffer(content[:size], self.record)
            found = {name: values[name] for name in self.record.names}
            if self.packing:
                distinct, begin = found.pop(DISTINCT), size
                size += self.packing.size(distinct)
                found[DRAWS] = self.packing.join(distinct, content[begin:size])
            end = len(content) - int(found.pop("id_bytes", 0))
            objects = np.frombuffer(content[size:end], self.objects) if self.objects.names else {}
            image_id = json.loads(content[end:] or "null")
        except Exception as error:  # ArrayRecord raises whatever its C++ part reports
            raise InputError(f"{self.name(index)} is damaged ({first_line(error)}).") from error
        found |= {name: objects[name].copy() for name in self.objects.names or ()}
        return found, image_id


def _fields(arrays: dict[str, np.ndarray]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of every array, for a structured type of NumPy."""
    return [(name, a.dtype.newbyteorder("<").str, a.shape) for name, a in arrays.items()]


class _TokenPlanes:
    """The tokens of an image as planes of bytes and bits, which deflate well."""

    def __init__(self, codec: tokens.Codec):
        self.grid, self.length = codec.grid, math.prod(codec.grid)
        self.image_shape = codec.image_shape[-3:-1]
        self.token_of = codec.similarity_order.astype(np.uint16)  # by new number
        self.number_of = np.argsort(self.token_of).astype(np.uint16)  # by token
        self.high_bits = max((codec.vocabulary - 1).bit_length() - 8, 0)
        high = (self.high_bits, -(-self.length // 8))
        self.fields = [("low", "|u1", (self.length,)), ("high", "|u1", high)]

    def split(self, image: Int[np.ndarray, " T"]) -> dict[str, np.ndarray]:
        numbers = self.number_of[image]
        bits = np.unpackbits((numbers >> 8).astype(np.uint8)[None], axis=0, bitorder="little")
        high = np.packbits(bits[: self.high_bits], axis=1)
        return {"low": numbers.astype(np.uint8), "high": high}

    def join(
        self, low: UInt8[np.ndarray, " T"], high: UInt8[np.ndarray, "bits bytes"]
    ) -> UInt16[np.ndarray, "*frames rows columns"]:
        numbers = low.astype(np.uint16)
        for bit, plane in enumerate(high, start=8):
            numbers |= np.unpackbits(plane, count=self.length).astype(np.uint16) << bit
        return self.token_of.take(numbers).reshape(self.grid)
