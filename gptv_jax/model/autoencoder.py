"""Learned tokens: a convolutional encoder and decoder with a quantizer between them.

Letters: B batch, H and W pixels, C channels of the image, h and w the grid of codes, Z dimensions
of a code, N and M channels of activations. Images run from -1 to 1. Like the GPT, an `Autoencoder`
holds weights and is a pytree; training works on the plain nested dict of `init` and binds it where
it is used.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import attention, layers
from gptv_jax.model.quantizer import Quantized, make_quantizer

BRANCH = 0.1  # initial size of a residual branch relative to the activations it is added to
LAYOUT = ("NHWC", "HWIO", "NHWC")


class Conv(nnx.Module):
    """A convolution with bias that keeps height and width."""

    def __init__(
        self, name: str, side: int, inputs: int, outputs: int, *, rngs: nnx.Rngs, gain=1.0
    ):
        """A kernel of `side` x `side` positions and variance gain^2 / (number of summed inputs).

        `name` is the kernel's name in `sharding.PARAMETERS`; inputs and outputs are channels.
        """
        self.name = name
        std = gain * (side * side * inputs) ** -0.5
        setattr(self, name, layers.normal(rngs, name, (side, side, inputs, outputs), std))
        self.bias = layers.constant("bias", (outputs,), 0.0)

    def __call__(self, x: Float[Array, "B h w N"]) -> Float[Array, "B h w M"]:
        """Computes in the dtype of `x`, with zeros beyond the border."""
        kernel = sharding.gather(getattr(self, self.name)[...], x.dtype)
        out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
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
        qkv = qkv.reshape(B, h * w, 3, 1, N, out_sharding=P(sharding.BATCH))
        mixed = attention.bidirectional_attention(*jnp.moveaxis(qkv, 2, 0))
        return x + self.out(mixed.reshape(B, h, w, N, out_sharding=P(sharding.BATCH)))


class Encoder(nnx.Module):
    """Images to the vectors that are quantized."""

    def __init__(self, config: config_lib.Autoencoder, size: int, *, rngs: nnx.Rngs):
        self.config = config
        first = config.channels * config.patch**2
        self.stem = Conv("from_pixels", 3, first, config.widths[0], rngs=rngs)
        stages = []
        for i, width in enumerate(config.widths):
            parts = []
            if i:
                parts.append(Conv("conv", 3, 4 * config.widths[i - 1], width, rngs=rngs))
            parts += [
                ResidualBlock(width, config.norm, rngs=rngs) for _ in range(config.encoder_blocks)
            ]
            stages.append(nnx.List(parts))
        if config.attention:
            stages[-1].append(Attention(config.widths[-1], rngs=rngs))
        self.stages = nnx.List(stages)
        self.to_code = Conv("to_code", 1, config.widths[-1], size, rngs=rngs)

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
        widths = config.widths[::-1]
        self.from_code = Conv("from_code", 3, size, widths[0], rngs=rngs)
        stages = []
        for i, width in enumerate(widths):
            parts = [
                ResidualBlock(width, config.norm, rngs=rngs) for _ in range(config.decoder_blocks)
            ]
            if i + 1 < len(widths):
                parts.append(Conv("conv", 3, width, 4 * widths[i + 1], rngs=rngs))
            stages.append(nnx.List(parts))
        if config.attention:
            stages[0].insert(0, Attention(widths[0], rngs=rngs))
        self.stages = nnx.List(stages)
        last = config.channels * config.patch**2
        self.to_pixels = Conv("to_pixels", 3, widths[-1], last, rngs=rngs, gain=BRANCH)

    def __call__(self, values: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        """Float32 images of about -1 to 1, not clipped."""
        x = self.from_code(values.astype(self.config.dtype))
        for i, stage in enumerate(self.stages):
            x = depth_to_space(x, 2) if i else x
            for part in stage:
                x = part(x)
        pixels = self.to_pixels(jax.nn.relu(x))
        return depth_to_space(pixels, self.config.patch).astype(jnp.float32)


class Autoencoder(nnx.Module):
    """The encoder, the quantizer and the decoder, with their weights."""

    def __init__(self, config: config_lib.Autoencoder, *, rngs: nnx.Rngs):
        self.quantizer = make_quantizer(config, rngs=rngs)
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


def space_to_depth(x: Float[Array, "B H W N"], side: int) -> Float[Array, "B h w M"]:
    """Squares of side * side positions become channels: M = side * side * N."""
    B, H, W, N = x.shape
    split = (B, H // side, side, W // side, side, N)
    x = x.reshape(split, out_sharding=P(sharding.BATCH)).swapaxes(2, 3)
    return x.reshape(B, H // side, W // side, -1, out_sharding=P(sharding.BATCH))


def depth_to_space(x: Float[Array, "B h w M"], side: int) -> Float[Array, "B H W N"]:
    """The inverse of `space_to_depth`."""
    B, h, w, M = x.shape
    split = (B, h, w, side, side, M // side**2)
    x = x.reshape(split, out_sharding=P(sharding.BATCH)).swapaxes(2, 3)
    return x.reshape(B, h * side, w * side, -1, out_sharding=P(sharding.BATCH))
