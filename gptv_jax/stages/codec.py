"""The codec that fits a run's data: whose palette or tokenizer it takes, or its own palette."""

import logging
import pathlib

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import tokens, weights
from gptv_jax.data import pipeline, sources
from gptv_jax.data.cache import TokenCache
from gptv_jax.data.damage import DamageLog
from gptv_jax.errors import InputError, list_differences
from gptv_jax.tokens import Codec, palette

LOG = logging.getLogger(__name__)
IMAGES, PIXELS = 4096, 2**18  # a palette is built from this many training images and pixels of them


def find_codec(config: config_lib.Config, folder: pathlib.Path | None = None) -> Codec | None:
    """The codec of a configuration; None where its palette or tokenizer is still to be made.

    Raises:
      InputError: the run folder, the token cache, `init_from` and the settings have different
        definitions, or the token cache holds other tokens or images than the configuration says.
    """
    data_set, kind = sources.open_data_set(config.data), config.tokens.kind
    cache = data_set if isinstance(data_set, TokenCache) else None
    if cache:
        _check_cache(config, cache)
    if kind not in tokens.DEFINITIONS:
        return tokens.make_codec(config.tokens, config.data.image_size)
    found: dict[str, tokens.TokenDefinition | None] = {}
    if folder:
        found[f"the run folder {folder}"] = tokens.load_definition(kind, folder)
    if cache:
        found[f"the token cache {cache.folder}"] = cache.codec().definition
    if config.init_from:
        path = pathlib.Path(config.init_from)
        imported = weights.is_weights_path(path)
        definition = (
            weights.read_definition(path) if imported else tokens.load_definition(kind, path)
        )
        found[f"config.init_from={path}"] = definition
    field = {"palette": "palette", "learned": "tokenizer"}[kind]
    if given := getattr(config.tokens, field):
        found[f"config.tokens.{field}={given}"] = tokens.DEFINITIONS[kind][1](given)
    present = [(where, definition) for where, definition in found.items() if definition is not None]
    if not present:
        return None
    (first, chosen), *rest = present
    for where, other in rest:
        if not other.equivalent(chosen):
            raise InputError(f"the {field} of {where} is another one than that of {first}.")
    return tokens.make_codec(config.tokens, config.data.image_size, chosen)


def build_codec(config: config_lib.Config, damage_log: DamageLog) -> Codec:
    """A codec whose palette is k-means over random training pixels, the same on every process."""
    rng = np.random.default_rng(config.seed)
    pixels = []
    for element in pipeline.images(config.data, "train", damage_log, IMAGES, config.seed):
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
    """Raises InputError where this configuration would make other tokens than the cache has."""
    pairs = (
        *config.tokens.pairs(cache.tokens),
        ("data.image_size", config.data.image_size, cache.image_size),
        ("data.eval_transforms", config.data.eval_transforms, cache.transforms),
    )
    cached = {f"config.{name}": theirs for name, _, theirs in pairs}
    if differing := list_differences(cached, {f"config.{n}": ours for n, ours, _ in pairs}):
        raise InputError(
            f"the token cache {cache.folder} was made by another configuration: "
            f"{'; '.join(differing)}. Take the settings of the cache, or make another cache."
        )
