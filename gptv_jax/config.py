"""Every setting of a run, declared once: its name, type, unit and meaning.

A file in `configs/` starts from `default()` (an `ml_collections.ConfigDict`, so that any field can
be overridden on the command line as `--config.a.b=value`), and `resolve` turns the result into the
frozen, checked `Config` that the rest of the program reads.
"""

import dataclasses
import difflib
import types
import typing

import ml_collections
from ml_collections import config_dict


class InputError(ValueError):
    """Something the user can mend: one sentence that says what, where and what to do."""


def _free(default):
    """A field that may change when a run is continued: it moves work about, not the numbers."""
    return dataclasses.field(default=default, metadata={"free": True})


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh's axes; at most one of them is -1 and takes what is left."""

    data: int = _free(-1)  # batch split, weights replicated
    fsdp: int = _free(1)  # batch split, weights split too and gathered layer by layer
    tensor: int = _free(1)  # heads and MLP width split


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from and what happens to them before they become tokens."""

    name: str = "digits"  # one of data.sources.SOURCES
    image_size: int = 8  # pixels, height and width
    augmentation: tuple[str, ...] = ()  # training only, in order: see data.transforms.TRANSFORMS
    workers: int = _free(0)  # Grain worker processes; 0: threads in this process


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How pixels become tokens."""

    name: str = "grey"  # one of tokens.CODECS
    levels: int = 17  # grey: number of levels, which is the vocabulary; lossless where data fits


@dataclasses.dataclass(frozen=True)
class Model:
    """The network; the defaults are iGPT-S (Chen et al. 2020)."""

    layers: int = 24
    width: int = 512
    heads: int = 8
    mlp_ratio: int = 4  # MLP width over width
    axial_positions: bool = False  # adds row and column tables to the learned position table
    start_per_variant: bool = False  # a start vector per augmentation variant (Jun et al. 2020)
    dropout: float = 0.0  # probability, on embeddings and on each residual branch
    dtype: str = _free("float32")  # of compute: float32 or bfloat16; weights stay float32
    scan_layers: bool = _free(True)  # walk layers by lax.scan (flat compile time) or unrolled
    remat: str = _free("none")  # what backward recomputes: none, dots (all but products) or full


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Optax optimizer, learning-rate schedule, clipping and decay."""

    name: str = "adam"  # adam, adamw, nadamw or muon (AdamW for all but the block matrices)
    learning_rate: float = 3e-3  # peak, reached at the end of the warm-up
    rest_learning_rate: float | None = None  # muon: peak of AdamW's share; None: learning_rate
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0  # decoupled, times the learning rate, on matrices only
    clip_norm: float | None = None  # bound on the global gradient norm; None: no clipping
    schedule: str = "cosine"  # after the warm-up: cosine or constant
    warmup_steps: int = 0  # linear from 0
    final_fraction: float = 0.0  # of the peak, at the last step of a cosine


@dataclasses.dataclass(frozen=True)
class Train:
    """One training by gradient steps."""

    steps: int = 1000
    batch_size: int = 128  # images a step, over all devices
    microbatches: int = _free(1)  # gradient accumulation: parts a batch is worked through in
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    eval_every: int = 250  # steps; 0: at the end only
    checkpoint_every: int = _free(250)  # steps; the last step is always saved
    keep_checkpoints: int = _free(2)  # newest ones that stay on disk
    log_every: int = _free(50)  # steps


@dataclasses.dataclass(frozen=True)
class Probe:
    """Linear probe: L-BFGS logistic regression on frozen features."""

    c: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)  # inverse regularisation strengths to try
    max_iterations: int = 1000  # of L-BFGS
    batch_size: int = 128  # images a forward pass


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Joint generative and classification training from the pretrained weights."""

    train: Train = dataclasses.field(default_factory=Train)
    generative_coefficient: float = 1.0  # weight of the generative loss, nats per token
    classification_coefficient: float = 1.0  # weight of the classification loss, nats per image
    patience: int = 5  # evaluations without a better validation accuracy before it stops; 0: never
    standardize: bool = False  # centre and scale the head's input by its statistics at the start


@dataclasses.dataclass(frozen=True)
class Sample:
    """Pictures made at the end of a run."""

    count: int = 64  # unconditional samples
    completions: int = 16  # test images whose upper part is kept and whose rest is drawn
    keep: float = 0.5  # share of rows kept in a completion
    temperature: float = 1.0  # 0: the most likely token
    top_k: int | None = None  # draw among the k most likely tokens; None: all
    top_p: float | None = None  # draw among the most likely tokens of this total probability


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0  # of initialisation, data order, augmentation, dropout and sampling
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


def resolve(settings: ml_collections.ConfigDict | dict) -> Config:
    """Typed, frozen and checked `Config`.

    Raises:
      InputError: an unknown or missing field, a wrong type, or a value that is not accepted; the
        message names the field, its value and what would be accepted.
    """
    config = _from_dict(Config, dict(settings), "config")
    _check(config)
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


