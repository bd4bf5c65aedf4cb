"""COCO data sets: image files, and JSON files with boxes and classes of the objects in them.

https://cocodataset.org/#format-data defines the format. Keypoints are not read.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from gptv_jax.data import coco_files, coco_masks
from gptv_jax.data.coco_files import image_name
from gptv_jax.data.folder import ORDER_SEED
from gptv_jax.data.images import DamagedImageError, as_stored, shown_size
from gptv_jax.data.records import Record
from gptv_jax.errors import InputError, shorten


class Coco:
    """A folder with a JSON file and a folder of images for each split.

    `notes` are sentences about what a user may not expect. The images of a split are mixed in a
    fixed order, so that `train[:90%]` is like the other tenth.
    """

    classes, class_names = 0, ()  # of whole images

    def __init__(
        self,
        path: pathlib.Path,
        annotations: str | None = None,
        images: str | None = None,
        max_missing: float = 0.05,
        shapes: tuple[str, ...] = (),
    ):
        """Reads the JSON files, and the names of the image files.

        `annotations` and `images` are as in `config.Data`. Of a split's images a share of
        `max_missing` may have no file. Records have what `shapes` names of `coco_masks.KINDS`.

        Raises:
          InputError: a file is no COCO file, or of no split; the images are not found; or nothing
            is left of a split.
        """
        self.notes: list[str] = []
        coco_masks.check(shapes)
        root = path if path.is_dir() else path.parent
        found = coco_files.find(path, annotations)
        self.other_names = {
            name: split
            for split, file in found.items()
            for name in (file.stem, coco_files.own_name(file))
            if name not in found
        }
        read = {split: coco_files.read(file, bool(shapes)) for split, file in found.items()}
        names = self._names({file: read[split]["categories"] for split, file in found.items()})
        self.object_ids = tuple(sorted(names))  # of the files, in the order of the numbers
        self.object_names = tuple(names[each] for each in self.object_ids)
        semantic = (coco_masks.BACKGROUND, *self.object_names)
        self.map_names = semantic if "semantic" in shapes else ()
        self.keys = ("masks",) if "masks" in shapes else ()
        self._splits = {}
        for split, file in found.items():
            content = read.pop(split)
            folder = coco_files.image_folder(
                root, split, file, content["images"], images, len(found)
            )
            note = self.notes.append
            kept = (self.object_ids, max_missing, shapes, note)
            self._splits[split] = _index(file, folder, content, *kept)
        if not any(len(source.boxes) for source in self._splits.values()):
            raise InputError(
                f"{shorten(found.values())} have no box that could be used, of "
                f"{len(self.object_ids)} categories; name other files by config.data.annotations."
            )
        self.lengths = {split: len(source) for split, source in self._splits.items()}

    def open(self, split: str) -> "CocoSplit":
        return self._splits[split]

    def _names(self, categories: dict[pathlib.Path, list[dict]]) -> dict[int, str]:
        """The name of every category of the files, by its id; notes where the files differ."""
        names: dict[int, str] = {}
        own = {}
        for file, entries in categories.items():
            own[file] = {}
            for each in entries:
                number = each.get("id")
                if type(number) is not int:
                    raise InputError(f"{file} has a category whose id, {number!r}, is no number.")
                name = str(each.get("name", number))
                own[file][number] = name
                if names.setdefault(number, name) != name:
                    raise InputError(
                        f"category {number} is {names[number]} and {name} ({file}); give a "
                        "category the same id and name in the files of all splits."
                    )
        for file, found in own.items():
            if missing := [names[number] for number in sorted(names) if number not in found]:
                self.notes.append(
                    f"{file} has no category {shorten(missing)}, which another split has"
                )
        return names


@dataclasses.dataclass(frozen=True, eq=False)
class CocoSplit:
    """The images of a split; arrays over all images hold the boxes."""

    file: pathlib.Path  # the JSON file
    folder: pathlib.Path
    names: list[str]  # N image files, relative to the folder
    ids: np.ndarray  # int64 [N], of the images in the JSON file
    sizes: np.ndarray  # int32 [N, 2], height and width in pixels; 0 where unknown
    offsets: np.ndarray  # int64 [N + 1]; image i has the boxes offsets[i] .. offsets[i + 1] - 1
    boxes: np.ndarray  # float32 [M, 4]
    box_labels: np.ndarray  # int32 [M]
    crowd: np.ndarray  # bool [M]
    area: np.ndarray  # float32 [M]
    outlines: coco_masks.Outlines | None  # of the objects, if asked for
    classes: int  # of objects

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Record:
        encoded = (self.folder / self.names[index]).read_bytes()
        return {"encoded": self._fitting(index, encoded), **self.annotations(index)}

    def annotations(self, index: int) -> Record:
        """The record without the picture, of which no file is read."""
        rows = slice(*self.offsets[index : index + 2])
        keys = ("boxes", "box_labels", "crowd", "area")
        record = {key: getattr(self, key)[rows].copy() for key in keys}
        if self.outlines:
            size = tuple(self.sizes[index].tolist())
            self.outlines.add(record, range(rows.start, rows.stop), size, self.classes)
        return record

    def image_id(self, index: int) -> int:
        """The image's id in the JSON file."""
        return int(self.ids[index])

    def name(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def object_counts(self, rows: range) -> dict[str, int | list[int]]:
        """Numbers of boxes, also by class, of crowds among them, and of images without boxes."""
        ends = self.offsets[rows.start : rows.stop + 1]
        kept = slice(ends[0], ends[-1])
        return {
            "boxes": int(ends[-1] - ends[0]),
            "crowd": int(self.crowd[kept].sum()),
            "empty": int((np.diff(ends) == 0).sum()),
            "by_class": np.bincount(self.box_labels[kept]).tolist(),
        }

    def objects_by_image(self, rows: range) -> np.ndarray:
        """The number of objects of each image, crowds left out, int64 [n]."""
        before = np.append(0, np.cumsum(~self.crowd))
        return np.diff(before[self.offsets[rows.start : rows.stop + 1]])

    def _fitting(self, index: int, encoded: bytes) -> bytes:
        """The image file, whose pixels are those that the boxes count; DamagedImageError if not.

        Where the JSON file has the size that the image has before its EXIF orientation turns it,
        so have the boxes, and the file comes back without the orientation.
        """
        try:
            size, stored = shown_size(encoded)
        except Exception:  # Pillow's parsers raise anything; decoding the file names the reason
            return encoded
        expected = tuple(self.sizes[index].tolist())
        if expected in (size, (0, 0)):
            return encoded
        if expected == stored:
            return as_stored(encoded)
        (height, width), (told_height, told_width) = size, expected
        raise DamagedImageError(
            f"it has {width} x {height} pixels, but {self.file.name} says {told_width} x "
            f"{told_height}, so that its boxes would not fit"
        )


def _index(
    file: pathlib.Path,
    folder: pathlib.Path,
    content: dict,
    category_ids: Sequence[int],
    max_missing: float,
    shapes: tuple[str, ...],
    note: Callable[[str], None],
) -> CocoSplit:
    """The arrays of a split; `note` takes a sentence on each kind of fault that was met."""

    def tell(what: str, faulty: Sequence | np.ndarray, name: Callable[[int], str]) -> None:
        if len(faulty):
            note(f"{file}: {what}: {len(faulty)}, the first {name(faulty[0])}")

    images, entries = content["images"], content["annotations"]
    image_of: dict[int, int] = {}
    repeated = [i for i, each in enumerate(images) if image_of.setdefault(each["id"], i) != i]
    called = lambda i: f"{images[i]['id']} ({image_name(images[i])})"  # noqa: E731
    tell("images whose id an image before has are left out", repeated, called)
    kept = np.setdiff1d(np.arange(len(images)), repeated)
    gone = _without_file(folder, [image_name(images[i]) for i in kept])
    if len(gone) > max_missing * len(kept):
        raise InputError(
            f"{len(gone)} of {len(kept)} images of {file} are not in {folder}, such as "
            f"{image_name(images[kept[gone[0]]])}; that is more than the share "
            f"config.data.max_damaged={max_missing:g}."
        )
    tell(f"images are not in {folder} and are left out", kept[gone], called)
    kept = np.delete(kept, gone)
    if not len(kept):
        raise InputError(f"{file} has no image.")
    kept = np.random.default_rng(ORDER_SEED).permutation(kept)
    place = np.full(len(images) + 1, -1)  # of an image of the file in the split; -1: left out
    place[kept] = np.arange(len(kept))
    names = [image_name(images[i]) for i in kept]
    sizes = _sizes(folder, [images[i] for i in kept], names)

    shape_of = [each.pop("segmentation", None) for each in entries]
    entry_name = lambda i: f"annotation {entries[i].get('id', f'number {i}')}"  # noqa: E731
    labels = {number: label for label, number in enumerate(category_ids)}
    owner = np.array([_find(image_of, each.get("image_id"), -1) for each in entries], int)
    label = np.array([_find(labels, each.get("category_id"), -1) for each in entries], np.int32)
    crowd = np.array([bool(each.get("iscrowd", 0)) for each in entries], bool)
    corners = _numbers([each.get("bbox") for each in entries], 4)
    area = _numbers([[each.get("area")] for each in entries], 1)[:, 0]
    at = place[owner]
    y0, x0, side = corners[:, 1], corners[:, 0], corners[:, :1:-1]  # sides: height, width
    known = np.where(sizes > 0, sizes, np.inf)[at]
    finite = np.isfinite(corners).all(1)
    low = np.stack([y0, x0], 1)
    boxes = np.concatenate([np.clip(low, 0, known), np.clip(low + side, 0, known)], 1)
    boxes = boxes.astype(np.float32)
    with np.errstate(invalid="ignore"):
        outside = ((low >= known) | (low + side <= 0)).any(1)
        # Rounding, as in COCO's own files, is no fault.
        clipped = ((low < -0.5) | (low + side > known + 0.5)).any(1)
        empty = (boxes[:, :2] >= boxes[:, 2:]).any(1)
    good = (owner < 0) | (at >= 0)  # the annotations of images without a file go with the images
    for what, faulty in (
        ("annotations of no image of the file are left out", owner < 0),
        ("annotations of no category of the file are left out", label < 0),
        ("annotations have no box of four finite numbers and are left out", ~finite),
        ("boxes have a negative width or height and are left out", (side < 0).any(1)),
        ("boxes lie outside of their image and are left out", outside),
        ("boxes have no area and are left out", empty),
        ("annotations repeat one before, id and all, and are left out", _copies(entries)),
    ):
        tell(what, np.flatnonzero(good & faulty), entry_name)
        good &= ~faulty
    reaching = np.flatnonzero(good & clipped)
    tell("boxes reach out of their image and are clipped", reaching, entry_name)
    rows = np.flatnonzero(good)
    rows = rows[np.argsort(at[rows], kind="stable")]
    outlines = None
    if shapes:
        given, spans = [shape_of[i] for i in rows], content["spans"]
        outlines = coco_masks.Outlines.of(file, shapes, given, spans)
        tell("annotations without polygons and run lengths", rows[outlines.lack()], entry_name)
    boxes = boxes[rows]
    own = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    with np.errstate(invalid="ignore"):
        area = np.where(area[rows] > 0, area[rows], own).astype(np.float32)
    counts = np.bincount(at[rows], minlength=len(kept))
    return CocoSplit(
        file,
        folder,
        names,
        np.array([images[i]["id"] for i in kept], np.int64),
        sizes,
        np.concatenate([[0], np.cumsum(counts)]),
        boxes,
        label[rows],
        crowd[rows],
        area,
        outlines,
        len(category_ids),
    )


def _without_file(folder: pathlib.Path, names: list[str]) -> list[int]:
    """Indices of the names that are no file in the folder, of which each part is listed once."""
    listed: dict[str, set[str]] = {}
    missing = []
    for i, name in enumerate(names):
        inner, last = os.path.split(name)
        if inner not in listed:
            with contextlib.suppress(OSError):
                listed[inner] = set(os.listdir(folder / inner))
        if last not in listed.setdefault(inner, set()):
            missing.append(i)
    return missing


def _sizes(folder: pathlib.Path, images: list[dict], names: list[str]) -> np.ndarray:
    """Height and width of every image, int32 [N, 2]; of the image files where the JSON has none."""
    sizes = _numbers([[each.get("height"), each.get("width")] for each in images], 2)
    unknown = ~(np.isfinite(sizes).all(1) & (sizes > 0).all(1))
    for i in np.flatnonzero(unknown):
        sizes[i] = 0  # of a file that cannot be read, which decoding finds out
        with contextlib.suppress(Exception):
            sizes[i] = shown_size((folder / names[i]).read_bytes())[0]
    return sizes.astype(np.int32)


def _numbers(values: list, count: int) -> np.ndarray:
    """Lists of `count` numbers each, as float64 [N, count]; NaN for anything else."""
    try:
        return np.array(values, np.float64).reshape(len(values), count)
    except (TypeError, ValueError):
        found = np.full((len(values), count), np.nan)
        for i, each in enumerate(values):
            with contextlib.suppress(TypeError, ValueError):
                found[i] = np.array(each, np.float64).reshape(count)
        return found


def _find(places: dict, key, absent: int) -> int:
    try:
        return places.get(key, absent)
    except TypeError:  # a list, say
        return absent


def _copies(entries: list[dict]) -> np.ndarray:
    """Whether an annotation equals one before; bool [n]. Different ones may have one id."""
    first: dict = {}
    copies = np.zeros(len(entries), bool)
    for i, each in enumerate(entries):
        number = each.get("id")
        if type(number) is int and entries[first.setdefault(number, i)] == each:
            copies[i] = first[number] != i
    return copies
