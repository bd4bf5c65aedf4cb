"""A data set as tokens on disk: compact, split over files, read where it lies.

A folder with

    header.json              what the tokens are, of which images, made how
    palette.npz              where the tokens are colours
    tokenizer.safetensors    where they are codes of a learned encoder
    <split>-00000.npy, ...   examples end to end, each packed and deflated; mapped, not loaded
    <split>.npz              where each example ends, its checksum and its label

An example's tokens are renumbered so that neighbours look alike, laid out as bit planes (the low
byte, then one plane for each bit above it) and deflated (zlib).
"""

import json
import pathlib
import zlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from gptv_jax import config as config_lib
from gptv_jax import files, tokens
from gptv_jax.config import fields
from gptv_jax.errors import InputError

FORMAT = 1  # of the folder; another one is not read
SHARD_BYTES = 2**26  # after which a new file is begun


def claim(folder: pathlib.Path) -> None:
    """Makes the folder.

    Raises:
      InputError: it cannot be written, or holds something already.
    """
    files.claim(folder, "out")
    if any(folder.iterdir()):
        raise InputError(f"--out={folder} is not empty; name a new folder.")


def write(
    folder: pathlib.Path,
    codec: tokens.Codec,
    splits: dict[str, Iterable[tuple[Int[np.ndarray, "T"], int | None]]],
    header: dict,
) -> None:
    """Writes all splits, each an iterable of tokens and label; the header comes last.

    Args:
      folder: claimed.
      codec: of the tokens.
      splits: examples in order, by name of the split.
      header: "tokens" (the fields of `config.Tokens`), "image_size", "transforms" and "classes",
        and what else is worth knowing.
    """
    packer = _Packer(codec)
    lengths = {name: _write_split(folder, name, found, packer) for name, found in splits.items()}
    tokens.save_definition(codec.definition, folder)
    header = {"format": FORMAT, "lengths": lengths, **header}
    files.write_json(folder / "header.json", header)


def _write_split(folder: pathlib.Path, split: str, examples: Iterable, packer: "_Packer") -> int:
    shard, number = bytearray(), 0
    rows = []  # of each example: its shard, where it ends there, checksum, label

    def flush():
        np.save(_shard(folder, split, number), np.frombuffer(shard, np.uint8))

    for example, label in examples:
        if len(shard) > SHARD_BYTES:
            flush()
            shard, number = bytearray(), number + 1
        packed = packer.pack(example)
        shard += packed
        rows.append((number, len(shard), zlib.crc32(packed), -1 if label is None else label))
    flush()
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    names = ("shard", "end", "checksum", "label")
    index = dict(zip(names, columns, strict=True)) | {"label": columns[3].astype(np.int32)}
    np.savez_compressed(folder / f"{split}.npz", **index)
    return len(rows)


def _shard(folder: pathlib.Path, split: str, number: int) -> pathlib.Path:
    return folder / f"{split}-{number:05d}.npy"


class TokenCache:
    """A folder that `write` made, as a data set."""

    stored_as = "tokens"

    def __init__(self, folder: pathlib.Path):
        """Reads the header.

        Raises:
          InputError: not such a folder, or of another format.
        """
        self.folder = folder
        path = folder / "header.json"
        try:
            self.header = json.loads(path.read_text())
            self.format = self.header["format"]
            self.classes: int = self.header["classes"]
            self.lengths: dict[str, int] = self.header["lengths"]
            said = config_lib.recorded(config_lib.Tokens, self.header["tokens"], "tokens")
            self.tokens = fields.from_dict(config_lib.Tokens, said, "tokens")
            self.image_size: int = self.header["image_size"]
            self.transforms: tuple[str, ...] = tuple(self.header["transforms"])
        except OSError as error:
            raise InputError(
                f"{folder} is no token cache: it has no header.json, which gptv_jax.prepare writes "
                "last."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}).") from error
        if self.format != FORMAT:
            raise InputError(f"{folder} is of format {self.format}; this version reads {FORMAT}.")

    def codec(self) -> tokens.Codec:
        """What the tokens mean."""
        kind = self.tokens.kind
        definition = tokens.load_definition(kind, self.folder)
        if kind in tokens.DEFINITIONS and definition is None:
            lost = tokens.DEFINITIONS[kind][0]
            raise InputError(f"{self.folder} is damaged: it has lost its {lost}.")
        return tokens.make_codec(self.tokens, self.image_size, definition)

    def open(self, split: str) -> "_CachedSplit":
        """A split; see `sources.DataSet`."""
        return _CachedSplit(self.folder, split, _Packer(self.codec()), bool(self.classes))


class _CachedSplit:
    def __init__(self, folder: pathlib.Path, split: str, packer: "_Packer", labelled: bool):
        self.folder, self.split, self.packer, self.labelled = folder, split, packer, labelled
        try:
            index = files.read_arrays(folder / f"{split}.npz")
            self.shards, self.ends = index["shard"], index["end"]
            self.labels, self.checksums = index["label"], index["checksum"]
            self.starts = np.where(np.diff(self.shards, prepend=-1), 0, np.roll(self.ends, 1))
            self._files = self._mapped()
        except (ValueError, KeyError) as error:
            raise InputError(f"split {split} of {folder} is damaged ({error}).") from error

    def _mapped(self) -> list[np.ndarray]:
        paths = [_shard(self.folder, self.split, i) for i in range(int(self.shards[-1]) + 1)]
        return [files.map_array(path) for path in paths]

    def __getstate__(self) -> dict:
        """Without the mapped files, which a worker process maps itself."""
        return {k: v for k, v in self.__dict__.items() if k != "_files"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._files = self._mapped()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict:
        packed = self._files[self.shards[index]][self.starts[index] : self.ends[index]]
        if zlib.crc32(packed) != self.checksums[index]:
            raise InputError(f"{self.name(index)} is damaged: its bytes are not those written.")
        example = {"image": self.packer.unpack(packed)}
        return {**example, "label": self.labels[index]} if self.labelled else example

    def name(self, index: int) -> str:
        return f"{self.folder}/{self.split}[{index}]"


class _Packer:
    """Tokens of one codec to bytes and back."""

    def __init__(self, codec: tokens.Codec):
        self.grid = codec.grid
        self.high_bits = max((codec.vocabulary - 1).bit_length() - 8, 0)
        self.token = codec.similarity_order.astype(np.uint16)  # by rank
        self.rank = np.argsort(self.token).astype(np.uint16)  # by token

    def pack(self, example: Int[np.ndarray, "T"]) -> bytes:
        ranks = self.rank[example]
        planes = [(ranks & 255).astype(np.uint8).tobytes()]
        for bit in range(self.high_bits):
            planes.append(np.packbits((ranks >> (8 + bit)) & 1).tobytes())
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)  # no header, no checksum
        return deflate.compress(b"".join(planes)) + deflate.flush()

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """Uint16 [rows, columns, 1]."""
        count = self.grid[0] * self.grid[1]
        planes = np.frombuffer(zlib.decompress(packed, -15), np.uint8)
        ranks = planes[:count]
        if self.high_bits:
            ranks = ranks.astype(np.uint16)
            bits = planes[count:].reshape(self.high_bits, -1)
            for bit, plane in enumerate(bits):
                ranks |= np.unpackbits(plane, count=count).astype(np.uint16) << (8 + bit)
        return self.token[ranks].reshape(*self.grid, 1)
