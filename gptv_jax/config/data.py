"""Where images come from, and how they become tokens."""

import dataclasses
import math

from gptv_jax.config.fields import ENTRIES, FROM_ZERO, POSITIVE, SHARE, field, flatten, one_of

LEVELS = ("2 or more, once or more", lambda v: v and all(levels >= 2 for levels in v))
MOST_CODES = 2**16  # token caches keep two bytes a token
CODES = (f"2 to {MOST_CODES}", lambda v: 2 <= v <= MOST_CODES)
ImageSize = int | tuple[int, ...]  # pixels of a square's side, or height and width
PIXELS = (
    "one number of pixels, 1 or more, or height and width, such as 48,64",
    lambda v: v >= 1 if isinstance(v, int) else len(v) == 2 and min(v) >= 1,
)
PATCH = (
    "nothing, or 2 or 3 numbers, 1 or more",
    lambda v: len(v) in (0, 2, 3) and all(side >= 1 for side in v),
)
WIDTHS = ("1 or more, once or more", lambda v: v and all(width >= 1 for width in v))


def height_and_width(size: ImageSize | list[int]) -> tuple[int, int]:
    """Height and width of images of `size` pixels; a list is a pair from a JSON file."""
    return (size, size) if isinstance(size, int) else tuple(size)


def image_size(height: int, width: int) -> ImageSize:
    """Height and width as fields and files keep them: one number where the image is a square."""
    return height if height == width else (height, width)


