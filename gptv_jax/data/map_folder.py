"""Folders of images beside label maps, matched by the names of their files."""

import collections
import dataclasses
import os
import pathlib
import re

import numpy as np

from gptv_jax.data.folder import ORDER_SEED
from gptv_jax.data.label_maps import LabelTable
from gptv_jax.data.listing import Listing, split_names
from gptv_jax.data.records import Record
from gptv_jax.errors import InputError, counted, shorten

SPLITS = ("train", "validation", "test")  # in this order, before others
Files = dict[tuple[str, str], list[pathlib.Path]]  # by split and name


class MapFolder:
    """Image files, each with the image file of its label map.

    `notes` are sentences about what a user may not expect. The images of a split are mixed in a
    fixed order, so that `train[:90%]` is like the other tenth.
    """

    classes, class_names, object_names = 0, (), ()

    def __init__(
        self,
        path: pathlib.Path,
        maps: str,
        images: str | None,
        table: LabelTable,
        max_missing: float = 0.05,
    ):
        """Lists the files; `maps` and `images` are as in `config.Data`.

        Of a split's images a share of `max_missing` may have no label map. Raises InputError where
        more have none, a pattern fits no file, or several files are of one image.
        """
        self.notes: list[str] = []
        self.map_names = table.names
        images = images or ("{split}" if "{split}" in maps else "{name}")
        map_files = _match(path, maps, "maps")
        known = {file for found in map_files.values() for file in found}
        image_files = {
            key: kept
            for key, found in _match(path, images, "images").items()
            if (kept := [file for file in found if file not in known])
        }
        for found in (image_files, map_files):
            if several := next((each for each in found.values() if len(each) > 1), None):
                raise InputError(
                    f"{' and '.join(map(str, several[:2]))} have one name; keep one of these files."
                )
        own = split_names(dict.fromkeys(split or "train" for split, _ in image_files))
        own = dict(sorted(own.items(), key=lambda item: (*SPLITS, item[1]).index(item[1])))
        self.other_names = {name: split for name, split in own.items() if name != split}
        self._splits, used = {}, set()
        for name, split in own.items():
            mine = {n: file for (s, n), (file,) in image_files.items() if (s or "train") == name}
            keys = {n: (name if "{split}" in maps else "", n) for n in mine}
            kept = [n for n in sorted(mine) if keys[n] in map_files]
            without = [mine[n] for n in sorted(mine) if keys[n] not in map_files]
            used |= {keys[n] for n in kept}
            problem = f"{len(without)} of {len(mine)} images of the split {name} have no label map"
            if without and kept and len(without) > max_missing * len(mine):
                raise InputError(
                    f"{problem} by config.data.maps={maps}, such as {without[0]}; that is more "
                    f"than the share config.data.max_damaged={max_missing:g}."
                )
            if without:
                self.notes.append(f"{problem} and are left out: {shorten(without)}")
            if kept:
                mixed = np.random.default_rng(ORDER_SEED).permutation(kept).tolist()
                pairs = [(str(mine[n]), str(map_files[keys[n]][0])) for n in mixed]
                self._splits[split] = _MapSplit(pairs, table)
        if not self._splits:
            raise InputError(
                f"no image of config.data.images={images} in {path} has a label map by "
                f"config.data.maps={maps}; the names that stand for {{split}} and {{name}} must be "
                "equal."
            )
        if unused := [file for key, (file,) in map_files.items() if key not in used]:
            self.notes.append(
                f"{counted(len(unused), 'label map')} without an image: {shorten(unused)}"
            )
        self.lengths = {split: len(source) for split, source in self._splits.items()}

    def open(self, split: str) -> "_MapSplit":
        return self._splits[split]


@dataclasses.dataclass(frozen=True)
class _MapSplit:
    pairs: list[tuple[str, str]]  # paths of an image and its label map
    table: LabelTable

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Record:
        encoded, encoded_map = (pathlib.Path(path).read_bytes() for path in self.pairs[index])
        encoded, classes = self.table.annotate(encoded, encoded_map)
        return {"encoded": encoded, "segmentation": classes}

    def name(self, index: int) -> str:
        return self.pairs[index][0]


def _match(root: pathlib.Path, pattern: str, field: str) -> Files:
    """The image files that a pattern below `root` fits; without {split} in it, the split is ""."""
    whole = pattern if "{name}" in pattern else f"{pattern.rstrip('/')}/{{name}}"
    fixed, last = re.fullmatch(r"([^{]*/)?(.*)", whole).groups(default="")
    ending = re.search(r"\.\w+$", last)
    parts = re.split(r"\{(split|name)\}", last)
    kinds = {"split": r"[^/]+", "name": r".+"}
    expression, seen = "", set()
    for number, part in enumerate(parts):
        if number % 2 == 0:
            expression += re.escape(part)
        else:
            expression += f"(?P={part})" if part in seen else f"(?P<{part}>{kinds[part]})"
            seen.add(part)
    folder = pathlib.Path(os.path.normpath(root / fixed))
    listed = Listing(folder).files if folder.is_dir() else []
    found = collections.defaultdict(list)
    for file in listed:
        below = file.replace(os.sep, "/")
        match = re.fullmatch(expression, below if ending else os.path.splitext(below)[0])
        if match:
            found[match.groupdict().get("split", ""), match["name"]].append(folder / file)
    if not found:
        has = f"; it has {shorten(listed)}" if listed else ""
        raise InputError(
            f"config.data.{field}={pattern} fits no image file in {folder}{has}. It takes a path "
            'below config.data.path with {split} and {name}, such as "{split}_labels/{name}".'
        )
    return found
