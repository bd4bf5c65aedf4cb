"""Learned tokens: the network that encodes and decodes images, and its training."""

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
    # Channels at each resolution, the finest first. Each resolution is half of the one before, so
    # the first layer takes squares of downsample / 2^(resolutions - 1) pixels a side.
    widths: tuple[int, ...] = field((96,), WIDTHS)
    encoder_blocks: int = field(2, NOT_NEGATIVE)  # residual blocks at each resolution
    decoder_blocks: int = field(3, NOT_NEGATIVE)
    norm: bool = False  # RMS norm over the channels, before each block
    attention: bool = False  # over all positions of the lowest resolution, on both sides
    # Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505), or a codebook of moving
    # averages of encodings (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1).
    quantizer: str = field("fsq", one_of("fsq", "vq"))
    # fsq: levels of each dimension of a code; the number of codes is their product. 240 codes:
    # (8, 6, 5); 1,000: (8, 5, 5, 5); 4,096: (8, 8, 8, 8); 16,384: (8, 8, 8, 8, 4); 64,000:
    # (8, 8, 8, 5, 5, 5).
    levels: tuple[int, ...] = field((8, 8, 8, 8), LEVELS)
    codes: int = field(4096, CODES)  # vq: codes of the codebook
    code_size: int = field(8, POSITIVE)  # vq: dimensions of a code, a vector of length 1
    dtype: str = field("float32", one_of("float32", "bfloat16"))  # of compute; weights: float32

    @property
    def vocabulary(self) -> int:
        """Number of codes."""
        return math.prod(self.levels) if self.quantizer == "fsq" else self.codes

    @property
    def patch(self) -> int:
        """Pixels a side of the squares that the first layer takes."""
        return self.downsample // 2 ** (len(self.widths) - 1)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Training of the encoder and decoder, on images whose values run from -1 to 1."""

    train: Train = dataclasses.field(default_factory=Train)
    # Replaces data.train_transforms; (): data.train_transforms.
    train_transforms: tuple[str, ...] = ()
    # Weights of the losses between images and reconstructions; 0: this loss is not computed.
    l1: float = field(0.0, NOT_NEGATIVE)  # mean absolute difference
    l2: float = field(1.0, NOT_NEGATIVE)  # mean squared difference
    gradient: float = field(0.0, NOT_NEGATIVE)  # L1 of the images' gradients, at three scales
    ssim: float = field(0.0, NOT_NEGATIVE)  # 1 - SSIM
    lpips: float = field(0.0, NOT_NEGATIVE)  # distance of VGG-16's features, from lpips_weights
    lpips_weights: str | None = field(None, free=True)  # a file: docs/tokenizer.md
    commitment: float = field(0.25, NOT_NEGATIVE)  # vq: of encodings to their codes
    codebook_decay: float = field(0.99, BELOW_ONE)  # vq: decay of the averages that codes follow
    # vq: a code that gets less than this part of an even share of the encodings is dead, and is
    # replaced by one of the encodings.
    restart_below: float = field(0.1, BELOW_ONE)
    # A discriminator of patches (Isola et al. 2017, arXiv:1611.07004), by the hinge loss.
    adversarial: float = field(0.0, NOT_NEGATIVE)  # weight of its loss; 0: no discriminator
    adversarial_from: float = field(0.5, SHARE)  # share of the steps before it begins
    discriminator_width: int = field(64, POSITIVE)  # channels of its first layer
    discriminator_layers: int = field(3, POSITIVE)  # layers that halve the resolution
    discriminator_rate: float = field(1e-4, NOT_NEGATIVE)  # learning rate of Adam
    discriminator_betas: tuple[float, ...] = field((0.5, 0.9), BETAS)  # of Adam
    # A collapse of the codebook is logged where an evaluation uses less than this share of the
    # codes that its number of tokens could use.
    least_used: float = field(0.2, SHARE)
