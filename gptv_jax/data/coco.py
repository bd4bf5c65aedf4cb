"""COCO data sets: image files, and JSON files with boxes and classes of the objects in them.

https://cocodataset.org/#format-data defines the format. Keypoints are not read.
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import coco_files, limits, listing
from gptv_jax.data.coco_files import image_name
from gptv_jax.data.data_set import ORDER_SEED, DataSet, Source
from gptv_jax.data.limits import DamagedImageError
from gptv_jax.data.orientation import as_stored, shown_size
from gptv_jax.data.records import Record
from gptv_jax.errors import InputError, cut, shorten


class Coco(DataSet):
    """A folder, `config.path`, with a JSON file and a folder of images for each split.

    Records have what `config.maps` names of `coco_files.KINDS`. The images of a split are mixed in
    a fixed order, so that `train[:90%]` is like the other tenth. Raises InputError where a file is
    no COCO file, or of no split; the images are not found, or too many of them (`config.missing`)
    have no file; or nothing is left of a split.
    """

    def __init__(self, config: config_lib.Data):
        self.config, self.notes = config, []
        self.shapes = shapes = coco_files.kinds(config.maps or "")
        path = listing.data_path(config)
        found = coco_files.find(path, config.annotations)
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
        semantic = (coco_files.BACKGROUND, *self.object_names)
        self.map_names = semantic if "semantic" in shapes else ()
        self.keys = ("masks",) if "masks" in shapes else ()
        self.splits = {}
        for split, file in found.items():
            content = read.pop(split)
            folder = coco_files.image_folder(config, file, split, len(found), content["images"])
            self.splits[split] = CocoSplit(self, file, folder, content)
        if not any(len(source.box_labels) for source in self.splits.values()):
            told = (note.partition(": ")[2] for note in self.notes)
            cause = shorten(told, "; ", room=140) or "there are no annotations"
            raise InputError(
                f"{shorten(found.values(), room=60)} have no box that could be used, of "
                f"{len(names)} categories: {cause}; mend the files, or name others by "
                "config.data.annotations."
            )

    def _names(self, categories: dict[pathlib.Path, list[dict]]) -> dict[int, str]:
        """The name of every category of the files, by its id; notes where the files differ."""
        names: dict[int, str] = {}
        for file, entries in categories.items():
            for each in entries:
                number = each.get("id")
                if type(number) is not int:
                    raise InputError(f"{file} has a category whose id, {number!r}, is no number.")
                name = str(each.get("name", number))
                if names.setdefault(number, name) != name:
                    both = f"{cut(names[number], 40)} and {cut(name, 40)}"
                    raise InputError(
                        f"category {number} is {both} ({file}); give a "
                        "category the same id and name in the files of all splits."
                    )
        for file, entries in categories.items():
            own = {each["id"] for each in entries}
            if missing := [names[number] for number in sorted(names) if number not in own]:
                self.notes.append(
                    f"{file} has no category {shorten(missing)}, which another split has"
                )
        return names


class CocoSplit(Source):
    """The N images of a split; arrays over all images hold the M boxes."""

    def __init__(self, data_set: Coco, file: pathlib.Path, folder: pathlib.Path, content: dict):
        """Reads the `content` of a JSON file, whose images lie in the folder.

        The data set gets a note on each kind of fault that was met.
        """
        self.file, self.folder, self.classes = file, folder, len(data_set.object_ids)
        self.limits = data_set.config.limits

        def tell(what: str, faulty: Sequence | np.ndarray, name: Callable[[int], str]) -> None:
            if len(faulty):
                note = f"{file}: {what}: {len(faulty)}, the first {name(faulty[0])}"
                data_set.notes.append(note)

        images, entries = content["images"], content["annotations"]
        image_of: dict[int, int] = {}
        repeated = [i for i, each in enumerate(images) if image_of.setdefault(each["id"], i) != i]
        called = lambda i: f"{images[i]['id']} ({cut(image_name(images[i]), 100)})"  # noqa: E731
        tell("images whose id an image before has are left out", repeated, called)
        kept = np.setdiff1d(np.arange(len(images)), repeated)
        gone = _without_file(folder, [image_name(images[i]) for i in kept])
        missing = data_set.config.missing
        if len(gone) > missing * len(kept):
            raise InputError(
                f"{len(gone)} of {len(kept)} images of {file} are not in {folder}, such as "
                f"{cut(image_name(images[kept[gone[0]]]), 100)}; that is more than the share "
                f"config.data.max_damaged={missing:g}."
            )
        tell(f"images are not in {folder} and are left out", kept[gone], called)
        kept = np.delete(kept, gone)
        if not len(kept):
            raise InputError(f"{file} has no image.")
        kept = np.random.default_rng(ORDER_SEED).permutation(kept)
        self.names = [image_name(images[i]) for i in kept]  # relative to the folder
        self.ids = np.array([images[i]["id"] for i in kept], np.int64)
        self.sizes = self._read_sizes([images[i] for i in kept])
        place = np.full(len(images) + 1, -1)  # of an image of the file in the split; -1: left out
        place[kept] = np.arange(len(kept))

        outlines = [each.pop("segmentation", None) for each in entries]
        entry_name = lambda i: cut(f"annotation {entries[i].get('id', f'number {i}')}", 60)  # noqa: E731
        label_of = {number: label for label, number in enumerate(data_set.object_ids)}
        owner = _look_up(image_of, [each.get("image_id") for each in entries])
        label = _look_up(label_of, [each.get("category_id") for each in entries])
        corners = _numbers([each.get("bbox") for each in entries], 4)
        area = _numbers([[each.get("area")] for each in entries], 1)[:, 0]
        at = place[owner]
        low, side = corners[:, 1::-1], corners[:, :1:-1]  # y, x and height, width
        known = np.where(self.sizes > 0, self.sizes, np.inf)[at]
        boxes = np.concatenate([np.clip(low, 0, known), np.clip(low + side, 0, known)], 1)
        boxes = boxes.astype(np.float32)
        finite = np.isfinite(corners).all(1)
        with np.errstate(invalid="ignore"):
            outside = ((low >= known) | (low + side <= 0)).any(1)
            # Rounding, as in COCO's own files, is no fault.
            clipped = ((low < -0.5) | (low + side > known + 0.5)).any(1)
            empty = (boxes[:, :2] >= boxes[:, 2:]).any(1)
        good = (owner < 0) | (at >= 0)  # annotations of images without a file go with the images
        faults = {
            "annotations of no image of the file are left out": (owner < 0, "image_id"),
            "annotations of no category of the file are left out": (label < 0, "category_id"),
            "annotations have no box of four finite numbers and are left out": (~finite, "bbox"),
            "boxes have a negative width or height and are left out": ((side < 0).any(1), "bbox"),
            "boxes lie outside of their image and are left out": (outside, "bbox"),
            "boxes have no area and are left out": (empty, "bbox"),
            "annotations repeat one before, id and all, and are left out": (_copies(entries), "id"),
        }
        for what, (faulty, key) in faults.items():
            rows = np.flatnonzero(good & faulty)
            given = cut(repr(entries[rows[0]].get(key)), 40) if len(rows) else ""
            tell(what, rows, lambda i, cause=f" ({key}={given})": entry_name(i) + cause)
            good &= ~faulty
        reaching = np.flatnonzero(good & clipped)
        tell("boxes reach out of their image and are clipped", reaching, entry_name)
        shares = np.flatnonzero(good & (low >= 0).all(1) & (low + side <= 1).all(1))
        if 2 * len(shares) > good.sum():
            what = "most boxes lie within one pixel, as shares of an image do; bbox takes pixels"
            tell(what, shares, entry_name)
        rows = np.flatnonzero(good)
        rows = rows[np.argsort(at[rows], kind="stable")]
        # Image i has the boxes offsets[i] .. offsets[i + 1] - 1.
        counts = np.bincount(at[rows], minlength=len(kept))
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        self.boxes, self.box_labels = boxes[rows], label[rows].astype(np.int32)
        self.crowd = np.array([bool(entries[i].get("iscrowd", 0)) for i in rows], bool)
        own = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1)
        with np.errstate(invalid="ignore"):
            self.area = np.where(area[rows] > 0, area[rows], own).astype(np.float32)
        self.outlines = None  # of the objects, if asked for
        if data_set.shapes:
            given = [outlines[i] for i in rows]
            self.outlines = coco_files.Outlines(file, data_set.shapes, given, content["spans"])
            lacking = rows[self.outlines.lack()]
            tell("annotations without polygons and run lengths", lacking, entry_name)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Record:
        encoded = limits.read(self.folder / self.names[index], self.limits)
        return {"encoded": self._fitting(index, encoded), **self.annotations(index)}

    def annotations(self, index: int) -> Record:
        """The record without the picture, of which no file is read."""
        rows = slice(*self.offsets[index : index + 2])
        keys = ("boxes", "box_labels", "crowd", "area")
        record = {key: getattr(self, key)[rows].copy() for key in keys}
        if self.outlines:
            size = tuple(self.sizes[index].tolist())
            limits.check_size(*size[::-1], self.limits)  # as masks have the size in the JSON file
            self.outlines.add(record, range(rows.start, rows.stop), size, self.classes)
        return record

    def image_id(self, index: int) -> int:
        """The image's id in the JSON file."""
        return int(self.ids[index])

    def name(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def known_objects(self, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ends = self.offsets[rows.start : rows.stop + 1]
        kept = slice(ends[0], ends[-1])
        images = np.repeat(np.arange(len(rows)), np.diff(ends))
        return images, self.box_labels[kept], self.crowd[kept]

    def _read_sizes(self, images: list[dict]) -> np.ndarray:
        """Height and width, int64 [N, 2]; of the image file where the JSON file has none."""
        sizes = _numbers([[each.get("height"), each.get("width")] for each in images], 2)
        unknown = ~(np.isfinite(sizes).all(1) & (sizes > 0).all(1))
        for i in np.flatnonzero(unknown):
            sizes[i] = 0  # of a file that cannot be read, which decoding finds out
            with contextlib.suppress(OSError, DamagedImageError):
                encoded = limits.read(self.folder / self.names[i], self.limits)
                sizes[i] = shown_size(encoded, self.limits)[0]
        return np.minimum(sizes, 2.0**62).astype(np.int64)

    def _fitting(self, index: int, encoded: bytes) -> bytes:
        """The image file, whose pixels are those that the boxes count; DamagedImageError if not.

        Where the JSON file has the size that the image has before its EXIF orientation turns it,
        so have the boxes, and the file comes back without the orientation.
        """
        size, stored = shown_size(encoded, self.limits)
        expected = tuple(self.sizes[index].tolist())
        if expected == size or (0, 0) in (expected, size):  # the size in either file is unknown
            return encoded
        if expected == stored:
            return as_stored(encoded, self.limits)
        (height, width), (told_height, told_width) = size, expected
        raise DamagedImageError(
            f"it has {width} x {height} pixels, but {self.file.name} says {told_width} x "
            f"{told_height}, so that its boxes would not fit"
        )


def _without_file(folder: pathlib.Path, names: list[str]) -> list[int]:
    """Indices of the names that are no file in the folder, of which each part is listed once."""
    listed: dict[str, set[str]] = {}
    for inner in {os.path.dirname(name) for name in names}:
        with contextlib.suppress(OSError, ValueError):  # as of a name with a zero byte
            listed[inner] = set(os.listdir(folder / inner))
    split = enumerate(map(os.path.split, names))
    return [i for i, (inner, last) in split if last not in listed.get(inner, ())]


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


def _look_up(places: dict[int, int], keys: list) -> np.ndarray:
    """The place of each key, int64 [N]; -1 of a key without a place, or that is no number."""
    return np.array([places.get(k, -1) if isinstance(k, int | float) else -1 for k in keys], int)


def _copies(entries: list[dict]) -> np.ndarray:
    """Whether an annotation equals one before; bool [n]. Different ones may have one id."""
    first: dict = {}
    copies = np.zeros(len(entries), bool)
    for i, each in enumerate(entries):
        number = each.get("id")
        if type(number) is int and entries[first.setdefault(number, i)] == each:
            copies[i] = first[number] != i
    return copies
