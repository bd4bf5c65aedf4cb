"""Grids of small images as PNG files."""

import math
import pathlib

import numpy as np
from etils import epy
from jaxtyping import Float, UInt8
from PIL import Image

with epy.lazy_imports():  # heavy, and for heat maps alone
    import matplotlib

SIDE = 64  # pixels; smaller images are enlarged to at least this side


def grid(
    images: UInt8[np.ndarray, "N H W 3"], columns: int | None = None
) -> UInt8[np.ndarray, "rows columns 3"]:
    """The images side by side with a thin border, enlarged by a whole factor.

    Args:
      images: RGB.
      columns: images in a row; None: as square as possible.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = max(1, SIDE // images.shape[1])
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    gap = max(2, scale // 2)
    framed = np.pad(large, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    missing = -len(framed) % columns
    framed = np.pad(framed, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=255)
    height, width = framed.shape[1:3]
    rows = framed.reshape(-1, columns, height, width, 3)
    return rows.swapaxes(1, 2).reshape(-1, columns * width, 3)


def heat_map(
    nats: Float[np.ndarray, "B H W"],
) -> tuple[UInt8[np.ndarray, "B H W 3"], float]:
    """Nats of pixels as colours on one scale, black for 0, and the value of the brightest colour.

    Args:
      nats: 0 or more for each pixel, from `Model.surprise`.
    """
    brightest = float(nats.max())
    share = nats / (brightest or 1.0)
    return matplotlib.colormaps["inferno"](share, bytes=True)[..., :3], brightest


def save(picture: UInt8[np.ndarray, "H W 3"], path: pathlib.Path) -> None:
    """Writes a PNG file, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
