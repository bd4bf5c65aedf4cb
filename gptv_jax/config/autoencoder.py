"""Learned tokens: the network that makes them of images, and its training."""

import dataclasses
import math

from gptv_jax.config.fields import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE, field, one_of
from gptv_jax.config.train import Train

LEVELS = ("2 or more, once or more", lambda v: v and all(levels >= 2 for levels in v))
MOST_CODES = 2**16  # token caches keep two bytes a token
CODES = (f"2 to {MOST_CODES}", lambda v: 2 <= v <= MOST_CODES)
BETAS = ("two numbers from 0, below 1", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v))
WIDTHS = ("1 or more, once or more", lambda v: v and all(width >= 1 for width in v))


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A convolutional encoder and decoder, with a quantizer between them."""

    channels: int = field(3, one_of(1, 3))  # of the images: grey or RGB
    downsample: int = field(4, one_of(4, 8, 16))  # pixels a side that one token stands for
    # Channels at each resolution, the finest first; it halves from one to the next, so the first
    # layer takes squares of downsample / 2^(resolutions - 1) pixels a side together.
    widths: tuple[int, ...] = field((96,), WIDTHS)
    encoder_blocks: int = field(2, NOT_NEGATIVE)  # residual blocks at each resolution
    decoder_blocks: int = field(3, NOT_NEGATIVE)
    norm: bool = False  # RMS norm over the channels, before each block: what deep ones need
    attention: bool = False  # over all positions of the lowest resolution, on both sides
    # Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505), or vectors of a codebook
    # that follows what it stands for (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1).
    quantizer: str = field("fsq", one_of("fsq", "vq"))
    # fsq: of each dimension of a code; as many codes as their product. 240 codes: (8, 6, 5); 1,000:
    # (8, 5, 5, 5); 4,096: (8, 8, 8, 8); 16,384: (8, 8, 8, 8, 4); 64,000: (8, 8, 8, 5, 5, 5).
    levels: tuple[int, ...] = field((8, 8, 8, 8), LEVELS)
    codes: int = field(4096, CODES)  # vq: of the codebook
    code_size: int = field(8, POSITIVE)  # vq: dimensions of a code, which is of length 1
    dtype: str = field("float32", one_of("float32", "bfloat16"))  # of compute; weights: float32

    @property
    def vocabulary(self) -> int:
        """How many codes there are."""
        return math.prod(self.levels) if self.quantizer == "fsq" else self.codes

    @property
    def patch(self) -> int:
        """Pixels a side that the first layer takes together."""
        return self.downsample // 2 ** (len(self.widths) - 1)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Training of the encoder and decoder, on images whose values run from -1 to 1."""

    train: Train = dataclasses.field(default_factory=Train)
    # In place of data.train_transforms; (): the same ones.
    train_transforms: tuple[str, ...] = ()
    # Weights of what a reconstruction is judged by; 0 leaves one out.
    l1: float = field(0.0, NOT_NEGATIVE)  # mean absolute difference
    l2: float = field(1.0, NOT_NEGATIVE)  # mean squared difference
    gradient: float = field(0.0, NOT_NEGATIVE)  # of the differences to neighbours, at three scales
    ssim: float = field(0.0, NOT_NEGATIVE)  # 1 - SSIM
    lpips: float = field(0.0, NOT_NEGATIVE)  # distance of VGG-16's features; see lpips_weights
    lpips_weights: str | None = field(None, free=True)  # a file: docs/tokenizer.md
    commitment: float = field(0.25, NOT_NEGATIVE)  # vq: of encodings to their codes
    codebook_decay: float = field(0.99, BELOW_ONE)  # vq: of the averages that codes follow
    # vq: a code whose share of the encodings falls below this part of an even share is dead, and
    # begins anew as one of them.
    restart_below: float = field(0.1, BELOW_ONE)
    # A discriminator of patches (Isola et al. 2017, arXiv:1611.07004), by the hinge loss.
    adversarial: float = field(0.0, NOT_NEGATIVE)  # weight; 0: there is none
    adversarial_from: float = field(0.5, SHARE)  # of all steps, those before it begins
    discriminator_width: int = field(64, POSITIVE)  # channels of its first layer
    discriminator_layers: int = field(3, POSITIVE)  # that halve the resolution
    discriminator_rate: float = field(1e-4, NOT_NEGATIVE)  # learning rate of Adam
    discriminator_betas: tuple[float, ...] = field((0.5, 0.9), BETAS)  # the same
    # Share of the codes in use on an evaluation, of those that its tokens could use, below which it
    # is told that the codebook collapses.
    least_used: float = field(0.2, SHARE)
