"""Label maps in image files: the files beside images, and the classes of their pixels."""

import collections
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.data import limits as limits_lib
from gptv_jax.data import listing
from gptv_jax.data.clips import Clips, Video, VideoSource, natural
from gptv_jax.data.containers import has_deep_colours
from gptv_jax.data.data_set import ORDER_SEED, SPLITS, DataSet, Source
from gptv_jax.data.limits import DamagedImageError
from gptv_jax.data.listing import Listing, split_names
from gptv_jax.data.orientation import as_stored, shown_size
from gptv_jax.data.records import Record
from gptv_jax.errors import InputError, as_input_error, counted, cut, shorten

COLOR = re.compile(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\S.*)")
VALUE = re.compile(r"(\d+)[\s,]+(\S.*)")
RADIX = np.array([2**16, 2**8, 1], np.int32)  # a colour as one number


def no_class(dtype: np.dtype) -> int:
    """The value of a pixel without a class in a record's label map."""
    return 255 if dtype == np.uint8 else -1


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """The classes of label maps, and the values or colours that stand for the classes in files."""

    names: tuple[str, ...]  # of the classes
    keys: tuple[int, ...]  # values, or colours as 65536 r + 256 g + b
    classes: tuple[int, ...]  # the class of each key
    colors: bool = False  # whether `keys` are colours
    channel: int | None = None  # with the values, see `config.Data.map_channel`
    limits: config_lib.Limits = limits_lib.DEFAULT  # of images and of label maps

    @property
    def dtype(self) -> np.dtype:
        """Of label maps in records."""
        return np.dtype(np.uint8 if len(self.names) <= 255 else np.int32)

    def annotate(self, encoded: bytes, encoded_map: bytes) -> tuple[bytes, np.ndarray]:
        """The image file, and the classes of its pixels [H, W], from the file of its label map.

        A map of another size is resized by nearest neighbour where its height and width have the
        image's ratio. Where the map fits the image before its EXIF orientation turns it, the image
        file comes back without the orientation. DamagedImageError: the map cannot be read, or does
        not fit the image.
        """
        sizes = shown_size(encoded, self.limits)  # upright and stored
        problem = "its label map cannot be read: "
        limits = dataclasses.replace(self.limits, formats=())  # `formats` are those of images
        with limits_lib.opened(encoded_map, limits, problem) as image:
            own = image.size[::-1]
            unknown = (0, 0) in sizes  # the image cannot be read, which decoding finds out
            fitting = [own] if unknown else [size for size in sizes if _similar(own, size)]
            if not fitting:
                (height, width), (h, w) = own, sizes[0]
                raise DamagedImageError(
                    f"its label map has {width} x {height} pixels, the image {w} x {h}"
                )
            size = own if own in fitting else fitting[0]
            classes = self._lookup(self._values(image))
        if size != own:
            resized = Image.fromarray(classes).resize(size[::-1], Image.Resampling.NEAREST)
            classes = np.array(resized)
        return encoded if unknown or size == sizes[0] else as_stored(encoded, self.limits), classes

    def _values(self, image: Image.Image) -> np.ndarray:
        """The values of the pixels, or their colours as one number each, [H, W]."""
        if image.format in ("JPEG", "MPO"):
            raise DamagedImageError("its label map is a JPEG file, which does not keep values")
        if self.colors:
            if image.mode not in ("P", "L", "RGB", "RGBA"):
                raise DamagedImageError(f"its label map has no colours (mode {image.mode})")
            return np.asarray(image.convert("RGB")) @ RADIX
        deep = has_deep_colours(image)  # of which Pillow reads the upper 8 bits
        values = np.asarray(image)
        if values.ndim == 3 and self.channel is None:
            grey = image.mode == "LA" or (values[..., :3] == values[..., :1]).all()
            if deep or not grey:
                raise DamagedImageError(
                    "its label map has colours, but config.data.map_names has none; give classes "
                    'as "r g b name", or name the channel with values by config.data.map_channel'
                )
            return values[..., 0]
        channel = self.channel or 0
        values = values.reshape(*values.shape[:2], -1)
        if deep or channel >= values.shape[2]:
            what = "16 bits" if deep else f"{values.shape[2]} channels"
            raise DamagedImageError(
                f"its label map has {what}, but config.data.map_channel={channel}"
            )
        return values[..., channel]

    def _lookup(self, values: np.ndarray) -> np.ndarray:
        """The class of each value; no class where a value is no key."""
        if values.dtype == np.uint8:
            return self._of_bytes[values]
        keys, order = np.unique(self.keys, return_index=True)
        place = np.searchsorted(keys, values).clip(max=len(keys) - 1)
        found = np.take(self.classes, order)[place]
        return np.where(keys[place] == values, found, no_class(self.dtype)).astype(self.dtype)

    @functools.cached_property
    def _of_bytes(self) -> np.ndarray:
        return self._lookup(np.arange(256))


