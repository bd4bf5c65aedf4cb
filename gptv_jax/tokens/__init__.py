"""Images to tokens and back.

A `Codec` encodes and decodes. Grey levels need nothing but the settings; the other kinds have a
definition, which a run folder and a token cache keep as a file: a `Palette`, the colours that
tokens refer to, or a `Tokenizer`, the trained encoder and decoder with their weights.
"""

import pathlib

from gptv_jax import config as config_lib
from gptv_jax.config.data import ImageSize
from gptv_jax.errors import InputError, shorten
from gptv_jax.tokens import learned
from gptv_jax.tokens import palette as palettes
from gptv_jax.tokens.codec import Codec, FrameCodec, GreyCodec
from gptv_jax.tokens.learned import LearnedCodec, Tokenizer
from gptv_jax.tokens.palette import Palette, PaletteCodec

__all__ = [
    "Codec",
    "FrameCodec",
    "GreyCodec",
    "LearnedCodec",
    "Palette",
    "PaletteCodec",
    "Tokenizer",
]

TokenDefinition = Palette | Tokenizer
# For each kind of token that has a definition: the name of its file, and what reads the file.
DEFINITIONS = {"palette": (palettes.FILE, palettes.load), "learned": (learned.FILE, learned.load)}
CODECS = {  # of images; codecs whose tokens may stand for several frames are made apart
    "palette": lambda config, size, palette: PaletteCodec(palette, size),
    "learned": lambda config, size, tokenizer: LearnedCodec(tokenizer, size),
    "none": lambda *_: None,
}


def make_codec(
    config: config_lib.Tokens,
    image_size: ImageSize,
    definition: TokenDefinition | None = None,
    frames: int = 0,
) -> Codec | None:
    """The codec that the config names, for images of `image_size` or for clips of so many frames.

    None: there are no tokens.
    """
    if isinstance(definition, Palette) and len(definition.centers) != config.colors:
        raise InputError(
            f"config.tokens.colors is {config.colors}, but the palette has "
            f"{len(definition.centers)} colours; set the field to that number."
        )
    if isinstance(definition, Tokenizer) and (found := definition.differing(config.autoencoder)):
        raise InputError(
            f"the tokenizer was trained with other settings: {shorten(found, '; ')}. Set these "
            "fields to the tokenizer's values."
        )
    if config.kind == "grey":
        return GreyCodec(config.levels, image_size, config.patch, frames)
    if config.kind == "learned" and config.autoencoder.frames > 1:
        return LearnedCodec(definition, image_size, frames)
    codec = CODECS[config.kind](config, image_size, definition)
    return FrameCodec(codec, frames) if codec and frames else codec


def codec_of(config: config_lib.Config, definition: TokenDefinition | None = None) -> Codec | None:
    """The codec of a run, see `make_codec`."""
    return make_codec(config.tokens, config.data.image_size, definition, config.data.frames)


def load_definition(kind: str, folder: pathlib.Path) -> TokenDefinition | None:
    """The palette or tokenizer in a run folder or token cache; None if the folder has neither."""
    name, load = DEFINITIONS.get(kind, (None, None))
    return load(folder / name) if name and (folder / name).exists() else None


def kind_of(definition: TokenDefinition) -> str:
    """The kind of tokens that a definition is for, as config.tokens.kind."""
    return "palette" if isinstance(definition, Palette) else "learned"


def save_definition(definition: TokenDefinition | None, folder: pathlib.Path) -> None:
    """Writes the palette or tokenizer, if there is one, into a run folder or token cache."""
    if definition is not None:
        definition.save(folder / DEFINITIONS[kind_of(definition)][0])
