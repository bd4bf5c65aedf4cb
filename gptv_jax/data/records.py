"""Records: what a source yields for an example, and what transforms change.

A record is a dict of NumPy arrays and numbers. Which keys it has says what is known of the example:

    encoded         bytes of an image file that is not decoded yet; of a clip a list, one a frame,
                    or an `EncodedClip`
    image           uint8 [H, W, C], pixels; of a clip [F, H, W, C], its frames
    tokens          uint16 [rows, columns] or [frames, rows, columns], tokens of a cache
    label           int32, the class of the image
    boxes           float32 [n, 4]: y0, x0, y1, x1 in pixels of the image
    box_labels      int32 [n], classes of the boxes
    crowd           bool [n], whether a box is around a group of objects
    area            float32 [n], pixels of the object in the original image
    masks           bool [n, H, W], pixels of each object
    segmentation    uint8 or int32 [H, W] or [F, H, W], class of every pixel; 255 (uint8) or -1
                    (int32): no class
    view            float32 [4]: y0, x0, y1, x1 of the part of the original image that the image
                    shows, in pixels of the original; y1 < y0 or x1 < x0 where it is mirrored
    teacher_draws   `teacher_draws.Draws`, what a teacher drew at the positions of cached tokens
    variant         int32, number of the shift that was drawn, see `geometry.Shift`
    damaged         int32, see data/damage.py

Geometry moves everything that lies in the image, all frames of a clip alike; colour changes pixels
alone. `crop`, `resize` and `mirror` are all geometry that transforms are made of.
"""

import abc
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Real, UInt8
from PIL import Image


class EncodedClip(abc.ABC):
    """A clip that is not decoded yet, where frames are no files of their own."""

    @abc.abstractmethod
    def decoded(self, decode) -> Sequence[UInt8[np.ndarray, "H W C"]]:
        """The pixels of each frame, by `images.Decode`; DamagedImageError: they are damaged."""


Record = dict[str, np.ndarray | np.generic | bytes | list | EncodedClip]
# What training draws from; None, in evaluation: nothing is random.
Rng = np.random.Generator | None
PICTURE = ("encoded", "image", "tokens")  # the picture itself; other keys say something about it
# Arrays that cover the image, and the axis of the image's rows, counted from the end; the next axis
# is the columns.
PLANES = {"image": -3, "tokens": -2, "segmentation": -2, "masks": -2}
OBJECTS = ("boxes", "box_labels", "crowd", "area", "masks")  # arrays with one entry an object


def annotations(record: Record) -> Record:
    """The record without the picture."""
    return {key: value for key, value in record.items() if key not in PICTURE}


def shape(record: Record) -> tuple[int, int]:
    """Height and width of the image, or rows and columns of the tokens."""
    name = "tokens" if "tokens" in record else "image"
    height, width = record[name].shape[PLANES[name] :][:2]
    return height, width


def with_view(record: Record, height: int, width: int) -> Record:
    """The record of an image of this size that no transform has changed yet."""
    return {**record, "view": np.array([0, 0, height, width], np.float32)}


def crop(
    record: Record,
    top: int,
    left: int,
    height: int,
    width: int,
    *,
    fill: int = 0,
    reflect: bool = False,
    keep_area: float = 0.0,
) -> Record:
    """Cuts out a window, which may reach beyond the image.

    Pixels beyond the image are `fill`, and of no class; or they, and their classes, mirror the
    image's border (`reflect`). Boxes are clipped to the window. An object is dropped when nothing
    of its box stays, as in Pix2seq (`filter_invalid_objects` in its data/data_utils.py), or less
    than the share `keep_area`.
    """
    rows, columns = shape(record)
    beyond = [(-top, top + height - rows), (-left, left + width - columns)]
    beyond = [(max(before, 0), max(after, 0)) for before, after in beyond]
    y, x = max(top, 0), max(left, 0)

    def cut(name: str, array: np.ndarray) -> np.ndarray:
        axis = array.ndim + PLANES[name]
        if np.any(beyond):
            pads = [(0, 0)] * axis + beyond + [(0, 0)] * (array.ndim - axis - 2)
            if reflect and name != "masks":
                array = np.pad(array, pads, mode="reflect")
            else:
                no_class = 255 if array.dtype == np.uint8 else -1
                values = {"segmentation": no_class, "masks": False}
                array = np.pad(array, pads, constant_values=values.get(name, fill))
        return array[(slice(None),) * axis + (slice(y, y + height), slice(x, x + width))]

    moved = _on_planes(record, cut)
    if "view" in record:
        ends = np.array([[top, left], [top + height, left + width]])
        moved["view"] = (
            _from_image(ends, (rows, columns), record["view"]).astype(np.float32).ravel()
        )
    if "boxes" not in record:
        return moved
    boxes = record["boxes"] - np.array([top, left] * 2, np.float32)
    moved["boxes"] = np.clip(boxes, 0, np.array([height, width] * 2, np.float32))
    areas = _areas(moved["boxes"])
    kept = (areas > 0) & (areas >= keep_area * _areas(boxes))
    return moved | {name: moved[name][kept] for name in OBJECTS if name in moved}


