"""Label maps as tokens and back: a class for each cell, or the code of a whole patch of classes.

A label map has a class 0 .. C-1 for every pixel. Any other number, such as 255 or -1, is no class.
Letters: C classes, T tokens of a map, P pixels of a cell.
"""

import abc
import dataclasses
import functools
import json
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int, Integer

from gptv_jax import config as config_lib
from gptv_jax.config import fields
from gptv_jax.errors import InputError, as_input_error
from gptv_jax.model import autoencoder
from gptv_jax.tokens.codec import AnyArray
from gptv_jax.tokens.learned import place

HEADER = "gptv_jax_labels"  # key of a file's metadata
FORMAT = 1
SAMPLED = 50_000  # patches of training maps, at most, that a codebook is made from
ROUNDS = 20  # of k-modes at most; the codebook of CamVid changes little after 5
CHUNK = 512  # patches that are compared with the codebook at a time, so that sums stay in the cache


def has_class(maps: Integer[AnyArray, "*any"], classes: int) -> Bool[AnyArray, "*any"]:
    """Where a pixel has a class; 255 is no class in a uint8 map of however many classes."""
    return (maps >= 0) & (maps < (min(classes, 255) if maps.dtype == np.uint8 else classes))


class LabelCodec(abc.ABC):
    """Turns label maps into tokens and tokens into label maps; tokens are in raster order."""

    kind: str  # name of the subclass in files
    classes: int  # C
    shape: tuple[int, int]  # height and width of the label maps, pixels
    cell: int  # height and width in pixels of the square that a token stands for
    vocabulary: int  # tokens are 0 .. vocabulary-1

    def __init__(self, classes: int, shape: tuple[int, int], cell: int, vocabulary: int):
        self.classes, self.shape, self.cell, self.vocabulary = classes, shape, cell, vocabulary

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens; cells at the end of a row or column may be cut."""
        return -(-self.shape[0] // self.cell), -(-self.shape[1] // self.cell)

    @abc.abstractmethod
    def encode(
        self, maps: Integer[np.ndarray, "B H W"]
    ) -> tuple[Int[np.ndarray, "B T"], Float[np.ndarray, "B T"]]:
        """Int32 tokens, and float32 weights: 0 where no pixel of the cell has a class, else 1."""

    @abc.abstractmethod
    def decode(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B H W"]:
        """Int32 label maps; every pixel has a class."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What the codec learned from label maps, by name."""
        return {}

    def settings(self) -> dict[str, object]:
        """Arguments of the constructor after the shape, arrays left out, as JSON."""
        return {"cell": self.cell}

    @classmethod
    def restore(cls, arrays: dict[str, np.ndarray], **header) -> "LabelCodec":
        """The codec that `arrays` and the header of a file describe."""
        return cls(**header, **arrays)

    def to_bytes(self) -> bytes:
        """The content of a .safetensors file, for `from_bytes`."""
        header = {"format": FORMAT, "kind": self.kind, "classes": self.classes}
        header |= {"shape": self.shape, **self.settings()}
        return safetensors.numpy.save(self.arrays(), {HEADER: json.dumps(header)})

    def cells(self, maps: Integer[np.ndarray, "B H W"]) -> Integer[np.ndarray, "N P"]:
        """The classes of the pixels of every cell, N = B * T; C where a pixel has no class."""
        if maps.shape[1:] != tuple(self.shape):
            raise ValueError(f"label maps are {list(maps.shape)}; it takes [B, *{self.shape}].")
        (rows, columns), side = self.grid, self.cell
        squares = self.padded(maps).reshape(len(maps), rows, side, columns, side).swapaxes(2, 3)
        return squares.reshape(-1, side * side)

    def padded(self, maps: Integer[np.ndarray, "B H W"]) -> Integer[np.ndarray, "B height width"]:
        """The maps up to the end of the last cells; C where a pixel has no class, and beyond."""
        known = np.where(has_class(maps, self.classes), maps, self.classes)
        beyond = [-size % self.cell for size in self.shape]
        return np.pad(known, [(0, 0), *((0, n) for n in beyond)], constant_values=self.classes)

    def joined(self, cells: Integer[np.ndarray, "B T P"]) -> Int[np.ndarray, "B H W"]:
        """The label maps of these cells."""
        (rows, columns), side, (height, width) = self.grid, self.cell, self.shape
        squares = cells.reshape(len(cells), rows, columns, side, side).swapaxes(2, 3)
        whole = squares.reshape(len(cells), rows * side, columns * side)
        return whole[:, :height, :width].astype(np.int32)


