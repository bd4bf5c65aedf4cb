"""The one check of what an image may be: by `config.Limits`, before any pixel is decoded.

Image files of every source, label maps, animations, frames of video files and the Python interface
go through `read`, `opened`, `check_frames`, `check_image`, `check_size` or `check_array`.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from gptv_jax.config.data import Limits
from gptv_jax.data import containers
from gptv_jax.errors import InputError, first_line, shorten

# Pillow warns of unusual metadata. The filter is global, since a context is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
DEFAULT = Limits()
# Formats of pictures that have no MIME type in Pillow. Other formats without one are stubs, fonts
# of games, or documents that other programs draw, such as EPS.
UNTYPED = ("QOI", "DDS", "FITS", "SUN", "MPO")
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


class Rewritten(bytes):
    """An image file that the program wrote from another one, which was within the limits.

    The limits of a file's format and length, `formats` and `max_bytes`, do not hold for it.
    """


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


def check_formats(limits: Limits, name: str = "config.data.limits.formats") -> None:
    """Raises InputError where the installed Pillow does not read one of the formats.

    `name` is what the error calls the formats.
    """
    if limits.formats:
        Image.init()
        if unknown := sorted(set(limits.formats) - set(Image.OPEN)):
            raise InputError(
                f"{name} has {shorten(unknown)}, which the installed Pillow "
                f"does not read; it reads {shorten(sorted(filter(is_picture, Image.OPEN)))}."
            )


def read(path: pathlib.Path, limits: Limits, start: int = 0, count: int | None = None) -> bytes:
    """The content of an image file, or `count` bytes of a file from `start` on.

    DamagedImageError: there are more bytes than the limit, the file is a pipe or a device, or it is
    shorter than `count` says.
    """
    if count is not None:
        _check_bytes(count, limits)  # before the file is opened
    with open(path, "rb", opener=_open_at_once) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):  # reading it may never end
            raise DamagedImageError("it is no regular file")
        if count is None:
            count = found.st_size
            _check_bytes(count, limits)
        file.seek(start)
        content = file.read(min(count, found.st_size))
        if len(content) < count:
            raise DamagedImageError("the file that holds it has become shorter")
        if start == 0 and count == found.st_size and file.read(1):
            raise DamagedImageError("the file has grown while it was read")
    return content


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file; a pipe does not wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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
    if isinstance(encoded, Rewritten):
        limits = dataclasses.replace(limits, formats=(), max_bytes=len(encoded))
    _check_bytes(len(encoded), limits)
    for size in containers.inner_sizes(encoded):
        check_size(*size, dataclasses.replace(limits, min_side=1))
    image = _identify(encoded, limits)
    try:
        check_image(image, limits)
        if (bits := containers.bits(image, encoded)) > limits.max_bits:
            raise DamagedImageError(f"{bits} bits are more than max_bits={limits.max_bits}")
        _check_work(image, containers.scans(image, encoded), "scans", limits)
        _check_count(containers.frames(image, encoded, limits.max_frames), limits)
    except BaseException:
        image.close()
        raise
    if image.tile and image.tile[0][0] == "fits_gzip":
        raise DamagedImageError("a compressed FITS file, whose length inside is not known before")
    if image.format == "PNG":
        _check_sums(encoded)
        if image.mode == "P" and image.palette is None:  # Pillow would make up colours
            raise DamagedImageError("its palette is missing")
    # Pillow shows a PCX file whose palette, at the file's end, is lost as a grey image.
    if image.format == "PCX" and image.mode == "L" and encoded[-769:-768] != b"\x0c":
        raise DamagedImageError("the file is truncated")
    return image


def _identify(encoded: bytes, limits: Limits) -> Image.Image:
    """The file as Pillow opens it, also above Pillow's own limit of pixels, without its pixels."""
    try:
        return Image.open(io.BytesIO(encoded), formats=limits.formats or None)
    except Image.DecompressionBombError:
        for name in limits.formats or Image.OPEN:
            factory, accepts = Image.OPEN[name]
            if accepts and accepts(encoded[:16]) is True:
                return factory(io.BytesIO(encoded), "")
        raise
    except Image.UnidentifiedImageError:
        for name, (_, accepts) in Image.OPEN.items() if limits.formats else ():
            if name not in limits.formats and accepts and accepts(encoded[:16]) is True:
                taken = shorten(limits.formats)
                problem = f"a file of the format {name}, and formats takes {taken}"
                raise DamagedImageError(problem) from None
        raise


def check_image(image: Image.Image, limits: Limits) -> None:
    """Raises DamagedImageError where an open image, or its frame that is shown, is refused.

    The pixels need not be decoded, and are not.
    """
    anything = dataclasses.replace(limits, min_side=1)
    check_size(*image.size, limits if image.format else anything)  # an array may be small
    if image.format and not is_picture(image.format):
        raise DamagedImageError(f"a file of the format {image.format} is no picture of pixels")
    if (channels := containers.channels(image)) > limits.max_channels:
        most = f"more than max_channels={limits.max_channels}"
        raise DamagedImageError(f"{channels} channels are {most}")
    width, height = containers.tile_size(image)
    if width * height > limits.max_pixels:
        most = f"more than max_pixels={limits.max_pixels}"
        raise DamagedImageError(f"a tile of {width} x {height} pixels is {most}")


def check_frames(image: Image.Image, count: int, limits: Limits) -> None:
    """Raises DamagedImageError where the first `count` frames of an open animation are refused."""
    _check_count(count, limits)
    _check_work(image, count, "frames", limits)


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_frames:
        raise DamagedImageError(f"it has more than max_frames={limits.max_frames} frames")


def _check_work(image: Image.Image, passes: int, noun: str, limits: Limits) -> None:
    """Refuses an image that a decoder goes over so often that it takes long."""
    width, height = image.size
    if passes > 1 and passes * width * height > limits.max_work:
        most = f"more than max_work={limits.max_work}"
        raise DamagedImageError(f"{passes} {noun} of {width} x {height} pixels are {most}")


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
