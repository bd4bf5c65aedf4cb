"""Masks of objects and label maps from the polygons and run lengths of a COCO file.

pycocotools' mask functions rasterise the outlines, as in its `COCO.annToMask`.
"""

import dataclasses
import json
import pathlib
from typing import BinaryIO

import numpy as np

from gptv_jax.data.images import DamagedImageError
from gptv_jax.data.records import Record
from gptv_jax.errors import InputError, first_line

KINDS = ("semantic", "masks")  # what `config.data.maps` names
BACKGROUND = "background"  # class 0 of label maps: pixels of no object
SHORTEST = len("[[0,0,0,1,1,1]]")  # text of a polygon
FAR = 10  # heights or widths of the image, within which the corners of polygons lie


@dataclasses.dataclass(frozen=True, eq=False)
class Outlines:
    """The outlines of M objects. Polygons stay in the JSON file until a record needs them."""

    file: pathlib.Path
    kinds: tuple[str, ...]  # of `KINDS`
    given: list  # the "segmentation" of each object, with rows of `spans` for lists; None: absent
    spans: np.ndarray  # int64 [N, 2], where lists begin and end in the file, see `coco_files.read`

    def lack(self) -> np.ndarray:
        """Whether an object has no outline, or a text too short for a polygon; bool [M]."""
        short = np.diff(self.spans)[:, 0] < SHORTEST
        return np.array([short[e] if type(e) is int else not e for e in self.given], bool)

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
        try:
            with self.file.open("rb") as file:
                runs = [_runs(self._outline(row, file), *size) for row in rows]
            known = np.array([each is not None for each in runs], bool)
            if known.any():
                masks[known] = mask.decode([each for each in runs if each]).transpose(2, 0, 1)
        except Exception as error:  # pycocotools raises whatever its parsers do
            raise DamagedImageError(
                f"an outline of its objects in {self.file.name} cannot be read: {first_line(error)}"
            ) from error
        return masks, known

    def _outline(self, row: int, file: BinaryIO) -> list | dict:
        """The polygons or run lengths of an object, with the lists that the open file has."""

        def read(given: object) -> object:
            if type(given) is not int:
                return given
            start, end = self.spans[given].tolist()
            file.seek(start)
            return json.loads(file.read(end - start))

        outline = read(self.given[row]) or []
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
        # Far corners would take gigabytes.
        if not (np.abs(np.concatenate(polygons)) < FAR * max(height, width)).all():
            raise ValueError("a polygon has corners far outside of the image")
        return mask.merge(mask.frPyObjects(polygons, height, width))
    if list(outline["size"]) != [height, width]:
        raise ValueError(f"run lengths are of {outline['size']}, the image of {[height, width]}")
    if not isinstance(outline["counts"], list):
        return outline
    if sum(outline["counts"]) != height * width or min(outline["counts"]) < 0:
        raise ValueError("run lengths are not of all pixels")
    return mask.frPyObjects(outline, height, width)
