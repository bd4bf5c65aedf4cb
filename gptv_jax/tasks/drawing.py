"""Pictures of detections: boxes on images, and curves of average precision."""

import itertools
from collections.abc import Sequence

import numpy as np
from etils import epy
from jaxtyping import Bool, UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont

from gptv_jax.data.records import Record, to_image
from gptv_jax.tasks.average_precision import Scores
from gptv_jax.tasks.boxes import Detections, intersection
from gptv_jax.tasks.masks import Masks

with epy.lazy_imports():  # heavy
    from matplotlib import figure as figures
    from matplotlib import font_manager
    from matplotlib.backends import backend_agg

SIDE = 320  # pixels, of the longer side of an image; smaller ones are enlarged by a whole factor
GAP, FONT = 8, 13  # pixels
SHOWN_SCORE = 0.3  # detections of a lower score are not drawn
OPACITY = 110  # of masks, of 255
NEAREST = Image.Resampling.NEAREST
MOST_CLASSES = 25  # of the bars
# Colours of classes, visible on dark and on light images.
COLORS = (
    *("#e6194b", "#3cb44b", "#4f7dff", "#f58231", "#c04df0", "#00b8b8", "#f032e6", "#a8a800"),
    *("#c08040", "#ff7f7f", "#7fbf00", "#ffb000"),
)


def text_font() -> ImageFont.FreeTypeFont:
    """Matplotlib's font, which has the letters of most European languages; Pillow's has not."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), FONT)


def detections(
    pairs: Sequence[tuple[Record, Detections]], names: Sequence[str]
) -> UInt8[np.ndarray, "H W 3"]:
    """Images with their annotated boxes and, to the right, with the detected ones; two a row."""
    cells = []
    for record, found in pairs:
        likely = found.scores >= SHOWN_SCORE
        texts = [f"{names[c]} {s:.2f}" for c, s in zip(found.labels, found.scores, strict=True)]
        texts = [text for text, kept in zip(texts, likely, strict=True) if kept]
        truth = [names[label] for label in record["box_labels"]]
        masks = (None, None) if found.masks is None else (record["masks"], found.masks[likely])
        left = draw(record["image"], record["boxes"], record["box_labels"], truth, masks[0])
        right = draw(record["image"], found.boxes[likely], found.labels[likely], texts, masks[1])
        cells += [left, right]
    columns, head = min(4, len(cells)), FONT + 5
    rows = [cells[at : at + columns] for at in range(0, len(cells), columns)]
    widths = [max(row[c].width for row in rows if c < len(row)) + GAP for c in range(columns)]
    heights = [max(cell.height for cell in row) + GAP for row in rows]
    sheet = Image.new("RGB", (sum(widths), head + sum(heights)), "white")
    canvas, font = ImageDraw.Draw(sheet), text_font()
    for column in range(columns):
        title = f"detected, score {SHOWN_SCORE:g} or more" if column % 2 else "annotated"
        canvas.text((sum(widths[:column]), 1), title, fill="#606060", font=font)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            sheet.paste(cell, (sum(widths[:c]), head + sum(heights[:r])))
    return np.asarray(sheet)


def draw(
    image: UInt8[np.ndarray, "H W C"],
    boxes: np.ndarray,
    labels: np.ndarray,
    texts: Sequence[str],
    masks: Masks | Bool[np.ndarray, "n H W"] | None = None,
) -> Image.Image:
    """The image with boxes, each with a text, and masks, in the colours of their classes."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    longer = max(picture.size)
    scale = max(SIDE // longer, 1) if longer <= SIDE else SIDE / longer
    size = [round(side * scale) for side in picture.size]
    method = NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    picture = picture.resize(size, method)
    canvas, font = ImageDraw.Draw(picture), text_font()
    boxes, colors = boxes * scale, [COLORS[label % len(COLORS)] for label in labels]
    for mask, color in zip([] if masks is None else np.asarray(masks), colors, strict=False):
        fill = Image.fromarray(mask * np.uint8(OPACITY)).resize(picture.size, NEAREST)
        picture.paste(color, (0, 0), fill)
    for (y0, x0, y1, x1), color in zip(boxes, colors, strict=True):
        canvas.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=color, width=2)
    ends = [canvas.textbbox((0, 0), text, font=font)[2:] for text in texts]
    sizes = [(height + 2, width + 4) for width, height in ends]
    places = label_places(boxes, sizes, (picture.height, picture.width))
    for (y0, x0, y1, x1), text, color in zip(places, texts, colors, strict=True):  # over all boxes
        canvas.rectangle((x0, y0, x1 - 1, y1 - 1), fill=color)
        ink = "black" if ImageColor.getcolor(color, "L") > 130 else "white"
        canvas.text((x0 + 2, y0), text, fill=ink, font=font)
    return picture


def label_places(
    boxes: np.ndarray, sizes: Sequence[tuple[int, int]], canvas: tuple[int, int]
) -> np.ndarray:
    """Places of labels of these heights and widths, one at each box, like `boxes`: pixels [n, 4].

    A label lies above its box where it covers no label before; else below, inside or beside the
    box; where it covers a label in each of these places, it covers as little as possible.
    """
    places = np.zeros((0, 4))
    for (y0, x0, y1, x1), size in zip(boxes, sizes, strict=True):
        height, width = size
        ys, xs = (y0 - height, y1, y0, y1 - height), (x0, x1 - width, (x0 + x1 - width) / 2)
        sides = itertools.product((x1, x0 - width), (y0, y1 - height, (y0 + y1 - height) / 2))
        corners = np.array([*itertools.product(ys, xs), *((y, x) for x, y in sides)])
        corners = corners.clip(0, np.maximum(np.subtract(canvas, size), 0)).round()
        possible = np.concatenate([corners, corners + size], axis=1)
        covered = intersection(possible, places).sum(axis=1)
        places = np.append(places, possible[covered.argmin()][None], axis=0)
    return places


def average_precision(scores: Scores, names: Sequence[str]) -> UInt8[np.ndarray, "H W 3"]:
    """The curve of precision and recall, and bars of the AP of the most frequent classes."""
    known = [(row["objects"], n, row) for n, row in zip(names, scores.by_class, strict=True)]
    known = sorted(known, key=lambda each: -each[0])[:MOST_CLASSES]
    height = max(3.3, 0.24 * len(known) + 1)
    figure = figures.Figure((10, height), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(np.linspace(0, 1, 101), scores.precision, color="#3d85c6")
    left.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall")
    left.set_title("precision at IoU .5, mean over classes", loc="left", fontsize=10)
    left.grid(alpha=0.3)
    places = np.arange(len(known))[::-1]
    for offset, name, color in ((0.2, "ap50", "#9fc5e8"), (-0.2, "ap", "#3d85c6")):
        values = [row[name] or 0 for *_, row in known]
        title = {"ap": "AP", "ap50": "AP at IoU .5"}[name]
        right.barh(places + offset, values, 0.4, color=color, label=title)
    labels = [f"{name.replace('$', chr(92) + '$')} ({count})" for count, name, _ in known]
    right.set_yticks(places, labels, fontsize=8)
    right.set(xlim=(0, 1))
    right.set_title("average precision by class (objects)", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    canvas = backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def as_shown(found: Detections, record: Record) -> Detections:
    """The detections in pixels of the record's picture, which shows its "view" of the original."""
    if "view" not in record:
        return found
    return found._replace(boxes=to_image(found.boxes, record["image"].shape[:2], record["view"]))
