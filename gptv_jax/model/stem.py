"""Pixels to inputs of the image's positions, by convolutions that halve height and width."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from gptv_jax import sharding
from gptv_jax.model import layers
from gptv_jax.model.autoencoder import Conv

CHANNELS = 3  # of the first convolution's input; grey images have three equal ones
SLOPE = 0.1  # of the leaky relu below zero
# Initial size of the inputs without tokens: as large as what the first layers add to them.
SCALE = 0.7


class Halving(nnx.Module):
    """A 3x3 convolution with stride 2, a norm and a leaky relu; neighbouring windows overlap.

    The norm is over the whole image, all channels together (a group norm of one group). A norm of
    each position makes faint noise on a plain background as loud as the objects: with one,
    detection on `digit_scenes` learned boxes and no classes. Without a norm, units die at Muon's
    learning rates: on BCCD a stem of four convolutions passed on nothing of the image after 50
    steps.
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.convolution = Conv("stem_conv", 3, inputs, outputs, rngs=rngs, gain=2**0.5, stride=2)

    def __call__(self, x: Float[Array, "B H W N"]) -> Float[Array, "B h w M"]:
        x = self.convolution(x)
        normed = jax.nn.standardize(x.astype(jnp.float32), axis=(1, 2, 3))
        return jax.nn.leaky_relu(normed, SLOPE).astype(x.dtype)


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
