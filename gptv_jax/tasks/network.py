"""The network that a configuration describes, before a task adds its parts."""

from gptv_jax import config as config_lib
from gptv_jax.data import transforms
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import of_images


def network_of(config: config_lib.Config, classes: int = 0, pooling: str = "mean") -> Network:
    """The network of a configuration, with a class head where `classes` is not 0.

    `pooling` is that of a probe or of the class head, see `config.Probe`.
    """
    layout = of_images(config.tokens.vocabulary, config.grid, config.model.objective)
    pool = config.grid[0] if pooling == "frames" else 1
    return Network(config.model, layout, start_vectors(config), classes, pool=pool)


def start_vectors(config: config_lib.Config) -> int:
    """Number of start vectors: one; one for each class and none; or one for each variant."""
    if config.model.class_tokens:
        return config.model.class_tokens + 1
    variants = transforms.variants(config.data.train_transforms)
    return variants if config.model.start_per_variant else 1
