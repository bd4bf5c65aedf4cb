"""Opens a run: all that can be refused is refused here, before any work and before files change."""

import operator
import pathlib
import tempfile

import jax

from gptv_jax import config as config_lib
from gptv_jax import files, hosts, sharding, tokens
from gptv_jax.config import fields, rules
from gptv_jax.data import pipeline, sources, transforms
from gptv_jax.data.damage import DamageLog
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.decode.sampler import check_guidable
from gptv_jax.errors import InputError, list_differences
from gptv_jax.runs.context import Context
from gptv_jax.runs.folder import RunFolder
from gptv_jax.runs.record import has_finished
from gptv_jax.stages import STAGES, pretrained
from gptv_jax.stages import codec as codecs
from gptv_jax.stages.select import choose_stages
from gptv_jax.tokens import Codec, TokenDefinition
from gptv_jax.train.metrics import MetricWriter


def open_run(config: config_lib.Config, workdir: str, wanted: list[str] | None = None) -> Context:
    """Makes the run folder, or goes on in it, and prepares what the stages read.

    Args:
      config: of the run.
      workdir: its folder.
      wanted: names of stages; None for all that the configuration has.

    Raises:
      InputError: the mesh, the network, the data and the stages do not fit each other, the folder
        cannot be written, or another configuration made it (every field that differs is listed).
    """
    if "://" in (config.init_from or ""):
        raise InputError(f"config.init_from={config.init_from} is an address; it takes a folder.")
    check_same_settings(config)
    mesh = sharding.make_mesh(config.mesh)
    folder = RunFolder(config, workdir)
    opened = {split: sources.open_source(config.data, split) for split in sources.SPLITS}
    classes = opened["train"].classes
    rules.check_classes(config, classes)
    stages = choose_stages(config, classes, wanted)
    for name in stages:
        if STAGES[name].on_request or not folder.finished(name):
            STAGES[name].check(config, mesh)
    if {"sample", "generate"} & set(stages) and config.sample.guidance != 1:
        check_guidable(config.model, f"config.sample.guidance is {config.sample.guidance:g}")
    for entries in _training_transforms(config, stages):
        transforms.check(entries, config.data.eval_transforms)
    data = {
        "images": {split: len(source) for split, source in opened.items()},
        "classes": getattr(sources.open_data_set(config.data), "class_names", classes),
    }
    hosts.from_first(lambda: _prepare(config, folder, stages, data))
    files.claim(folder.path, "workdir")  # every process names the damaged images that it meets
    images = Pipeline(config.data, None, config.seed, folder.path, sharding.batch_share(mesh))
    log = MetricWriter(folder.path)
    return with_codec(Context(config, mesh, folder, log, images, classes, tuple(stages)))


def with_codec(context: Context) -> Context:
    """The context with its codec, unless the tokenizer is still to be trained."""
    definition = _kept_definition(context)
    untrained = definition is None and context.config.tokens.kind in tokens.DEFINITIONS
    return context if untrained else context.with_definition(definition)


def check_same_settings(config: config_lib.Config) -> None:
    """Raises InputError where processes have different settings, the place of the data apart."""
    place = ("config.data.dir", "config.data.path")
    own = {k: v for k, v in fields.flatten(config, "config.").items() if k not in place}
    first, *others = hosts.from_all(own)
    differing = [line for other in others for line in list_differences(first, other)]
    if differing:
        raise InputError(
            f"the processes were given different settings: {'; '.join(dict.fromkeys(differing))}. "
            "Start all of them by the same command."
        )


def _prepare(config: config_lib.Config, folder: RunFolder, stages: list[str], data: dict) -> None:
    """Finds or makes the codec, checks it and the pretrained weights, and claims the folder."""
    kind, found = config.tokens.kind, codecs.find_codec(config, folder.path)
    if (
        not found
        and folder.has_checkpoints
        and (kind != "learned" or has_finished(folder.summary(), "tokenizer"))
    ):
        raise InputError(f"{folder.path} has lost its {tokens.DEFINITIONS[kind][0]}; restore it.")
    if not found and kind == "learned" and "tokenizer" not in stages:
        raise InputError(
            "config.tokens.kind=learned needs a tokenizer; run --stages=tokenizer first, or "
            "name one by config.tokens.tokenizer."
        )
    trained_here = not found and kind == "learned"
    if found or trained_here:
        _try_out(config, stages, found)
    if config.init_from or not {"pretrain", "tokenizer"} & set(stages):
        pretrained.check(config, folder.path, found)
    folder.claim(data)
    if not found and not trained_here:
        found = codecs.build_codec(config, DamageLog(config.data, folder.path))
        _try_out(config, stages, found)
    if found:
        tokens.save_definition(found.definition, folder.path)


def _try_out(config: config_lib.Config, stages: list[str], codec: Codec | None) -> None:
    """Checks that the images, every list of transforms and the codec fit each other."""
    data = config.data
    channels = config.tokens.autoencoder.channels
    shape = codec.image_shape if codec else (data.image_size, data.image_size, channels)
    for entries in dict.fromkeys([*_training_transforms(config, stages), data.eval_transforms]):
        pipeline.try_out(data, codec, shape, entries)


def _training_transforms(config: config_lib.Config, stages: list[str]) -> list[tuple[str, ...]]:
    """The lists of transforms that the stages train with."""
    sections = [STAGES[name].own_transforms for name in stages if STAGES[name].own_transforms]
    own = [operator.attrgetter(f"{each}.train_transforms")(config) for each in sections]
    return [config.data.train_transforms, *(entries for entries in own if entries)]


def _kept_definition(context: Context) -> TokenDefinition | None:
    """The palette or tokenizer in process 0's run folder, on all processes; None: there is none."""
    kind, folder = context.config.tokens.kind, context.folder.path
    if kind not in tokens.DEFINITIONS or jax.process_count() == 1:
        return tokens.load_definition(kind, folder)
    path = folder / tokens.DEFINITIONS[kind][0]
    first = jax.process_index() == 0
    content = hosts.bytes_of_first(path.read_bytes() if first and path.exists() else b"")
    with tempfile.TemporaryDirectory() as copies:
        (pathlib.Path(copies) / path.name).write_bytes(content)
        return tokens.load_definition(kind, pathlib.Path(copies)) if content else None
