"""The teachers of a stage: found, checked against the student, and loaded onto the mesh."""

import dataclasses
import logging
import operator
import pathlib
from collections.abc import Sequence

from jax.sharding import Mesh

from gptv_jax import config as config_lib
from gptv_jax import hosts, sharding, tokens, weights
from gptv_jax.checkpoint import newest_step
from gptv_jax.data import cached_tokens, transforms
from gptv_jax.errors import InputError, shorten
from gptv_jax.model.gpt import Network
from gptv_jax.runs.context import Context
from gptv_jax.runs.record import RunFolder
from gptv_jax.stages.pretrained import palette_of
from gptv_jax.tasks.network import network_of
from gptv_jax.tokens import Codec
from gptv_jax.tokens.differences import token_differences
from gptv_jax.weights.native import WeightsFile

LOG = logging.getLogger(__name__)
SECTIONS = {"pretrain": "distill", "finetune": "finetune.distill"}  # of the stages with teachers


def settings_of(config: config_lib.Config, stage: str) -> config_lib.Distill:
    """The section of the configuration that names the stage's teachers."""
    return operator.attrgetter(SECTIONS[stage])(config)


def definitions(
    config: config_lib.Config, stages: Sequence[str]
) -> dict[str, tokens.TokenDefinition | None]:
    """The palettes or tokenizers of the teachers of some stages, by the teachers' names."""
    found = {}
    for stage in (each for each in SECTIONS if each in stages):
        for name in settings_of(config, stage).teacher:
            (path, named), kind = _locate(stage, name), config.tokens.kind
            if weights.is_weights_path(path):
                given = weights.read_definition(path)
                # `check` refuses a teacher of another kind of tokens.
                found[named] = given if given and tokens.kind_of(given) == kind else None
            else:
                found[named] = tokens.load_definition(kind, path)
    return found


def check(
    config: config_lib.Config,
    mesh: Mesh,
    stage: str,
    codec: Codec | None,
    classes: Sequence[str] | int = 0,
) -> None:
    """Checks before any work that a stage's teachers can teach its network; for process 0.

    `classes` are the names of the data's classes, or their number without names. Raises InputError
    where a teacher is not found, has other tokens, classes, orders or variants than the student, or
    cannot be split over the mesh.
    """
    settings = settings_of(config, stage)
    for name in settings.teacher:
        named = _locate(stage, name)[1]
        found, _ = _read(stage, name, codec, with_params=False)
        _check_tokens(config, found, named, codec)
        _check_variants(config, found, named, stage)
        if stage == "finetune":
            _check_classes(found, named, classes)
        else:
            _check_orders(config, found, named)
        layers = found.model.layers
        if (settings.teacher_layer or 0) > layers:
            raise InputError(
                f"config.{SECTIONS[stage]}.teacher_layer is {settings.teacher_layer}, but {named} "
                f"has {layers} layers; take at most {layers}, or None."
            )
        try:
            sharding.check(dataclasses.replace(config, model=found.model), mesh, ("model",))
        except InputError as error:
            raise InputError(f"{named} cannot be split over the mesh: {error}") from error


def load(context: Context, stage: str) -> tuple[tuple[Network, ...], dict | None]:
    """The networks of a stage's teachers, and the `frozen` arrays of `train.distillation`.

    The arrays are None where the stage has no teacher. config.json records the teachers' digests.
    InputError: the stage has begun with other teachers.
    """
    networks, params, given = _read_all(context.config, stage, context.codec)
    for name, network in zip(settings_of(context.config, stage).teacher, networks, strict=True):
        size = network.config.layers, network.config.width
        LOG.info("%s has the teacher %s, of %d layers and width %d.", stage, name, *size)
    if given:
        hosts.from_first(lambda: _keep(context.folder, stage, given))
    return networks, {"teachers": params} if params else None


def check_begun(config: config_lib.Config, folder: RunFolder, stage: str) -> None:
    """Checks that a stage, which takes more steps, has the teachers that it began with.

    Every process calls this function, on the mesh, before results are moved away. InputError: the
    teachers are other ones.
    """
    kind = config.tokens.kind
    definition = hosts.from_first(lambda: tokens.load_definition(kind, folder.path))
    lost = definition is None and kind in tokens.DEFINITIONS  # which is refused later
    codec = None if lost else tokens.codec_of(config, definition)
    given = _read_all(config, stage, codec)[2]
    hosts.from_first(lambda: _refuse_changed(folder, stage, given))


