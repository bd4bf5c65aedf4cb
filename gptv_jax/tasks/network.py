"""The network that a configuration describes, before a task adds its parts."""

from gptv_jax import config as config_lib
from gptv_jax.data import transforms
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import Layout, of_images


def network_of(
    config: config_lib.Config,
    classes: int = 0,
    read: config_lib.Probe | config_lib.Finetune | None = None,
) -> Network:
    """The network of a configuration, with a class head where `classes` is not 0.

    `read` says how a probe or the class head reads features: pooling and attention. None: as in
    pretraining.
    """
    attention = read.attention if read else "causal"
    model = config.model
    layout = images_layout(model, config.tokens, config.grid, attention)
    pool = config.grid[0] if read and read.pooling == "frames" else 1
    regions = getattr(read, "regions", 1)
    starts = start_vectors(config)
    patch = patch_of(model, config.tokens)
    return Network(model, layout, starts, classes, patch=patch, pool=pool, regions=regions)


def patch_of(model: config_lib.Model, tokens: config_lib.Tokens) -> tuple[int, ...]:
    """Height, width and channels of the pixels that a position reads, see `Network.patch`."""
    if model.image_input == "tokens":
        return ()
    return (*tokens.cell[1:], tokens.autoencoder.channels if tokens.kind == "learned" else 3)


def images_layout(
    model: config_lib.Model,
    tokens: config_lib.Tokens,
    grid: tuple[int, ...],
    attention: str = "causal",
) -> Layout:
    """The layout of images or clips alone, see `of_images`."""
    levels = tokens.autoencoder.levels if model.code_head == "levels" else ()
    return of_images(tokens.vocabulary, grid, model.objective, attention, levels)


def start_vectors(config: config_lib.Config) -> int:
    """Number of start vectors: one; one for each class and none; or one for each variant."""
    if config.model.class_tokens:
        return config.model.class_tokens + 1
    variants = transforms.variants(config.data.train_transforms)
    return variants if config.model.start_per_variant else 1
