"""Every setting of a run, declared once: its name, type, unit and meaning.

A file in `configs/` starts from `default()` (an `ml_collections.ConfigDict`, so that any field can
be overridden on the command line as `--config.a.b=value`), and `resolve` turns the result into the
frozen, checked `Config` that the rest of the program reads.
"""

import collections.abc
import dataclasses
import difflib
import math
import types
import typing

import ml_collections
from ml_collections import config_dict


class InputError(ValueError):
    """Something the user can mend: one sentence that says what, where and what to do."""


# What a value must be, in words for the message and as a test.
POSITIVE = ("1 or more", lambda v: v >= 1)
NOT_NEGATIVE = ("0 or more", lambda v: 0 <= v < math.inf)
ABOVE_ZERO = ("more than 0", lambda v: 0 < v < math.inf)
BELOW_ONE = ("0 up to but not 1", lambda v: 0 <= v < 1)
SHARE = ("0 to 1", lambda v: 0 <= v <= 1)
AXIS = ("1 or more, or -1 to fill", lambda v: v >= 1 or v == -1)


def _one_of(*names: str):
    return "one of " + ", ".join(names), lambda v: v in names


def _field(default, accepted=None, *, free: bool = False):
    """A field of these values; a free one may change when a run is continued.

    Free is what moves work about but not the numbers it comes to, rounding apart.
    """
    return dataclasses.field(default=default, metadata={"accepted": accepted, "free": free})


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh's axes; at most one of them is -1 and takes what is left."""

    data: int = _field(-1, AXIS, free=True)  # batch split, weights replicated
    fsdp: int = _field(
        1, AXIS, free=True
    )  # batch split, weights split too and gathered layer by layer
    tensor: int = _field(1, AXIS, free=True)  # heads and MLP width split


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from and what happens to them before they become tokens."""

    name: str = "digits"  # one of data.sources.SETS, or the name of a TFDS set
    # TFDS: the folder of all prepared sets (its data_dir), or that of this one; None: TFDS's own.
    dir: str | None = _field(None, free=True)
    # folder: the folder of images; arrays: an .npz file; tokens: a folder made by gptv_jax.prepare.
    path: str | None = _field(None, free=True)
    # Split expressions as in TFDS: "train[:96%]", "train[5000:]", "train+test".
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    labels: bool = True  # False: classes are left alone, and with them the probe and fine-tuning
    image_size: int = _field(8, POSITIVE)  # pixels, height and width, after the transforms
    # What happens to an image, in order, in training and elsewhere: see data.transforms.TRANSFORMS.
    train_transforms: tuple[str, ...] = ()
    eval_transforms: tuple[str, ...] = ()
    # What an image that cannot be read leads to: another one in its place, or the end of the run.
    damaged: str = _field("skip", _one_of("skip", "fail"))
    max_damaged: float = _field(0.05, SHARE)  # share of such images above which the run stops
    workers: int = _field(
        0, NOT_NEGATIVE, free=True
    )  # Grain worker processes; 0: threads in this process


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How pixels become tokens."""

    name: str = "grey"  # one of tokens.CODECS
    levels: int = _field(
        17, ("2 to 256", lambda v: 2 <= v <= 256)
    )  # grey: number of levels, which is the vocabulary; lossless where data fits
    colors: int = _field(
        512, ("2 to 65536", lambda v: 2 <= v <= 65536)
    )  # palette: number of colours, which is the vocabulary
    # palette: iGPT's kmeans_centers.npy or a file of gptv_jax.prepare; None: the token cache's or
    # that of init_from, or else k-means over training pixels, kept in the run folder.
    palette: str | None = _field(None, free=True)


