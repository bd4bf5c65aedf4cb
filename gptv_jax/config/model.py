"""The network."""

import dataclasses
import math

from gptv_jax.config.fields import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE, field, one_of

TWO_SHARES = (
    "two shares of the training, the first one no larger, or none",
    lambda v: not v or (len(v) == 2 and 0 <= v[0] <= v[1] <= 1),
)


@dataclasses.dataclass(frozen=True)
class Model:
    """The network; the defaults are iGPT-S (Chen et al. 2020)."""

    layers: int = field(24, POSITIVE)
    width: int = field(512, POSITIVE)
    heads: int = field(8, POSITIVE)
    mlp_ratio: int = field(4, POSITIVE)  # MLP width over width; of swiglu 2/3 of it, see mlp_width
    # gelu: x * sigmoid(1.702 x) between two products. swiglu: silu(gate) * up (Shazeer 2020,
    # arXiv:2002.05202), with a width that keeps the number of weights and FLOPs.
    mlp: str = field("gelu", one_of("gelu", "swiglu"))
    learned_positions: bool = True  # a table of positions, added to the embeddings
    axial_positions: bool = False  # adds tables of rows and columns
    rotary: bool = False  # rotates queries and keys by rows and columns; see model/layers.py
    qk_norm: bool = False  # RMS norm, with a gain, of every head's queries and keys
    # Adds an embedding of the position of the token to predict, from a table of its own; the other
    # position tables then embed the position of the input token.
    target_positions: bool = False
    # muP (Yang et al. 2022, arXiv:2203.03466): the width at which learning rates were tuned. At
    # another width with heads of the same size, initialisation and learning rates of the blocks'
    # matrices and the output heads are scaled. None: nothing is scaled.
    base_width: int | None = field(None, POSITIVE)
    start_per_variant: bool = False  # a start vector per augmentation variant (Jun et al. 2020)
    # Class-conditional: the number of classes. Each class has a start vector, and one more start
    # vector stands for no class. 0: the network is not conditioned on classes.
    class_tokens: int = field(0, NOT_NEGATIVE)
    label_dropout: float = field(0.1, SHARE)  # share of the training images that are given no class
    dropout: float = field(0.0, BELOW_ONE)  # probability, on embeddings and each residual branch
    dtype: str = field("float32", one_of("float32", "bfloat16"))  # of compute; weights: float32
    # True: lax.scan over the layers, whose compile time does not grow with depth. False: an
    # unrolled loop, which runs faster on a CPU. None: unrolled on a CPU, else scanned.
    scan_layers: bool | None = field(None, free=True)
    # Predicted are: each token from the tokens before it, or masked tokens from all other tokens.
    objective: str = field("autoregressive", one_of("autoregressive", "bert"))
    masked_share: float = field(0.15, SHARE)  # bert: share of the positions that are masked
    votes: int = field(5, POSITIVE)  # bert: number of masks that vote on an image's class
    # Random orders of the tokens in place of raster order (RAR, Yu et al. 2024, arXiv:2411.00776):
    # every training image has a random order up to the first share of the training; the fraction
    # of such images then falls linearly to none at the second share. (): always raster order.
    random_order: tuple[float, ...] = field((), TWO_SHARES)
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
