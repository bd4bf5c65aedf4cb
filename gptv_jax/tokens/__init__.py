"""Images to sequences of tokens and back. Each kind of token is one small class, a `Codec`.

Where the settings alone do not say what tokens stand for, a `TokenDefinition` does: the colours of
a palette, or a trained tokenizer. A run folder and a token cache each keep a copy.
"""

import pathlib
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from gptv_jax import config as config_lib
from gptv_jax.errors import InputError
from gptv_jax.tokens import learned
from gptv_jax.tokens import palette as palettes
from gptv_jax.tokens.grey import GreyLevels
from gptv_jax.tokens.learned import LearnedTokens, Tokenizer
from gptv_jax.tokens.palette import Palette, PaletteTokens

TokenDefinition = Palette | Tokenizer
# Of a kind of token that has one: the file that a folder keeps it in, and what reads it.
DEFINITIONS = {
    "palette": (palettes.FILE, palettes.load),
    "learned": (learned.FILE, learned.load),
}


@runtime_checkable
class Codec(Protocol):
    """What a kind of token must offer; `encode` and `decode` take NumPy arrays."""

    vocabulary: int  # V: tokens are 0 .. V-1
    grid: tuple[int, int]  # rows and columns of tokens, in raster order; T is their product
    image_shape: tuple[int, int, int]  # H, W, C of the images it takes
    lossless: bool  # whether `decode` gives back every image that `encode` takes
    on_devices: bool  # whether it encodes on devices, for which many images at once are better
    definition: "TokenDefinition | None"  # what tokens stand for, where the settings do not say it
    similarity_order: np.ndarray  # all tokens, those that look alike next to each other

    def encode(self, images: UInt8[np.ndarray, "B H W C"]) -> Int[np.ndarray, "B T"]:
        """Int32 tokens; raises ValueError where a pixel has no token."""

    def decode(
        self, tokens: Int[np.ndarray, "B N"], grid: tuple[int, int] | None = None
    ) -> UInt8[np.ndarray, "B height width C"]:
        """Images in the data set's own range; of other rows and columns where `grid` says so."""

    def picture(self, images: UInt8[np.ndarray, "B H W C"]) -> UInt8[np.ndarray, "B H W 3"]:
        """The same images for people's eyes, RGB in 0..255."""


CODECS = {
    "grey": lambda config, size, _: GreyLevels(config.levels, size),
    "palette": lambda config, size, palette: PaletteTokens(palette, size),
    "learned": lambda config, size, tokenizer: LearnedTokens(tokenizer, size),
}


def make_codec(
    config: config_lib.Tokens, image_size: int, definition: TokenDefinition | None = None
) -> Codec:
    """The codec that the config names, for square images of `image_size` pixels.

    Args:
      config: kind and settings.
      image_size: height and width in pixels.
      definition: what the tokens stand for, where they have one.

    Raises:
      InputError: it is not what the settings say.
    """
    if isinstance(definition, Palette) and len(definition.centers) != config.colors:
        raise InputError(
            f"config.tokens.colors is {config.colors}, but the palette has "
            f"{len(definition.centers)} colours; set it to that."
        )
    if isinstance(definition, Tokenizer) and (
        differing := definition.differing(config.autoencoder)
    ):
        raise InputError(
            f"the tokenizer is another one than config.tokens.autoencoder says: "
            f"{'; '.join(differing)}. Set these fields to its values."
        )
    return CODECS[config.kind](config, image_size, definition)


def load_definition(kind: str, folder: pathlib.Path) -> TokenDefinition | None:
    """What a run folder or a token cache keeps of a kind of token; None where it has none."""
    if kind not in DEFINITIONS:
        return None
    name, load = DEFINITIONS[kind]
    return load(folder / name) if (folder / name).exists() else None


def save_definition(definition: TokenDefinition | None, folder: pathlib.Path) -> None:
    """Keeps what tokens stand for, where they have a definition."""
    if definition is not None:
        kind = "palette" if isinstance(definition, Palette) else "learned"
        definition.save(folder / DEFINITIONS[kind][0])
