"""Every setting of a run, declared once: its name, type, unit and meaning.

A file in `configs/` starts from `default()` (an `ml_collections.ConfigDict`, so that any field can
be overridden on the command line as `--config.a.b=value`), and `resolve` turns the result into the
frozen, checked `Config` that the rest of the program reads.
"""

import dataclasses
import math
import re

import ml_collections

from gptv_jax import consistency, fields
from gptv_jax.errors import InputError
from gptv_jax.fields import ABOVE_ZERO, BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE, field, one_of

POSITIVES = (
    "positive numbers, one or more",
    lambda v: v and all(0 < number < math.inf for number in v),
)
STEPS = ("the first and the last step as FIRST:LAST, such as 10:15", lambda v: _steps(v))
PLACE = (
    "an absolute path or an address such as gs://bucket/path",
    lambda v: v.startswith("/") or "://" in v,
)
AXIS = ("1 or more, or -1 to fill", lambda v: v >= 1 or v == -1)


def _steps(text: str) -> tuple[int, int] | None:
    """`(10, 15)` of "10:15"; None where the text is not of this form."""
    numbers = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    first, last = (int(n) for n in numbers.groups()) if numbers else (1, 0)
    return (first, last) if first <= last else None


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh's axes; at most one of them is -1 and takes what is left."""

    data: int = field(-1, AXIS, free=True)  # batch split, weights replicated
    fsdp: int = field(1, AXIS, free=True)  # batch and weights split, gathered layer by layer
    sequence: int = field(1, AXIS, free=True)  # positions split, for long sequences
    tensor: int = field(1, AXIS, free=True)  # heads and MLP width split


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from and what happens to them before they become tokens."""

    name: str = "digits"  # one of data.sources.SETS, or the name of a TFDS set
    # TFDS: the folder of all prepared sets (its data_dir), or that of this one; None: TFDS's own.
    dir: str | None = field(None, free=True)
    # folder: the folder of images; arrays: an .npz file; tokens: a folder made by gptv_jax.prepare.
    path: str | None = field(None, free=True)
    # Split expressions as in TFDS: "train[:96%]", "train[5000:]", "train+test".
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    labels: bool = True  # False: classes are left alone, and with them the probe and fine-tuning
    image_size: int = field(8, POSITIVE)  # pixels, height and width, after the transforms
    # What happens to an image, in order, in training and elsewhere: see data.transforms.TRANSFORMS.
    train_transforms: tuple[str, ...] = ()
    eval_transforms: tuple[str, ...] = ()
    # What an image that cannot be read leads to: another one in its place, or the end of the run.
    damaged: str = field("skip", one_of("skip", "fail"))
    max_damaged: float = field(0.05, SHARE)  # share of such images above which the run stops
    workers: int = field(0, NOT_NEGATIVE, free=True)  # Grain's processes; 0: threads in this one


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How pixels become tokens."""

    name: str = "grey"  # one of tokens.CODECS
    # grey: number of levels, which is the vocabulary; lossless where the data fit.
    levels: int = field(17, ("2 to 256", lambda v: 2 <= v <= 256))
    # palette: number of colours, which is the vocabulary.
    colors: int = field(512, ("2 to 65536", lambda v: 2 <= v <= 65536))
    # palette: iGPT's kmeans_centers.npy or a file of gptv_jax.prepare; None: the token cache's or
    # that of init_from, or else k-means over training pixels, kept in the run folder.
    palette: str | None = field(None, free=True)


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
    # Adds to each input an embedding, of another table, of the token above the one to predict.
    above_embedding: bool = False
    # muP (Yang et al. 2022, arXiv:2203.03466): the width that learning rates are tuned at; at
    # another one, of heads of the same size, the blocks' matrices and the heads are initialised
    # and trained so that they carry over. None: they are taken as they are.
    base_width: int | None = field(None, POSITIVE)
    start_per_variant: bool = False  # a start vector per augmentation variant (Jun et al. 2020)
    dropout: float = field(0.0, BELOW_ONE)  # probability, on embeddings and each residual branch
    dtype: str = field("float32", one_of("float32", "bfloat16"))  # of compute; weights: float32
    # Layers are walked by lax.scan, whose compile time does not grow with depth, or unrolled, which
    # runs faster on a CPU; None: as the platform likes it, unrolled on a CPU, else scanned.
    scan_layers: bool | None = field(None, free=True)
    # What is predicted: each token from those before it, or hidden ones from all others.
    objective: str = field("autoregressive", one_of("autoregressive", "bert"))
    masked_share: float = field(0.15, SHARE)  # bert: of the positions, whose content is hidden
    votes: int = field(5, POSITIVE)  # bert: masks an image is evaluated under; the majority counts
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


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Optax optimizer, learning-rate schedule, clipping and decay."""

    # muon is for the matrices of the blocks; AdamW takes the rest.
    name: str = field("adam", one_of("adam", "adamw", "nadamw", "muon"))
    learning_rate: float = field(3e-3, ABOVE_ZERO)  # peak, reached at the end of the warm-up
    # muon: the peak of AdamW's share; None: the same as learning_rate.
    rest_learning_rate: float | None = field(None, ABOVE_ZERO)
    beta1: float = field(0.9, BELOW_ONE)
    beta2: float = field(0.95, BELOW_ONE)
    weight_decay: float = field(0.0, NOT_NEGATIVE)  # times the learning rate; matrices only
    clip_norm: float | None = field(None, ABOVE_ZERO)  # of all gradients together; None: no bound
    # After the warm-up; wsd (Hu et al. 2024, arXiv:2404.06395) stays at the peak, then falls to the
    # end in a line.
    schedule: str = field("cosine", one_of("cosine", "constant", "wsd"))
    warmup_steps: int = field(0, NOT_NEGATIVE)  # linear, up to the peak
    decay_share: float = field(0.2, SHARE)  # wsd: of all steps, those at the end on which it falls
    final_fraction: float = field(0.0, SHARE)  # of the peak, after the last step; not of constant


@dataclasses.dataclass(frozen=True)
class Train:
    """One training by gradient steps."""

    steps: int = field(1000, POSITIVE)
    batch_size: int = field(128, POSITIVE)  # images a step, over all devices
    # Gradient accumulation: the parts that a batch is worked through in, so that fewer devices hold
    # it. The same result, but that dropout and what bert hides are drawn part by part: others, and
    # as good.
    microbatches: int = field(1, POSITIVE, free=True)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    # Decay of a moving average of the weights, at step t (1 + t) / (10 + t) if that is less, which
    # evaluations, later stages and users take in their place; None: no average.
    ema: float | None = field(None, BELOW_ONE)
    eval_every: int = field(250, NOT_NEGATIVE)  # steps; 0: at the end only
    checkpoint_every: int = field(250, POSITIVE, free=True)  # steps; the last step is always saved
    keep_checkpoints: int = field(2, POSITIVE, free=True)  # newest ones that stay on disk
    log_every: int = field(50, POSITIVE, free=True)  # steps

    @property
    def weights(self) -> str:
        """The part of a train state that all but the next step takes."""
        return "params" if self.ema is None else "ema"


@dataclasses.dataclass(frozen=True)
class ProbeSgd:
    """Training of the probe's heads by SGD, on augmented images; each head keeps its last step."""

    steps: int = field(10_000, POSITIVE)
    batch_size: int = field(128, POSITIVE)  # images a step, over all devices
    # Peaks to try, all in one training; each falls to 0 along a cosine.
    learning_rates: tuple[float, ...] = field((30.0, 10.0, 3.0, 1.0, 0.3), POSITIVES)
    momentum: float = field(0.9, BELOW_ONE)
    # Centres and scales the features by the statistics of training images as they are.
    standardize: bool = False
    # In place of data.train_transforms; (): the same ones.
    train_transforms: tuple[str, ...] = ()
    eval_every: int = field(1000, NOT_NEGATIVE)  # steps; 0: at the end only
    checkpoint_every: int = field(1000, POSITIVE, free=True)  # steps
    log_every: int = field(50, POSITIVE, free=True)  # steps