FORMATS = (
    "names of Pillow's formats in capitals, such as ('JPEG', 'PNG'), or () for all",
    lambda v: all(name.isupper() for name in v),
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an image file may be; `data.limits` checks the header before any pixel is decoded."""

    # Pillow's names of formats, such as JPEG, PNG; (): all formats of pixels that Pillow reads.
    formats: tuple[str, ...] = field((), FORMATS)
    max_bytes: int = field(2**29, POSITIVE)  # of a file
    max_pixels: int = field(2**26, POSITIVE)  # height times width
    max_side: int = field(2**16, POSITIVE)  # pixels of the longer side
    min_side: int = field(2, POSITIVE)  # pixels of the shorter side; arrays may be smaller
    # Longer side over shorter side; a resize would enlarge a longer image enormously.
    max_ratio: float = field(32.0, ("1 or more", lambda v: v >= 1))
    max_channels: int = field(4, POSITIVE)  # transparency is one
    max_bits: int = field(32, POSITIVE)  # of a channel
    max_frames: int = field(50_000, POSITIVE)  # of a clip, or an animation
    # Pixels that a decoder goes over in one file: height times width times the frames up to the
    # last one that is read, or times the scans of a JPEG file.
    max_work: int = field(2**31, POSITIVE)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from and what happens to them before they become tokens."""

    name: str = "digits"  # one of data.sources.SETS, or the name of a TFDS set
    # TFDS: the folder of all prepared sets (data_dir), or of this set; None: TFDS's default.
    dir: str | None = field(None, free=True)
    # folder: the folder of images, or of videos where `frames` is set; camera_motions: the folder
    # of images that a camera moves over; arrays: an .npz file; coco: the folder of a COCO data set,
    # or one of its JSON files; tokens: a folder made by gptv_jax.prepare.
    path: str | None = field(None, free=True)
    # coco: JSON files and folders of images, relative to `path`; None: found by their names. A
    # pattern such as "labels/{split}.json", or one for each of train, validation and test, in this
    # order and with commas between; a single folder of images holds the images of all splits.
    annotations: str | None = field(None, free=True)
    images: str | None = field(None, free=True)
    # Label maps, a class for every pixel. folder: their files, relative to `path`, such as
    # "{split}_labels" or "gtFine/{split}/{name}_labelIds"; then `images` is such a pattern too
    # (None: "{split}"). A TFDS set: the feature. coco: semantic, masks (of each object), or both
    # with a comma between, made of polygons and run lengths. None: label maps are not read.
    maps: str | None = field(None, free=True)
    # The classes of label maps, with commas between, or a text file (.txt) with a class a line:
    # names of the values 0, 1, ...; or each name after its value, "7 road", or its colour,
    # "128 64 128 road". Every other value is no class.
    map_names: str | None = None
    map_ignore: tuple[int, ...] = ()  # values that `map_names` without values or colours skips
    # Of label maps with several channels, the one with the values. None: maps have one, or colours.
    map_channel: int | None = field(None, FROM_ZERO)
    # folder: a CSV file with the header file,label, in place of a sub-folder for each class.
    labels_file: str | None = field(None, free=True)
    # folder, arrays, parquet, webdataset: leaves the images with this label out, of all splits.
    ignore_label: int | None = None
    # Split expressions as in TFDS: "train[:96%]", "train[5000:]", "train+test".
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    labels: bool = True  # False: ignores the labels; there is no probe and no fine-tuning
    # Pixels after the transforms: one number for squares, or height and width, such as (48, 64).
    image_size: int | tuple[int, ...] = field(8, PIXELS)
    # Frames of a clip; 0: the data are images. A clip begins at a random frame of its video in
    # training, and lies in the middle of the video in evaluation. A shorter video repeats its last
    # frame. Videos are folders of frames and animations (folder), arrays of 5 axes (arrays), the
    # feature `video` of a TFDS set, moving_digits and camera_motions.
    frames: int = field(0, FROM_ZERO)
    frame_stride: int = field(1, POSITIVE)  # every so many frames of the video, one is of the clip
    # Pretraining on clips takes single images in place of this share of the clips, from the folder
    # `stills`. An image is a clip of one frame: no other frame is predicted. `still_transforms`
    # are the images' transforms; (): those of train_transforms.
    still_share: float = field(0.0, SHARE)
    stills: str | None = field(None, free=True)
    still_transforms: tuple[str, ...] = field((), ENTRIES)
    # The label of data sets with several labels, such as moving_digits; None: the first.
    label: str | None = None
    # Transforms in training and in evaluation, in order; see data.transforms.TRANSFORMS.
    train_transforms: tuple[str, ...] = field((), ENTRIES)
    eval_transforms: tuple[str, ...] = field((), ENTRIES)
    limits: Limits = dataclasses.field(default_factory=Limits)
    # An image that cannot be read is replaced by another image (skip), or ends the run (fail).
    damaged: str = field("skip", one_of("skip", "fail"))
    max_damaged: float = field(0.05, SHARE)  # share of unreadable images above which the run stops
    workers: int = field(0, FROM_ZERO, free=True)  # Grain's processes; 0: threads in this one

    def __post_init__(self):
        object.__setattr__(self, "image_size", image_size(*self.size))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return height_and_width(self.image_size)

    @property
    def missing(self) -> float:
        """The share of images without a file or a label map up to which these are left out."""
        return 0.0 if self.damaged == "fail" else self.max_damaged


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A convolutional encoder and decoder, with a quantizer between them."""

    channels: int = field(3, one_of(1, 3))  # of the images: grey or RGB
    downsample: int = field(4, one_of(4, 8, 16))  # pixels a side that one token stands for
    # Of clips: frames after the first one that one token stands for; the first frame has tokens of
    # its own, as an image has, and no token depends on later frames. 1: each frame is an image.
    frames: int = field(1, POSITIVE)
    # Channels at each resolution, the finest first. Each resolution is half of the one before, so
    # the first layer takes squares of downsample / 2^(resolutions - 1) pixels a side.
    widths: tuple[int, ...] = field((96,), WIDTHS)
    encoder_blocks: int = field(2, FROM_ZERO)  # residual blocks at each resolution
    decoder_blocks: int = field(3, FROM_ZERO)
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
    # Groups of the norms in a tokenizer of diffusers or LlamaGen (model/vqgan.py); such a tokenizer
    # brings all settings of this section with it. 0: this project's own network.
    groups: int = field(0, FROM_ZERO)

    @property
    def vocabulary(self) -> int:
        """Number of codes."""
        return math.prod(self.levels) if self.quantizer == "fsq" else self.codes

    @property
    def patch(self) -> int:
        """Pixels a side of the squares that the first layer takes."""
        return self.downsample // 2 ** (len(self.widths) - 1)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How pixels become tokens."""

    # See tokens.CODECS; none: there are no tokens, and only a task with
    # config.task.image_input=pixels reads the images.
    kind: str = field("grey", one_of("grey", "palette", "learned", "none"))
    # grey: number of levels; lossless where the data fit. A token stands for a patch of pixels:
    # (), one pixel; or height and width, of clips frames, height and width. The vocabulary is
    # levels ^ (pixels of a patch).
    levels: int = field(17, ("2 to 256", lambda v: 2 <= v <= 256))
    patch: tuple[int, ...] = field((), PATCH)
    # palette: number of colours, which is the vocabulary.
    colors: int = field(512, ("2 to 65536", lambda v: 2 <= v <= 65536))
    # palette: iGPT's kmeans_centers.npy or a file of gptv_jax.prepare; None: the palette of the
    # token cache or of init_from, or else k-means over training pixels, kept in the run folder.
    palette: str | None = field(None, free=True)
    # learned: a run folder whose tokenizer has finished, a file of Tokenizer.save, a folder of
    # diffusers' VQModel, or LlamaGen's VQ-16 as .safetensors; None: the tokenizer of the token
    # cache or of init_from, or else the stage `tokenizer` trains one.
    tokenizer: str | None = field(None, free=True)
    autoencoder: Autoencoder = dataclasses.field(default_factory=Autoencoder)  # learned

    @property
    def vocabulary(self) -> int:
        """Number of different tokens, V; 0 without tokens."""
        learned = self.autoencoder.vocabulary
        grey = self.levels ** math.prod(self.patch)
        known = {"grey": grey, "palette": self.colors, "learned": learned, "none": 0}
        return known[self.kind]

    @property
    def levelled(self) -> bool:
        """Whether a token is a code of finite scalar quantization, with a level by dimension."""
        return self.kind == "learned" and self.autoencoder.quantizer == "fsq"

    def pairs(self, other: "Tokens") -> list[tuple[str, object, object]]:
        """Names of the fields that tokens depend on, definitions apart, with both values."""
        own = {"grey": ("levels", "patch"), "palette": "colors", "learned": "autoencoder."}
        now, there = flatten(self), flatten(other)
        names = [n for n in now if n == "kind" or n.startswith(own.get(self.kind, "kind"))]
        return [(f"tokens.{name}", now[name], there[name]) for name in names]

    @property
    def cell(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels that a token stands for; one frame of an image.

        The first frame of a clip may have tokens of its own, see `Autoencoder.frames`.
        """
        if self.kind == "learned":
            down = self.autoencoder.downsample
            return (self.autoencoder.frames, down, down)
        patch = self.patch if self.kind == "grey" else ()
        return (1,) * (3 - len(patch)) + patch
