"""What is done with a pretrained network (probe, fine-tune, sample), and the whole run."""

import dataclasses
import math
import os

from gptv_jax.config.data import Data, Tokens
from gptv_jax.config.distill import Distill, Matching
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
from gptv_jax.config.tasks import Task
from gptv_jax.config.train import Mesh, Model, Profile, Tokenizer, Train

PLACE = (
    "an absolute path, or an address such as gs://bucket/path without any of *?[",
    lambda v: os.path.isabs(v) or v.startswith("~") or ("://" in v and not set("*?[") & set(v)),
)
POSITIVES = ("positive numbers, one or more", lambda v: v and all(0 < x < math.inf for x in v))


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
    # Transforms of this training; (): those of data.train_transforms.
    train_transforms: tuple[str, ...] = field((), ENTRIES)
    eval_every: int = field(1000, FROM_ZERO)  # steps; 0: at the end only
    checkpoint_every: int = field(1000, POSITIVE, free=True)  # steps
    log_every: int = field(50, POSITIVE, free=True)  # steps


@dataclasses.dataclass(frozen=True)
class Probe:
    """Linear probe: how well a linear classifier reads the class from frozen features."""

    # lbfgs: logistic regression on features held in memory; sgd: heads trained on augmented images.
    method: str = field("lbfgs", one_of("lbfgs", "sgd"))
    # What is read of a layer: its normed input n^l, as in the paper, or that input itself, h^l.
    features: str = field("normed", one_of("normed", "raw"))
    # Over positions: their mean; with sgd, a mean weighted by a learned query (attentive); of
    # clips, the means of every frame side by side (frames), which keep the motion.
    pooling: str = field("mean", one_of("mean", "attentive", "frames"))
    # Rows and columns of equal regions of an image, whose means stand side by side: 2 are quarters.
    regions: int = field(1, POSITIVE)
    # What a position sees: the positions before it, as in pretraining (causal); all positions of
    # the image or clip (whole); or of clips its whole frame and the frames before (frames).
    attention: str = field("causal", one_of("causal", "frames", "whole"))
    # Neighbouring layers read side by side, beside single ones; the best of these is in the middle.
    concatenate: int = field(1, ("an odd number, 1 or more", lambda v: v >= 1 and v % 2))
    # Every layer is first probed by ridge regression. How many, the best on validation, are probed
    # by `method` as well; None: all of them.
    refine: int | None = field(None, POSITIVE)
    # Strengths of the ridge to try, on standardised features; times the number of images.
    ridge: tuple[float, ...] = field((1e-4, 1e-3, 1e-2, 1e-1), POSITIVES)
    # Pretraining steps between ridge tables, each a pass over the images; 0: none.
    every: int = field(0, FROM_ZERO, free=True)
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
    # Transforms of this training; (): those of data.train_transforms.
    train_transforms: tuple[str, ...] = field((), ENTRIES)
    generative_coefficient: float = field(1.0, FROM_ZERO)  # weight of nats per token
    classification_coefficient: float = field(1.0, FROM_ZERO)  # of nats per image
    # Learning rate of a layer over that of the layer above it; 1: the same. Not used for the
    # network trained from scratch.
    layer_decay: float = field(1.0, ("above 0 up to 1", lambda v: 0 < v <= 1))
    # Evaluations without a better validation accuracy after which it stops; 0: never.
    patience: int = field(5, FROM_ZERO)
    standardize: bool = False  # centre and scale the head's input by its statistics at the start
    # What the class head reads: the mean over positions; or of clips the means of every frame side
    # by side (frames).
    pooling: str = field("mean", one_of("mean", "frames"))
    # What a position sees, as config.probe.attention. With frames and whole, tokens are not
    # predicted, so generative_coefficient must be 0.
    attention: str = field("causal", one_of("causal", "frames", "whole"))
    # Clips of each video that validation and test read, evenly spaced; their class probabilities
    # are averaged.
    clips: int = field(1, POSITIVE)
    # Trains the network from scratch as well, for comparison, which takes as long again.
    scratch: bool = True
    distill: Matching = dataclasses.field(default_factory=Matching)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How tokens are drawn from the network's logits.

    temperature: divides the logits; 0 takes the most likely token.
    top_k: draw among the k most likely tokens; None: among all tokens.
    top_p: draw among the fewest most likely tokens whose probabilities reach p; None: among all.
    guidance: scale of classifier-free guidance; 1 draws from the class's own distribution, more
      moves further away from the distribution without a class. Needs labels.
    guidance_schedule: "constant", or "cosine", which rises from 1 at the first token to `guidance`
      at the last (RAR, Yu et al. 2024, arXiv:2411.00776).
    guidance_power: of the schedule "cosine"; the higher, the later the scale rises.
    draft_tokens: proposed by a draft for each pass of the network, at most as many as are drawn;
      not used without a draft.
    """

    temperature: float = field(1.0, FROM_ZERO)
    top_k: int | None = field(None, POSITIVE)
    top_p: float | None = field(None, ("above 0 up to 1", lambda v: 0 < v <= 1))
    guidance: float = field(1.0, FROM_ZERO)
    guidance_schedule: str = field("constant", one_of("constant", "cosine"))
    guidance_power: float = field(1.0, ABOVE_ZERO)
    draft_tokens: int = field(4, POSITIVE)


@dataclasses.dataclass(frozen=True)
class Sample(Drawing):
    """Pictures made at the end of a run, drawn as the fields of `Drawing` say."""

    # Speculative sampling: a smaller network of equal tokens that proposes tokens, a run folder or
    # other weights as `init_from` takes them; None: every token is drawn by the network itself.
    draft: str | None = None
    # New images; of a class-conditional network a row for each class, or for some of the classes.
    count: int = field(64, POSITIVE)
    # Test images of which the upper part is kept and the rest drawn, then of which the middle is
    # drawn; the surprise of their pixels is shown too.
    completions: int = field(16, FROM_ZERO)
    keep: float = field(0.5, SHARE)  # share of the rows, or frames, that a completion keeps
    # Test clips whose first frames are given, the share `keep`, and whose other frames are drawn,
    # the most likely token each time, and compared with the true frames; see quality/clips.py.
    continuations: int = field(64, FROM_ZERO)


@dataclasses.dataclass(frozen=True)
class Generate:
    """Many new images, drawn as `sample` says, and how close they come to real ones."""

    # Images; of a class-conditional network the classes by turns. The Inception Score splits them
    # into ten.
    count: int = field(1000, ("10 or more", lambda v: v >= 10), free=True)
    # Images drawn at a time; another size draws other ones.
    batch_size: int = field(100, POSITIVE, free=True)
    # Share of the rows, or of a clip's frames, that is given, of the test images in order; the rest
    # is drawn. 0: nothing is given.
    keep: float = field(0.0, SHARE)
    # What images are compared by (docs/generation_quality.md): a run folder, a file of weights, or
    # "pixels", the same as None: averages over 8 x 8 areas, which see colour and layout alone.
    features: str | None = field(None, free=True)
    # Where the features are I3D's: how frames become 224 x 224 pixels. tensorflow: bilinear as in
    # TensorFlow 1, as published; tensorflow_64: to 64 x 64 first, as for BAIR's robots; pytorch:
    # bilinear between centres of pixels, as in StyleGAN-V.
    i3d_resize: str = field(
        "tensorflow", one_of("tensorflow", "tensorflow_64", "pytorch"), free=True
    )
    # Real images to compare with: a split of the data, or statistics that were saved of them.
    split: str = field("train", free=True)
    reference: str | None = field(None, free=True)


# What `data.corruptions` does to test images.
CORRUPTIONS = ("noise", "blur", "jpeg", "brightness", "contrast", "shift", "occlusion")


@dataclasses.dataclass(frozen=True)
class Robustness:
    """What corruptions and changed tokens do to the fine-tuned task; see docs/robustness.md.

    Only --stages=robustness runs this.
    """

    # Test images, the first ones, that are read under every corruption; None: all.
    images: int | None = field(1000, POSITIVE, free=True)
    corruptions: tuple[str, ...] = field(
        CORRUPTIONS,
        (
            f"one or more of {', '.join(CORRUPTIONS)}, each once",
            lambda v: v and set(v) <= {*CORRUPTIONS} and len(set(v)) == len(v),
        ),
        free=True,
    )
    # Fine-tuned weights that are measured beside this run's, such as the teacher's: a run folder,
    # or weights as `init_from` takes them.
    compare: str | None = field(None, free=True)
    # Of classification, the attack: tokens of an image that it changes at most (0: no attack),
    # passes of the network over an image that it takes at most, and test images, the first ones.
    attack_tokens: int = field(4, FROM_ZERO, free=True)
    attack_calls: int = field(128, POSITIVE, free=True)
    attack_images: int = field(200, POSITIVE, free=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    # Of initialisation, data order, augmentation, dropout and sampling.
    seed: int = field(0, FROM_ZERO)
    # Pretrained weights in place of this run's own: a run folder, hf://user/model on the Hugging
    # Face Hub, or what docs/weights.md lists.
    init_from: str | None = None
    # Where checkpoints are, of this run alone; None: checkpoints/ in the run folder.
    checkpoint_dir: str | None = field(None, PLACE, free=True)
    # Project of Weights & Biases that gets a copy of the log; pip install wandb.
    wandb: str | None = field(None, free=True)
    data: Data = dataclasses.field(default_factory=Data)
    tokens: Tokens = dataclasses.field(default_factory=Tokens)
    model: Model = dataclasses.field(default_factory=Model)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    tokenizer: Tokenizer = dataclasses.field(default_factory=Tokenizer)
    train: Train = dataclasses.field(default_factory=Train)
    distill: Distill = dataclasses.field(default_factory=Distill)
    probe: Probe = dataclasses.field(default_factory=Probe)
    task: Task = dataclasses.field(default_factory=Task)
    finetune: Finetune = dataclasses.field(default_factory=Finetune)
    sample: Sample = dataclasses.field(default_factory=Sample)
    generate: Generate = dataclasses.field(default_factory=Generate)
    robustness: Robustness = dataclasses.field(default_factory=Robustness)
    profile: Profile = dataclasses.field(default_factory=Profile)

    @property
    def trains_tokenizer(self) -> bool:
        """Whether this run learns its tokens: no run, weights, token cache or teacher has them."""
        given = self.tokens.tokenizer or self.init_from or self.distill.teacher
        return self.tokens.kind == "learned" and not given and self.data.name != "tokens"

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns of an image's positions: its tokens, or its pixels after the stem.

        Of clips: steps in time, which are frames where a token stands for one; rows and columns.
        """
        cell, frames = self.tokens.cell, self.data.frames
        if self.tokens.kind == "none":
            cell = (1, *(2 ** len(self.task.stem),) * 2)
        pixels = (max(frames, 1), *self.data.size)
        # Only the number of frames may be no multiple: the first frame can have tokens of its own.
        grid = tuple(-(-n // side) for n, side in zip(pixels, cell, strict=True))
        return grid if frames else grid[1:]
