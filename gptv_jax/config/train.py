"""How a network is trained, and over which devices."""

import dataclasses
import re

from gptv_jax.config.fields import (
    ABOVE_ZERO,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    field,
    one_of,
)

AXIS = ("1 or more, or -1 to fill", lambda v: v >= 1 or v == -1)
STEPS = ("the first and the last step as FIRST:LAST, such as 10:15", lambda v: _steps(v))


def _steps(text: str) -> tuple[int, int] | None:
    """`(10, 15)` of "10:15"; None where the text is not of this form."""
    numbers = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    first, last = (int(n) for n in numbers.groups()) if numbers else (1, 0)
    return (first, last) if first <= last else None


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
    weight_decay: float = field(0.0, NOT_NEGATIVE)  # multiplied by the learning rate; matrices only
    clip_norm: float | None = field(None, ABOVE_ZERO)  # of the global gradient norm; None: no bound
    # After the warm-up; wsd (Hu et al. 2024, arXiv:2404.06395) stays at the peak, then falls
    # linearly.
    schedule: str = field("cosine", one_of("cosine", "constant", "wsd"))
    warmup_steps: int = field(0, NOT_NEGATIVE)  # linear, up to the peak
    decay_share: float = field(0.2, SHARE)  # wsd: share of the steps, at the end, on which it falls
    final_fraction: float = field(0.0, SHARE)  # of the peak, at the end; not for constant


@dataclasses.dataclass(frozen=True)
class Train:
    """One training by gradient steps."""

    steps: int = field(1000, POSITIVE)
    batch_size: int = field(128, POSITIVE)  # images a step, over all devices
    # Gradient accumulation: the number of parts into which a batch is split, to use less memory.
    # The result is the same, except that dropout, BERT's masks, label dropout and random orders are
    # drawn for each part and so have other values.
    microbatches: int = field(1, POSITIVE, free=True)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    # Decay of a moving average of the weights (at step t at most (1 + t) / (10 + t)), which
    # evaluations, later stages and users take in place of the weights; None: no average.
    ema: float | None = field(None, BELOW_ONE)
    eval_every: int = field(250, NOT_NEGATIVE)  # steps; 0: at the end only
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