class Cells(LabelCodec):
    """The token of a cell is the class of most of its pixels, among equals the first class."""

    kind = "cells"

    def __init__(self, classes: int, shape: tuple[int, int], cell: int):
        super().__init__(classes, shape, cell, classes)

    def counts(self, maps: Integer[np.ndarray, "B H W"]) -> Integer[np.ndarray, "B T C"]:
        """The number of pixels of each class in every cell."""
        found = self.cells(maps)
        place = np.arange(len(found))[:, None] * (self.classes + 1) + found
        counts = np.bincount(place.ravel(), minlength=len(found) * (self.classes + 1))
        return counts.reshape(len(maps), -1, self.classes + 1)[..., : self.classes]

    def encode(self, maps):
        counts = self.counts(maps)
        return counts.argmax(-1).astype(np.int32), counts.any(-1).astype(np.float32)

    def decode(self, tokens):
        return self.joined(np.repeat(tokens[..., None], self.cell**2, axis=-1))


class Patches(LabelCodec):
    """The token of a cell is the code whose patch has the cell's class at most of its pixels."""

    kind = "patches"

    def __init__(
        self,
        classes: int,
        shape: tuple[int, int],
        cell: int,
        patches: Integer[np.ndarray, "codes P"],  # the classes of every code's pixels
    ):
        super().__init__(classes, shape, cell, len(patches))
        self.patches = np.asarray(patches, np.int32)

    def encode(self, maps):
        found = self.cells(maps)
        weights = (found < self.classes).any(axis=1).astype(np.float32)
        tokens = _nearest(found, self._same)
        return tokens.reshape(len(maps), -1), weights.reshape(len(maps), -1)

    @functools.cached_property
    def _same(self) -> np.ndarray:
        return _codes_by_class(self.patches, self.classes)

    def decode(self, tokens):
        return self.joined(self.patches[tokens])

    def arrays(self):
        return {"patches": self.patches}


