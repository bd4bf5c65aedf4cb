"""Scenes of handwritten digits with boxes, masks and a label map, drawn on the fly.

scikit-learn's digits (`digits.digits`, with the same split) are resized and scattered over a canvas
with noise, specks and strokes. Each scene of a split has a random generator, seeded by the scene's
number, so a scene depends neither on the order of reading nor on the number of workers.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageDraw

from gptv_jax.data.data_set import SPLITS, DataSet, Source
from gptv_jax.data.digits import digits
from gptv_jax.data.records import Record

HEIGHT, WIDTH = 32, 48  # of the canvas, pixels
DIGITS = 5  # at most, of a scene
SIDES = (9, 17)  # height of a digit, pixels; the end is excluded
OVERLAP = 0.15  # of two digits' boxes, at most, as a share of the smaller box
INK = 0.3  # share of a digit's brightness from which a pixel belongs to the digit
TRIES = 20  # to find a free place for a digit, which is left out otherwise


class DigitScenes(DataSet):
    """The data set: 20,000 scenes of training digits, 400 each of validation and test digits."""

    object_names = tuple("0123456789")
    map_names = ("background", *object_names)
    keys = ("area", "masks", "segmentation")

    def __init__(self, seed: int = 0):
        lengths = (20_000, 400, 400)
        self.splits = {s: Scenes(s, n, seed) for s, n in zip(SPLITS, lengths, strict=True)}


@dataclasses.dataclass(frozen=True)
class Scenes(Source):
    """The scenes of a split, by number; see `scene`."""

    where: str  # the split
    length: int
    seed: int = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        return scene(self.where, index, self.seed)


@functools.cache
def drawings(split: str) -> tuple[list[Image.Image], np.ndarray]:
    """The digits of a split, each cropped to its ink, and their classes."""
    source = digits().open(split)
    cropped = []
    for image in source.images[..., 0]:
        y0, x0, y1, x1 = _bounds(image >= 16 * INK).astype(int)
        cropped.append(Image.fromarray((image[y0:y1, x0:x1] * 15.9375).astype(np.uint8)))
    return cropped, source.labels


def scene(split: str, index: int, seed: int = 0) -> Record:
    """The record of a scene of 1 to 5 digits.

    "image" is uint8 [H, W, 1]. Of each of the n digits, "boxes" float32 [n, 4] (y0, x0, y1, x1,
    pixels) is tight around its visible ink, "box_labels" int32 [n] is its class, "crowd" bool [n]
    is False, "masks" bool [n, H, W] is its visible ink and "area" float32 [n] the number of pixels
    of its mask, as in COCO; masks do not overlap. "segmentation" uint8 [H, W] has 1 + class on a
    digit's ink, 0 elsewhere.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    choices, classes = drawings(split)
    canvas = _background(rng)
    best = np.zeros((HEIGHT, WIDTH), np.uint8)  # brightest ink
    owner = np.zeros((HEIGHT, WIDTH), np.uint8)  # number of the digit with this ink; 0: none
    places, labels = [], []
    for _ in range(rng.integers(1, DIGITS + 1)):
        chosen = rng.integers(len(choices))
        drawing, height = choices[chosen], int(rng.integers(*SIDES))
        width = round(height * drawing.width / drawing.height * rng.uniform(0.85, 1.2))
        place = _free_place(rng, places, height, max(width, 3))
        if place is None:
            continue
        y0, x0, y1, x1 = place
        ink = np.asarray(drawing.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR))
        places.append(place)
        labels.append(classes[chosen])
        level = rng.uniform(0.6, 1)
        ink = (ink * level).astype(np.uint8)
        under, owned = best[y0:y1, x0:x1], owner[y0:y1, x0:x1]
        owned[(ink > under) & (ink >= 255 * level * INK)] = len(places)
        np.maximum(under, ink, out=under)
    numbers = np.arange(1, len(places) + 1, dtype=np.uint8)
    masks = owner == numbers[:, None, None]
    values = np.array([0, *(1 + label for label in labels)], np.uint8)
    return {
        "image": np.maximum(canvas, best)[..., None],
        "boxes": np.stack([_bounds(mask) for mask in masks]),
        "box_labels": np.array(labels, np.int32),
        "crowd": np.zeros(len(labels), bool),
        "area": masks.sum(axis=(1, 2)).astype(np.float32),
        "masks": masks,
        "segmentation": values[owner],
    }


def _bounds(mask: np.ndarray) -> np.ndarray:
    """The box, float32 (y0, x0, y1, x1), around the pixels where the mask is True."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], np.float32)


def _background(rng: np.random.Generator) -> np.ndarray:
    """Noise, specks and strokes: uint8 [H, W]."""
    image = Image.new("L", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(5)):  # strokes, shorter than a digit is high
        x, y = rng.uniform((0, 0), (WIDTH, HEIGHT))
        dx, dy = rng.uniform(-7, 7, 2)
        draw.line((x, y, x + dx, y + dy), int(rng.integers(60, 180)), int(rng.integers(1, 3)))
    canvas = np.array(image)
    specks = rng.integers(HEIGHT * WIDTH, size=rng.integers(20))
    canvas.reshape(-1)[specks] = rng.integers(60, 255, size=len(specks))
    noise = rng.integers(rng.integers(10, 70), size=canvas.shape, dtype=np.uint8)
    return np.maximum(canvas, noise)


def _free_place(rng, places: list, height: int, width: int) -> tuple[int, int, int, int] | None:
    """A box of this size that hardly overlaps the boxes in `places`; None: not found."""
    for _ in range(TRIES):
        y0, x0 = rng.integers(HEIGHT - height + 1), rng.integers(WIDTH - width + 1)
        y1, x1 = y0 + height, x0 + width
        for a, b, c, d in places:
            common = max(min(y1, c) - max(y0, a), 0) * max(min(x1, d) - max(x0, b), 0)
            if common > OVERLAP * min(height * width, (c - a) * (d - b)):
                break
        else:
            return int(y0), int(x0), int(y1), int(x1)
    return None