@dataclasses.dataclass(frozen=True)
class Model:
    """The network; the defaults are iGPT-S (Chen et al. 2020)."""

    layers: int = _field(24, POSITIVE)
    width: int = _field(512, POSITIVE)
    heads: int = _field(8, POSITIVE)
    mlp_ratio: int = _field(4, POSITIVE)  # MLP width over width
    axial_positions: bool = False  # adds row and column tables to the learned position table
    start_per_variant: bool = False  # a start vector per augmentation variant (Jun et al. 2020)
    dropout: float = _field(
        0.0, BELOW_ONE
    )  # probability, on embeddings and on each residual branch
    dtype: str = _field("float32", _one_of("float32", "bfloat16"))  # of compute; weights: float32
    scan_layers: bool = _field(
        True, free=True
    )  # walk layers by lax.scan (flat compile time) or unrolled
    # What the backward pass computes again: nothing, all but products with weights, or everything.
    remat: str = _field("none", _one_of("none", "dots", "full"), free=True)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Optax optimizer, learning-rate schedule, clipping and decay."""

    # muon is for the matrices of the blocks; AdamW takes the rest.
    name: str = _field("adam", _one_of("adam", "adamw", "nadamw", "muon"))
    learning_rate: float = _field(3e-3, ABOVE_ZERO)  # peak, reached at the end of the warm-up
    # muon: the peak of AdamW's share; None: the same as learning_rate.
    rest_learning_rate: float | None = _field(None, ABOVE_ZERO)
    beta1: float = _field(0.9, BELOW_ONE)
    beta2: float = _field(0.95, BELOW_ONE)
    weight_decay: float = _field(0.0, NOT_NEGATIVE)  # times the learning rate; matrices only
    clip_norm: float | None = _field(None, ABOVE_ZERO)  # of all gradients together; None: no bound
    schedule: str = _field("cosine", _one_of("cosine", "constant"))  # after the warm-up
    warmup_steps: int = _field(0, NOT_NEGATIVE)  # linear, up to the peak
    final_fraction: float = _field(0.0, SHARE)  # of the peak, at the last step of a cosine


@dataclasses.dataclass(frozen=True)
class Train:
    """One training by gradient steps."""

    steps: int = _field(1000, POSITIVE)
    batch_size: int = _field(128, POSITIVE)  # images a step, over all devices
    # Gradient accumulation: the parts that a batch is worked through in.
    microbatches: int = _field(1, POSITIVE)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    eval_every: int = _field(250, NOT_NEGATIVE)  # steps; 0: at the end only
    checkpoint_every: int = _field(250, POSITIVE, free=True)  # steps; the last step is always saved
    keep_checkpoints: int = _field(2, POSITIVE, free=True)  # newest ones that stay on disk
    log_every: int = _field(50, POSITIVE, free=True)  # steps


@dataclasses.dataclass(frozen=True)
class Probe:
    """Linear probe: L-BFGS logistic regression on frozen features."""

    # Inverse regularisation strengths to try.
    c: tuple[float, ...] = _field(
        (0.01, 0.1, 1.0, 10.0),
        ("positive numbers, one or more", lambda v: v and all(0 < c < math.inf for c in v)),
    )
    max_iterations: int = _field(1000, POSITIVE)  # of L-BFGS
    batch_size: int = _field(128, POSITIVE, free=True)  # images a forward pass
    # Training images that the regression is fitted to, the first ones; None: all of them.
    train_images: int | None = _field(None, POSITIVE)


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Joint generative and classification training from the pretrained weights."""

    train: Train = dataclasses.field(default_factory=Train)
    # In place of data.train_transforms; (): the same ones.
    train_transforms: tuple[str, ...] = ()
    generative_coefficient: float = _field(1.0, NOT_NEGATIVE)  # weight of nats per token
    classification_coefficient: float = _field(1.0, NOT_NEGATIVE)  # of nats per image
    # Evaluations without a better validation accuracy after which it stops; 0: never.
    patience: int = _field(5, NOT_NEGATIVE)
    standardize: bool = False  # centre and scale the head's input by its statistics at the start


@dataclasses.dataclass(frozen=True)
class Sample:
    """Pictures made at the end of a run."""

    count: int = _field(64, POSITIVE)  # unconditional samples
    completions: int = _field(
        16, NOT_NEGATIVE
    )  # test images whose upper part is kept and whose rest is drawn
    keep: float = _field(0.5, SHARE)  # share of rows kept in a completion
    temperature: float = _field(1.0, NOT_NEGATIVE)  # 0: the most likely token
    top_k: int | None = _field(None, POSITIVE)  # draw among the k most likely tokens; None: all
    # Draw among the fewest most likely tokens that reach this probability; None: all.
    top_p: float | None = _field(None, ("above 0 up to 1", lambda v: 0 < v <= 1))


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = _field(
        0, NOT_NEGATIVE
    )  # of initialisation, data order, augmentation, dropout and sampling
    init_from: str | None = None  # a run folder whose pretrained weights replace this run's own
    data: Data = dataclasses.field(default_factory=Data)
    tokens: Tokens = dataclasses.field(default_factory=Tokens)
    model: Model = dataclasses.field(default_factory=Model)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    train: Train = dataclasses.field(default_factory=Train)
    probe: Probe = dataclasses.field(default_factory=Probe)
    finetune: Finetune = dataclasses.field(default_factory=Finetune)
    sample: Sample = dataclasses.field(default_factory=Sample)


def default() -> ml_collections.ConfigDict:
    """The defaults as a locked ConfigDict, for a file in `configs/` to change."""
    return _to_dict(Config())


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
    config = _from_dict(Config, settings, "config")
    _check_together(config)
    return config


def flatten(config, prefix: str = "") -> dict[str, object]:
    """`{"train.steps": 500, ...}` for every field, in order of declaration."""
    flat = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        nested = dataclasses.is_dataclass(value)
        flat.update(flatten(value, f"{name}.") if nested else {name: value})
    return flat


