"""Where images come from, and how they become tokens."""

import dataclasses

from gptv_jax.config.autoencoder import Autoencoder
from gptv_jax.config.fields import NOT_NEGATIVE, POSITIVE, SHARE, field, flatten, one_of


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from and what happens to them before they become tokens."""

    name: str = "digits"  # one of data.sources.SETS, or the name of a TFDS set
    # TFDS: the folder of all prepared sets (data_dir), or of this set; None: TFDS's default.
    dir: str | None = field(None, free=True)
    # folder: the folder of images; arrays: an .npz file; tokens: a folder made by gptv_jax.prepare.
    path: str | None = field(None, free=True)
    # Split expressions as in TFDS: "train[:96%]", "train[5000:]", "train+test".
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    labels: bool = True  # False: ignores the labels; there is no probe and no fine-tuning
    image_size: int = field(8, POSITIVE)  # pixels, height and width, after the transforms
    # Transforms in training and in evaluation, in order; see data.transforms.TRANSFORMS.
    train_transforms: tuple[str, ...] = ()
    eval_transforms: tuple[str, ...] = ()
    # An image that cannot be read is replaced by another image (skip), or ends the run (fail).
    damaged: str = field("skip", one_of("skip", "fail"))
    max_damaged: float = field(0.05, SHARE)  # share of unreadable images above which the run stops
    workers: int = field(0, NOT_NEGATIVE, free=True)  # Grain's processes; 0: threads in this one


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How pixels become tokens."""

    kind: str = field("grey", one_of("grey", "palette", "learned"))  # see tokens.CODECS
    # grey: number of levels, which is the vocabulary; lossless where the data fit.
    levels: int = field(17, ("2 to 256", lambda v: 2 <= v <= 256))
    # palette: number of colours, which is the vocabulary.
    colors: int = field(512, ("2 to 65536", lambda v: 2 <= v <= 65536))
    # palette: iGPT's kmeans_centers.npy or a file of gptv_jax.prepare; None: the palette of the
    # token cache or of init_from, or else k-means over training pixels, kept in the run folder.
    palette: str | None = field(None, free=True)
    # learned: a run folder whose tokenizer has finished, or a file of Tokenizer.save; None: the
    # tokenizer of the token cache or of init_from, or else the stage `tokenizer` trains one.
    tokenizer: str | None = field(None, free=True)
    autoencoder: Autoencoder = dataclasses.field(default_factory=Autoencoder)  # learned

    @property
    def vocabulary(self) -> int:
        """Number of different tokens, V."""
        match self.kind:
            case "grey":
                return self.levels
            case "palette":
                return self.colors
            case "learned":
                return self.autoencoder.vocabulary

    def pairs(self, other: "Tokens") -> list[tuple[str, object, object]]:
        """Names of the fields that tokens depend on, definitions apart, with both values."""
        own = {"grey": "tokens.levels", "palette": "tokens.colors"}.get(self.kind)
        own = own or "tokens.autoencoder."
        now, there = flatten(self, "tokens."), flatten(other, "tokens.")
        return [(n, now[n], there[n]) for n in now if n == "tokens.kind" or n.startswith(own)]

    def grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of the tokens of an image of `image_size` x `image_size` pixels."""
        side = image_size // (self.autoencoder.downsample if self.kind == "learned" else 1)
        return (side, side)