def free_fields(cls: type = Config, prefix: str = "") -> set[str]:
    """Names (as in `flatten`) of the fields that may change when a run is continued."""
    free = set()
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            free |= free_fields(field.type, f"{name}.")
        elif field.metadata.get("free"):
            free.add(name)
    return free


def _optional(kind) -> tuple[type, bool]:
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


def _from_dict(cls: type, settings: dict, where: str):
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
            values[name] = _from_dict(field.type, dict(value), f"{where}.{name}")
        else:
            values[name] = _typed(value, field.type, f"{where}.{name}")
    return cls(**values)


def _typed(value, kind, where: str):
    """`value` as `kind`; whole numbers pass as floats, lists as tuples, nothing else is converted."""
    kind, optional = _optional(kind)
    if value is None and optional:
        return None
    if typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            item = typing.get_args(kind)[0]
            return tuple(_typed(v, item, f"{where}[{i}]") for i, v in enumerate(value))
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    name = getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)
    accepted = name + (" or None" if optional else "")
    raise InputError(f"{where} is {value!r}, a {type(value).__name__}; it takes {accepted}.")


def _check(config: Config) -> None:
    """Values that can be judged without data or devices."""
    flat = flatten(config)

    def require(name: str, accepted: str, holds) -> None:
        if not holds(flat[name]):
            raise InputError(f"config.{name} is {flat[name]!r}; it takes {accepted}.")

    def choice(name: str, *choices: str) -> None:
        require(name, "one of " + ", ".join(choices), lambda v: v in choices)

    trainings = ("train", "finetune.train")
    at_least_one = ["data.image_size", "model.layers", "model.width", "model.heads"]
    at_least_one += ["model.mlp_ratio", "probe.max_iterations", "probe.batch_size", "sample.count"]
    not_negative = ["seed", "data.workers", "finetune.patience", "sample.temperature"]
    not_negative += ["finetune.generative_coefficient", "finetune.classification_coefficient"]
    not_negative += ["sample.completions"]
    for t in trainings:
        at_least_one += [f"{t}.{n}" for n in ("steps", "batch_size", "microbatches", "log_every")]
        at_least_one += [f"{t}.checkpoint_every", f"{t}.keep_checkpoints"]
        not_negative += [f"{t}.eval_every", f"{t}.optimizer.weight_decay"]
        not_negative += [f"{t}.optimizer.warmup_steps"]
    for name in at_least_one:
        require(name, "1 or more", lambda v: v >= 1)
    for name in not_negative:
        require(name, "0 or more", lambda v: v >= 0)
    for name in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
        require(name, "1 or more, or -1 to fill", lambda v: v >= 1 or v == -1)
    if sum(flat[f"mesh.{a}"] == -1 for a in ("data", "fsdp", "tensor")) > 1:
        raise InputError("config.mesh has more than one -1; only one axis can fill what is left.")

    choice("model.dtype", "float32", "bfloat16")
    choice("model.remat", "none", "dots", "full")
    require("model.dropout", "a probability from 0 up to but not 1", lambda v: 0 <= v < 1)
    require("tokens.levels", "2 to 256", lambda v: 2 <= v <= 256)
    width, heads = config.model.width, config.model.heads
    require("model.heads", f"a divisor of config.model.width = {width}", lambda v: width % v == 0)
    require("probe.c", "positive numbers, one or more", lambda v: v and min(v) > 0)
    require("sample.keep", "a share from 0 to 1", lambda v: 0 <= v <= 1)
    require("sample.top_k", "1 or more, or None", lambda v: v is None or v >= 1)
    require("sample.top_p", "above 0 up to 1, or None", lambda v: v is None or 0 < v <= 1)
    del heads
    for t in trainings:
        choice(f"{t}.optimizer.name", "adam", "adamw", "nadamw", "muon")
        choice(f"{t}.optimizer.schedule", "cosine", "constant")
        require(f"{t}.optimizer.learning_rate", "more than 0", lambda v: v > 0)
        for name in ("rest_learning_rate", "clip_norm"):
            require(f"{t}.optimizer.{name}", "more than 0, or None", lambda v: v is None or v > 0)
        for name in ("beta1", "beta2"):
            require(f"{t}.optimizer.{name}", "0 up to but not 1", lambda v: 0 <= v < 1)
        require(f"{t}.optimizer.final_fraction", "0 to 1", lambda v: 0 <= v <= 1)
        batch = flat[f"{t}.batch_size"]
        require(f"{t}.microbatches", f"a divisor of {batch}", lambda v, b=batch: b % v == 0)
        if flat[f"{t}.optimizer.name"] == "adam" and flat[f"{t}.optimizer.weight_decay"]:
            raise InputError(
                f"config.{t}.optimizer.weight_decay is {flat[f'{t}.optimizer.weight_decay']} but "
                f"adam has no decay; take config.{t}.optimizer.name=adamw or weight_decay=0."
            )
        if flat[f"{t}.optimizer.name"] != "muon" and flat[f"{t}.optimizer.rest_learning_rate"]:
            raise InputError(
                f"config.{t}.optimizer.rest_learning_rate is set but only muon splits the weights;"
                f" take config.{t}.optimizer.name=muon or rest_learning_rate=None."
            )
