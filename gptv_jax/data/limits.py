"""The one check of what an image may be: by `config.Limits`, before any pixel is decoded.

Image files of every source, label maps, animations, frames of video files and the Python interface
go through `read`, `opened`, `check_size` or `check_array`. Pillow decodes ICO and ICNS files as it
opens them; Pillow's own limit of 179 million pixels (`PIL.Image.MAX_IMAGE_PIXELS`) holds for these.
"""

import contextlib
import dataclasses
import io
import pathlib
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

from gptv_jax.config.data import Limits
from gptv_jax.errors import InputError, first_line, shorten

# Pillow warns of unusual metadata. The filter is global, since a context is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
DEFAULT = Limits()
# Formats of pictures that have no MIME type in Pillow. Other formats without one are stubs, fonts
# of games, or documents that other programs draw, such as EPS.
UNTYPED = ("QOI", "DDS", "FITS", "SUN", "MPO")
# Numbers of TIFF's tags (TIFF 6.0, sections 8 and 19).
BITS, PHOTOMETRIC, MAX_SAMPLE, SAMPLE_FORMAT = 258, 262, 281, 339
# Chunks of a PNG file that say nothing about its pixels: damage to these does no harm.
METADATA = (
    b"tEXt",
    b"zTXt",
    b"iTXt",
    b"eXIf",
    b"tIME",
    b"pHYs",
    b"iCCP",
    b"gAMA",
    b"cHRM",
    b"sRGB",
)
METADATA += (b"sBIT", b"sPLT", b"bKGD", b"hIST")


class DamagedImageError(ValueError):
    """An image file cannot be decoded; the message says why."""


@contextlib.contextmanager
def as_damaged(problem: str = "") -> Iterator[None]:
    """Within the `with`, an exception becomes a DamagedImageError: `problem`, and the reason."""
    try:
        yield
    except DamagedImageError:
        raise
    except Exception as error:  # parsers of files, such as Pillow's plugins, raise anything
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = getattr(error, "strerror", None) or first_line(error)
        if unknown:
            reason = "not an image that Pillow can read"
        elif isinstance(error, LookupError):  # in Pillow's own parsers
            reason = f"the file is damaged ({reason})"
        raise DamagedImageError(problem + reason) from error


def is_picture(kind: str) -> bool:
    """Whether a format of Pillow, whose plugin is loaded, holds pixels."""
    return Image.MIME.get(kind, "").startswith("image/") or kind in UNTYPED


def check_formats(limits: Limits) -> None:
    """Raises InputError where the installed Pillow does not read one of the formats."""
    if limits.formats:
        Image.init()
        if unknown := sorted(set(limits.formats) - set(Image.OPEN)):
            raise InputError(
                f"config.data.limits.formats has {shorten(unknown)}, which the installed Pillow "
                f"does not read; it reads {shorten(sorted(filter(is_picture, Image.OPEN)))}."
            )