@dataclasses.dataclass(frozen=True)
class Probe:
    """Linear probe: how well a linear classifier reads the class from frozen features."""

    # lbfgs: logistic regression on features held in memory; sgd: heads trained on augmented images.
    method: str = field("lbfgs", one_of("lbfgs", "sgd"))
    # What is read of a layer: its normed input n^l, as in the paper, or that input itself, h^l.
    features: str = field("normed", one_of("normed", "raw"))
    # Over positions: their mean or, with sgd, a mean weighted by a learned query.
    pooling: str = field("mean", one_of("mean", "attentive"))
    # Neighbouring layers read side by side, beside single ones; the best of these is in the middle.
    concatenate: int = field(1, ("an odd number, 1 or more", lambda v: v >= 1 and v % 2))
    # Every layer is first probed by ridge regression. How many, the best on validation, are probed
    # by `method` as well; None: all of them.
    refine: int | None = field(None, POSITIVE)
    # Strengths of the ridge to try, on standardised features; times the number of images.
    ridge: tuple[float, ...] = field((1e-4, 1e-3, 1e-2, 1e-1), POSITIVES)
    # Pretraining steps between ridge tables, each a pass over the images; 0: none.
    every: int = field(0, NOT_NEGATIVE, free=True)
    # Training images that regressions are fitted to, the first ones; None: all of them.
    train_images: int | None = field(None, POSITIVE)
    batch_size: int = field(128, POSITIVE, free=True)  # images a forward pass
    # lbfgs: inverse regularisation strengths to try.
    c: tuple[float, ...] = field((0.01, 0.1, 1.0, 10.0), POSITIVES)
    max_iterations: int = field(1000, POSITIVE)  # of L-BFGS
    # lbfgs: training images of each class that the best layer is probed with as well, and how often
    # such a subset is drawn.
    labels_per_class: tuple[int, ...] = field((), ("1 or more", lambda v: all(k >= 1 for k in v)))
    draws: int = field(5, POSITIVE)
    sgd: ProbeSgd = dataclasses.field(default_factory=ProbeSgd)


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Joint generative and classification training from the pretrained weights."""

    train: Train = dataclasses.field(default_factory=Train)
    # In place of data.train_transforms; (): the same ones.
    train_transforms: tuple[str, ...] = ()
    generative_coefficient: float = field(1.0, NOT_NEGATIVE)  # weight of nats per token
    classification_coefficient: float = field(1.0, NOT_NEGATIVE)  # of nats per image
    # Learning rate of a layer over that of the one above it; 1: the same. The pretrained network's
    # alone: trained from scratch, it has nothing to keep.
    layer_decay: float = field(1.0, ("above 0 up to 1", lambda v: 0 < v <= 1))
    # Evaluations without a better validation accuracy after which it stops; 0: never.
    patience: int = field(5, NOT_NEGATIVE)
    standardize: bool = False  # centre and scale the head's input by its statistics at the start


@dataclasses.dataclass(frozen=True)
class Sample:
    """Pictures made at the end of a run."""

    count: int = field(64, POSITIVE)  # unconditional samples
    # Test images whose upper part is kept and whose rest is drawn.
    completions: int = field(16, NOT_NEGATIVE)
    keep: float = field(0.5, SHARE)  # share of rows kept in a completion
    temperature: float = field(1.0, NOT_NEGATIVE)  # 0: the most likely token
    top_k: int | None = field(None, POSITIVE)  # draw among the k most likely tokens; None: all
    # Draw among the fewest most likely tokens that reach this probability; None: all.
    top_p: float | None = field(None, ("above 0 up to 1", lambda v: 0 < v <= 1))


@dataclasses.dataclass(frozen=True)
class Profile:
    """A trace of a few steps of pretraining, in the run folder's profile/."""

    steps: str | None = field(None, STEPS, free=True)  # traced, both ends included; None: no trace

    @property
    def window(self) -> tuple[int, int] | None:
        """The first and the last step."""
        return _steps(self.steps) if self.steps else None


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    # Of initialisation, data order, augmentation, dropout and sampling.
    seed: int = field(0, NOT_NEGATIVE)
    # Pretrained weights in place of this run's own: a run folder, or what docs/weights.md lists.
    init_from: str | None = None
    # Where checkpoints are, of this run alone; None: checkpoints/ in the run folder.
    checkpoint_dir: str | None = field(None, PLACE, free=True)
    data: Data = dataclasses.field(default_factory=Data)
    tokens: Tokens = dataclasses.field(default_factory=Tokens)
    model: Model = dataclasses.field(default_factory=Model)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    train: Train = dataclasses.field(default_factory=Train)
    probe: Probe = dataclasses.field(default_factory=Probe)
    finetune: Finetune = dataclasses.field(default_factory=Finetune)
    sample: Sample = dataclasses.field(default_factory=Sample)
    profile: Profile = dataclasses.field(default_factory=Profile)


def default() -> ml_collections.ConfigDict:
    """The defaults as a locked ConfigDict, for a file in `configs/` to change."""
    return fields.to_dict(Config())


def choose(argument: str, choices: dict):
    """What a config file's own argument, as in `--config=FILE:ARGUMENT`, stands for.

    Raises:
      InputError: it is none of the choices.
    """
    if argument not in choices:
        raise InputError(f"its argument is {argument!r}; it takes one of {', '.join(choices)}.")
    return choices[argument]


def resolve(settings: ml_collections.ConfigDict | dict) -> Config:
    """Typed, frozen and checked `Config`.

    Raises:
      InputError: an unknown or missing field, a wrong type, or a value that is not accepted; the
        message names the field, its value and what would be accepted.
    """
    config = fields.from_dict(Config, settings, "config")
    consistency.check(config)
    return config
