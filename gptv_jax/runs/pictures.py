"""Grids of small images as PNG files."""

import math
import pathlib

import jax
import numpy as np
from etils import epy
from jaxtyping import Float, UInt8
from PIL import Image

with epy.lazy_imports():  # heavy, and for heat maps alone
    import matplotlib

SIDE = 64  # pixels; smaller images are enlarged to at least this side


def save_grid(
    images: UInt8[np.ndarray, "N H W 3"], path: pathlib.Path, columns: int | None = None
) -> None:
    """Writes the images side by side with a thin border, enlarged by a whole factor.

    A row has as many images as `columns` says; None: the grid is as square as possible.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = max(1, SIDE // images.shape[1])
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    gap, missing = max(2, scale // 2), -len(images) % columns
    framed = np.pad(large, ((0, missing), (0, gap), (0, gap), (0, 0)), constant_values=255)
    height, width = framed.shape[1:3]
    rows = framed.reshape(-1, columns, height, width, 3)
    save(rows.swapaxes(1, 2).reshape(-1, columns * width, 3), path)


def save_pairs(left: np.ndarray, right: np.ndarray, path: pathlib.Path) -> None:
    """Writes a grid of images, each with its partner to the right."""
    pairs = np.stack([left, right], axis=1)
    save_grid(pairs.reshape(-1, *pairs.shape[2:]), path, columns=8)


def heat_map(nats: Float[np.ndarray, "B H W"]) -> tuple[UInt8[np.ndarray, "B H W 3"], float]:
    """Nats of pixels as colours on one scale, black for 0, and the value of the brightest colour.

    `nats` are 0 or more, from `Model.surprise`.
    """
    brightest = float(nats.max())
    share = nats / (brightest or 1.0)
    return matplotlib.colormaps["inferno"](share, bytes=True)[..., :3], brightest


def save(picture: UInt8[np.ndarray, "H W 3"], path: pathlib.Path) -> None:
    """Writes a PNG file, and makes its folder; on process 0 alone."""
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
