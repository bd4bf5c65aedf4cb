"""What the stage `finetune` teaches the network: the task, and the settings of each task."""

import dataclasses

from gptv_jax.config import data
from gptv_jax.config.fields import ENTRIES, FROM_ZERO, POSITIVE, SHARE, field, one_of

WIDTHS = ("positive numbers of channels, or none", lambda v: all(width >= 1 for width in v))
THREE_SHARES = (
    "three shares, which add up to 1",
    lambda v: len(v) == 3 and all(0 <= share <= 1 for share in v) and abs(sum(v) - 1) < 1e-6,
)


@dataclasses.dataclass(frozen=True)
class Detect:
    """Objects as tokens: y0 x0 y1 x1 class of each (Pix2seq, Chen et al. 2022, arXiv:2109.10852).

    Where a field says nothing else, its default is the value of Pix2seq.
    """

    objects: int = field(100, POSITIVE)  # most objects of an image, real and noise ones together
    bins: int = field(1000, ("2 or more", lambda v: v >= 2))  # coordinates along each axis
    order: str = field("random", one_of("random", "position"))  # of the objects; position: by y, x
    # Noise objects fill the sequence up to `objects`: the class of a noise object is "noise", and
    # its coordinates have no loss. False: the token "noise" fills it, and ends decoding.
    noise: bool = True
    # Probability, of every image, that the noise objects stand among the real ones. 0: after them;
    # a network may then learn that an object is noise from its place in the sequence alone.
    noise_among: float = field(0.0, SHARE)
    # Shares of the noise objects that are a real box jittered, a real box shifted, a random box.
    # Pix2seq draws the number of jittered ones anew for every image; these are its means.
    noise_kinds: tuple[float, ...] = field((0.5, 0.25, 0.25), THREE_SHARES)
    # Probability that the network reads, in place of an object's class, a random class or "noise"
    # with even odds. 1: no object's class is read, so decoding cannot lean on it. Below 1, a random
    # class is read of a noise object, as decoding takes a class for every object.
    class_corruption: float = field(1.0, SHARE)
    # Standard deviation, in bins, of the Gaussian that is the target of a coordinate; 0: its bin.
    soft: float = field(0.0, FROM_ZERO)
    class_weight: float = field(1.0, FROM_ZERO)  # of the class's loss; a coordinate's is 1
    # Decoding: coordinates are drawn from the most likely ones that reach this probability; 0: the
    # most likely one. Classes are always the most likely real class.
    top_p: float = field(0.4, SHARE)
    # Sequences that are drawn of every view of an image; the boxes of all sequences vote, as one
    # sequence finds objects that another has missed. The view itself is read once.
    samples: int = field(1, POSITIVE)
    # Test images are also read after each of these transforms, such as "flip(1.0)", or several as
    # "flip(1.0)|flip_vertical(1.0)"; the boxes of all views vote. (): there is no vote.
    votes: tuple[str, ...] = field((), ENTRIES)
    most: int = field(100, POSITIVE)  # detections an image that count, the most likely ones
    # Instance masks: tokens of an object after its class, such as 16 (PaliGemma, arXiv:2407.07726);
    # 0: boxes alone. The tokens are the codes that an autoencoder gives the mask in the object's
    # box, resized to `mask_size` pixels a side. A code has dimensions of so many `mask_levels`, and
    # the product of the levels is the number of codes.
    masks: int = field(0, FROM_ZERO)
    mask_size: int = field(64, POSITIVE)
    mask_levels: tuple[int, ...] = field((8, 4, 4), data.LEVELS)
    mask_weight: float = field(1.0, FROM_ZERO)  # of a mask token's loss; a coordinate's is 1
    mask_steps: int = field(1000, POSITIVE)  # of the autoencoder's training
    masks_measured: int = field(2000, POSITIVE)  # training images whose masks it learns from
    # Validation images that evaluations during training read, the first ones; 0: all.
    validation_images: int = field(0, FROM_ZERO)


@dataclasses.dataclass(frozen=True)
class Segment:
    """A class for every pixel: read at once from the image's positions, or written as tokens."""

    read: bool = True  # a head on the positions of the image predicts the classes of their cells
    write: bool = True  # the label map is a part after the image, predicted token by token
    read_weight: float = field(1.0, FROM_ZERO)  # of the read classes' loss
    write_weight: float = field(1.0, FROM_ZERO)  # of the written tokens' loss
    # Layers whose features the head reads, 0 .. config.model.layers; (): the last alone.
    layers: tuple[int, ...] = field((), ("numbers from 0", lambda v: min(v, default=0) >= 0))
    # Side, in pixels, of the cells that are read; between them logits are interpolated.
    read_cell: int = field(1, POSITIVE)
    # Label tokens. cells: the most frequent class of a cell; patches: one of `codes` patches, which
    # k-modes finds in training maps; learned: codes of an autoencoder of label maps.
    labels: str = field("patches", one_of("cells", "patches", "learned"))
    cell: int = field(4, POSITIVE)  # side, in pixels, of the square that a label token stands for
    codes: int = field(512, ("2 or more", lambda v: v >= 2))  # of patches
    # learned: levels of each dimension of a code, channels at each resolution, the finest first (as
    # of config.tokens.autoencoder, where `cell` is `downsample`), and steps of 16 label maps.
    levels: tuple[int, ...] = field((8, 8, 8), data.LEVELS)
    widths: tuple[int, ...] = field((32,), data.WIDTHS)
    steps: int = field(500, POSITIVE)
    # Share of the label tokens in place of which training reads any token. Label maps repeat
    # themselves: a network that can copy the token before does not learn to look at the image.
    corruption: float = field(0.3, SHARE)
    # The weight of a pixel's loss is its class's frequency ** -balance. 0: all pixels have an equal
    # weight; 1: all classes have an equal total weight, as in median frequency balancing (Eigen &
    # Fergus 2015).
    balance: float = field(0.0, FROM_ZERO)
    # Training maps, drawn at random, of which patches, frequencies and the prior are made.
    measured: int = field(2000, POSITIVE)
    # Maps that are drawn of every test image, beside the most likely tokens; 0: there is no picture
    # of uncertainty.
    samples: int = field(0, FROM_ZERO)
    # Of clips: test videos, the first ones, all of whose frames are segmented after the training
    # (docs/tasks.md, Video); 0: none.
    videos: int = field(8, FROM_ZERO)
    # Validation images that evaluations during training read, the first ones; 0: all.
    validation_images: int = field(0, FROM_ZERO)


@dataclasses.dataclass(frozen=True)
class Task:
    """The task of fine-tuning, and how it reads an image."""

    name: str = "classify"  # one of tasks.TASKS
    # tokens: the image's tokens; pixels: a convolutional stem on the pixels as well, or alone where
    # config.tokens.kind is none.
    image_input: str = field("tokens", one_of("tokens", "pixels"))
    # Channels of the stem's convolutions, each of which halves height and width.
    stem: tuple[int, ...] = field((), WIDTHS)
    # All positions of the image see each other, and the image is not predicted. False: they see the
    # positions before them, as in pretraining, and are predicted as well.
    prefix: bool = True
    detect: Detect = dataclasses.field(default_factory=Detect)
    segment: Segment = dataclasses.field(default_factory=Segment)
