"""Image files that EXIF turns: their sizes upright and as stored, and files without the turn."""

import contextlib
import io

from PIL import ExifTags, Image

from gptv_jax.config.data import Limits
from gptv_jax.data.limits import Rewritten, opened

ORIENTED = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # parts of PNG files
# For each EXIF orientation that swaps height and width: what undoes the turn.
TURNED_BACK = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90}
TURNED_BACK |= {7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}


def shown_size(encoded: bytes, limits: Limits) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width that `Decode` gives, and those before the EXIF orientation; not decoded.

    0, 0 of a file that cannot be read, whose reason decoding finds.
    """
    with contextlib.suppress(Exception), opened(encoded, limits) as image:
        size = image.size[::-1]
        # Pillow decodes a PNG to look for an orientation behind the pixels.
        plain = image.format == "PNG" and not any(each in encoded for each in ORIENTED)
        turned = not plain and image.getexif().get(ExifTags.Base.Orientation) in TURNED_BACK
        sizes = (size[::-1], size) if turned else (size, size)
        return sizes[::-1] if image.format == "TIFF" else sizes  # of a TIFF, Pillow's is upright
    return (0, 0), (0, 0)


def as_stored(encoded: bytes, limits: Limits) -> bytes:
    """The image file as a PNG file without EXIF orientation, so that `Decode` does not turn it."""
    with opened(encoded, limits) as image, io.BytesIO() as plain:
        back = TURNED_BACK.get(image.getexif().get(ExifTags.Base.Orientation))
        image = image.transpose(back) if back and image.format == "TIFF" else image  # as decoded
        image.save(plain, "PNG", exif=b"", compress_level=1)
        return Rewritten(plain.getvalue())