class Learned(LabelCodec):
    """The token of a cell is its code in an autoencoder of label maps, `model.autoencoder`.

    The encoder reads the class of each pixel as a channel of its own, and zeros where there is no
    class. The decoder gives a logit for each class. `train.autoencoding.fit_learned` trains both. A
    device of this process encodes and decodes the maps one after another, in one call, so the other
    maps of a batch change nothing.
    """

    kind = "learned"

    def __init__(
        self,
        classes: int,
        shape: tuple[int, int],
        config: config_lib.Autoencoder,
        params: dict[str, np.ndarray],  # float32, by flat name: "encoder.stem.bias"
    ):
        super().__init__(classes, shape, config.downsample, config.vocabulary)
        self.config, self.params = dataclasses.replace(config, channels=classes), params

    def encode(self, maps):
        weights = (self.cells(maps) < self.classes).any(axis=1).astype(np.float32)
        codes = self._each(self.padded(maps).astype(np.int32), decoding=False)
        return codes.reshape(len(maps), -1).astype(np.int32), weights.reshape(len(maps), -1)

    def decode(self, tokens):
        maps = self._each(tokens.reshape(-1, *self.grid).astype(np.int32), decoding=True)
        return maps[:, : self.shape[0], : self.shape[1]].astype(np.int32)

    def arrays(self):
        return self.params

    def settings(self):
        return {"autoencoder": fields.flatten(dataclasses.replace(self.config, channels=1))}

    @classmethod
    def restore(cls, arrays, *, autoencoder, **header):
        autoencoder = config_lib.recorded(config_lib.Autoencoder, autoencoder, "autoencoder")
        config = fields.from_dict(config_lib.Autoencoder, autoencoder, "autoencoder")
        return cls(**header, config=config, params=arrays)

    def __getstate__(self):  # Grain's workers place the weights on devices of their own
        return {name: value for name, value in vars(self).items() if name != "_placed"}

    @functools.cached_property
    def _placed(self) -> tuple[jax.sharding.Mesh, dict]:
        return place(self.config, self.params, jax.local_devices()[:1])

    def _each(self, rows: np.ndarray, decoding: bool) -> np.ndarray:
        mesh, params = self._placed
        beyond = (1 << (len(rows) - 1).bit_length()) - len(rows)  # few sizes, so few programs
        padded = np.pad(rows, [(0, beyond), *[(0, 0)] * (rows.ndim - 1)])
        with jax.set_mesh(mesh):
            given = jax.device_put(padded, NamedSharding(mesh, P()))
            return jax.device_get(_apply(self.config, decoding, params, given))[: len(rows)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(config: config_lib.Autoencoder, decoding: bool, params: dict, rows: jax.Array):
    """Label maps of grids of codes (`decoding`), or codes of label maps."""
    model = autoencoder.bind(config, params)

    def one(row: jax.Array) -> jax.Array:
        if decoding:
            return jnp.argmax(model.decode(row[None])[0], axis=-1)
        return model.encode(as_channels(row[None], config.channels)).codes[0]

    return jax.lax.map(one, rows)


def as_channels(maps: Integer[jax.Array, "B H W"], classes: int) -> Float[jax.Array, "B H W C"]:
    """One channel for each class, of variance 1 where classes are equally frequent; 0: no class."""
    return jax.nn.one_hot(maps, classes) * classes**0.5


def fit_patches(
    maps: Iterable[Integer[np.ndarray, "H W"]], classes: int, cell: int, codes: int, seed: int
) -> Patches:
    """Makes a codebook of patches of label maps of one shape, by k-modes.

    K-modes (Huang 1998, doi:10.1023/A:1009769707641) is k-means for classes: the distance is the
    number of pixels of different classes, and a centre has the most frequent class at every pixel.
    It starts from random patches that all differ. The maps are read once; of their patches a random
    sample of SAMPLED is kept. Equal maps and seeds give equal codebooks.

    Raises:
      InputError: the maps have fewer than `codes` different patches, or there is no map.
    """
    rng, order, shape = np.random.default_rng(seed), np.zeros(0), (cell, cell)
    kept = np.zeros((0, cell * cell), np.min_scalar_type(classes))
    for each in maps:
        shape = each.shape
        found = Cells(classes, shape, cell).cells(each[None])
        found = found[(found < classes).any(axis=1)]
        kept = np.concatenate([kept, found.astype(kept.dtype)])
        # The patches with the smallest random numbers are a uniform sample of all patches so far.
        order = np.concatenate([order, rng.random(len(found))])
        if len(kept) > 2 * SAMPLED:
            first = np.argpartition(order, SAMPLED)[:SAMPLED]
            kept, order = kept[first], order[first]
    kept = kept[np.argsort(order)[:SAMPLED]]
    distinct, counts = np.unique(kept, axis=0, return_counts=True)
    # A pixel without a class begins with the class of most of the patch's pixels.
    most, _ = Cells(classes, (cell, len(distinct) * cell), cell).encode(
        distinct.reshape(-1, cell, cell).swapaxes(0, 1).reshape(1, cell, -1)
    )
    complete = np.unique(np.where(distinct < classes, distinct, most.T), axis=0)
    if len(complete) < codes:
        raise InputError(
            f"the label maps have {len(complete)} different patches of {cell} x {cell} pixels, "
            f"fewer than config.task.segment.codes={codes}; take "
            + f"config.task.segment.codes={len(complete)} or less, or " * (len(complete) > 1)
            + "config.task.segment.labels=cells."
        )
    patches = complete[rng.choice(len(complete), codes, replace=False)].astype(np.int64)
    for _ in range(ROUNDS):
        nearest, before = _nearest(distinct, _codes_by_class(patches, classes)), patches
        patches = _modes(distinct, counts, nearest, patches, classes)
        if np.array_equal(before, patches):
            break
    return Patches(classes, shape, cell, patches)


def _codes_by_class(
    patches: Integer[np.ndarray, "codes P"], classes: int
) -> Integer[np.ndarray, "P C codes"]:
    """1 where a code has a class at a pixel; a last row of zeros is for pixels without a class."""
    codes, pixels = patches.shape
    same = np.zeros((pixels, classes + 1, codes), np.min_scalar_type(pixels))
    same[np.arange(pixels)[:, None], patches.T, np.arange(codes)] = 1
    return same


def _nearest(
    cells: Integer[np.ndarray, "N P"], same: Integer[np.ndarray, "P C codes"]
) -> Int[np.ndarray, " N"]:
    """The first code with most pixels of the cell's class; pixels without a class do not count."""
    found = np.empty(len(cells), np.int32)
    for start in range(0, len(cells), CHUNK):
        chunk = np.ascontiguousarray(cells[start : start + CHUNK].T)
        agreeing = np.zeros((chunk.shape[1], same.shape[-1]), same.dtype)
        for of_class, row in zip(same, chunk, strict=True):
            agreeing += of_class.take(row, axis=0)
        found[start : start + CHUNK] = agreeing.argmax(axis=1)
    return found


def _modes(cells, counts, nearest, patches, classes: int) -> Int[np.ndarray, "codes P"]:
    """The most frequent class at every pixel of the cells of each code, or else the code's own."""
    codes, pixels = patches.shape
    seen = np.zeros((codes * pixels, classes + 1), np.int64)
    place = nearest[:, None].astype(np.int64) * pixels + np.arange(pixels)
    np.add.at(seen, (place, cells), counts[:, None])
    seen = seen[:, :classes].reshape(codes, pixels, classes)
    return np.where(seen.any(axis=-1), seen.argmax(axis=-1), patches)


def from_bytes(content: bytes) -> LabelCodec:
    """The codec of `LabelCodec.to_bytes`; InputError where the bytes are others, or damaged."""
    with as_input_error("what a run or its weights keep of the label tokens is damaged"):
        length = int.from_bytes(content[:8], "little")  # of the JSON that a .safetensors file opens
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][HEADER])
        if (found := header.pop("format")) != FORMAT:
            raise InputError(f"label tokens are of format {found}; this version reads {FORMAT}.")
        kind = {codec.kind: codec for codec in (Cells, Patches, Learned)}[header.pop("kind")]
        arrays = safetensors.numpy.load(content)
        return kind.restore(arrays, **header | {"shape": tuple(header["shape"])})
