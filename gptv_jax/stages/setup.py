"""Opens a run: all that can be refused is refused here, before any work and before files change."""

import dataclasses
import functools
import logging
import operator
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from gptv_jax import config as config_lib
from gptv_jax import files, hosts, sharding, tasks, tokens, weights
from gptv_jax.config import fields, rules
from gptv_jax.data import inventory, pipeline, sources, transforms, trial
from gptv_jax.data.cache import TokenCache
from gptv_jax.data.damage import DamageLog
from gptv_jax.data.folder import refuse_inside
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.data.stills import images_of
from gptv_jax.decode.sampler import check_guidable
from gptv_jax.errors import InputError, list_differences, shorten
from gptv_jax.runs.context import Context
from gptv_jax.runs.record import RunFolder, has_finished
from gptv_jax.stages import STAGES, changes, finetuned, pretrained, teacher_cache, teachers
from gptv_jax.stages.precision import settle_dtype
from gptv_jax.stages.select import choose_stages
from gptv_jax.tokens import Codec, learned, palette
from gptv_jax.train import wandb_copy
from gptv_jax.train.metrics import MetricWriter

LOG = logging.getLogger(__name__)
IMAGES, PIXELS = 4096, 2**18  # a palette is built from this many training images and pixels of them


def open_run(config: config_lib.Config, workdir: str, wanted: list[str] | None = None) -> Context:
    """Makes the run folder, or goes on in it, and prepares what the stages read.

    `wanted` names stages; None: all stages that the configuration and the data allow.

    InputError: the mesh, the network, the data and the stages do not fit each other, the folder
    cannot be written, or its work is of another configuration (every field that differs is listed).
    """
    if not isinstance(config, config_lib.Config):
        raise InputError(
            f"open_run was given a {type(config).__name__}, but takes what "
            "gptv_jax.config.resolve(config) returns; gptv_jax.train(config, workdir) runs the "
            "stages in Python or in a notebook."
        )
    check_same_settings(config)
    sources.open_data_set.cache_clear()  # the files may have changed since a run before
    if config.init_from:  # process 0 downloads first what lies on the Hugging Face Hub
        missing = f"config.init_from={config.init_from} does not exist"
        own = lambda: pretrained.has_own(config, files.user_path(workdir))  # noqa: E731
        hosts.from_first(lambda: own() or str(weights.locate(config.init_from, missing)))
    written = {"--workdir": workdir, "config.checkpoint_dir": config.checkpoint_dir}
    refuse_inside(config.data, written)
    if config.data.stills:
        refuse_inside(images_of(config.data)[0], written)
    if config.wandb:
        hosts.from_first(wandb_copy.check_installed)
    config = take_tokenizer_settings(settle_dtype(config, files.user_path(workdir)))
    folder = RunFolder(config, workdir)
    try:
        return _open(config, folder, wanted)
    except BaseException:
        folder.release()  # the traceback keeps the folder alive, and with it the lock
        raise


