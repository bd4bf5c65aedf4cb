"""Learned tokens: a convolutional encoder and decoder, and between them one of model/quantizers.py.

A discriminator may judge restored images in training.

A clip is encoded frame by frame, as images are. With `config.frames` = t above 1, the encoder then
merges the frames into steps in time, and the decoder splits steps into frames: the first frame is a
step of its own, and each t frames after it are one more, so 1 + n t frames become K = 1 + n steps.
All of this is causal in time, as in MAGVIT-v2 (Yu et al. 2023, arXiv:2310.05737): neither a code
nor a restored frame depends on what comes later, and an image is a clip of its first frame alone.

Letters: B batch, F frames, K steps in time, H and W pixels, C channels of the image, h and w the
grid of codes, Z dimensions of a code, N and M channels of activations. Images run from -1 to 1.
Like the GPT, an `Autoencoder` holds weights and is a pytree; training works on the plain nested
dict of `init` and binds it where it is used.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import layers
from gptv_jax.model.attention import self_attention
from gptv_jax.model.layout import full_mask
from gptv_jax.model.quantizers import Quantized, ScalarQuantizer, VectorQuantizer

BRANCH = 0.1  # initial size of a residual branch relative to the activations it is added to
LAYOUT = ("NHWC", "HWIO", "NHWC")
TAPS = 3  # steps that a convolution in time reads: its own and those before
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

    def __call__(self, x: Float[Array, "B *K h w N"]) -> Float[Array, "B *K i j M"]:
        """Computes in the dtype of `x`, with zeros beyond the border."""
        kernel, strides = sharding.gather(getattr(self, self.name)[...], x.dtype), [self.stride] * 2
        rows = as_images(x)
        out = jax.lax.conv_general_dilated(rows, kernel, strides, "SAME", dimension_numbers=LAYOUT)
        return as_clips(out + self.bias[...].astype(x.dtype)[None, None, None], x.shape[1:-3])


class ResidualBlock(nnx.Module):
    """X + conv1x1(relu(conv3x3(x))).

    With several `taps` the first convolution also reads the steps before, and the branch is 0 at
    first.
    """

    def __init__(self, width: int, norm: bool, taps: int = 1, *, rngs: nnx.Rngs):
        self.gain = layers.constant("gain", (width,), 1.0) if norm else None
        self.taps, gain = taps, BRANCH if taps == 1 else 0.0
        self.wide = Conv("conv", 3, taps * width, width, rngs=rngs)
        self.out = Conv("conv", 1, width, width, rngs=rngs, gain=gain)

    def __call__(self, x: Float[Array, "B *K h w N"]) -> Float[Array, "B *K h w N"]:
        read = x if self.gain is None else layers.rms_norm(x, self.gain[...])
        read = read if self.taps == 1 else with_past(read, self.taps)
        return x + self.out(jax.nn.relu(self.wide(read)))


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


class Merge(nnx.Module):
    """Frames to steps: at first the last frame of each step, as if it were an image."""

    def __init__(self, config: config_lib.Autoencoder, *, rngs: nnx.Rngs):
        width, self.frames = config.widths[-1], config.frames
        self.mix = Conv("conv", 3, config.frames * width, width, rngs=rngs, gain=0.0)
        blocks = range(config.encoder_blocks)
        self.blocks = nnx.List(ResidualBlock(width, config.norm, TAPS, rngs=rngs) for _ in blocks)

    def __call__(self, x: Float[Array, "B F h w N"]) -> Float[Array, "B K h w N"]:
        x = x[:, :: self.frames] + self.mix(with_past(x, self.frames, self.frames))
        for block in self.blocks:
            x = block(x)
        return x


class Split(nnx.Module):
    """Steps to frames: at first all frames of a step are equal."""

    def __init__(self, config: config_lib.Autoencoder, *, rngs: nnx.Rngs):
        width, self.frames = config.widths[-1], config.frames
        blocks = range(config.decoder_blocks)
        self.blocks = nnx.List(ResidualBlock(width, config.norm, TAPS, rngs=rngs) for _ in blocks)
        self.spread = Conv("conv", 3, width, config.frames * width, rngs=rngs, gain=0.0)

    def __call__(self, x: Float[Array, "B K h w N"]) -> Float[Array, "B F h w N"]:
        for block in self.blocks:
            x = block(x)
        (B, K, h, w, N), t, spec = x.shape, self.frames, {"out_sharding": sharding.BATCH_FIRST}
        own = self.spread(x).reshape(B, K, h, w, t, N, **spec)
        frames = x[:, :, None] + jnp.moveaxis(own, 4, 2)
        return frames.reshape(B, K * t, h, w, N, **spec)[:, t - 1 :]  # the first step is one frame


class Encoder(nnx.Module):
    """Images or clips to the vectors that are quantized."""

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
        self.merge = Merge(config, rngs=rngs) if config.frames > 1 else None

    def __call__(self, images: Float[Array, "B *F H W C"]) -> Float[Array, "B *K h w Z"]:
        steps, x = images.shape[1:-3], as_images(images.astype(self.config.dtype))
        x = self.stem(space_to_depth(x, self.config.patch))
        for i, stage in enumerate(self.stages):
            x = space_to_depth(x, 2) if i else x
            for part in stage:
                x = part(x)
        if self.merge is not None:
            x = self.merge(as_clips(x, steps or (1,)))
            steps, x = steps and x.shape[1:2], as_images(x)
        return as_clips(self.to_code(jax.nn.relu(x)), steps)


class Decoder(nnx.Module):
    """Values of codes to images or clips: the encoder's layers in reverse order."""

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
        self.split = Split(config, rngs=rngs) if config.frames > 1 else None

    def __call__(self, values: Float[Array, "B *K h w Z"]) -> Float[Array, "B *F H W C"]:
        """Float32 images of about -1 to 1, not clipped."""
        frames, x = values.shape[1:-3], as_images(values.astype(self.config.dtype))
        x = self.from_code(x)
        if self.split is not None:
            x = self.split(as_clips(x, frames or (1,)))
            frames, x = frames and x.shape[1:2], as_images(x)
        for i, stage in enumerate(self.stages):
            x = depth_to_space(x, 2) if i else x
            for part in stage:
                x = part(x)
        pixels = self.to_pixels(jax.nn.relu(x))
        images = depth_to_space(pixels, self.config.patch).astype(jnp.float32)
        return as_clips(images, frames)


