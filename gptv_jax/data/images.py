"""The base class of transforms, and the decoding of image files to pixels."""

import contextlib
import copy
import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, dataclass_transform

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from gptv_jax.config.data import Limits
from gptv_jax.config.fields import ABOVE_ZERO, POSITIVE, field
from gptv_jax.data.containers import (
    BITS,
    MAX_SAMPLE,
    PHOTOMETRIC,
    SAMPLE_FORMAT,
    has_deep_colours,
    is_deep,
    tags_of,
)
from gptv_jax.data.limits import (
    DEFAULT,
    DamagedImageError,
    as_damaged,
    check_array,
    check_formats,
    check_frames,
    check_image,
    opened,
    read,
)
from gptv_jax.data.records import (
    OBJECTS,
    PICTURE,
    PLANES,
    EncodedClip,
    Record,
    to_array,
    to_picture,
)
from gptv_jax.errors import InputError, as_input_error, cut, shorten

GREY = ("0 to 255, a grey value", lambda v: 0 <= v <= 255)


@dataclass_transform(frozen_default=True)
class Transform:
    """A step from a record to a new record, of which it takes arrays over that it does not change.

    A transform of colour implements `pixels`, one of geometry `__call__`. Subclasses become frozen
    dataclasses; their fields are the arguments of the entry in the configuration, which has the
    class's name, `random_crop` of RandomCrop.
    """

    named: ClassVar[dict[str, type["Transform"]]] = {}  # all transforms by their entries' names
    random: ClassVar[bool] = False  # whether the generator is used; not allowed in evaluation
    # False: the transform only moves pixels, so that it may move tokens of a cache.
    needs_pixels: ClassVar[bool] = True
    drops: ClassVar[bool] = False  # whether it leaves images out, see data/filters.py
    in_place: ClassVar[bool] = True  # False: `pixels` moves pixels, but boxes and masks stay

    def __init_subclass__(cls):
        dataclasses.dataclass(frozen=True)(cls)
        if not cls.__name__.startswith("_"):
            cls.named[re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()] = cls

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Record:
        """Transforms one record; `rng` is the generator of this example, None in evaluation."""
        if not self.in_place and set(record) & {*PLANES, *OBJECTS} - {*PICTURE}:
            raise InputError(
                "rotate and random_augment move pixels, but not the boxes, masks and label maps "
                "that this task reads; remove both transforms from config.finetune.train_transforms"
                " or, where that list is empty, from config.data.train_transforms."
            )
        image = record["image"]
        if image.ndim == 3:
            return {**record, "image": self.pixels(image, rng)}
        if self.in_place:  # the frames of a clip, one below the other, are one image
            return {**record, "image": self.pixels(np.concatenate(image), rng).reshape(image.shape)}
        # Each frame is moved with equal random numbers.
        generators = [*(copy.deepcopy(rng) for _ in image[1:]), rng]
        frames = [self.pixels(*each) for each in zip(image, generators, strict=True)]
        return {**record, "image": np.stack(frames)}

    def generator(
        self, number: int, rng: np.random.Generator | None = None
    ) -> np.random.Generator | None:
        """What the transform draws from for example `number`: `rng`, unless a subclass differs."""
        del number
        return rng

    def pixels(
        self, image: UInt8[np.ndarray, "H W C"], rng: np.random.Generator | None
    ) -> UInt8[np.ndarray, "h w c"]:
        """The pixels of the new record."""
        raise NotImplementedError


