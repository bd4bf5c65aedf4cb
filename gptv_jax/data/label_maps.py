"""Label maps in image files: which values or colours of pixels stand for which classes."""

import contextlib
import dataclasses
import functools
import io
import re

import numpy as np
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.data.images import DamagedImageError, as_stored, has_deep_colours, shown_size
from gptv_jax.errors import InputError, as_input_error, cut, first_line, shorten

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
        sizes = ()  # upright and stored; none of a file that cannot be read, see `Decode`
        with contextlib.suppress(Exception):
            sizes = shown_size(encoded)
        try:
            with Image.open(io.BytesIO(encoded_map)) as image:
                own = image.size[::-1]
                fitting = [size for size in sizes or (own,) if _similar(own, size)]
                if not fitting:
                    (height, width), (h, w) = own, sizes[0]
                    raise DamagedImageError(
                        f"its label map has {width} x {height} pixels, the image {w} x {h}"
                    )
                size = own if own in fitting else fitting[0]
                classes = self._lookup(self._values(image))
        except DamagedImageError:
            raise
        except Exception as error:  # Pillow's plugins raise whatever their parsers do
            unknown = isinstance(error, Image.UnidentifiedImageError)
            reason = "it is empty or no image" if unknown else first_line(error)
            raise DamagedImageError(f"its label map cannot be read: {reason}") from error
        if size != own:
            resized = Image.fromarray(classes).resize(size[::-1], Image.Resampling.NEAREST)
            classes = np.array(resized)
        return as_stored(encoded) if sizes and size != sizes[0] else encoded, classes

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
    if lines[0].endswith(".txt"):
        beside = files.user_path(config.path or config.dir or ".") / lines[0]
        path = beside if beside.is_file() else files.user_path(lines[0])
        with as_input_error(f"{where} cannot be read as UTF-8 text", (OSError, ValueError)):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not lines:
        raise InputError(
            f"config.data.maps={config.maps} needs the names of the classes: config.data.map_names="
            "sky,road,... or a text file (.txt) with a line for each."
        )
    form = COLOR if any(map(COLOR.fullmatch, lines)) else VALUE
    what = "colour" if form is COLOR else "value"
    found = [form.fullmatch(line) for line in lines]
    if not any(found):
        return named(tuple(lines), config)
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
    numbers = np.array(numbers, np.int64)
    if form is COLOR and numbers.max() > 255:
        raise InputError(f"{where} has a colour with {numbers.max()}; colours are 0 to 255.")
    keys = (RADIX[-len(numbers) :] @ numbers).tolist()
    if twice := shorten(line for key, line in zip(keys, lines, strict=True) if keys.count(key) > 1):
        raise InputError(f"{where} gives one {what} twice: {twice}.")
    return _table(keys, names, config, form is COLOR)


def named(names: tuple[str, ...], config: config_lib.Data) -> LabelTable:
    """The table of classes that are the values 0, 1, ... without `config.data.map_ignore`."""
    values = [n for n in range(len(names) + len(config.map_ignore)) if n not in config.map_ignore]
    return _table(values[: len(names)], names, config)


def _table(
    keys: list[int], names: tuple[str, ...], config: config_lib.Data, colors: bool = False
) -> LabelTable:
    """The table of a key for each name; all keys of one name are one class."""
    classes = tuple(dict.fromkeys(names))
    if len(classes) < 2:
        raise InputError(f"label maps have the single class {classes[0]}; they need 2 or more.")
    of_keys = tuple(classes.index(name) for name in names)
    return LabelTable(classes, tuple(keys), of_keys, colors, config.map_channel)


def _similar(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two heights and widths have one ratio, up to a pixel that was rounded."""
    (h, w), (height, width) = sorted((size, other))
    return abs(height * w / width - h) < 1 or abs(width * h / height - w) < 1
