"""The base class of transforms, and the decoding of image files to pixels."""

import abc
import dataclasses
import io
import warnings
from typing import ClassVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from gptv_jax.config.fields import POSITIVE, field
from gptv_jax.errors import first_line

# Pillow warns of unusual metadata. The filter is global, since a context is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Pillow's limit would refuse images before `Decode.max_pixels` does.
Image.MAX_IMAGE_PIXELS = None


class DamagedImageError(ValueError):
    """An image file cannot be decoded; the message says why."""


class Transform(abc.ABC):
    """A step that turns an image, uint8 [H, W, C], into a new one; see `transforms.TRANSFORMS`.

    Subclasses are dataclasses; their fields are the arguments of the entry in the configuration.
    """

    random: ClassVar[bool] = False  # whether the generator is used; not allowed in evaluation
    # False: the transform only moves pixels, so that it may move tokens, uint16 [rows, columns, 1].
    needs_pixels: ClassVar[bool] = True

    @abc.abstractmethod
    def __call__(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Transforms one image; `rng` is the generator of this example, None in evaluation."""


@dataclasses.dataclass(frozen=True)
class Decode(Transform):
    """Decodes an image file of any format that Pillow reads to RGB or grey pixels.

    The EXIF orientation is applied. Animations give their first frame, 16 bits become 8, CMYK and
    indexed colours become RGB, and transparent pixels are laid over `background`.
    """

    channels: int = field(3, ("3 (RGB) or 1 (grey)", lambda v: v in (1, 3)))
    background: int = field(255, ("0 to 255, a grey value", lambda v: 0 <= v <= 255))
    # Height times width; a larger image is refused before it is decompressed.
    max_pixels: int = field(2**26, POSITIVE)
    # Longer side over shorter side; a resize would enlarge a longer image enormously.
    max_ratio: float = field(32.0, ("1 or more", lambda v: v >= 1))
    min_side: int = field(2, POSITIVE)  # pixels

    def __call__(self, encoded: bytes | np.ndarray, rng=None) -> np.ndarray:
        """Pixels, uint8 [H, W, channels]; of an array only the channels are converted.

        Raises DamagedImageError where the file is truncated, empty, no image, or of a wrong size.
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
            unknown = isinstance(error, Image.UnidentifiedImageError)
            reason = "not an image that Pillow can read" if unknown else first_line(error)
            raise DamagedImageError(reason) from error

    def _check_size(self, width: int, height: int) -> None:
        short, long = sorted((width, height))
        for wrong, limit in (
            (width * height > self.max_pixels, f"more than max_pixels={self.max_pixels}"),
            (long > self.max_ratio * short, f"longer than max_ratio={self.max_ratio}"),
            (short < self.min_side, f"less than min_side={self.min_side}"),
        ):
            if wrong:
                raise DamagedImageError(f"{width} x {height} pixels are {limit}")

    def _pixels(self, image: Image.Image) -> np.ndarray:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
        if image.has_transparency_data:
            background = Image.new("RGBA", image.size, (self.background,) * 3 + (255,))
            image = Image.alpha_composite(background, image.convert("RGBA"))
        return to_array(image.convert("RGB" if self.channels == 3 else "L"), self.channels)


def to_picture(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """A Pillow image of an array with one or three channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else np.ascontiguousarray(image))


def to_array(picture: Image.Image, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """The inverse of `to_picture`."""
    return np.asarray(picture).reshape(picture.height, picture.width, channels)