def read_table(config: config_lib.Data) -> LabelTable:
    """The classes that `config.data.map_names` names; InputError where it cannot be read."""
    where = f"config.data.map_names={cut(config.map_names or '', 60)}"
    lines = (config.map_names or "").split(",")
    if in_file := lines[0].endswith(".txt"):
        beside = files.user_path(config.path or config.dir or ".") / lines[0]
        path = beside if beside.is_file() else files.user_path(lines[0])
        with as_input_error(f"{where} cannot be read as UTF-8 text", (OSError, ValueError)):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    marked = [line for line in lines if line.startswith("#")]
    lines = [line for line in lines if line not in marked]
    if marked and not (in_file and lines):
        raise InputError(
            f"{where} has {marked[0]!r}, but # begins a comment of a text file; a colour is three "
            'numbers from 0 to 255, as in "128 64 128 road".'
        )
    if not lines:
        raise InputError(
            f"config.data.maps={config.maps} needs the names of the classes: config.data.map_names="
            "sky,road,... or a text file (.txt) with a line for each."
        )
    form = COLOR if any(map(COLOR.fullmatch, lines)) else VALUE
    what = "colour" if form is COLOR else "value"
    found = [form.fullmatch(line) for line in lines]
    if not any(found):
        return make_table(tuple(lines), config)
    if not all(found):
        with_number, without = lines[[*map(bool, found)].index(True)], lines[found.index(None)]
        raise InputError(
            f"{where} has {with_number!r} with a {what}, but {without!r} without one; give a "
            f"{what} to every class or to none."
        )
    if config.map_ignore:
        raise InputError(
            f"{where} has a {what} for each class, and all others are no class; leave "
            f"config.data.map_ignore={config.map_ignore} out."
        )
    *numbers, names = zip(*(match.groups() for match in found), strict=True)
    with as_input_error(f"{where} has a {what} that is too large", OverflowError):
        numbers = np.array(numbers, np.int64)
    if form is COLOR and numbers.max() > 255:
        raise InputError(f"{where} has a colour with {numbers.max()}; colours are 0 to 255.")
    keys = (RADIX[-len(numbers) :] @ numbers).tolist()
    if twice := shorten(line for key, line in zip(keys, lines, strict=True) if keys.count(key) > 1):
        raise InputError(f"{where} gives one {what} twice: {twice}.")
    return make_table(names, config, keys, form is COLOR)


def make_table(
    names: tuple[str, ...], config: config_lib.Data, keys: Sequence[int] = (), colors: bool = False
) -> LabelTable:
    """The table of a value or colour for each name; all keys of one name are one class.

    Without `keys`, the values are 0, 1, ... without `config.data.map_ignore`.
    """
    classes, ignored = tuple(dict.fromkeys(names)), config.map_ignore
    if len(classes) < 2:
        raise InputError(
            f"label maps have the single class {cut(classes[0], 60)}; they need 2 or more. "
            "config.data.map_names takes sky,road,... or the name of a text file, which ends in "
            ".txt, with a line for each."
        )
    values = [n for n in range(len(names) + len(ignored)) if n not in ignored]
    of_keys = tuple(classes.index(name) for name in names)
    keys = tuple(keys or values[: len(names)])
    return LabelTable(classes, keys, of_keys, colors, config.map_channel, config.limits)


