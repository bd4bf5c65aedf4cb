"""Colours as tokens: each pixel becomes the nearest colour of a palette (Chen et al. 2020)."""

import dataclasses
import functools
import io
import json
import logging
import pathlib
import warnings

import numpy as np
from etils import epy
from jaxtyping import Float, Int, UInt8

from gptv_jax import files
from gptv_jax.config.data import ImageSize, height_and_width
from gptv_jax.errors import InputError, as_input_error
from gptv_jax.tokens.codec import Codec

with epy.lazy_imports():  # slow to import, and only building a palette needs it
    from sklearn import cluster

LOG = logging.getLogger(__name__)
FILE = "palette.npz"  # in a run folder and in a token cache
MOST_BYTES = 2**22  # of a palette's file: 65,536 colours in float64, and their provenance
CELL = 16  # the lookup table is built in cells of 16 x 16 x 16 colours
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue (Rec. 601)


@dataclasses.dataclass(frozen=True, eq=False)
class Palette:
    """The colours that the tokens of a `PaletteCodec` refer to: token i is `centers[i]`."""

    centers: Float[np.ndarray, "V 3"]  # float32, RGB from -1 to 1, as in iGPT's kmeans_centers.npy
    provenance: dict  # JSON that says how the colours were made

    @property
    def colors(self) -> UInt8[np.ndarray, "V 3"]:
        return np.rint((self.centers + 1) * 127.5).clip(0, 255).astype(np.uint8)

    def equivalent(self, other: "Palette") -> bool:
        return np.array_equal(self.centers, other.centers)

    def save(self, path: str | pathlib.Path) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, centers=self.centers, provenance=json.dumps(self.provenance))
        files.replace(files.user_path(path), buffer.getvalue())


def load(path: str | pathlib.Path) -> Palette:
    """Reads a palette: an `.npz` file of `Palette.save`, or a `.npy` file of an array.

    The array is iGPT's `kmeans_centers.npy`, [colours, 3] from -1 to 1, or integers from 0 to 255.
    """
    path = files.user_path(path)
    if not path.exists():
        raise InputError(f"there is no palette {path}.")
    with as_input_error(f"{path} is not a palette"):
        content = files.read_arrays(path, MOST_BYTES)
        if "" in content:
            centers, provenance = content[""], {}
        else:
            centers, provenance = content["centers"], json.loads(str(content["provenance"]))
    # `Palette.save` writes colours from -1 to 1, with their provenance; other files may differ.
    found = checked(centers, provenance, str(path), trusted_range=bool(provenance))
    if provenance:
        return found
    if twice := len(found.centers) - len(np.unique(found.centers, axis=0)):
        LOG.warning("%s has %d colours that it had before; their tokens never occur.", path, twice)
    return dataclasses.replace(found, provenance={"file": path.name})


def checked(
    centers: np.ndarray, provenance: dict, where: str, *, trusted_range: bool = True
) -> Palette:
    """A palette of `centers` [V, 3], floating-point from -1 to 1 or integers from 0 to 255.

    Raises InputError, which calls the array `where`. Without `trusted_range` it refuses arrays
    without a negative value, which may be in 0..1.
    """
    numbers = centers.dtype.kind in "fiu" and centers.size > 0
    low, high = (centers.min(), centers.max()) if numbers else (np.nan, np.nan)  # NaN has no range
    usable = centers.ndim == 2 and centers.shape[1] == 3 and 2 <= len(centers) <= 65536
    if usable and centers.dtype.kind in "iu" and low >= 0 and 1 < high <= 255:
        return Palette((centers / 127.5 - 1).astype(np.float32), provenance)
    ranged = low >= -1 and high <= 1 and (low < 0 or (trusted_range and centers.dtype.kind == "f"))
    if usable and ranged:
        return Palette(centers.astype(np.float32), provenance)
    cure = ""
    if centers.ndim == 2 and len(centers) == 3 != centers.shape[1]:
        cure = " Transpose the array."
    elif usable and low >= 0 and high <= 1:
        cure = (
            " Colours from 0 to 1: 2 * colours - 1; from -1 to 1 already: "
            'gptv_jax.tokens.Palette(colours, {"range": "-1 to 1"}).save("palette.npz").'
        )
    elif usable and low >= 0 and high <= 255:
        cure = " Colours from 0 to 255 become such numbers by colours / 127.5 - 1."
    span = f" from {low:g} to {high:g}" if numbers else ""
    raise InputError(
        f"{where} holds {centers.dtype} {list(centers.shape)}{span}; a palette is floating-point "
        f"numbers [colours, 3] from -1 to 1, or integers from 0 to 255, 2 to 65536 colours.{cure}"
    )


