"""Pictures of label maps: images beside their maps, with a legend, and bars of the classes' IoU."""

import colorsys
from collections.abc import Sequence

import numpy as np
from etils import epy
from jaxtyping import Integer, UInt8
from PIL import Image, ImageDraw

from gptv_jax.data.records import Record
from gptv_jax.tasks.drawing import GAP, MOST_CLASSES, text_font
from gptv_jax.tokens.label_maps import has_class

with epy.lazy_imports():  # heavy
    from matplotlib import cm
    from matplotlib import figure as figures
    from matplotlib.backends import backend_agg

SIDE = 240  # pixels, of the longer side of a picture; smaller ones are enlarged by a whole factor
HEAD, SWATCH = 20, 14  # pixels: a line of text, a colour of the legend
NO_CLASS = (255, 255, 255)
TITLES = {
    "read": "read",
    "written": "written",
    "uncertain": "uncertainty of drawn maps",
    "alone": "each frame alone",
    "previous": "true maps before",
    "propagated": "first map given",
    "copied": "first map copied",
    "prior": "class prior",
}
TONES = ("#3cb44b", "#3d85c6", "#f58231", "#c04df0", "#e6194b", "#808080", "#b0b0b0")  # of curves


def colors(classes: int) -> UInt8[np.ndarray, "C 3"]:
    """A colour for each class: a dark grey, then hues far from each other."""
    tones = ((0.75, 0.95), (0.45, 0.95), (1.0, 0.7))  # saturation and value
    hues = [(0.618034 * c % 1, *tones[c % 3]) for c in range(classes)]
    found = np.array([colorsys.hsv_to_rgb(*hue) for hue in hues])
    return (255 * np.concatenate([[[0.2, 0.2, 0.2]], found])[:classes]).astype(np.uint8)


def maps(
    shown: Sequence[tuple[Record, dict[str, np.ndarray]]], names: Sequence[str]
) -> UInt8[np.ndarray, "H W 3"]:
    """A row for each image: the image, its label map, and what was predicted, by `TITLES`.

    Predictions are maps of classes, and for "uncertain" shares from 0 to 1, of the image's size.
    The legend has the classes that are in these maps, and white for pixels without a class.
    """
    table, rows, present, unknown = colors(len(names)), [], set(), False
    for record, planes in shown:
        truth = record["segmentation"]
        cells = [record["image"], paint(truth, table)]
        known = has_class(truth, len(names))
        present, unknown = present | {*np.unique(truth[known]).tolist()}, unknown | (~known).any()
        for name, plane in planes.items():
            if name == "uncertain":
                cells.append((255 * cm.inferno(plane)[..., :3]).astype(np.uint8))
            else:
                cells.append(paint(plane, table))
                present |= {*np.unique(plane[has_class(plane, len(names))]).tolist()}
        rows.append([_enlarged(cell) for cell in cells])
    titles = ["image", "label map", *(TITLES[name] for name in shown[0][1])]
    widths = [max(row[c].width for row in rows) + GAP for c in range(len(titles))]
    heights = [row[0].height + GAP for row in rows]
    entries = [(names[c], table[c]) for c in sorted(present)]
    entries += [("no class", np.array(NO_CLASS))] if unknown else []
    legend = _legend(entries, sum(widths))
    sheet = Image.new("RGB", (sum(widths), HEAD + sum(heights) + legend.height), "white")
    canvas = ImageDraw.Draw(sheet)
    for c, title in enumerate(titles):
        canvas.text((sum(widths[:c]), 1), title, fill="#404040", font=text_font())
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            sheet.paste(cell, (sum(widths[:c]), HEAD + sum(heights[:r])))
    sheet.paste(legend, (0, HEAD + sum(heights)))
    return np.asarray(sheet)


def by_frame(record: Record, planes: dict[str, np.ndarray]) -> list[tuple[Record, dict]]:
    """What `maps` takes, a row for each frame, of a clip's record and its predicted maps."""
    return [
        (
            {name: record[name][frame] for name in ("image", "segmentation")},
            {name: plane[frame] for name, plane in planes.items()},
        )
        for frame in range(len(record["segmentation"]))
    ]


