"""Pictures: grids of small images and clips, heat maps and plots of curves."""

import io
import math
import pathlib
import warnings
from collections.abc import Sequence

import numpy as np
from etils import epy
from jaxtyping import Float, Int, UInt8
from PIL import Image

from gptv_jax import files

with epy.lazy_imports():  # heavy, and for heat maps and plots alone
    import matplotlib
    from matplotlib import figure as figures
    from matplotlib import ticker

# Plots are transparent, in tones that are readable on white and on black.
BLUE, ORANGE, QUIET, INK = "#3d85c6", "#d9822b", "#9a9a9a", "#808080"
SIZE = (5.4, 3.3)  # inches, of a plot
SIDE = 64  # pixels; images are enlarged while their shorter side is not longer than this


FRAME_SECONDS, LAST_SECONDS = 0.2, 0.8  # that an animation shows a frame, and its last frame


def save_grid(
    images: UInt8[np.ndarray, "N *F H W 3"],
    path: pathlib.Path,
    columns: int | None = None,
    strips: int | None = None,
) -> None:
    """Writes a PNG file of the images side by side with a thin border, enlarged by a whole factor.

    A row has as many images as `columns` says; None: the grid is as square as possible. Clips are
    written twice: as film strips, a clip's frames from left to right and as many clips in a row as
    `strips` says (None: as `columns` says), and as an animation, WebP, whose frames are grids.
    """
    if images.ndim == 5:
        frames = [_grid(images[:, i], columns) for i in range(images.shape[1])]
        save_animation(np.stack(frames), path)
        images, columns = np.concatenate(images.swapaxes(0, 1), axis=2), strips or columns
    save(_grid(images, columns), path)


def save_animation(frames: UInt8[np.ndarray, "F H W 3"], path: pathlib.Path) -> None:
    """Writes a lossless WebP file that plays the frames in a loop; `path` may end otherwise."""
    first, *others = map(Image.fromarray, frames)
    last = round(1000 * LAST_SECONDS)
    timing = {"duration": [*[round(1000 * FRAME_SECONDS)] * len(others), last], "loop": 0}
    options = {"save_all": True, "append_images": others, "lossless": True, **timing}
    target = path.with_suffix(".webp")
    files.replace(target, lambda target: first.save(target, "WEBP", **options))


def _grid(
    images: UInt8[np.ndarray, "N H W 3"], columns: int | None
) -> UInt8[np.ndarray, "height width 3"]:
    height, width = images.shape[1:3]
    columns = columns or math.ceil(math.sqrt(len(images) * height / width))
    scale = max(1, SIDE // min(height, width))
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    gap, missing = max(2, scale // 2), -len(images) % columns
    framed = np.pad(large, ((0, missing), (0, gap), (0, gap), (0, 0)), constant_values=255)
    height, width = framed.shape[1:3]
    rows = framed.reshape(-1, columns, height, width, 3)
    return rows.swapaxes(1, 2).reshape(-1, columns * width, 3)


def save_pairs(left: np.ndarray, right: np.ndarray, path: pathlib.Path) -> None:
    """Writes a grid of images, each with its partner to the right, or below a film strip."""
    pairs = np.stack([left, right], axis=1)
    save_grid(pairs.reshape(-1, *pairs.shape[2:]), path, columns=8, strips=1)


def heat_map(
    nats: Float[np.ndarray, "B *F H W"],
) -> tuple[UInt8[np.ndarray, "B *F H W 3"], float]:
    """Nats of pixels as colours on one scale, black for 0, and the value of the brightest colour.

    `nats` are 0 or more, from `Model.surprise`.
    """
    brightest = float(nats.max())
    share = nats / (brightest or 1.0)
    return matplotlib.colormaps["inferno"](share, bytes=True)[..., :3], brightest


def save(picture: UInt8[np.ndarray, "H W 3"], path: pathlib.Path) -> None:
    """Writes a PNG file as `files.replace` does."""
    files.replace(path, lambda target: Image.fromarray(picture).save(target, "PNG"))


def plot(
    title: str, x_label: str, curves: list[tuple], level=(), *, percent=False, below=()
) -> bytes:
    """A plot of curves (the arguments of `_line` after the axes) as a PNG file.

    `level` is the y and the label of a dashed line; y is a share if `percent`; `below` is the title
    and the points of a low plot under the first one.
    """
    figure, ratios = figures.Figure(SIZE, layout="constrained"), (4, 1) if below else (1,)
    grid = figure.subplots(len(ratios), sharex=True, squeeze=False, height_ratios=ratios)
    axes, last = grid[0, 0], grid[-1, 0]
    for curve in curves:
        _line(axes, *curve)
    if level:
        axes.axhline(level[0], color=QUIET, ls="--", lw=1, label=level[1])
    if percent:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    if below:
        _line(last, below[1], QUIET)
        last.yaxis.set_major_locator(ticker.MaxNLocator(2))
        last.yaxis.set_major_formatter("{x:g}")
        _finish(last, below[0])
    _finish(axes, title)
    last.set_xlabel(x_label, fontsize=9, color=INK)
    return _png(figure)


def confusion(counts: Int[np.ndarray, "C C"], names: Sequence[str]) -> bytes:
    """A matrix of counts as a PNG file: rows are the images' classes, columns the classes given.

    A cell is as dark as its share of its row, and shows its count; at most about 30 classes fit.
    """
    totals, small = counts.sum(axis=1, keepdims=True), len(counts) > 15
    share, side = counts / np.maximum(totals, 1), max(SIZE[1], 0.32 * len(counts) + 1.2)
    figure = figures.Figure((max(SIZE[0], side), side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        ink = "white" if share[row, column] > 0.5 else "black"
        if count:
            axes.text(column, row, count, ha="center", va="center", fontsize=7 - small, color=ink)
    short = [name if len(name) <= 14 else f"{name[:13]}…" for name in names]
    short = [name.replace("$", r"\$") for name in short]  # which would begin a formula
    axes.set_xticks(range(len(names)), short, rotation=90)
    axes.set_yticks(range(len(names)), short)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.set_xlabel("predicted class", fontsize=9, color=INK)
    axes.set_ylabel("true class", fontsize=9, color=INK)
    axes.spines[:].set_visible(False)
    return _png(figure)


def _line(axes: "matplotlib.axes.Axes", points, color, label="", style="-", ring=None) -> None:
    """Draws one curve, with a ring around the point at x = `ring`."""
    if not points:
        return
    marker = "." if len(points) < 30 else None  # more of them would hide the line
    axes.plot(*zip(*points, strict=True), style, marker=marker, ms=4, lw=1.3, c=color, label=label)
    for x, y in points:
        if x == ring:
            axes.plot(x, y, "o", ms=10, mfc="none", mec=color)


def _png(figure: "figures.Figure") -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters the font lacks
        figure.savefig(buffer, format="png", dpi=200, transparent=True)
    return buffer.getvalue()


def _finish(axes: "matplotlib.axes.Axes", title: str) -> None:
    """A light frame, whole numbers on x, y's meaning in the title, and a legend."""
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(colors=INK, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(axis="y", color=INK, alpha=0.2, lw=0.6)
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