class Autoencoder(nnx.Module):
    """The encoder, the quantizer and the decoder, with their weights."""

    def __init__(self, config: config_lib.Autoencoder, *, rngs: nnx.Rngs):
        if config.quantizer == "fsq":
            self.quantizer = ScalarQuantizer(config.levels)
        else:
            self.quantizer = VectorQuantizer(config, rngs=rngs)
        self.encoder = Encoder(config, self.quantizer.size, rngs=rngs)
        self.decoder = Decoder(config, self.quantizer.size, rngs=rngs)

    def encode(self, images: Float[Array, "B *F H W C"]) -> Quantized:
        return self.quantizer(self.encoder(images))

    def decode(self, codes: Int[Array, "B *K h w"]) -> Float[Array, "B *F H W C"]:
        """Float32 images or clips of codes, of a grid of any size."""
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


def as_images(x: Float[Array, "B *K h w N"]) -> Float[Array, "b h w N"]:
    """The frames of clips as images of one batch; images as they are."""
    return x if x.ndim == 4 else x.reshape(-1, *x.shape[-3:], out_sharding=sharding.BATCH_FIRST)


def as_clips(x: Float[Array, "b h w N"], frames: tuple[int, ...]) -> Float[Array, "B *K h w N"]:
    """The inverse of `as_images` for clips of `frames` frames; (): images."""
    shape = (-1, *frames, *x.shape[1:])
    return x.reshape(shape, out_sharding=sharding.BATCH_FIRST) if frames else x


def with_past(
    x: Float[Array, "B F h w N"], count: int, stride: int = 1
) -> Float[Array, "B K h w M"]:
    """Every `stride`-th frame behind the `count` - 1 frames before it, as channels, M = count * N.

    Zeros stand before the first frame. A convolution of the result is one over time too.
    """
    F, padded = x.shape[1], jnp.pad(x, ((0, 0), (count - 1, 0), *((0, 0),) * 3))
    return jnp.concatenate([padded[:, i : i + F : stride] for i in range(count)], axis=-1)


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
