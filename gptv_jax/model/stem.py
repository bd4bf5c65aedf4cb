"""Pixels to inputs of the image's positions, by convolutions that halve height and width."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from gptv_jax import sharding
from gptv_jax.model import layers
from gptv_jax.model.autoencoder import Conv

CHANNELS = 3  # of the first convolution's input; grey images have three equal ones
# Initial size of the inputs without tokens: as large as what the first layers add to them.
SCALE = 0.7


class Halving(nnx.Module):
    """relu(conv3x3) with stride 2; neighbouring windows overlap.

    There is no norm: a norm of the channels makes faint noise on a plain background as loud as the
    objects. With one, detection on `digit_scenes` learned boxes and no classes.
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.convolution = Conv("stem_conv", 3, inputs, outputs, rngs=rngs, gain=2**0.5, stride=2)

    def __call__(self, x: Float[Array, "B H W N"]) -> Float[Array, "B h w M"]:
        return jax.nn.relu(self.convolution(x))


class Stem(nnx.Module):
    """Weights of the stem: a `Halving` for each of `widths`, and a projection to the width D.

    With `tokens` the projection begins at zero: the network begins as the one that reads tokens
    alone.
    """

    def __init__(self, widths: tuple[int, ...], width: int, tokens: bool, *, rngs: nnx.Rngs):
        pairs = zip((CHANNELS, *widths), widths, strict=False)
        self.layers = nnx.List([Halving(*pair, rngs=rngs) for pair in pairs])
        std = 0.0 if tokens else SCALE * widths[-1] ** -0.5
        self.from_stem = layers.normal(rngs, "from_stem", (widths[-1], width), std)

    def __call__(self, pixels: UInt8[Array, "B H W C"], dtype: str) -> Float[Array, "B N D"]:
        """Inputs of the N positions that hold the image, in raster order; C is 1 or 3."""
        # Each image is standardised: a dark or bright background would be most of the input.
        x = jax.nn.standardize(pixels.astype(jnp.float32), axis=(1, 2, 3)).astype(dtype)
        x = jnp.broadcast_to(x, (*x.shape[:3], CHANNELS))
        for layer in self.layers:
            x = layer(x)
        x = x.reshape(len(x), -1, x.shape[-1], out_sharding=sharding.BATCH_FIRST)
        return layers.project("bnm,md->bnd", x, self.from_stem[...], sharding.BATCH_FIRST)