def _keep(folder: RunFolder, stage: str, given: dict[str, list]) -> None:
    """Records the teachers of a stage; InputError: the stage began with others. For process 0."""
    place = folder.checkpoints(stage)
    if place.exists() and newest_step(place) > 0:
        _refuse_changed(folder, stage, given)
    folder.keep_teachers(stage, given)


def _refuse_changed(folder: RunFolder, stage: str, given: dict[str, list]) -> None:
    if changed := folder.changed_teachers(stage, given):
        raise InputError(
            f"{folder.path} has begun the stage {stage} with other teachers than "
            f"{shorten(changed)} gives now; restore the weights or the token cache that the stage "
            "began with, or take another --workdir."
        )


def _read_all(
    config: config_lib.Config, stage: str, codec: Codec | None
) -> tuple[tuple[Network, ...], tuple[dict, ...], dict[str, list]]:
    """Networks and weights of a stage's teachers, and the digests of `RunFolder.keep_teachers`."""
    settings, networks, params, given = settings_of(config, stage), [], [], {}
    for name in settings.teacher:
        found, arrays = _read(stage, name, codec, with_params=True)
        networks.append(found.network)
        params.append(arrays)
        given[_locate(stage, name)[1]] = [sharding.hash_params(arrays)]
    if settings.cached:
        taught = cached_tokens.taught_by(config.data)
        drawn = taught.samples, taught.temperature, taught.seed
        given["config.data.path"] = [*taught.digests, *drawn]
    return tuple(networks), tuple(params), given


def _locate(stage: str, name: str) -> tuple[pathlib.Path, str]:
    """The path of a teacher, and its name in messages."""
    named = f"config.{SECTIONS[stage]}.teacher={name}"
    return weights.locate(name, f"{named} does not exist"), named


def _read(
    stage: str, name: str, codec: Codec | None, *, with_params: bool
) -> tuple[WeightsFile, dict]:
    path, named = _locate(stage, name)
    try:
        found = weights.read_stage(path, stage, palette_of(codec), with_params=with_params)
    except InputError as error:
        raise InputError(f"{named} cannot be read: {error}") from error
    kind = found[0].tokens.kind
    if kind in tokens.DEFINITIONS and found[0].definition is None:
        raise InputError(f"{named} has lost its {tokens.DEFINITIONS[kind][0]}; restore it.")
    return found


def _check_tokens(
    config: config_lib.Config, found: WeightsFile, named: str, codec: Codec | None
) -> None:
    if found.task:
        raise InputError(
            f"{named} is fine-tuned for config.task.name={found.task.name}; a teacher predicts "
            "the tokens of images, or their class."
        )
    network, kinds = network_of(config), (found.tokens.kind, config.tokens.kind)
    if differing := token_differences(found.network, found.codec, network, codec, kinds):
        raise InputError(
            f"{named} has {shorten(differing)}; a teacher takes the tokens of its student."
        )


def _check_orders(config: config_lib.Config, found: WeightsFile, named: str) -> None:
    # Fine-tuning reads images in raster order, see `train.step.draw_view`.
    if config.model.random_order and not found.model.random_order:
        raise InputError(
            f"config.model.random_order is {config.model.random_order}, but {named} has read "
            "images in raster order alone; take (), or a teacher with random orders."
        )


def _check_variants(config: config_lib.Config, found: WeightsFile, named: str, stage: str) -> None:
    """InputError: variants of images have the numbers of other shifts of the teacher.

    Images that are not shifted are variant 0 of every teacher, see `objective.start_vectors`.
    """
    section = "config.finetune" if stage == "finetune" else "config.data"
    entries = config.finetune.train_transforms if stage == "finetune" else ()
    if not entries:
        section, entries = "config.data", config.data.train_transforms
    variants, network = transforms.variants(entries), found.network
    known = 1 if network.config.class_tokens else network.starts
    if 1 not in (variants, known) and variants != known:
        raise InputError(
            f"{section}.train_transforms make {variants} variants of an image, but {named} has "
            f"start vectors for {known}, which are other shifts; take the shift of the teacher, or "
            "a teacher with start_per_variant=False."
        )


def _check_classes(found: WeightsFile, named: str, classes: Sequence[str] | int) -> None:
    if isinstance(classes, int):
        classes = tuple(map(str, range(classes)))
    if not found.classes:
        raise InputError(f"{named} has no class head; name a classifier that is fine-tuned.")
    theirs = found.class_names or tuple(map(str, range(found.classes)))
    if theirs != tuple(classes):
        told, ours = (shorten(names, room=60) for names in (theirs, classes))
        raise InputError(
            f"{named} knows {len(theirs)} classes ({told}), and the data have {len(classes)} "
            f"({ours}); a teacher takes the classes of the data, in their order."
        )
