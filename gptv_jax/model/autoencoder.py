"""Learned tokens: a convolutional encoder and decoder with a quantizer between them.

A quantizer maps the encoder's output to the decoder's input, with gradients that pass straight
through to the encoder, to codes, each a whole number, and to a commitment loss. A discriminator may
judge restored images in training.

Letters: B batch, H and W pixels, C channels of the image, h and w the grid of codes, Z dimensions
of a code, N and M channels of activations. Images run from -1 to 1. Like the GPT, an `Autoencoder`
holds weights and is a pytree; training works on the plain nested dict of `init` and binds it where
it is used.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import layers
from gptv_jax.model.attention import self_attention
from gptv_jax.model.layout import full_mask

BRANCH = 0.1  # initial size of a residual branch relative to the activations it is added to
LAYOUT = ("NHWC", "HWIO", "NHWC")
# 2 sigmoid(1.6 z) - 1 is close to the cumulative distribution of a unit normal, scaled to -1 .. 1:
# a normal encoder output then uses all levels equally often; tanh would favour the outer levels.
STEEPNESS = 1.6
SLOPE = 0.2  # of the discriminator's leaky ReLU below 0


class Conv(nnx.Module):
    """A convolution with bias that divides height and width by its stride.

    The kernel has `side` x `side` positions and variance gain^2 / (number of summed inputs), and is
    named `name` in `sharding.PARAMETERS`; inputs and outputs are channels.
    """

    def __init__(
        self, name: str, side: int, inputs: int, outputs: int, *, rngs: nnx.Rngs, gain=1.0, stride=1
    ):
        self.name, self.stride = name, stride
        std = gain * (side * side * inputs) ** -0.5
        setattr(self, name, layers.normal(rngs, name, (side, side, inputs, outputs), std))
        self.bias = layers.constant("bias", (outputs,), 0.0)

    def __call__(self, x: Float[Array, "B h w N"]) -> Float[Array, "B i j M"]:
        """Computes in the dtype of `x`, with zeros beyond the border."""
        kernel, strides = sharding.gather(getattr(self, self.name)[...], x.dtype), [self.stride] * 2
        out = jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=LAYOUT)
        return out + self.bias[...].astype(x.dtype)[None, None, None]


class ResidualBlock(nnx.Module):
    """X + conv1x1(relu(conv3x3(x)))."""

    def __init__(self, width: int, norm: bool, *, rngs: nnx.Rngs):
        self.gain = layers.constant("gain", (width,), 1.0) if norm else None
        self.wide = Conv("conv", 3, width, width, rngs=rngs)
        self.out = Conv("conv", 1, width, width, rngs=rngs, gain=BRANCH)

    def __call__(self, x: Float[Array, "B h w N"]) -> Float[Array, "B h w N"]:
        normed = x if self.gain is None else layers.rms_norm(x, self.gain[...])
        return x + self.out(jax.nn.relu(self.wide(normed)))


class Attention(nnx.Module):
    """A residual branch in which all positions attend to all positions, with one head."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.gain = layers.constant("gain", (width,), 1.0)
        self.qkv = Conv("conv", 1, width, 3 * width, rngs=rngs)
        self.out = Conv("conv", 1, width, width, rngs=rngs, gain=BRANCH)

    def __call__(self, x: Float[Array, "B h w N"]) -> Float[Array, "B h w N"]:
        B, h, w, N = x.shape
        qkv = self.qkv(layers.rms_norm(x, self.gain[...]))
        qkv = qkv.reshape(B, h * w, 3, 1, N, out_sharding=sharding.BATCH_FIRST)
        mixed = self_attention(*jnp.moveaxis(qkv, 2, 0), visible=full_mask(h * w))
        return x + self.out(mixed.reshape(B, h, w, N, out_sharding=sharding.BATCH_FIRST))


