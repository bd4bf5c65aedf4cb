"""The network, and how it and the tokenizer are trained, over which devices."""

import dataclasses
import math
import re

from gptv_jax.config.fields import (
    ABOVE_ZERO,
    BELOW_ONE,
    ENTRIES,
    FROM_ZERO,
    POSITIVE,
    SHARE,
    field,
    one_of,
)

AXIS = ("1 or more, or -1 to fill", lambda v: v >= 1 or v == -1)
BETAS = ("two numbers from 0, below 1", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v))
STEPS = ("the first and the last step as FIRST:LAST, such as 10:15", lambda v: _steps(v))
TWO_SHARES = (
    "two shares of the training, the first one no larger, or none",
    lambda v: not v or (len(v) == 2 and 0 <= v[0] <= v[1] <= 1),
)


def _steps(text: str) -> tuple[int, int] | None:
    """`(10, 15)` of "10:15"; None where the text is not of this form."""
    numbers = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    first, last = (int(n) for n in numbers.groups()) if numbers else (1, 0)
    return (first, last) if first <= last else None


@dataclasses.dataclass(frozen=True)
class Model:
    """The network; the defaults are iGPT-S (Chen et al. 2020)."""

    layers: int = field(24, POSITIVE)
    width: int = field(512, POSITIVE)
    heads: int = field(8, POSITIVE)
    mlp_ratio: int = field(4, POSITIVE)  # MLP width over width; see mlp_width
    # gelu: x * sigmoid(1.702 x) between two products. swiglu: silu(gate) * up (Shazeer 2020,
    # arXiv:2002.05202), with a width that keeps the number of weights and FLOPs.
    mlp: str = field("gelu", one_of("gelu", "swiglu"))
    learned_positions: bool = True  # a table of positions, added to the embeddings
    axial_positions: bool = False  # adds tables of rows and columns
    rotary: bool = False  # rotates queries and keys by rows and columns; see model/layers.py
    qk_norm: bool = False  # RMS norm, with a gain, of every head's queries and keys
    # Adds an embedding of the position of the token to predict, from a separate table; the other
    # position tables then embed the position of the input token.
    target_positions: bool = False
    # muP (Yang et al. 2022, arXiv:2203.03466): the width at which learning rates were tuned. At
    # another width with heads of the same size, initialisation and learning rates of the blocks'
    # matrices and the output heads are scaled. None: nothing is scaled.
    base_width: int | None = field(None, POSITIVE)
    # Learned tokens of finite scalar quantization: "levels" predicts the levels of a code one after
    # the other, in place of one softmax over all codes; see model/level_head.py.
    code_head: str = field("flat", one_of("flat", "levels"))
    start_per_variant: bool = False  # a start vector per augmentation variant (Jun et al. 2020)
    # Class-conditional: the number of classes. Each class has a start vector, and one more start
    # vector stands for no class. 0: the network is not conditioned on classes.
    class_tokens: int = field(0, FROM_ZERO)
    label_dropout: float = field(0.1, SHARE)  # share of the training images that are given no class
    dropout: float = field(0.0, BELOW_ONE)  # probability, on embeddings and each residual branch
    dtype: str = field("float32", one_of("float32", "bfloat16"))  # of compute; weights: float32
    # False: on a CPU a run with dtype=bfloat16 computes in float32 where that is faster
    # (stages/precision.py). `gptv_jax.load` computes in the dtype that the run has recorded.
    bfloat16_on_cpu: bool = False
    # True: lax.scan over the layers, whose compile time does not grow with depth. False: an
    # unrolled loop, which runs faster on a CPU. None: unrolled on a CPU, else scanned.
    scan_layers: bool | None = field(None, free=True)
    # What a position reads of its input token: the token's embedding (tokens); or the pixels that
    # the token stands for, through a linear map (pixels). With pixels the network sees more of an
    # image than its tokens keep. Such a network is for features: it draws no images.
    image_input: str = field("tokens", one_of("tokens", "pixels"))
    # What is predicted: each token from the tokens before it, or the masked tokens from all other
    # tokens.
    objective: str = field("autoregressive", one_of("autoregressive", "bert"))
    masked_share: float = field(0.15, SHARE)  # bert: share of the positions that are masked
    votes: int = field(5, POSITIVE)  # bert: number of masks that vote on an image's class
    # Random orders of the tokens in place of raster order (RAR, Yu et al. 2024, arXiv:2411.00776):
    # every training image has a random order up to the first share of the training; the fraction
    # of such images then falls linearly to none at the second share. (): always raster order.
    random_order: tuple[float, ...] = field((), TWO_SHARES)
    # The largest share of the input tokens that training hides; the targets stay. Each image or
    # clip draws a share between 0 and this one, so that the network also learns to read whole
    # images, as sampling does. Of clips the tokens before the last frame can be hidden: next-frame
    # prediction then learns features of objects and not only of what stayed (NExT-Vid, 2025,
    # arXiv:2512.21004).
    context_masking: float = field(0.0, SHARE)
    # The backward pass recomputes nothing, all but products with weights, or everything.
    remat: str = field("none", one_of("none", "dots", "full"), free=True)

    @property
    def mlp_width(self) -> int:
        """F; for swiglu a multiple of the largest power of two that is at most 1/64 of F."""
        width = self.mlp_ratio * self.width
        if self.mlp == "gelu":
            return width
        multiple = 2 ** max(math.floor(math.log2(2 * width / 3 / 64)), 0)
        return math.ceil(2 * width / (3 * multiple)) * multiple

    @property
    def relative_width(self) -> float:
        """Width divided by `base_width`."""
        return self.width / (self.base_width or self.width)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh's axes; at most one of them is -1 and takes what is left."""

    data: int = field(-1, AXIS, free=True)  # batch is split, weights are replicated
    fsdp: int = field(1, AXIS, free=True)  # batch and weights split, gathered layer by layer
    sequence: int = field(1, AXIS, free=True)  # positions split, for long sequences
    tensor: int = field(1, AXIS, free=True)  # heads and MLP width split


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Optax optimizer, learning-rate schedule, clipping and decay."""

    # muon updates the matrices of the blocks; AdamW updates all other parameters.
    name: str = field("adam", one_of("adam", "adamw", "nadamw", "muon"))
    learning_rate: float = field(3e-3, ABOVE_ZERO)  # peak, reached at the end of the warm-up
    # muon: the peak for the parameters that AdamW updates; None: learning_rate.
    rest_learning_rate: float | None = field(None, ABOVE_ZERO)
    beta1: float = field(0.9, BELOW_ONE)
    beta2: float = field(0.95, BELOW_ONE)
    weight_decay: float = field(0.0, FROM_ZERO)  # multiplied by the learning rate; matrices only
    clip_norm: float | None = field(None, ABOVE_ZERO)  # of the global gradient norm; None: no bound
    # After the warm-up; wsd (Hu et al. 2024, arXiv:2404.06395) stays at the peak, then falls
    # linearly.
    schedule: str = field("cosine", one_of("cosine", "constant", "wsd"))
    warmup_steps: int = field(0, FROM_ZERO)  # linear, up to the peak
    decay_share: float = field(0.2, SHARE)  # wsd: share of the steps, at the end, on which it falls
    final_fraction: float = field(0.0, SHARE)  # of the peak, at the end; not for constant


@dataclasses.dataclass(frozen=True)
class Train:
    """One training by gradient steps."""

    steps: int = field(1000, POSITIVE)
    batch_size: int = field(128, POSITIVE)  # images a step, over all devices
    # Gradient accumulation: the number of parts into which a batch is split, to use less memory.
    # Results do not change, except that dropout, BERT's masks, hidden tokens, label dropout and
    # random orders are drawn for each part and so have other values.
    microbatches: int = field(1, POSITIVE, free=True)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    # Decay of a moving average of the weights (at step t at most (1 + t) / (10 + t)), which
    # evaluations, later stages and users take in place of the weights; None: no average.
    ema: float | None = field(None, BELOW_ONE)
    eval_every: int = field(250, FROM_ZERO)  # steps; 0: at the end only
    checkpoint_every: int = field(250, POSITIVE, free=True)  # steps; the last step is always saved
    keep_checkpoints: int = field(2, POSITIVE, free=True)  # newest ones that stay on disk
    log_every: int = field(50, POSITIVE, free=True)  # steps

    @property
    def weights(self) -> str:
        """The part of the train state that evaluations and later stages take."""
        return "params" if self.ema is None else "ema"


@dataclasses.dataclass(frozen=True)
class Profile:
    """A trace of a few steps of pretraining, in the run folder's profile/."""

    steps: str | None = field(None, STEPS, free=True)  # traced, both ends included; None: no trace

    @property
    def window(self) -> tuple[int, int] | None:
        """The first and the last step."""
        return _steps(self.steps) if self.steps else None


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Training of the encoder and decoder, on images or clips whose values run from -1 to 1."""

    train: Train = dataclasses.field(default_factory=Train)
    # A tokenizer, as config.tokens.tokenizer takes one, whose weights the training begins with. A
    # tokenizer of images begins one of clips (autoencoder.frames above 1): the first frame of a
    # clip has the image's codes then, and each later step those of its last frame.
    init_from: str | None = None
    # Replaces data.train_transforms; (): data.train_transforms.
    train_transforms: tuple[str, ...] = field((), ENTRIES)
    # Weights of the losses between images and reconstructions; 0: this loss is not computed.
    l1: float = field(0.0, FROM_ZERO)  # mean absolute difference
    l2: float = field(1.0, FROM_ZERO)  # mean squared difference
    gradient: float = field(0.0, FROM_ZERO)  # L1 of the images' gradients, at three scales
    ssim: float = field(0.0, FROM_ZERO)  # 1 - SSIM
    lpips: float = field(0.0, FROM_ZERO)  # distance of VGG-16's features, from lpips_weights
    lpips_weights: str | None = field(None, free=True)  # a file: docs/tokenizer.md
    commitment: float = field(0.25, FROM_ZERO)  # vq: of encodings to their codes
    codebook_decay: float = field(0.99, BELOW_ONE)  # vq: decay of the averages that codes follow
    # vq: a code that gets less than this part of an even share of the encodings is dead, and is
    # replaced by one of the encodings.
    restart_below: float = field(0.1, BELOW_ONE)
    # A discriminator of patches (Isola et al. 2017, arXiv:1611.07004), by the hinge loss.
    adversarial: float = field(0.0, FROM_ZERO)  # weight of its loss; 0: no discriminator
    adversarial_from: float = field(0.5, SHARE)  # share of the steps before it begins
    discriminator_width: int = field(64, POSITIVE)  # channels of its first layer
    discriminator_layers: int = field(3, POSITIVE)  # layers that halve the resolution
    discriminator_rate: float = field(1e-4, FROM_ZERO)  # learning rate of Adam
    discriminator_betas: tuple[float, ...] = field((0.5, 0.9), BETAS)  # of Adam
    # A collapse of the codebook is logged where an evaluation uses less than this share of the
    # codes that its number of tokens could use.
    least_used: float = field(0.2, SHARE)