def unflatten(flat: dict[str, object]) -> dict:
    """The inverse of `flatten`, as nested dicts, for `resolve`."""
    nested: dict = {}
    for name, value in flat.items():
        *sections, field = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[field] = value
    return nested


def fields(cls: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every field by its name as in `flatten`."""
    found = {}
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        nested = dataclasses.is_dataclass(field.type)
        found.update(fields(field.type, f"{name}.") if nested else {name: field})
    return found


def free_fields() -> set[str]:
    """Names of the fields that may change when a run is continued."""
    return {name for name, field in fields().items() if field.metadata.get("free")}


def type_words(field: dataclasses.Field) -> str:
    """What a field takes, in words: `int`, `float or None`, `tuple of str`."""
    kind, optional = _optional(field.type)
    if typing.get_origin(kind) is tuple:
        words = f"a tuple of {typing.get_args(kind)[0].__name__}"
    else:
        words = f"{'an' if kind is int else 'a'} {kind.__name__}"
    return words + (" or None" if optional else "")


def _optional(kind) -> tuple[object, bool]:
    """`(float, True)` for `float | None`, `(float, False)` for `float`."""
    if isinstance(kind, types.UnionType):
        return next(a for a in typing.get_args(kind) if a is not type(None)), True
    return kind, False


def _to_dict(config) -> ml_collections.ConfigDict:
    settings = ml_collections.ConfigDict()
    for field in dataclasses.fields(config):
        value, (kind, optional) = getattr(config, field.name), _optional(field.type)
        if dataclasses.is_dataclass(value):
            value = _to_dict(value)
        elif optional and value is None:
            value = config_dict.placeholder(kind)
        settings[field.name] = value
    return settings.lock()


def _from_dict(cls: type, settings, where: str):
    if not isinstance(settings, collections.abc.Mapping | ml_collections.ConfigDict):
        raise InputError(f"{where} is {settings!r}; it is a section with fields of its own.")
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {where}.{near[0]}? " if near else ""
            accepted = ", ".join(known)
            raise InputError(f"{where}.{name} is not a field; {hint}{where} takes: {accepted}.")
    values = {}
    for name, field in known.items():
        if name not in settings:
            raise InputError(f"{where}.{name} is missing; start from gptv_jax.config.default().")
        value = settings[name]
        if dataclasses.is_dataclass(field.type):
            values[name] = _from_dict(field.type, value, f"{where}.{name}")
        else:
            values[name] = _checked(value, field, f"{where}.{name}")
    return cls(**values)


def _checked(value, field: dataclasses.Field, where: str):
    """`value` of the field's type and among its values, or an InputError."""
    kind, optional = _optional(field.type)
    if value is None and optional:
        return None
    try:
        value = typed(value, kind)
    except TypeError:
        found = f"{where} is {value!r}, of type {type(value).__name__}"
        raise InputError(f"{found}; it takes {type_words(field)}.") from None
    words, holds = field.metadata.get("accepted") or (None, None)
    if holds and not holds(value):
        alternative = ", or None" if optional else ""
        raise InputError(f"{where} is {value!r}; it takes {words}{alternative}.")
    return value


def typed(value, kind):
    """`value` as `kind`; only whole numbers to floats and lists to tuples are converted.

    Raises:
      TypeError: it is of another type.
    """
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(typed(v, typing.get_args(kind)[0]) for v in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value


def _check_together(config: Config) -> None:
    """What can be judged without data or devices, of fields that must fit each other."""
    mesh, model = config.mesh, config.model
    if (mesh.data, mesh.fsdp, mesh.tensor).count(-1) > 1:
        raise InputError("config.mesh has more than one -1; only one axis can fill what is left.")
    if model.width % model.heads:
        raise InputError(
            f"config.model.heads is {model.heads}; it takes a divisor of config.model.width = "
            f"{model.width}."
        )
    for where, train in (("train", config.train), ("finetune.train", config.finetune.train)):
        optimizer, prefix = train.optimizer, f"config.{where}.optimizer"
        if train.batch_size % train.microbatches:
            raise InputError(
                f"config.{where}.microbatches is {train.microbatches}; it takes a divisor of "
                f"config.{where}.batch_size = {train.batch_size}."
            )
        if optimizer.name == "adam" and optimizer.weight_decay:
            raise InputError(
                f"{prefix}.weight_decay is {optimizer.weight_decay}, but adam has no decay; take "
                f"{prefix}.name=adamw or weight_decay=0."
            )
        if optimizer.name != "muon" and optimizer.rest_learning_rate is not None:
            raise InputError(
                f"{prefix}.rest_learning_rate is {optimizer.rest_learning_rate}, but only muon "
                f"treats the rest apart; take {prefix}.name=muon or rest_learning_rate=None."
            )
