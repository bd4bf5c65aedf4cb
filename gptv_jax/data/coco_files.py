"""The files of a COCO data set: the JSON file and the folder of images of a split, and outlines.

pycocotools' mask functions rasterise polygons and run lengths, as in its `COCO.annToMask`.
"""

import dataclasses
import gc
import json
import mmap
import os
import pathlib
import re
import secrets
from typing import BinaryIO

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files as files_lib
from gptv_jax.data import listing
from gptv_jax.data.data_set import SPLITS
from gptv_jax.data.limits import as_damaged
from gptv_jax.data.listing import split_name, split_of
from gptv_jax.data.records import Record
from gptv_jax.errors import InputError, as_input_error, cut, shorten

LISTS = ("images", "annotations", "categories")
# Most of a file is polygons. They are cut out of the text, since as Python objects they would take
# gigabytes; a string with these words has \" in JSON. Anything but lists of numbers as JSON writes
# them stays, and is read or refused with the rest.
_SPACE = rb"[ \t\n\r]*+"
_NUMBER = rb"-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?+[0-9]++)?+" + _SPACE


def _list_of(item: bytes) -> bytes:
    """The pattern of a JSON list, possibly empty, with the spaces behind the list."""
    items = rb"(?:%b(?:,%b%b)*+)?+" % (item, _SPACE, item)
    return rb"\[%b%b\]%b" % (_SPACE, items, _SPACE)


_SHAPES = re.compile(
    rb'"(segmentation|counts|keypoints)"%b:%b(%b|%b)'
    % (_SPACE, _SPACE, _list_of(_NUMBER), _list_of(_list_of(_NUMBER)))
)
WHOLE_STARS = re.compile(r"(?<![^/])\*\*(?![^/])")  # a pattern's part for folders of any depth
PROBED = 32  # images of a JSON file that are looked for in every folder
KINDS = ("semantic", "masks")  # what `config.data.maps` names
BACKGROUND = "background"  # class 0 of label maps: pixels of no object
SHORTEST = len("[[0,0,0,1,1,1]]")  # text of a polygon
UNREADABLE = (ValueError, OSError, RecursionError)  # as of JSON, of files and of nested lists
FAR = 10  # heights or widths of the image, within which the corners of polygons lie
LONGEST = 100  # an outline is at most so many times as long as height and width of the image
RUN_BITS = 40  # of a compressed run length; no image has so many pixels
MOST = 2**63 - 1  # an id of an image is at most so large


def find(path: pathlib.Path, given: str | None) -> dict[str, pathlib.Path]:
    """The JSON file of every split, in the order of `SPLITS`."""
    field, root = "config.data.annotations", _root(path)
    if root != path:
        files = [path]
    elif given is None:
        files = listing.coco_files(path)
        if not files:
            advice = listing.of_folder(path, "coco")
            if advice and "config.data.name=folder " not in advice:
                raise InputError(f"config.data.path={advice}")
            above = listing.coco_files(path.parent)
            found = f"{path.parent}, which has such a file" if above else "the folder that has it"
            raise InputError(
                f"config.data.path={path} has no COCO JSON file, such as instances_train.json, in "
                f"the folder or in a folder directly in it; take {found}, name files by {field}, "
                "or read images without boxes by --config.data.name=folder."
            )
    elif "{split}" in given:
        pattern = given.replace("{split}", "*")
        if "**" in WHOLE_STARS.sub("", pattern) or pathlib.Path(pattern).is_absolute():
            raise InputError(
                f"{field}={given} is no pattern: {{split}} stands for any letters, so no * stands "
                f"beside it, and a pattern is relative to {path}, such as 'labels/{{split}}.json'."
            )
        files = sorted(path.glob(pattern))
        if not files:
            raise InputError(f"{field}={given} names no file in {path}.")
    else:
        files = [path / name.strip() for name in given.split(",")]
        if missing := [file for file in files if not file.is_file()]:
            raise InputError(f"{field}={given} names {missing[0]}, which does not exist.")
        return dict(zip(SPLITS, files, strict=False))
    splits = [split_of(file.relative_to(root).with_suffix("")) for file in files]
    if len(files) == 1:
        return {splits[0] or "train": files[0]}
    for split in splits:
        members = [file for file, own in zip(files, splits, strict=True) if own == split]
        if split is None or len(members) > 1:
            of = f"of the split {split}" if split else "of no split by their names"
            raise InputError(
                f"{path} has {shorten(f.relative_to(path) for f in members)} {of}; name the files "
                f"to use by {field}=TRAIN.json,VALIDATION.json,TEST.json."
            )
    return {split: files[splits.index(split)] for split in SPLITS if split in splits}


def _root(path: pathlib.Path) -> pathlib.Path:
    return path if path.is_dir() else path.parent


def own_name(file: pathlib.Path) -> str:
    """The name of the file's split in COCO, such as train2017."""
    return file.stem.removeprefix("instances_")


