"""Encoded images to pixels, and what happens where that cannot be done."""

import dataclasses
import io
import warnings
from typing import ClassVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from gptv_jax.config.fields import POSITIVE, field
from gptv_jax.errors import first_line

# Pillow's remarks on odd metadata; here, because a `with` would not be safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Pillow's own limit would come before `Decode.max_pixels`, which is looked at before unpacking.
Image.MAX_IMAGE_PIXELS = None


class DamagedImageError(ValueError):
    """An image that cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Decode:
    """An encoded image (JPEG, PNG, GIF, WebP, ...: whatever Pillow reads) to pixels.

    The orientation in the EXIF data is carried out; of an animation the first frame is taken; 16
    bits become 8; CMYK and palettes become RGB, and what is transparent lies on `background`.
    """

    random: ClassVar = False
    of_pixels: ClassVar = True
    channels: int = field(3, ("3 (RGB) or 1 (grey)", lambda v: v in (1, 3)))
    background: int = field(255, ("0 to 255, a grey value", lambda v: 0 <= v <= 255))
    # Height times width; a larger image is refused before it is unpacked.
    max_pixels: int = field(2**26, POSITIVE)
    # Of the longer side over the shorter; a resize would blow it up.
    max_ratio: float = field(32.0, ("1 or more", lambda v: v >= 1))
    min_side: int = field(2, POSITIVE)  # pixels; a smaller image shows nothing

    def __call__(self, encoded: bytes | np.ndarray, rng=None) -> np.ndarray:
        """Uint8 [H, W, channels]; of an array, uint8 [H, W, C], only the channels change.

        Raises:
          DamagedImageError: cut short, empty, not an image, too large or too small.
        """
        if isinstance(encoded, np.ndarray):
            return self._pixels(to_picture(encoded))
        if not encoded:
            raise DamagedImageError("the file is empty")
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                self._check_size(*image.size)
                return self._pixels(image)
        except DamagedImageError:
            raise
        except Exception as error:  # Pillow's plugins raise whatever their parsers do
            raise DamagedImageError(_reason(error)) from error

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise DamagedImageError(
                f"{width} x {height} pixels are more than max_pixels={self.max_pixels}"
            )
        if max(width, height) > self.max_ratio * min(width, height):
            raise DamagedImageError(
                f"{width} x {height} pixels are longer than max_ratio={self.max_ratio}"
            )
        if min(width, height) < self.min_side:
            raise DamagedImageError(
                f"{width} x {height} pixels are less than min_side={self.min_side}"
            )

    def _pixels(self, image: Image.Image) -> np.ndarray:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits, as Pillow holds them
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
        if image.has_transparency_data:
            below = Image.new("RGBA", image.size, (self.background,) * 3 + (255,))
            image = Image.alpha_composite(below, image.convert("RGBA"))
        return to_array(image.convert("RGB" if self.channels == 3 else "L"), self.channels)


def to_picture(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """An image of one or three channels as Pillow has it."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else np.ascontiguousarray(image))


def to_array(picture: Image.Image, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """What `to_picture` was made of."""
    return np.asarray(picture).reshape(picture.height, picture.width, channels)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can read"
    return first_line(error)