def _open(config: config_lib.Config, folder: RunFolder, wanted: list[str] | None) -> Context:
    """As `open_run`, which has checked the processes' settings."""
    mesh = sharding.make_mesh(config.mesh)
    # The place of the data may differ between processes.
    opened = hosts.on_all(lambda: sources.open_splits(config.data))
    contents = inventory.describe(sources.open_data_set(config.data), opened)
    if jax.process_index() == 0:
        inventory.log(config.data, contents, opened)
    train = opened["train"]
    rules.check_classes(config, train.classes)
    begun = hosts.from_first(lambda: changes.begun_stages(folder))
    stages = choose_stages(config, train.keys, wanted, begun)
    classes = train.class_names or tuple(map(str, range(train.classes)))
    task = tasks.make(config, classes, train.object_names, train.map_names)
    adapting = config.init_from and "pretrain" in begun and not folder.finished("pretrain")
    if adapting and "pretrain" not in stages:
        raise InputError(
            f"pretraining in {folder.path} goes on from config.init_from={config.init_from}, but "
            "has not finished; name pretrain in --stages as well."
        )
    labelled = {"probe", *(["finetune", "robustness"] if "label" in task.needs else [])}
    if classes and (config.model.class_tokens or labelled & set(stages)):
        lists = [config.data.eval_transforms, *_training_transforms(config, stages)]
        hosts.on_all(lambda: sources.check_labels(config.data, opened, lists))
    data = {
        "images": {split: len(source) for split, source in opened.items()},
        "classes": list(train.class_names) or train.classes,
        "objects": list(train.object_names),
        "maps": list(train.map_names),
    }
    changed = hosts.from_first(lambda: changes.find(folder, data, stages))
    # A stage that has finished needs its teachers no more.
    unfinished = [n for n in stages if n in changed.unfinished or not folder.finished(n)]
    for name in stages:
        if STAGES[name].on_request or name in unfinished:
            tuned = name in ("finetune", "robustness")
            if tuned:
                hosts.on_all(task.check)
            length = task.network().length if tuned else None
            STAGES[name].check(config, mesh, length)
    if {"sample", "generate"} & set(stages) and config.sample.guidance != 1:
        check_guidable(config.model, f"config.sample.guidance is {config.sample.guidance:g}")
    for entries in _training_transforms(config, stages):
        transforms.check(entries, config.data.eval_transforms)
    if config.distill.cached and "pretrain" in unfinished:
        hosts.on_all(lambda: teacher_cache.check(config))
    taught = [name for name in teachers.SECTIONS if name in unfinished]
    with jax.set_mesh(mesh):
        for name in [name for name in taught if name in changed.extended]:
            teachers.check_begun(config, folder, name)
    prepared = config, mesh, folder, stages, data, changed, contents, task, taught
    hosts.from_first(lambda: _prepare(*prepared))
    # Every process writes the names of the damaged images that it meets.
    hosts.on_all(lambda: files.claim(folder.path, "--workdir"))
    images = Pipeline(config.data, None, config.seed, folder.path, sharding.batch_share(mesh))
    log = hosts.on_all(lambda: _open_log(config, folder.path))
    return with_codec(Context(config, mesh, folder, log, images, task, tuple(stages)))


def _open_log(config: config_lib.Config, folder: pathlib.Path) -> MetricWriter:
    """The log of a run folder that is claimed; process 0 copies it to Weights & Biases if asked."""
    copy = None
    if config.wandb and jax.process_index() == 0:
        identity = files.read_json(folder / "config.json", {})["id"]
        copy = wandb_copy.Wandb(config.wandb, folder, identity, fields.flatten(config))
    return MetricWriter(folder, copy)


def with_codec(context: Context) -> Context:
    """The context with its codec, unless the tokenizer is still to be trained.

    Every process gets the palette or tokenizer that the run folder of process 0 holds.
    """
    kind, folder = context.config.tokens.kind, context.folder.path
    if kind not in tokens.DEFINITIONS:
        return context.with_definition(None)
    definition = hosts.from_first(lambda: tokens.load_definition(kind, folder))
    return context if definition is None else context.with_definition(definition)