def resize(record: Record, height: int, width: int, method: str = "bilinear") -> Record:
    """Resizes by a method of Pillow, with antialiasing; masks and classes by nearest neighbour."""
    rows, columns = shape(record)
    if (rows, columns) == (height, width):
        return record
    nearest_row, nearest_column = _nearest(rows, height)[:, None], _nearest(columns, width)

    def resized(name: str, array: np.ndarray) -> np.ndarray:
        if name == "image":
            if array.ndim == 4:  # a clip
                return np.stack([resized(name, frame) for frame in array])
            picture = to_picture(array).resize((width, height), Image.Resampling[method.upper()])
            return to_array(picture, array.shape[-1])
        return array[..., nearest_row, nearest_column]

    moved = _on_planes(record, resized)
    if "boxes" in record:
        moved["boxes"] = record["boxes"] * np.array(
            [height / rows, width / columns] * 2, np.float32
        )
    return moved


def mirror(record: Record, axis: int) -> Record:
    """Mirrors top and bottom (axis 0), or left and right (axis 1)."""
    moved = _on_planes(record, lambda name, array: np.flip(array, PLANES[name] + axis))
    exchanged = [[2, 1, 0, 3], [0, 3, 2, 1]][axis]
    if "view" in record:
        moved["view"] = record["view"][exchanged]
    if "boxes" in record:
        moved["boxes"] = record["boxes"][:, exchanged]
        ends = moved["boxes"][:, axis::2]
        ends[:] = shape(record)[axis] - ends
    return moved


def to_original(
    boxes: Float[np.ndarray, "n 4"], image_shape: tuple[int, int], view: Float[np.ndarray, " 4"]
) -> Float[np.ndarray, "n 4"]:
    """Boxes of an image of this height and width, moved into the original, whose part is `view`.

    Where the image shows more than the original, boxes may lie outside the original.
    """
    return _boxes(_from_image(boxes.reshape(-1, 2, 2), image_shape, view), boxes.dtype)


def to_image(
    boxes: Float[np.ndarray, "n 4"], image_shape: tuple[int, int], view: Float[np.ndarray, " 4"]
) -> Float[np.ndarray, "n 4"]:
    """The inverse of `to_original`."""
    start, end = view[:2].astype(float), view[2:].astype(float)
    ends = (boxes.reshape(-1, 2, 2) - start) * (image_shape / (end - start))
    return _boxes(ends, boxes.dtype)


def plane_to_original(
    plane: Real[np.ndarray, "*F h w"], view: Float[np.ndarray, " 4"], shape: tuple[int, int]
) -> Real[np.ndarray, "*F H W"]:
    """The nearest value of `plane` at each pixel of the original, of this height and width.

    `view` is the part of the original that the plane shows; pixels outside get the nearest border.
    """
    start, end = view[:2].astype(float), view[2:].astype(float)
    at = (
        np.floor((np.arange(pixels) + 0.5 - a) * side / (b - a)).clip(0, side - 1).astype(int)
        for pixels, side, a, b in zip(shape, plane.shape[-2:], start, end, strict=True)
    )
    return plane[(..., *np.ix_(*at))]


def to_picture(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """A Pillow image of an array with one or three channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else np.ascontiguousarray(image))


def to_array(picture: Image.Image, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """The inverse of `to_picture`."""
    return np.asarray(picture).reshape(picture.height, picture.width, channels)


def _on_planes(record: Record, change) -> Record:
    """The record with `change(name, array)` of every array that covers the image."""
    return record | {name: change(name, record[name]) for name in PLANES if name in record}


def _from_image(points: np.ndarray, image_shape: tuple[int, int], view: np.ndarray) -> np.ndarray:
    """Points (y, x) of the image, [..., 2], in the original."""
    start, end = view[:2].astype(float), view[2:].astype(float)
    return start + points * ((end - start) / image_shape)


def _boxes(ends: Float[np.ndarray, "n 2 2"], dtype: np.dtype) -> Float[np.ndarray, "n 4"]:
    """Boxes of two opposite corners each."""
    return np.concatenate([ends.min(axis=1), ends.max(axis=1)], axis=1).astype(dtype)


def _nearest(side: int, size: int) -> np.ndarray:
    """The nearest of `side` pixels to each of `size` pixels, as Pillow rounds."""
    line = Image.fromarray(np.arange(side, dtype=np.int32)[None])
    return np.asarray(line.resize((size, 1), Image.Resampling.NEAREST))[0]


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
