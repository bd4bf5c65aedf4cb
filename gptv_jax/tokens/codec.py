"""The interface that every kind of token implements."""

import abc

import jax
import numpy as np
from jaxtyping import Int, UInt8

AnyArray = np.ndarray | jax.Array  # what a user may pass


class Codec(abc.ABC):
    """Turns images into tokens and tokens into images; each kind of token is one subclass.

    `encode` and `decode` take and return NumPy arrays. Tokens are in raster order.
    """

    vocabulary: int  # V: tokens are 0 .. V-1
    grid: tuple[int, int]  # rows and columns of tokens; T is their product
    image_shape: tuple[int, int, int]  # H, W, C of the images that are encoded
    lossless: bool = False  # whether `decode` restores every image that `encode` takes
    on_devices: bool = False  # whether a network encodes, best many images at once on JAX devices
    # The palette or the tokenizer that the tokens refer to; None where the settings say it all.
    definition: object = None

    @property
    def similarity_order(self) -> Int[np.ndarray, "V"]:
        """All tokens, those that look alike next to each other, for smaller token caches."""
        return np.arange(self.vocabulary)

    @abc.abstractmethod
    def encode(self, images: UInt8[AnyArray, "B H W C"]) -> Int[np.ndarray, "B T"]:
        """Int32 tokens.

        Raises:
          ValueError: a pixel has no token, or the images have another shape.
        """

    @abc.abstractmethod
    def decode(
        self, tokens: Int[AnyArray, "B N"], grid: tuple[int, int] | None = None
    ) -> UInt8[np.ndarray, "B height width C"]:
        """Images in the data set's range of values; `grid` is for tokens of another image size."""

    def picture(self, images: UInt8[np.ndarray, "B H W C"]) -> UInt8[np.ndarray, "B H W 3"]:
        """The images as RGB in 0..255, for display."""
        return np.broadcast_to(images, (*images.shape[:3], 3))