def find_codec(
    config: config_lib.Config,
    folder: pathlib.Path | None = None,
    taught: Sequence[str] = ("pretrain",),
) -> Codec | None:
    """The codec of a configuration; None where its palette or tokenizer is still to be made.

    The teachers of the stages `taught` give their palette or tokenizer.

    InputError: the run folder, the token cache, `init_from`, the teachers and the settings have
    different definitions, or the token cache holds other tokens or images than the configuration
    says.
    """
    data_set, kind = sources.open_data_set(config.data), config.tokens.kind
    cache = data_set if isinstance(data_set, TokenCache) else None
    if cache:
        _check_cache(config, cache)
    if kind not in tokens.DEFINITIONS:
        return tokens.codec_of(config)
    found: dict[str, tokens.TokenDefinition | None] = {}
    if folder:
        found[f"the run folder {folder}"] = tokens.load_definition(kind, folder)
    if cache:
        found[f"the token cache {cache.folder}"] = cache.codec().definition
    if config.init_from and not (folder and pretrained.has_own(config, folder)):
        path = weights.locate(config.init_from)
        imported = weights.is_weights_path(path)
        definition = (
            weights.read_definition(path) if imported else tokens.load_definition(kind, path)
        )
        found[f"config.init_from={path}"] = definition
    found |= teachers.definitions(config, taught)
    field = {"palette": "palette", "learned": "tokenizer"}[kind]
    if given := getattr(config.tokens, field):
        missing = f"there is no {field} {given}, which config.tokens.{field} names"
        place = weights.locate(given, missing)
        found[f"config.tokens.{field}={given}"] = tokens.DEFINITIONS[kind][1](place)
    present = [(where, definition) for where, definition in found.items() if definition is not None]
    if not present:
        return None
    (first, chosen), *rest = present
    for where, other in rest:
        if not other.equivalent(chosen):
            raise InputError(f"the {field} of {where} is another one than that of {first}.")
    return tokens.codec_of(config, chosen)