class Decode(Transform):
    """Decodes an image file of any format that Pillow reads to RGB or grey pixels.

    The EXIF orientation is applied. Animations and files of several pages give their first one,
    CMYK, Lab and indexed colours become RGB, and transparent pixels are laid over `background`.
    More than 8 bits become 8: white is `maximum`, or what the file says, see `find_depth`.
    """

    channels: int = field(3, ("3 (RGB) or 1 (grey)", lambda v: v in (1, 3)))
    background: int = field(255, GREY)
    # Limits of this list alone, in place of those of config.data.limits.
    max_pixels: int | None = field(None, POSITIVE)
    max_ratio: float | None = field(None, ("1 or more", lambda v: v >= 1))
    min_side: int | None = field(None, POSITIVE)
    # The value that becomes 255, as 4095 of 12 bits; None: by the file. A number above 255 leaves
    # images of 8 bits as they are.
    maximum: float | None = field(None, ABOVE_ZERO)
    configured: ClassVar[Limits] = DEFAULT  # config.data.limits, see `within`

    def within(self, limits: Limits) -> "Decode":
        """The step under the limits of a configuration."""
        found = copy.copy(self)
        object.__setattr__(found, "configured", limits)
        return found

    @property
    def limits(self) -> Limits:
        """The configured limits, in which the step's own arguments take over."""
        own = {name: getattr(self, name) for name in ("max_pixels", "max_ratio", "min_side")}
        given = {name: value for name, value in own.items() if value is not None}
        return dataclasses.replace(self.configured, **given)

    def __call__(self, record, rng=None):
        """The record with "image" in place of "encoded"."""
        rest = {name: value for name, value in record.items() if name != "encoded"}
        given = record["encoded"] if "encoded" in record else record["image"]
        if isinstance(given, EncodedClip):
            frames = given.decoded(self)
        elif isinstance(given, list) or getattr(given, "ndim", 0) == 4:  # the frames of a clip
            frames = [self.pixels(frame) for frame in given]
        else:
            return {**rest, "image": self.pixels(given)}
        if len(sizes := dict.fromkeys(f"{len(frame[0])} x {len(frame)}" for frame in frames)) > 1:
            raise DamagedImageError(f"its frames have several sizes: {shorten(sizes)} pixels")
        return {**rest, "image": np.stack(frames)}

    def pixels(self, encoded: bytes | np.ndarray | Image.Image, rng=None) -> np.ndarray:
        """Pixels, uint8 [H, W, channels], of a file's bytes, an array or a Pillow image.

        An array or a Pillow image may have any size. Raises DamagedImageError where the file is
        truncated, empty, no image, or of a wrong size.
        """
        if isinstance(encoded, np.ndarray):
            return self.convert(to_picture(encoded))
        if isinstance(encoded, Image.Image):
            with as_damaged():
                return self.convert(encoded)
        with opened(encoded, self.limits) as image:
            return self.convert(image)

    def convert(self, image: Image.Image) -> np.ndarray:
        """Pixels, uint8 [H, W, channels], of an open image, of which the frame that is shown."""
        stored = image  # has the file's tags, which a turned image has lost
        maximum, deep = self.maximum or 0, is_deep(stored)
        if maximum > 255 and has_deep_colours(stored):
            raise DamagedImageError(
                "Pillow reads only the upper 8 of the 16 bits of its colours, so it cannot take "
                f"maximum={maximum:g}; save it with 8 bits"
            )
        image = ImageOps.exif_transpose(image)
        if image.mode == "LAB":
            image = image.convert("RGB")  # from which Pillow makes grey
        if deep:
            image = Image.fromarray(self._to_eight_bits(image, stored))
        elif 0 < maximum <= 255:
            *colours, alpha = image.convert("RGBA").split()
            scaled = [c.point(lambda value: round(value * 255 / maximum)) for c in colours]
            image = Image.merge("RGBA", [*scaled, alpha])
        if image.has_transparency_data:
            background = Image.new("RGBA", image.size, (self.background,) * 3 + (255,))
            image = Image.alpha_composite(background, image.convert("RGBA"))
        return to_array(image.convert("RGB" if self.channels == 3 else "L"), self.channels)

    def depth(self, encoded: bytes) -> "Depth | None":
        """The values of a file of more than 8 bits; None: it has 8 bits or cannot be decoded."""
        with contextlib.suppress(Exception), opened(encoded, self.limits) as image:
            if has_deep_colours(image):  # of which Pillow reads the upper 8 bits
                upper = np.asarray(image)
                return Depth("16-bit colour", upper.min() * 256.0, upper.max() * 256.0, 65535)
            # Pillow scales a PGM to 16 bits by what its header says, with its codec "ppm".
            if is_deep(image) and "'ppm'" not in str(getattr(image, "tile", "")):
                return find_depth(image, _values(image, image))
        return None

    def _to_eight_bits(self, image: Image.Image, stored: Image.Image) -> UInt8[np.ndarray, "H W"]:
        """The values of one channel, white being 255; `stored` is the image as the file has it."""
        depth = find_depth(stored, values := _values(image, stored))
        if not (white := self.maximum or depth.white):
            cut = ", where values below 0 become black" if depth.low < 0 else ""
            raise DamagedImageError(
                f"its values, {depth.low:g} to {depth.high:g}, are in none of the usual ranges "
                f"(0..1, 0..255, 0..65535); name what is white by decode(maximum=...){cut}"
            )
        pixels = np.rint((values * (255 / white)).clip(0, 255)).astype(np.uint8)
        if (
            tags_of(stored).get(PHOTOMETRIC) == 0
        ):  # white is zero; Pillow heeds that for 8 bits alone
            pixels = 255 - pixels
        if isinstance(clear := stored.info.get("transparency"), int):
            pixels[values == clear] = self.background
        return pixels


@dataclasses.dataclass(frozen=True)
class Animation(EncodedClip):
    """Frames of a GIF, WebP, APNG or another file with several frames that Pillow reads."""

    encoded: bytes
    numbers: Sequence[int]  # of the frames, in the order of time; those before are decoded too

    def decoded(self, decode: Decode) -> Sequence[UInt8[np.ndarray, "H W C"]]:
        found, last = {}, int(max(self.numbers))
        with opened(self.encoded, decode.limits) as image:
            for number in range(last + 1):
                image.seek(number)  # which decodes the frame before
                check_image(image, decode.limits)  # a frame of a GIF file may be larger
                check_frames(image, last + 1, decode.limits)
                if number in self.numbers:
                    found[number] = decode.convert(image)
        return [found[number] for number in self.numbers]


