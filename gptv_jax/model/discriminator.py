"""Tells patches of images from patches of restored images (Isola et al. 2017, arXiv:1611.07004)."""

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax.model import layers
from gptv_jax.model.autoencoder import Conv, space_to_depth

SLOPE = 0.2  # of the leaky ReLU below 0


class Discriminator(nnx.Module):
    """Convolutions that each halve the resolution, then one score for each remaining position."""

    def __init__(
        self, config: config_lib.Autoencoder, settings: config_lib.Tokenizer, *, rngs: nnx.Rngs
    ):
        widths = [settings.discriminator_width * 2 ** min(i, 3)
                  for i in range(settings.discriminator_layers)]  # fmt: skip
        inputs = [config.channels, *widths[:-1]]
        self.layers = nnx.List(
            Conv("conv", 3, 4 * before, after, rngs=rngs)
            for before, after in zip(inputs, widths, strict=True)
        )
        self.score = Conv("score", 3, widths[-1], 1, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w 1"]:
        """Scores, positive where a patch looks real."""
        x = images
        for layer in self.layers:
            x = jax.nn.leaky_relu(layer(space_to_depth(x, 2)), SLOPE)
        return self.score(x)


def init(config: config_lib.Autoencoder, settings: config_lib.Tokenizer, key: PRNGKeyArray) -> dict:
    """Fresh weights as a nested dict of float32 arrays; call it under a mesh, inside jit."""
    return layers.init(Discriminator, config, settings, key=key)


def scores(
    config: config_lib.Autoencoder,
    settings: config_lib.Tokenizer,
    params: dict,
    images: Float[Array, "B H W C"],
) -> Float[Array, "B h w 1"]:
    """Scores of the patches of images from -1 to 1."""
    return layers.bind(Discriminator, config, settings, params=params)(images)
