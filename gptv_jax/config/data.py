"""Where images come from, and what a token of them is."""

import dataclasses

from gptv_jax.config.autoencoder import Autoencoder
from gptv_jax.config.fields import NOT_NEGATIVE, POSITIVE, SHARE, field, flatten, one_of


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

    kind: str = field("grey", one_of("grey", "palette", "learned"))  # see tokens.CODECS
    # grey: number of levels, which is the vocabulary; lossless where the data fit.
    levels: int = field(17, ("2 to 256", lambda v: 2 <= v <= 256))
    # palette: number of colours, which is the vocabulary.
    colors: int = field(512, ("2 to 65536", lambda v: 2 <= v <= 65536))
    # palette: iGPT's kmeans_centers.npy or a file of gptv_jax.prepare; None: the token cache's or
    # that of init_from, or else k-means over training pixels, kept in the run folder.
    palette: str | None = field(None, free=True)
    # learned: a run folder whose tokenizer has finished, or a file of Tokenizer.save; None: the
    # token cache's or that of init_from, or else this run's own stage `tokenizer` trains it.
    tokenizer: str | None = field(None, free=True)
    autoencoder: Autoencoder = dataclasses.field(default_factory=Autoencoder)  # learned

    @property
    def vocabulary(self) -> int:
        """V."""
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
        """Rows and columns of the tokens of an image of so many pixels, height and width."""
        side = image_size // (self.autoencoder.downsample if self.kind == "learned" else 1)
        return (side, side)