def count_frames(encoded: bytes, limits: Limits) -> int:
    """Number of frames of an image file, 1 of most; DamagedImageError: it cannot be read."""
    with opened(encoded, limits) as image:
        count = getattr(image, "n_frames", 1)
        check_frames(image, count, limits)
        return count


class Depth(NamedTuple):
    """The range of an image file of more than 8 bits."""

    kind: str  # "16-bit", "16-bit colour", "signed 16-bit", "32-bit", "floating-point"
    low: float  # the least value
    high: float  # the greatest value
    white: int | None  # the value that is taken for white; None: unknown
    sure: bool = True  # whether the file says what is white


def find_depth(stored: Image.Image, values: np.ndarray) -> Depth:
    """The range of an image of one channel, whose file is `stored`.

    A file of unsigned 16 bits or fewer says what is white: by its bits, or by a TIFF's
    MaxSampleValue, which is believed where it is the most of 9 to 15 bits; another number only
    where no value exceeds it, as it may be the image's own maximum. Numbers of 32 bits, signed and
    floating-point ones say nothing: white is then 1 (floating-point), 255 or 65535 (32767 of signed
    16 bits), the first that no value exceeds. White is unknown where a value is negative or above
    all of these, or where no value comes near the white that is found: 0..1 with an overshoot to
    1.1 is not 0..255, and 0..4095 is not 0..65535.
    """
    tags, low, high = tags_of(stored), values.min().item(), values.max().item()
    bits = tags.get(BITS, (16,))[0]
    if stored.mode.startswith("I;16") or (stored.mode == "I" and stored.format in ("PNG", "PPM")):
        most = tags.get(MAX_SAMPLE, (0,))[0]
        sure = most & (most + 1) == 0
        if most > 255 and (sure or high <= most):
            return Depth("16-bit", low, high, most, sure)
        return Depth("16-bit", low, high, 2**bits - 1)
    short, floating = bits == 16 and BITS in tags, stored.mode == "F"
    ranges = (1,) * floating + (255, 32767 if short else 65535)
    white = next((most for most in ranges if high <= most), None)
    least = 0 if white == ranges[0] else 16 if white == 255 else 4096
    white = white if low >= 0 and high >= least else None
    kind = "signed 16-bit" if short else "floating-point" if floating else "32-bit"
    return Depth(kind, low, high, white, sure=False)


def _values(image: Image.Image, stored: Image.Image) -> np.ndarray:
    """The values, [H, W], of an image whose file is `stored`; DamagedImageError if not finite."""
    tags, values = tags_of(stored), np.asarray(image)
    if not np.isfinite(values).all():
        raise DamagedImageError("it has values that are not finite numbers")
    unsigned = tags.get(BITS) == (32,) and tags.get(SAMPLE_FORMAT, (1,)) == (1,)
    return values.view(np.uint32) if unsigned else values  # Pillow reads them as signed ones


def load_image(
    source: str | os.PathLike | bytes | Image.Image | np.ndarray,
    limits: Limits = DEFAULT,
    channels: int = 3,
) -> UInt8[np.ndarray, "H W channels"]:
    """The pixels of an image that may come from anywhere, checked before they are decoded.

    Args:
      source: the path of an image file, or the bytes of one, of any format that Pillow reads; or an
        open Pillow image or an array of pixels [H, W] or [H, W, 1 to 4]: grey, grey with
        transparency, RGB, RGBA.
      limits: what the image may be; gptv_jax.Limits(max_pixels=10**6, formats=("JPEG",)), say.
      channels: 3 (RGB) or 1 (grey); an image of other channels is converted as `decode()` does it.

    Raises:
      ValueError: the image is outside the limits, damaged or no image; one sentence says why.
    """
    check_formats(limits, "formats")
    if channels not in (1, 3):
        raise InputError(f"channels is {channels!r}; it takes 3 (RGB) or 1 (grey).")
    decode = Decode(channels).within(limits)
    given = isinstance(source, str | os.PathLike)
    with as_input_error(f"{cut(str(source), 100) if given else 'an image'} cannot be read"):
        if given:
            source = read(pathlib.Path(source), limits)
        elif isinstance(source, Image.Image):
            check_image(source, limits)
        elif not isinstance(source, bytes):
            source = np.asarray(source)
            pixels = source[..., None] if source.ndim == 2 else source
            right = pixels.ndim == 3 and pixels.size and pixels.shape[2] in (1, 2, 3, 4)
            if source.dtype != np.uint8 or not right:
                found = f"it is an array {source.dtype} {list(source.shape)}"
                raise DamagedImageError(f"{found}; give uint8 [H, W] or [H, W, 1 to 4 channels]")
            check_array(source := pixels, limits)
        return decode.pixels(source)