class Encoder(nnx.Module):
    """Images to the vectors that are quantized."""

    def __init__(self, config: config_lib.Autoencoder, size: int, *, rngs: nnx.Rngs):
        self.config = config
        widths, blocks, stages = config.widths, range(config.encoder_blocks), []
        pixels = config.channels * config.patch**2
        self.stem = Conv("from_pixels", 3, pixels, widths[0], rngs=rngs)
        for i, width in enumerate(widths):
            parts = [Conv("conv", 3, 4 * widths[i - 1], width, rngs=rngs)] if i else []
            parts += [ResidualBlock(width, config.norm, rngs=rngs) for _ in blocks]
            stages.append(nnx.List(parts))
        if config.attention:
            stages[-1].append(Attention(widths[-1], rngs=rngs))
        self.stages = nnx.List(stages)
        self.to_code = Conv("to_code", 1, widths[-1], size, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w Z"]:
        x = self.stem(space_to_depth(images.astype(self.config.dtype), self.config.patch))
        for i, stage in enumerate(self.stages):
            x = space_to_depth(x, 2) if i else x
            for part in stage:
                x = part(x)
        return self.to_code(jax.nn.relu(x))


class Decoder(nnx.Module):
    """Values of codes to images: the encoder's layers in reverse order."""

    def __init__(self, config: config_lib.Autoencoder, size: int, *, rngs: nnx.Rngs):
        self.config = config
        widths, blocks, stages = config.widths[::-1], range(config.decoder_blocks), []
        self.from_code = Conv("from_code", 3, size, widths[0], rngs=rngs)
        for i, width in enumerate(widths):
            parts = [ResidualBlock(width, config.norm, rngs=rngs) for _ in blocks]
            if i + 1 < len(widths):
                parts.append(Conv("conv", 3, width, 4 * widths[i + 1], rngs=rngs))
            stages.append(nnx.List(parts))
        if config.attention:
            stages[0].insert(0, Attention(widths[0], rngs=rngs))
        self.stages = nnx.List(stages)
        pixels = config.channels * config.patch**2
        self.to_pixels = Conv("to_pixels", 3, widths[-1], pixels, rngs=rngs, gain=BRANCH)

    def __call__(self, values: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        """Float32 images of about -1 to 1, not clipped."""
        x = self.from_code(values.astype(self.config.dtype))
        for i, stage in enumerate(self.stages):
            x = depth_to_space(x, 2) if i else x
            for part in stage:
                x = part(x)
        pixels = self.to_pixels(jax.nn.relu(x))
        return depth_to_space(pixels, self.config.patch).astype(jnp.float32)


class Quantized(NamedTuple):
    """The quantized output of an encoder."""

    values: Float[Array, "B h w Z"]  # of the codes; gradients pass as if nothing were rounded
    codes: Int[Array, "B h w"]
    commitment: Float[Array, ""]  # mean squared distance to learned codes; else 0


class ScalarQuantizer(nnx.Module):
    """Rounds each dimension to a number of levels (Mentzer et al. 2023, arXiv:2309.15505).

    A dimension of n levels is squashed to -1 .. 1, cut into n intervals of equal size, and replaced
    by the middle of its interval: (2 i + 1) / n - 1 for i = 0 .. n-1. The levels are symmetric
    around 0; 0 is a level where n is odd. Nothing is learned.
    """

    def __init__(self, levels: tuple[int, ...]):
        self.levels = levels
        self.size = len(levels)  # Z
        self._strides = tuple(math.prod(levels[:i]) for i in range(len(levels)))

    def __call__(self, z: Float[Array, "B h w Z"]) -> Quantized:
        """Quantizes any real numbers; computes in float32 at least."""
        squashed = 2 * jax.nn.sigmoid(STEEPNESS * z.astype(layers.accumulator(z))) - 1
        return Quantized(self.rounded(squashed), self.codes(squashed), jnp.zeros(()))

    def rounded(self, squashed: Float[Array, "*any Z"]) -> Float[Array, "*any Z"]:
        """The nearest levels of numbers from -1 to 1, with the gradient of the identity."""
        nearest = (2 * self._digits(squashed) + 1) / _last(self.levels, squashed) - 1
        return squashed + jax.lax.stop_gradient(nearest - squashed)

    def values(self, codes: Int[Array, "*any"]) -> Float[Array, "*any Z"]:
        codes = codes[..., None]
        digits = codes // _last(self._strides, codes) % _last(self.levels, codes)
        digits = digits.astype(jnp.float32)
        return (2 * digits + 1) / _last(self.levels, digits) - 1

    def codes(self, squashed: Float[Array, "*any Z"]) -> Int[Array, "*any"]:
        """Codes of the nearest levels of numbers from -1 to 1."""
        digits = self._digits(squashed).astype(jnp.int32)
        return (digits * _last(self._strides, digits)).sum(axis=-1)

    def _digits(self, squashed: Float[Array, "*any Z"]) -> Float[Array, "*any Z"]:
        counts = _last(self.levels, squashed)
        return jnp.clip(jnp.floor((squashed + 1) / 2 * counts), 0, counts - 1)


class VectorQuantizer(nnx.Module):
    """Takes the nearest of learned unit vectors (van den Oord et al. 2017, arXiv:1711.00937).

    Only directions are compared, which keeps more of a large codebook in use (Yu et al. 2021,
    arXiv:2110.04627). The codebook gets no gradient: train/autoencoding.py moves it after a step.
    """

    def __init__(self, config: config_lib.Autoencoder, *, rngs: nnx.Rngs):
        self.size = config.code_size  # Z
        self.codebook = layers.normal(rngs, "codebook", (config.codes, self.size), 1.0)

    def __call__(self, z: Float[Array, "B h w Z"]) -> Quantized:
        """Quantizes any real numbers; computes in float32 at least."""
        z = unit(z.astype(layers.accumulator(z)))
        book = unit(jax.lax.stop_gradient(self.codebook[...]))
        # By default a TPU rounds both to bfloat16, and takes the wrong one of two near codes.
        cosine = jnp.einsum("bhwz,vz->bhwv", z, book, precision="highest")
        codes = jnp.argmax(cosine, axis=-1)
        nearest = self.values(codes)
        distance = jnp.square(z - jax.lax.stop_gradient(nearest)).sum(axis=-1).mean()
        return Quantized(z + jax.lax.stop_gradient(nearest - z), codes, distance)

    def values(self, codes: Int[Array, "*any"]) -> Float[Array, "*any Z"]:
        book = unit(self.codebook[...])
        return book.at[codes].get(out_sharding=jax.typeof(codes).sharding.spec)


def _last(values: tuple[int, ...], like: Array) -> np.ndarray:
    """The values along the last axis of an array of the dtype and rank of `like`."""
    return np.array(values, like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def unit(x: Float[Array, "*any Z"]) -> Float[Array, "*any Z"]:
    """The vectors scaled to length 1."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)


class Autoencoder(nnx.Module):
    """The encoder, the quantizer and the decoder, with their weights."""

    def __init__(self, config: config_lib.Autoencoder, *, rngs: nnx.Rngs):
        if config.quantizer == "fsq":
            self.quantizer = ScalarQuantizer(config.levels)
        else:
            self.quantizer = VectorQuantizer(config, rngs=rngs)
        self.encoder = Encoder(config, self.quantizer.size, rngs=rngs)
        self.decoder = Decoder(config, self.quantizer.size, rngs=rngs)

    def encode(self, images: Float[Array, "B H W C"]) -> Quantized:
        return self.quantizer(self.encoder(images))

    def decode(self, codes: Int[Array, "B h w"]) -> Float[Array, "B H W C"]:
        """Float32 images of codes, of a grid of any size."""
        return self.decoder(self.quantizer.values(codes))


def init(config: config_lib.Autoencoder, key: PRNGKeyArray) -> dict:
    """Fresh weights as a nested dict of float32 arrays; call it under a mesh, inside jit."""
    return layers.init(Autoencoder, config, key=key)


def bind(config: config_lib.Autoencoder, params: dict) -> Autoencoder:
    """The module with these weights."""
    return layers.bind(Autoencoder, config, params=params)


class Discriminator(nnx.Module):
    """Scores patches, positive where they look real (Isola et al. 2017, arXiv:1611.07004).

    Convolutions each halve the resolution, then there is one score for each remaining position.
    """

    def __init__(
        self, config: config_lib.Autoencoder, settings: config_lib.Tokenizer, *, rngs: nnx.Rngs
    ):
        first, count = settings.discriminator_width, settings.discriminator_layers
        widths = [config.channels, *(first * 2 ** min(i, 3) for i in range(count))]
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List(Conv("conv", 3, 4 * a, b, rngs=rngs) for a, b in pairs)
        self.score = Conv("score", 3, widths[-1], 1, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w 1"]:
        for layer in self.layers:
            images = jax.nn.leaky_relu(layer(space_to_depth(images, 2)), SLOPE)
        return self.score(images)


def space_to_depth(x: Float[Array, "B H W N"], side: int) -> Float[Array, "B h w M"]:
    """Squares of side * side positions become channels: M = side * side * N."""
    B, h, w, N = x.shape[0], x.shape[1] // side, x.shape[2] // side, x.shape[3]
    x = x.reshape(B, h, side, w, side, N, out_sharding=sharding.BATCH_FIRST).swapaxes(2, 3)
    return x.reshape(B, h, w, -1, out_sharding=sharding.BATCH_FIRST)


def depth_to_space(x: Float[Array, "B h w M"], side: int) -> Float[Array, "B H W N"]:
    """The inverse of `space_to_depth`."""
    B, h, w, M = x.shape
    split = (B, h, w, side, side, M // side**2)
    x = x.reshape(split, out_sharding=sharding.BATCH_FIRST).swapaxes(2, 3)
    return x.reshape(B, h * side, w * side, -1, out_sharding=sharding.BATCH_FIRST)
