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
    # What an MLP does between its products: x * sigmoid(1.702 x), or silu(gate) * up, of two
    # products (Shazeer 2020, arXiv:2002.05202), narrower by as much as keeps weights and FLOPs.
    mlp: str = field("gelu", one_of("gelu", "swiglu"))
    learned_positions: bool = True  # a table of positions, added to the embeddings
    axial_positions: bool = False  # adds tables of rows and columns
    rotary: bool = False  # turns queries and keys by their rows and columns: see model.rotary
    qk_norm: bool = False  # RMS norm, with a gain, of every head's queries and keys
    # Adds to each input an embedding, of another table, of the place of the token to predict; the
    # other tables are then of the place of the token that the input holds.
    target_positions: bool = False
    # muP (Yang et al. 2022, arXiv:2203.03466): the width that learning rates are tuned at; at
    # another one, of heads of the same size, the blocks' matrices and the heads are initialised
    # and trained so that they carry over. None: they are taken as they are.
    base_width: int | None = field(None, POSITIVE)
    start_per_variant: bool = False  # a start vector per augmentation variant (Jun et al. 2020)
    # Class-conditional: how many classes there are, each of which begins its images with a token of
    # its own in place of the start vector; one more says that the class is not told. 0: none is.
    class_tokens: int = field(0, NOT_NEGATIVE)
    label_dropout: float = field(0.1, SHARE)  # of training images, whose class is not told
    dropout: float = field(0.0, BELOW_ONE)  # probability, on embeddings and each residual branch
    dtype: str = field("float32", one_of("float32", "bfloat16"))  # of compute; weights: float32
    # Layers are walked by lax.scan, whose compile time does not grow with depth, or unrolled, which
    # runs faster on a CPU; None: as the platform likes it, unrolled on a CPU, else scanned.
    scan_layers: bool | None = field(None, free=True)
    # What is predicted: each token from those before it, or hidden ones from all others.
    objective: str = field("autoregressive", one_of("autoregressive", "bert"))
    masked_share: float = field(0.15, SHARE)  # bert: of the positions, whose content is hidden
    votes: int = field(5, POSITIVE)  # bert: masks an image is evaluated under; the majority counts
    # Random orders in place of raster, which they become (RAR, Yu et al. 2024, arXiv:2411.00776):
    # every training image has its own up to the first share of the training, then ever fewer of
    # them, in a line down to none at the second. (): raster throughout.
    random_order: tuple[float, ...] = field((), TWO_SHARES)
    # What the backward pass computes again: nothing, all but products with weights, or everything.
    remat: str = field("none", one_of("none", "dots", "full"), free=True)

    @property
    def mlp_width(self) -> int:
        """F; of swiglu up to a multiple of the largest power of two that is 1/64 of it at most."""
        width = self.mlp_ratio * self.width
        if self.mlp == "gelu":
            return width
        multiple = 2 ** max(math.floor(math.log2(2 * width / 3 / 64)), 0)
        return math.ceil(2 * width / (3 * multiple)) * multiple

    @property
    def relative_width(self) -> float:
        """Width over the one that learning rates are tuned at."""
        return self.width / (self.base_width or self.width)