def build_codec(config: config_lib.Config, damage_log: DamageLog) -> Codec:
    """A codec whose palette is k-means over random training pixels, the same on every process."""
    rng = np.random.default_rng(config.seed)
    pixels = []
    for element in pipeline.images(config.data, "train", damage_log, IMAGES, config.seed):
        image = element["image"]
        if image.shape[-1] != 3:
            raise InputError(
                f"images have {image.shape[-1]} channel(s), but config.tokens.kind=palette takes "
                'RGB; take "decode(channels=3)" or config.tokens.kind=grey.'
            )
        flat = image.reshape(-1, 3)
        pixels.append(flat[rng.integers(len(flat), size=-(-PIXELS // IMAGES))])
    provenance = {"data": config.data.name, "split": config.data.train_split, "images": len(pixels)}
    LOG.info("building a palette of %d colours", config.tokens.colors)
    colors = palette.build(np.concatenate(pixels), config.tokens.colors, config.seed, provenance)
    return tokens.codec_of(config, colors)


def _check_cache(config: config_lib.Config, cache: TokenCache) -> None:
    """Raises InputError where this configuration would make other tokens than the cache has."""
    pairs = (
        *config.tokens.pairs(cache.tokens),
        ("data.image_size", config.data.image_size, cache.image_size),
        ("data.frames", config.data.frames, cache.frames),
        ("data.frame_stride", config.data.frame_stride, cache.stride),
        ("data.eval_transforms", config.data.eval_transforms, cache.transforms),
    )
    cached = {f"config.{name}": theirs for name, _, theirs in pairs}
    if differing := list_differences(cached, {f"config.{n}": ours for n, ours, _ in pairs}):
        raise InputError(
            f"the token cache {cache.folder} was made by another configuration: "
            f"{shorten(differing, '; ')}. Take the settings of the cache, or make another cache."
        )


def take_tokenizer_settings(config: config_lib.Config) -> config_lib.Config:
    """The configuration with the settings of a tokenizer that another program made.

    This is the tokenizer that config.tokens.tokenizer names, or that of the token cache. Every
    process takes what process 0 finds.
    """
    named, cached = config.tokens.tokenizer, config.data.name == "tokens"
    if config.tokens.kind != "learned" or not (named or cached):
        return config

    def find() -> config_lib.Autoencoder:
        if not named:
            return sources.open_data_set(config.data).tokens.autoencoder
        missing = f"there is no tokenizer {named}, which config.tokens.tokenizer names"
        return learned.load(weights.locate(named, missing)).config

    found = hosts.from_first(find)
    if found.groups:
        taken = dataclasses.replace(config.tokens, autoencoder=found)
        config = dataclasses.replace(config, tokens=taken)
    rules.check(config)
    return config


def check_same_settings(config: config_lib.Config) -> None:
    """Raises InputError where processes have different settings, the place of the data apart."""
    free = ("dir", "path", "labels_file", "annotations", "images", "stills")
    place = [f"config.data.{name}" for name in free]
    own = {k: v for k, v in fields.flatten(config, "config.").items() if k not in place}
    first, *others = hosts.from_all(own)
    if differing := [line for other in others for line in list_differences(first, other)]:
        raise InputError(
            "the processes were given different settings: "
            f"{shorten(dict.fromkeys(differing), '; ')}. Start all of them by the same command."
        )


def _prepare(
    config: config_lib.Config,
    mesh: Mesh,
    folder: RunFolder,
    stages: list[str],
    data: dict,
    changed: changes.Changes,
    contents: dict,
    task: tasks.Task,
    taught: list[str],
) -> None:
    """Finds or makes the codec, checks it and the pretrained weights, and claims the folder.

    `taught` are the stages to run that may have teachers.
    """
    # A palette or tokenizer in the folder that other settings or fewer steps made does not count.
    outdated = changed.anew or "tokenizer" in changed.extended
    kind, place = config.tokens.kind, None if outdated else folder.path
    found = find_codec(config, place, taught)
    for stage in taught:
        teachers.check(config, mesh, stage, found, data["classes"])
    trained_here = not found and kind == "learned"
    made = not trained_here or has_finished(folder.summary(), "tokenizer")
    if kind in tokens.DEFINITIONS and not (found or outdated) and made and folder.has_checkpoints:
        raise InputError(f"{folder.path} has lost its {tokens.DEFINITIONS[kind][0]}; restore it.")
    if trained_here and "tokenizer" not in stages:
        raise InputError(
            "config.tokens.kind=learned needs a tokenizer; run --stages=tokenizer first, or "
            "name one by config.tokens.tokenizer."
        )
    try_out(config, stages, found)
    if trained_here and config.tokenizer.init_from:
        pretrained.given_tokenizer(config)
    if config.init_from or (kind != "none" and not {"pretrain", "tokenizer"} & set(stages)):
        adapt = "pretrain" in stages and not pretrained.has_own(config, folder.path)
        pretrained.check(config, folder.path, found, adapt=adapt)
    if config.sample.draft and {"sample", "generate"} & set(stages):
        pretrained.check_draft(config, found)
    if "robustness" in stages:
        finetuned.check(config, task, folder, stages, found)
    recorded = data | {"found": contents}
    clear = functools.partial(changes.clear, folder, changed)
    folder.claim(recorded, changed.fields, clear, anew=changed.anew)
    if not found and kind == "palette":
        found = build_codec(config, DamageLog(config.data, folder.path))
    if found:
        tokens.save_definition(found.definition, folder.path)


def try_out(config: config_lib.Config, stages: list[str] | None, codec: Codec | None) -> None:
    """Checks that images, codec and the transforms of evaluation and of `stages` fit together."""
    data = config.data
    channels = config.tokens.autoencoder.channels if config.tokens.kind == "learned" else 3
    shape = (data.frames,) * (data.frames > 0) + data.size
    shape = (*shape, channels) if config.tokens.kind != "none" else shape
    training = [] if stages is None else _training_transforms(config, stages)
    tried = dict.fromkeys([data.eval_transforms, *training], False)
    if training and "finetune" in stages and {*tasks.kind(config.task.name).needs} - {"label"}:
        tried[config.finetune.train_transforms or data.train_transforms] = True
    shape = codec.image_shape if codec else shape
    for entries, annotated in tried.items():
        trial.try_out(data, codec, shape, entries, annotated)
    if data.still_share and "pretrain" in (stages or ()):
        images, _, entries = images_of(data)
        trial.try_out(images, None, shape[1:], entries)


def _training_transforms(config: config_lib.Config, stages: list[str]) -> list[tuple[str, ...]]:
    """The lists of transforms that the stages train with."""
    sections = [STAGES[name].own_transforms for name in stages if STAGES[name].own_transforms]
    own = [operator.attrgetter(f"{each}.train_transforms")(config) for each in sections]
    return [config.data.train_transforms, *(entries for entries in own if entries)]
