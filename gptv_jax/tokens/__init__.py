"""Images to sequences of tokens and back. Each kind of token is one small class, a `Codec`."""

import pathlib
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from gptv_jax import config as config_lib
from gptv_jax.errors import InputError
from gptv_jax.tokens import palette as palettes
from gptv_jax.tokens.grey import GreyLevels
from gptv_jax.tokens.palette import Palette, PaletteTokens

PALETTE_FILE = "palette.npz"  # in a run folder and in a token cache


@runtime_checkable
class Codec(Protocol):
    """What a kind of token must offer; `encode` and `decode` take NumPy arrays."""

    vocabulary: int  # V: tokens are 0 .. V-1
    grid: tuple[int, int]  # rows and columns of tokens, in raster order; T is their product
    image_shape: tuple[int, int, int]  # H, W, C of the images it takes
    lossless: bool  # whether `decode` gives back every image that `encode` takes
    order: np.ndarray  # all tokens, those that look alike next to each other

    def encode(self, images: UInt8[np.ndarray, "B H W C"]) -> Int[np.ndarray, "B T"]:
        """Int32 tokens; raises ValueError where a pixel has no token."""

    def decode(
        self, tokens: Int[np.ndarray, "B N"], grid: tuple[int, int] | None = None
    ) -> UInt8[np.ndarray, "B height width C"]:
        """Images in the data set's own range; of other rows and columns where `grid` says so."""

    def picture(self, images: UInt8[np.ndarray, "B H W C"]) -> UInt8[np.ndarray, "B H W 3"]:
        """The same images for people's eyes, RGB in 0..255."""


CODECS = {
    "grey": lambda config, size, palette: GreyLevels(config.levels, size),
    "palette": lambda config, size, palette: PaletteTokens(palette, size),
}


def make_codec(config: config_lib.Tokens, image_size: int, palette: Palette | None = None) -> Codec:
    """The codec that the config names, for square images of `image_size` pixels.

    Args:
      config: kind and settings.
      image_size: height and width in pixels.
      palette: the colours, where they are the tokens.

    Raises:
      InputError: the palette is of another number of colours.
    """
    if palette is not None and len(palette.centers) != config.colors:
        raise InputError(
            f"config.tokens.colors is {config.colors}, but the palette has {len(palette.centers)} "
            "colours; set it to that."
        )
    return CODECS[config.kind](config, image_size, palette)


def load_palette(folder: pathlib.Path) -> Palette | None:
    """The palette that a run folder or a token cache keeps; None where it has none."""
    path = folder / PALETTE_FILE
    return palettes.load(path) if path.exists() else None


def save_palette(codec: Codec, folder: pathlib.Path) -> None:
    """Keeps a codec's palette, where it has one."""
    if isinstance(codec, PaletteTokens):
        codec.palette.save(folder / PALETTE_FILE)