def _similar(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two heights and widths have one ratio, up to a pixel that was rounded."""
    (h, w), (height, width) = sorted((size, other))
    return abs(height * w / width - h) < 1 or abs(width * h / height - w) < 1


class MapFolder(DataSet):
    """Image files, each with the image file of its label map; see `config.Data.maps`.

    The images of a split are mixed in a fixed order, so that `train[:90%]` is like the other tenth.
    With `config.frames` the images of a folder are the frames of a video, in the order of their
    names, and a frame without a label map has no class at any pixel. Raises InputError where a
    pattern fits no file, several files are of one image, or too many images of a split have no
    label map (`config.Data.missing`).
    """

    def __init__(self, config: config_lib.Data):
        path, table, maps = listing.data_path(config), read_table(config), config.maps
        self.notes, self.map_names, self.videos = [], table.names, config.frames > 0
        images = config.images or ("{split}" if "{split}" in maps else "{name}")
        map_files = _match(path, maps, "maps")
        known = {file for found in map_files.values() for file in found}
        found = _match(path, images, "images").items()
        kept = {key: [file for file in several if file not in known] for key, several in found}
        image_files = {key: several for key, several in kept.items() if several}
        for several in (*image_files.values(), *map_files.values()):
            if len(several) > 1:
                shown = " and ".join(map(str, several[:2]))
                raise InputError(f"{shown} have one name; keep one of these files.")
        own = split_names(dict.fromkeys(split or "train" for split, _ in image_files))
        own = dict(sorted(own.items(), key=lambda item: (*SPLITS, item[1]).index(item[1])))
        self.other_names = {name: split for name, split in own.items() if name != split}
        self.splits, used = {}, set()
        for name, split in own.items():
            mine = {n: file for (s, n), (file,) in image_files.items() if (s or "train") == name}
            keys = {n: (name if "{split}" in maps else "", n) for n in sorted(mine)}
            kept = [n for n, key in keys.items() if key in map_files]
            without = [mine[n] for n, key in keys.items() if key not in map_files]
            used |= {keys[n] for n in kept}
            problem = f"{len(without)} of {len(mine)} images of the split {name} have no label map"
            if kept and len(without) > config.missing * len(mine):
                raise InputError(
                    f"{problem} by config.data.maps={maps}, such as {without[0]}; that is more "
                    f"than the share config.data.max_damaged={config.missing:g}."
                )
            if without:
                fate = "have no class at any pixel" if self.videos else "are left out"
                self.notes.append(f"{problem} and {fate}: {shorten(without)}")
            if not kept:
                continue
            pairs = {n: (str(mine[n]), str(map_files[keys[n]][0])) for n in kept}
            if self.videos:
                pairs = {n: pairs.get(n, (str(path), None)) for n, path in mine.items()}
                found = _MapVideos.of(pairs, table, config)
                lengths = ((found.name(i), len(pairs)) for i, pairs in enumerate(found.videos))
                self.notes += found.clips.short(lengths)
            else:
                mixed = np.random.default_rng(ORDER_SEED).permutation(kept).tolist()
                found = _MapSplit([pairs[n] for n in mixed], table)
            self.splits[split] = found
        if not self.splits:
            raise InputError(
                f"no image of config.data.images={images} in {path} has a label map by "
                f"config.data.maps={maps}; the names that stand for {{split}} and {{name}} must be "
                "equal."
            )
        if unused := [file for key, (file,) in map_files.items() if key not in used]:
            self.notes.append(
                f"{counted(len(unused), 'label map')} without an image: {shorten(unused)}"
            )


@dataclasses.dataclass(frozen=True)
class _MapSplit(Source):
    pairs: list[tuple[str, str]]  # paths of an image and its label map
    table: LabelTable

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Record:
        limits = self.table.limits
        paths = map(pathlib.Path, self.pairs[index])
        encoded, encoded_map = (limits_lib.read(path, limits) for path in paths)
        encoded, classes = self.table.annotate(encoded, encoded_map)
        return {"encoded": encoded, "segmentation": classes}

    def name(self, index: int) -> str:
        return self.pairs[index][0]


@dataclasses.dataclass(frozen=True)
class _MapVideos(VideoSource):
    videos: list[list[tuple[str, str | None]]]  # paths of every frame and of its label map
    table: LabelTable
    clips: Clips

    @classmethod
    def of(
        cls, pairs: dict[str, tuple[str, str | None]], table: LabelTable, config: config_lib.Data
    ) -> "_MapVideos":
        """The videos in a fixed order, of the files by name; a folder of files is a video."""
        videos = collections.defaultdict(list)
        for name in sorted(pairs, key=natural):
            videos[os.path.dirname(name)].append(pairs[name])
        mixed = np.random.default_rng(ORDER_SEED).permutation(sorted(videos)).tolist()
        return cls([videos[name] for name in mixed], table, Clips.of(config))

    def __len__(self) -> int:
        return len(self.videos)

    def video(self, index: int) -> Video:
        pairs = self.videos[index]
        take = lambda numbers: [self._frame(*pairs[n]) for n in numbers.tolist()]  # noqa: E731
        return Video(len(pairs), take, {})

    def record(self, video: Video, numbers: np.ndarray) -> Record:
        encoded, maps = zip(*video.take(numbers), strict=True)
        if len(sizes := {plane.shape for plane in maps}) > 1:
            raise DamagedImageError(f"its label maps have several sizes: {shorten(sizes)}")
        return {"encoded": list(encoded), "segmentation": np.stack(maps)}

    def _frame(self, path: str, of_map: str | None) -> tuple[bytes, np.ndarray]:
        """The image file and the classes of its pixels."""
        limits = self.table.limits
        encoded = limits_lib.read(pathlib.Path(path), limits)
        if of_map is not None:
            return self.table.annotate(encoded, limits_lib.read(pathlib.Path(of_map), limits))
        size = shown_size(encoded, limits)[0]
        return encoded, np.full(size, no_class(self.table.dtype), self.table.dtype)

    def name(self, index: int) -> str:
        return os.path.dirname(self.videos[index][0][0])


def _match(root: pathlib.Path, pattern: str, field: str) -> dict[tuple, list[pathlib.Path]]:
    """The image files that a pattern below `root` fits, by split ("" without {split}) and name."""
    whole = pattern if "{name}" in pattern else f"{pattern.rstrip('/')}/{{name}}"
    fixed, last = re.fullmatch(r"([^{]*/)?(.*)", whole).groups(default="")
    expression = re.escape(last)
    for part, kind in (("split", "[^/]+"), ("name", ".+")):  # the same text at every place
        expression = expression.replace(rf"\{{{part}\}}", f"(?P<{part}>{kind})", 1)
        expression = expression.replace(rf"\{{{part}\}}", f"(?P={part})")
    ending = re.search(r"\.\w+$", last)
    folder = pathlib.Path(os.path.normpath(root / fixed))
    exists = folder.is_dir()
    listed = Listing(folder).files if exists else []
    found = collections.defaultdict(list)
    for file in listed:
        below = file.replace(os.sep, "/")
        match = re.fullmatch(expression, below if ending else os.path.splitext(below)[0])
        if match:
            found[match.groupdict().get("split", ""), match["name"]].append(folder / file)
    if not found:
        has = f"; it has {shorten(listed)}" if listed else ""
        has = has if exists else ", which is no folder"
        raise InputError(
            f"config.data.{field}={pattern} fits no image file in {folder}{has}. It takes a path "
            'below config.data.path with {split} and {name}, such as "{split}_labels/{name}".'
        )
    return found
