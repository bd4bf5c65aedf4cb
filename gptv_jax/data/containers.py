"""What a decoder meets in an image file beyond the width and height that Pillow gives on opening.

Icons hold whole files, TIFF files have tiles, progressive JPEG files are read scan by scan. Nothing
here decodes pixels; `data/limits.py` compares the numbers with the limits.
"""

import contextlib
import io
import re
import struct
from collections.abc import Iterator, Mapping

from PIL import BmpImagePlugin, Image, Jpeg2KImagePlugin, PngImagePlugin

# Numbers of TIFF's tags (TIFF 6.0, sections 8, 15 and 19).
BITS, PHOTOMETRIC, SAMPLES, MAX_SAMPLE, SAMPLE_FORMAT = 258, 262, 277, 281, 339
TILE_WIDTH, TILE_LENGTH = 322, 323
MOST_PICTURES = 256  # in an icon
HEADER = 2**16  # bytes at the beginning of a file that hold what is looked for by name
LEAST_FRAME = 12  # bytes of an animation's frame, at least
INNER = {
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"\xff\x4f\xff\x51": Jpeg2KImagePlugin.Jpeg2KImageFile,
    b"\x00\x00\x00\x0cjP  ": Jpeg2KImagePlugin.Jpeg2KImageFile,
}


def tags_of(image: Image.Image) -> Mapping:
    """A TIFF's tags by their numbers."""
    return getattr(image, "tag_v2", {})


def is_deep(image: Image.Image) -> bool:
    """Whether the image has one channel of more than 8 bits; Pillow reads no deep colours."""
    return image.mode.startswith("I") or image.mode == "F"


def has_deep_colours(image: Image.Image) -> bool:
    """Whether the file, whose pixels are not read yet, has several channels of 16 bits."""
    return not is_deep(image) and ";16" in str(getattr(image, "tile", ""))


def inner_sizes(encoded: bytes) -> Iterator[tuple[int, int]]:
    """Width and height of each picture inside an ICO or ICNS file; none of another file.

    Pillow decodes an ICO file when it opens the file, by the picture's own size, and an ICNS file
    states the size of its pictures alone. ValueError: there are more than MOST_PICTURES.
    """
    if encoded.startswith(b"\0\0\1\0"):
        (count,) = struct.unpack_from("<H", encoded.ljust(6, b"\0"), 4)
        places = range(6, min(6 + 16 * count, len(encoded) - 15), 16)
        starts = {struct.unpack_from("<I", encoded, at + 12)[0] for at in places}
        other = BmpImagePlugin.DibImageFile
    elif encoded.startswith(b"icns"):
        starts, other = set(_icns_parts(encoded)), None
    else:
        return
    if len(starts) > MOST_PICTURES:
        raise ValueError(f"an icon of {len(starts)} pictures; it may have {MOST_PICTURES}")
    for start in sorted(starts):
        known = (kind for magic, kind in INNER.items() if encoded.startswith(magic, start))
        if kind := next(known, other):
            file = io.BytesIO(encoded)
            file.seek(start)
            # A picture that Pillow cannot open has no pixels; opening the icon finds the reason.
            with contextlib.suppress(Exception), kind(file, "") as picture:
                height = picture.height // 2 if kind is other else picture.height  # with the mask
                yield picture.width, height


def _icns_parts(encoded: bytes) -> Iterator[int]:
    """Where the contents of an ICNS file's parts begin."""
    at = 8
    while at + 8 <= len(encoded):
        yield at + 8
        at += max(struct.unpack_from(">I", encoded, at + 4)[0], 8)


def tile_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of a TIFF's tiles, which are decoded whole; 0, 0 where it has none."""
    found = (tags_of(image).get(tag, 0) for tag in (TILE_WIDTH, TILE_LENGTH))
    width, height = (int(each[0] if isinstance(each, tuple) else each) for each in found)
    return width, height


def scans(image: Image.Image, encoded: bytes) -> int:
    """How often a decoder goes over the pixels of an open JPEG file, at most; 1 of other files."""
    return max(encoded.count(b"\xff\xda"), 1) if image.format in ("JPEG", "MPO") else 1


def frames(image: Image.Image, encoded: bytes, most: int) -> int:
    """The number of frames of an open file; a number above `most` may be too small."""
    if image.format == "GIF":
        return max(_gif_frames(encoded, most), 1)
    if image.format == "TIFF" and len(encoded) < LEAST_FRAME * most:
        return 1  # or as many as the limit permits
    with contextlib.suppress(Exception):  # of damage behind the first frame
        return getattr(image, "n_frames", 1)
    return 1


def _gif_frames(encoded: bytes, most: int) -> int:
    """The frames of a GIF file by the order of its blocks (GIF89a), up to `most` + 1."""
    at, found, length = 13, 0, len(encoded)
    at += 3 << (encoded[10] & 7) + 1 if length > 10 and encoded[10] & 128 else 0
    while at < length and found <= most:
        if encoded[at] == 0x2C and at + 9 < length:
            packed = encoded[at + 9]
            at += 11 + (3 << (packed & 7) + 1 if packed & 128 else 0)
            found += 1
        elif encoded[at] == 0x21:
            at += 2
        else:
            at += 1  # as Pillow does: it looks for the next block
            continue
        while at < length and encoded[at]:
            at += 1 + encoded[at]
        at += 1
    return found


def bits(image: Image.Image, encoded: bytes) -> int:
    """Bits of a channel of an open file, of the widest one."""
    if image.format == "SGI":
        return 8 * encoded[3]
    if image.format == "JPEG2000":
        return _jpeg2000_bits(encoded)
    if image.format == "AVIF":
        at = encoded.find(b"pixi", 0, HEADER)
        return max(encoded[at + 9 : at + 9 + encoded[at + 8]], default=8) if at > 0 else 8
    if image.format == "FITS":
        found = re.findall(rb"BITPIX *= *-?(\d{1,4})", encoded[:HEADER])
        return max(map(int, found), default=8)
    if image.format == "PPM" and image.mode not in ("1", "F"):
        # The decoder's arguments end with the value of white where that is not 255.
        last = image.tile[0][3][-1] if isinstance(image.tile[0][3], tuple) else 255
        return 16 if image.mode == "I" or (isinstance(last, int) and last > 255) else 8
    if not is_deep(image):
        return 16 if has_deep_colours(image) else 1 if image.mode == "1" else 8
    short = image.mode.startswith("I;16") or image.format == "PNG"
    return max(tags_of(image).get(BITS, (16 if short else 32,)))


def _jpeg2000_bits(encoded: bytes) -> int:
    """Bits of the components by the codestream's marker SIZ (ISO 15444-1, A.5.1)."""
    at = encoded.find(b"\xff\x4f\xff\x51")  # the start of a codestream
    (count,) = struct.unpack_from(">H", encoded, at + 40)
    return max([(byte & 127) + 1 for byte in encoded[at + 42 : at + 42 + 3 * count : 3]], default=8)


def channels(image: Image.Image) -> int:
    """Channels of an open file; Pillow leaves some samples of a TIFF file away."""
    samples = tags_of(image).get(SAMPLES, 1)
    return max(len(image.getbands()), int(samples[0] if isinstance(samples, tuple) else samples))
