"""The codec that fits a run's data: whose palette it takes, or a palette of its own."""

import logging
import pathlib

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import interop, tokens
from gptv_jax.data import pipeline, sources
from gptv_jax.data.cache import TokenCache
from gptv_jax.data.damage import Ledger
from gptv_jax.errors import InputError
from gptv_jax.tokens import Codec, Palette, palette

LOG = logging.getLogger(__name__)
IMAGES, PIXELS = 4096, 2**18  # a palette is built from this many training images and pixels of them


def find_codec(config: config_lib.Config, folder: pathlib.Path | None = None) -> Codec | None:
    """The codec of a configuration; None where its palette is still to be built.

    Args:
      config: of the run.
      folder: of the run, which keeps its palette; None: there is none yet.

    Raises:
      InputError: palettes of the run, the token cache, `init_from` and `tokens.palette` differ, or
        the token cache holds other tokens or images than the configuration says.
    """
    data_set = sources.open_data_set(config.data)
    cache = data_set if isinstance(data_set, TokenCache) else None
    if cache:
        _check_cache(config, cache)
    if config.tokens.kind != "palette":
        return tokens.make_codec(config.tokens, config.data.image_size)
    found: dict[str, Palette | None] = {}
    if folder:
        found[f"the run folder {folder}"] = tokens.load_palette(folder)
    if cache:
        found[f"the token cache {cache.folder}"] = cache.codec().palette
    if config.init_from:
        path = pathlib.Path(config.init_from)
        portable = interop.is_portable(path)
        found[f"config.init_from={path}"] = (
            interop.read_palette(path) if portable else tokens.load_palette(path)
        )
    if config.tokens.palette:
        given = config.tokens.palette
        found[f"config.tokens.palette={given}"] = palette.load(given)
    there = {where: colors for where, colors in found.items() if colors is not None}
    if not there:
        return None
    (first, chosen), *rest = there.items()
    for where, other in rest:
        if not other.same_as(chosen):
            raise InputError(f"the palette of {where} is another one than that of {first}.")
    return tokens.make_codec(config.tokens, config.data.image_size, chosen)


def build_codec(config: config_lib.Config, ledger: Ledger) -> Codec:
    """A codec whose palette is k-means over random pixels of the training images.

    The same on every process of a run, so that each builds its own.
    """
    rng = np.random.default_rng(config.seed)
    pixels = []
    for element in pipeline.images(config.data, "train", ledger, IMAGES, config.seed):
        image = element["image"]
        if image.shape[-1] != 3:
            raise InputError(
                f"images have {image.shape[-1]} channel(s), but config.tokens.kind=palette takes "
                'RGB; take "decode(channels=3)" or config.tokens.kind=grey.'
            )
        flat = image.reshape(-1, 3)
        pixels.append(flat[rng.integers(len(flat), size=-(-PIXELS // IMAGES))])
    provenance = {"data": config.data.name, "split": config.data.train_split, "images": len(pixels)}
    LOG.info("building a palette of %d colours", config.tokens.colors)
    colors = palette.build(np.concatenate(pixels), config.tokens.colors, config.seed, provenance)
    return tokens.make_codec(config.tokens, config.data.image_size, colors)


def _check_cache(config: config_lib.Config, cache: TokenCache) -> None:
    """Raises where the cache is not what this configuration would have made."""
    now, there = config.tokens, cache.tokens
    size = "colors" if now.kind == "palette" else "levels"
    differing = [
        f"config.{where} is {ours!r}, there {theirs!r}"
        for where, ours, theirs in (
            ("tokens.kind", now.kind, there.kind),
            (f"tokens.{size}", getattr(now, size), getattr(there, size)),
            ("data.image_size", config.data.image_size, cache.image_size),
            ("data.eval_transforms", config.data.eval_transforms, cache.transforms),
        )
        if ours != theirs
    ]
    if differing:
        raise InputError(
            f"the token cache {cache.folder} was made by another configuration: "
            f"{'; '.join(differing)}. Take that of the cache, or make another one."
        )