def read(path: pathlib.Path, outlines: bool = False) -> dict:
    """The content of a JSON file without polygons; InputError where it is no COCO file.

    With `outlines`, a `Cut` stands for the polygons or run lengths of each annotation: the number
    of a row of "spans", int64 [N, 2], where the list begins and ends in the file.
    """
    spans: list[tuple[int, int]] = []
    mark = secrets.token_hex(8)  # which no file has, by chance or on purpose

    def replaced(match: re.Match) -> bytes:
        if match[1] == b"keypoints":
            return b'"":0'
        spans.append(match.span(2))
        return b'"%s":"%s%d"' % (match[1], mark.encode(), len(spans) - 1)

    def restored(given: object) -> object:
        """The number of the list in place of a marked text."""
        marked = isinstance(given, str) and given.startswith(mark)
        return Cut(given.removeprefix(mark)) if marked else given

    problem, advice = f"{path} cannot be read as JSON", "; it may be cut short: copy it anew"
    collecting = gc.isenabled()
    gc.disable()  # which would look through millions of new objects again and again
    try:
        with (
            as_input_error(problem, UNREADABLE, advice, lambda e: getattr(e, "msg", "")),
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            content = json.loads(_SHAPES.sub(replaced if outlines else b'"":0', text))
    finally:
        if collecting:
            gc.enable()
    wanted = "a COCO file is an object with the lists images, annotations and categories"
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, such as results; {wanted}.")
    lists = [k for k in LISTS if isinstance(content.get(k), list)]
    if missing := [k for k in LISTS if k not in lists]:
        raise InputError(f"{path} has no list of {' and '.join(missing)}; {wanted}.")
    for key in LISTS:
        if not all(isinstance(each, dict) for each in content[key]):
            raise InputError(f"{path} has {key} that are no objects; {wanted}.")
    for each in content["images"]:
        number, name = each.get("id"), each.get("file_name")
        if type(number) is not int or abs(number) > MOST or type(name) is not str:
            raise InputError(
                f"{path} has an image with id={cut(repr(number), 40)} and file_name="
                f"{cut(repr(name), 100)}; an id is a whole number of 64 bits, a file name a text."
            )
    for each in content["annotations"] if spans else ():
        if "segmentation" in each:
            given = each["segmentation"] = restored(each["segmentation"])
            if isinstance(given, dict) and "counts" in given:
                given["counts"] = restored(given["counts"])
    content["spans"] = np.array(spans, np.int64).reshape(-1, 2)
    return content


def image_folder(
    config: config_lib.Data, file: pathlib.Path, split: str, splits: int, images: list[dict]
) -> pathlib.Path:
    """The folder in which most of the images of a split's `file` lie; there are `splits` splits."""
    root, given = _root(files_lib.user_path(config.path)), config.images
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        if "{split}" in given:
            own = (own_name(file), file.stem, split)
            folders = [root / given.replace("{split}", name) for name in own]
        elif len(names) in (1, splits):
            folders = [root / names[SPLITS.index(split) if len(names) > 1 else 0]]
        else:
            raise InputError(
                f"config.data.images={given} names {len(names)} folders for {splits} splits."
            )
    else:
        places = [file.parent, root, root / "images"]
        below = [folder for place in places for folder in sorted(place.glob("*/"))]
        # Among folders with equally many images, the folder named like the split comes first.
        fitting = [each for each in below if split_name(each.name, within=True) == split]
        own = [each for each in below if each.name == own_name(file)]
        folders = [*own, *fitting, *places, *below]
    probed = images[:: max(len(images) // PROBED, 1)]
    # `os.path.isfile` takes any name; of a name that no system takes `Path.is_file` may raise.
    has = lambda folder, image: os.path.isfile(folder / image_name(image))  # noqa: E731
    counts = [sum(has(folder, each) for each in probed) for folder in folders]
    if images and not max(counts):
        name, above = cut(image_name(images[0]), 100), root.parent
        places = (above, *sorted(above.glob("*/")))
        beside = given is None and next((f for f in places if has(f, images[0])), None)
        advice = "name the folder by config.data.images"
        if beside and root.samefile(files_lib.user_path(config.path)):
            advice = f"take config.data.path={above}, which has the images"
        elif beside:
            advice = f"take config.data.images={os.path.relpath(beside, root)}"
        raise InputError(
            f"of the images of {file.name}, such as {name}, none lies in "
            f"{shorten(dict.fromkeys(folders), room=100)}; {advice}."
        )
    return folders[counts.index(max(counts))]


def image_name(image: dict) -> str:
    """The image file, relative to the folder of images."""
    return image["file_name"].replace("\\", "/")  # as Windows writes paths


class Cut(int):
    """The number of a list that `read` leaves in the file; the file's own numbers are no `Cut`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Outlines:
    """The outlines of M objects. Polygons stay in the JSON file until a record needs them."""

    file: pathlib.Path
    kinds: tuple[str, ...]  # of `KINDS`
    given: list  # the "segmentation" of each object, with a `Cut` for each list; None: absent
    spans: np.ndarray  # int64 [N, 2], where lists begin and end in the file, see `coco_files.read`

    def lack(self) -> np.ndarray:
        """Whether an object has no outline, or a text too short for a polygon; bool [M]."""
        short = np.diff(self.spans)[:, 0] < SHORTEST
        return np.array([short[e] if type(e) is Cut else not e for e in self.given], bool)

    def add(self, record: Record, rows: range, size: tuple[int, int], classes: int) -> None:
        """Adds "masks" and "segmentation" of the objects `rows`, whose boxes the record has.

        A smaller object covers a larger one in the label map. The box of an object without an
        outline is of no class, where no other object is, and the object's mask is empty.
        """
        masks, known = self._masks(rows, size)
        if "masks" in self.kinds:
            record["masks"] = masks
        if "semantic" in self.kinds:
            dtype = np.dtype(np.uint8 if classes < 255 else np.int32)
            found = np.zeros(size, dtype)
            for y0, x0, y1, x1 in record["boxes"][~known].round().astype(int):
                found[y0:y1, x0:x1] = 255 if dtype == np.uint8 else -1
            for i in np.argsort(-masks.sum((1, 2)), kind="stable"):
                found[masks[i]] = 1 + record["box_labels"][i]
            record["segmentation"] = found

    def _masks(self, rows: range, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Masks, bool [n, H, W], and whether each object has an outline, bool [n]."""
        from pycocotools import mask

        masks = np.zeros((len(rows), *size), bool)
        problem = f"an outline of its objects in {self.file.name} cannot be read: "
        with as_damaged(problem), self.file.open("rb") as file:
            runs = [_runs(self._outline(row, file), *size) for row in rows]
            known = np.array([each is not None for each in runs], bool)
            if known.any():
                masks[known] = mask.decode([each for each in runs if each]).transpose(2, 0, 1)
        return masks, known

    def _outline(self, row: int, file: BinaryIO) -> list | dict:
        """The polygons or run lengths of an object, with the lists that the open file has."""

        def read(given: object) -> object:
            if type(given) is not Cut:
                return given
            start, end = self.spans[given].tolist()
            file.seek(start)
            return json.loads(file.read(end - start))

        outline = read(self.given[row]) or []
        if not isinstance(outline, list | dict):
            raise ValueError(f"{cut(repr(outline), 40)} is no list of polygons and no run lengths")
        return {**outline, "counts": read(outline["counts"])} if "counts" in outline else outline


def kinds(given: str) -> tuple[str, ...]:
    """The kinds that `config.data.maps` names; InputError if unknown, or without pycocotools."""
    found = tuple(each.strip() for each in given.split(",") if each.strip())
    if set(found) - set(KINDS):
        raise InputError(
            f"config.data.maps={given} is unknown for COCO files; it takes semantic (label maps), "
            "masks (of each object), or semantic,masks."
        )
    if found:
        try:
            import pycocotools.mask  # noqa: F401
        except ImportError as error:
            raise InputError(
                "masks of COCO files are made by pycocotools, which is not installed; "
                "pip install pycocotools"
            ) from error
    return found


def _runs(outline: list | dict, height: int, width: int) -> dict | None:
    """Compressed run lengths of the pixels inside an outline; None: there is no outline."""
    from pycocotools import mask

    if isinstance(outline, list):
        polygons = [each for each in outline if len(each) >= 6 and len(each) % 2 == 0]
        if not polygons:
            return None
        # pycocotools takes 40 bytes for each pixel of an outline's length.
        if not (np.abs(np.concatenate(polygons)) < FAR * max(height, width)).all():
            raise ValueError("a polygon has corners far outside of the image")
        for each in polygons:
            corners = np.reshape(each, (-1, 2))
            steps = np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1)
            if steps.sum() > LONGEST * (height + width):
                raise ValueError("a polygon's outline is too long for the image")
        return mask.merge(mask.frPyObjects(polygons, height, width))
    if list(outline["size"]) != [height, width]:
        raise ValueError(f"run lengths are of {outline['size']}, the image of {[height, width]}")
    counts = outline["counts"]
    counts = counts if isinstance(counts, list) else _uncompressed(counts)
    if sum(counts) != height * width or min(counts) < 0:  # pycocotools would leave pixels random
        raise ValueError("run lengths are not of all pixels")
    return mask.frPyObjects({**outline, "counts": counts}, height, width)


def _uncompressed(text: str) -> list[int]:
    """The run lengths in a compressed text, as pycocotools' `rleFrString` reads them.

    A character has five bits of a number, the lowest first; from the fourth on, a number is the
    difference from the run length two before.
    """
    counts, number, bits = [], 0, 0
    for letter in text.encode():
        letter -= 48
        number |= (letter & 31) << bits
        if (bits := bits + 5) > RUN_BITS:  # a number of many digits would take quadratic time
            raise ValueError("a run length is longer than any image")
        if not letter & 32:
            number -= (letter & 16) // 16 << bits  # the sign
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = bits = 0
    return counts