def paint(plane: Integer[np.ndarray, "H W"], table: UInt8[np.ndarray, "C 3"]) -> np.ndarray:
    """The map in the colours of its classes; pixels without a class are white."""
    known = has_class(plane, len(table))
    painted = table[np.where(known, plane, 0)]
    return np.where(known[..., None], painted, NO_CLASS).astype(np.uint8)


def _enlarged(pixels: np.ndarray) -> Image.Image:
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    picture = Image.fromarray(pixels).convert("RGB")
    longer = max(picture.size)
    scale = max(SIDE // longer, 1) if longer <= SIDE else SIDE / longer
    return picture.resize([round(s * scale) for s in picture.size], Image.Resampling.NEAREST)


def _legend(entries: Sequence[tuple[str, np.ndarray]], width: int) -> Image.Image:
    """Colours with their names, in as many lines as the width needs."""
    places, x, line = [], 0, 0
    for name, _ in entries:
        needed = SWATCH + 4 + int(text_font().getlength(name)) + 2 * GAP
        if x and x + needed > width:
            x, line = 0, line + 1
        places.append((x, line * HEAD))
        x += needed
    picture = Image.new("RGB", (width, (line + 1) * HEAD), "white")
    canvas = ImageDraw.Draw(picture)
    for (name, color), (x, y) in zip(entries, places, strict=True):
        square = (x, y + 2, x + SWATCH, y + 2 + SWATCH)
        canvas.rectangle(square, fill=tuple(color.tolist()), outline="#808080")
        canvas.text((x + SWATCH + 4, y + 1), name, fill="#202020", font=text_font())
    return picture


def class_iou(rows: Sequence[dict]) -> UInt8[np.ndarray, "H W 3"]:
    """Bars of the IoU of the most frequent classes; `rows` have "name", "share" and "..._iou".

    A class without an IoU, as no pixel has it or was taken for it, has a text in place of a bar.
    """
    known = sorted(rows, key=lambda row: -row["share"])[:MOST_CLASSES]
    ways = [name for name in rows[0] if name.endswith("_iou")]
    height = max(2.5, 0.26 * len(known) + 1)
    figure = figures.Figure((8, height), dpi=110, layout="constrained")
    axes, places = figure.subplots(), np.arange(len(known))[::-1]
    thick = 0.8 / len(ways)
    for i, (way, color) in enumerate(zip(ways, ("#3d85c6", "#f58231"), strict=False)):
        values = [row[way] or 0 for row in known]
        offset = 0.4 - thick * (i + 0.5)
        axes.barh(places + offset, values, thick, color=color, label=way.removesuffix("_iou"))
        for place, row in zip(places + offset, known, strict=True):
            if row[way] is None:
                axes.text(0.01, place, "occurs nowhere", va="center", fontsize=7, color="#606060")
    labels = [f"{row['name'].replace('$', chr(92) + '$')} ({row['share']:.1%})" for row in known]
    axes.set_yticks(places, labels, fontsize=8)
    axes.set(xlim=(0, 1))
    axes.set_title("intersection over union by class (share of pixels)", loc="left", fontsize=10)
    if len(ways) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _drawn(figure)


def miou_by_frame(scores: dict[str, Sequence[float | None]]) -> UInt8[np.ndarray, "H W 3"]:
    """Curves of the mean IoU of frame 1, 2, ... of videos, for each way of segmenting, by `TITLES`.

    A frame without an IoU, as no pixel has a class, is a gap.
    """
    figure = figures.Figure((8, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for (way, values), color in zip(scores.items(), TONES, strict=False):
        points = np.array([np.nan if value is None else value for value in values])
        axes.plot(np.arange(1, len(points) + 1), points, ".-", ms=4, color=color, label=TITLES[way])
    axes.set(xlabel="frame", ylim=(0, 1))
    axes.set_title("mean IoU by frame", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return _drawn(figure)


def _drawn(figure: "figures.Figure") -> UInt8[np.ndarray, "H W 3"]:
    canvas = backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