def build(pixels: UInt8[np.ndarray, "N 3"], colors: int, seed: int, provenance: dict) -> Palette:
    """Builds a palette of so many `colors` by k-means (scikit-learn's MiniBatchKMeans).

    The colours are in the order of luminance. Where the pixels have exactly `colors` different
    values, the palette is these values; fewer raise InputError. `provenance` describes the pixels;
    the method is added.
    """
    distinct = np.unique(pixels, axis=0)
    if len(distinct) < colors:
        problem = (
            f"the images have only {len(distinct)} different colours; set config.tokens.colors to "
            "this number or less"
        )
        if len(distinct) == 1:
            problem = "the images have a single colour, from which nothing can be learned"
        raise InputError(
            f"{problem}. Their values are {distinct.min()} to {distinct.max()} of 255: where files "
            "of more than 8 bits came out too dark, name their white by decode(maximum=...)."
        )
    if len(distinct) == colors:
        centers = distinct / 127.5 - 1
    else:
        means = cluster.MiniBatchKMeans(colors, random_state=seed, batch_size=8192, n_init=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of memory, on Windows with MKL
            centers = means.fit(pixels.astype(np.float32) / 127.5 - 1).cluster_centers_
    centers = centers[np.argsort(centers @ LUMINANCE, kind="stable")].clip(-1, 1)
    method = {"method": "scikit-learn MiniBatchKMeans", "seed": seed, "pixels": len(pixels)}
    return Palette(centers.astype(np.float32), provenance | method)


class PaletteCodec(Codec):
    """The token of a pixel is the number of the nearest colour, by squared distance of RGB."""

    def __init__(self, palette: Palette, size: ImageSize):
        self.definition, self.vocabulary = palette, len(palette.centers)
        self.grid = height_and_width(size)
        self.image_shape = (*self.grid, 3)

    @property
    def similarity_order(self) -> Int[np.ndarray, " V"]:
        return np.argsort(self.definition.centers @ LUMINANCE, kind="stable")

    def encode(self, images: UInt8[np.ndarray, "B H W 3"]) -> Int[np.ndarray, "B T"]:
        if images.shape[-1] != 3:
            raise ValueError(f"images have {images.shape[-1]} channel(s); a palette takes RGB.")
        r, g, b = (images[..., c].astype(np.uint32) for c in range(3))
        table = _nearest(self.definition.centers.tobytes())
        return table[(r << 16) | (g << 8) | b].reshape(len(images), -1).astype(np.int32)

    def decode(
        self, tokens: Int[np.ndarray, "B N"], grid: tuple[int, int] | None = None
    ) -> UInt8[np.ndarray, "B height width 3"]:
        return self.definition.colors[tokens].reshape(len(tokens), *(grid or self.grid), 3)


@functools.lru_cache(maxsize=2)
def _nearest(centers: bytes) -> np.ndarray:
    """The nearest colour of each of the 2^24 RGB values, exactly; 32 MiB.

    The table is filled cell by cell. Of each cell, the colours are kept whose least distance to a
    value in the cell is not above the smallest of the colours' greatest distances, a dozen of 512:
    no other colour can be the nearest one of any value in the cell.
    """
    wanted = (np.frombuffer(centers, np.float32).reshape(-1, 3).astype(np.float64) + 1) * 127.5
    lows = np.arange(0, 256, CELL)
    below = lows[:, None] - wanted.T[:, None]  # channel, cell, colour
    above = wanted.T[:, None] - (lows + CELL - 1)[:, None]
    near = np.maximum(np.maximum(below, above), 0) ** 2
    far = np.maximum(-below, -above) ** 2
    offsets = np.arange(CELL)
    table = np.empty((len(lows), CELL) * 3, np.uint16)
    for i, j, k in np.ndindex(table.shape[::2]):
        least = near[0, i] + near[1, j] + near[2, k]
        candidates = np.flatnonzero(least <= (far[0, i] + far[1, j] + far[2, k]).min())
        starts = lows[[i, j, k]]
        x, y, z = ((starts[c] + offsets[:, None] - wanted[candidates, c]) ** 2 for c in range(3))
        distance = x[:, None, None] + y[None, :, None] + z[None, None]
        table[i, :, j, :, k] = candidates[np.argmin(distance, axis=-1)]
    return table.reshape(-1)