def read(path: pathlib.Path, limits: Limits) -> bytes:
    """The content of an image file; DamagedImageError: it is too long, or a pipe or a device."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # reading it may never end
        raise DamagedImageError("it is no regular file")
    _check_bytes(found.st_size, limits)
    return path.read_bytes()


@contextlib.contextmanager
def opened(encoded: bytes, limits: Limits, problem: str = "") -> Iterator[Image.Image]:
    """An image file within the limits, whose pixels are not decoded yet.

    In the `with`, an exception becomes a DamagedImageError, which says why the file is refused,
    after `problem`; a DamagedImageError of the block itself passes as it is.
    """
    with as_damaged(problem):
        try:
            image = _open(encoded, limits)
        except DamagedImageError as error:
            raise DamagedImageError(f"{problem}{error}") from error
        with image:
            yield image


def _open(encoded: bytes, limits: Limits) -> Image.Image:
    if not encoded:
        raise DamagedImageError("not an image: the file is empty")
    _check_bytes(len(encoded), limits)
    if Image.MAX_IMAGE_PIXELS and limits.max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limits.max_pixels  # Pillow would refuse these before
    try:
        image = Image.open(io.BytesIO(encoded), formats=limits.formats or None)
    except Image.DecompressionBombError:
        for factory, accepts in Image.OPEN.values():  # for the size, which the error has not
            if accepts and accepts(encoded[:16]) is True:
                check_size(*factory(io.BytesIO(encoded), "").size, limits)
        raise
    check_size(*image.size, limits)
    if not is_picture(image.format):
        raise DamagedImageError(f"a file of the format {image.format} is no picture of pixels")
    if (channels := len(image.getbands())) > limits.max_channels:
        most = f"more than max_channels={limits.max_channels}"
        raise DamagedImageError(f"{channels} channels are {most}")
    if (bits := _bits(image)) > limits.max_bits:
        raise DamagedImageError(f"{bits} bits are more than max_bits={limits.max_bits}")
    if image.format == "PNG":
        _check_sums(encoded)
    # Pillow shows a PCX file whose palette, at the file's end, is lost as a grey image.
    if image.format == "PCX" and image.mode == "L" and encoded[-769:-768] != b"\x0c":
        raise DamagedImageError("the file is truncated")
    return image


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raises DamagedImageError where an image file of this size is refused."""
    short, long = sorted((width, height))
    for wrong, limit in (
        (width * height > limits.max_pixels, f"more than max_pixels={limits.max_pixels}"),
        (long > limits.max_side, f"more than max_side={limits.max_side}"),
        (long > limits.max_ratio * short, f"longer than max_ratio={limits.max_ratio}"),
        (short < limits.min_side, f"less than min_side={limits.min_side}"),
    ):
        if wrong:
            raise DamagedImageError(f"{width} x {height} pixels are {limit}")


def check_array(pixels: np.ndarray, limits: Limits) -> None:
    """Raises DamagedImageError where an array of pixels [H, W, ...] is refused by its size."""
    if pixels.ndim > 2 and pixels.shape[2] > limits.max_channels:
        most = f"more than max_channels={limits.max_channels}"
        raise DamagedImageError(f"{pixels.shape[2]} channels are {most}")
    height, width = pixels.shape[:2]
    check_size(width, height, dataclasses.replace(limits, min_side=1))


def _check_bytes(count: int, limits: Limits) -> None:
    if count > limits.max_bytes:
        raise DamagedImageError(f"{count} bytes are more than max_bytes={limits.max_bytes}")


def _bits(image: Image.Image) -> int:
    """Bits of a channel of an open file."""
    if not is_deep(image):
        return 16 if has_deep_colours(image) else 1 if image.mode == "1" else 8
    short = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    return tags_of(image).get(BITS, (16 if short else 32,))[0]


def is_deep(image: Image.Image) -> bool:
    """Whether the image has one channel of more than 8 bits; Pillow reads no deep colours."""
    return image.mode.startswith("I") or image.mode == "F"


def has_deep_colours(image: Image.Image) -> bool:
    """Whether the file, whose pixels are not read yet, has several channels of 16 bits."""
    return not is_deep(image) and ";16" in str(getattr(image, "tile", ""))


def tags_of(image: Image.Image) -> Mapping:
    """A TIFF's tags by their numbers."""
    return getattr(image, "tag_v2", {})


def _check_sums(encoded: bytes) -> None:
    """Raises DamagedImageError where a PNG file's pixels have changed; Pillow checks few parts."""
    at, kind, view = 8, b"", memoryview(encoded)  # behind the signature
    while kind != b"IEND" and at + 12 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, at)
        end = at + 8 + length
        if end + 4 > len(encoded):
            raise DamagedImageError("the file is truncated")
        found = zlib.crc32(view[at + 4 : end]).to_bytes(4, "big")
        if kind not in METADATA and found != view[end : end + 4]:
            raise DamagedImageError(f"the checksum of its part {kind!r} is wrong")
        at = end + 4
