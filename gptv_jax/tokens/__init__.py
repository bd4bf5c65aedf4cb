"""Images to sequences of tokens and back. Each kind of token is one small class, a `Codec`."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from gptv_jax import config as config_lib
from gptv_jax.tokens.grey import GreyLevels


@runtime_checkable
class Codec(Protocol):
    """What a kind of token must offer; `encode` and `decode` take NumPy arrays."""

    vocabulary: int  # V: tokens are 0 .. V-1
    grid: tuple[int, int]  # rows and columns of tokens, in raster order; T is their product
    image_shape: tuple[int, int, int]  # H, W, C of the images it takes

    def encode(self, images: UInt8[np.ndarray, "B H W C"]) -> Int[np.ndarray, "B T"]:
        """Int32 tokens; raises ValueError where a pixel has no token."""

    def decode(self, tokens: Int[np.ndarray, "B T"]) -> UInt8[np.ndarray, "B H W C"]:
        """Images in the data set's own range."""

    def picture(self, images: UInt8[np.ndarray, "B H W C"]) -> UInt8[np.ndarray, "B H W 3"]:
        """The same images for people's eyes, RGB in 0..255."""


CODECS = {"grey": lambda c, size: GreyLevels(c.levels, size)}


def make_codec(config: config_lib.Tokens, image_size: int) -> Codec:
    """The codec that the config names, for square images of `image_size` pixels.

    Raises:
      InputError: no codec has that name.
    """
    if config.name not in CODECS:
        accepted = ", ".join(CODECS)
        raise config_lib.InputError(
            f"config.tokens.name is {config.name!r}; it takes one of {accepted}."
        )
    return CODECS[config.name](config, image_size)
