"""Fine-tuning: the pretrained network learns a task, `config.task`, or from teachers of classes.

Unless `finetune.scratch` is False, the same network is trained from scratch beside it, with the
same settings and budget.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator

import jax

from gptv_jax import config as config_lib
from gptv_jax import files, hosts, sharding, tasks
from gptv_jax.checkpoint import Checkpoints, newest_step
from gptv_jax.data import pipeline, sources, whole_videos
from gptv_jax.data.records import Record
from gptv_jax.errors import shorten
from gptv_jax.model.gpt import Network
from gptv_jax.planning.finetuning import Finetuning
from gptv_jax.runs import accuracy, pictures
from gptv_jax.runs.context import Context
from gptv_jax.stages import comparison, pretrained, teachers
from gptv_jax.tasks.task import Records, Task
from gptv_jax.tokens import Codec
from gptv_jax.train import distillation, loop, step

LOG = logging.getLogger(__name__)


def run_stage(context: Context) -> dict:
    """Fine-tunes pretrained weights, then from scratch; returns the summary's numbers."""
    config, settings, task = context.config, context.config.finetune, _measured(context)
    train, batch_size, network = settings.train, settings.train.batch_size, task.network()
    networks, frozen = teachers.load(context, "finetune")
    # Without layer decay both trainings are one object, whose train step is compiled once.
    adapting = scratch = Finetuning(config, networks, given=task)
    if settings.layer_decay != 1:
        scratch = dataclasses.replace(adapting, from_scratch=True)
    reading = {"example": task.example if task.parts() else None, "pixels": task.pixels}
    batches = functools.partial(
        context.data.train, batch_size, entries=settings.train_transforms, **reading
    )
    mixup = settings.distill.mixup if networks else 0.0
    evaluation = functools.partial(context.data.evaluation, batch_size=batch_size, **reading)
    scored = functools.partial(evaluation, clips=settings.clips)
    key = jax.random.key(config.seed)
    known = sources.open_source(config.data, "test").annotations

    @functools.cache
    def metric(split: str) -> step.Metric:
        made = task.test_metric if split == "test" else task.metric
        return made(network, sources.open_source(config.data, split).annotations)

    def evaluate(params: dict) -> dict:
        validation = scored("validation", limit=task.validation_images)
        return metric("validation").measure(params, validation)

    def fit(name: str, weights: Callable[[], dict], training: Finetuning) -> loop.Fitted:
        """The finished training of this name, with the teachers that it has."""
        start, taught = jax.jit(training.start), bool(training.teachers)
        mixing = {"mixup": mixup} if taught else {}
        with Checkpoints(context.folder.checkpoints(name), train.keep_checkpoints) as checkpoints:
            return loop.fit(
                name,
                training.train,
                length=network.length,
                flops=training.flops.total,
                checkpoints=checkpoints,
                log=context.log,
                initial=lambda: start(task.begin(network, weights(), evaluation)),
                abstract=sharding.abstract(training.init),
                train_step=lambda state, batch: training.train_step(
                    state, batch, frozen if taught else None
                ),
                batches=functools.partial(batches, **mixing),
                evaluate=evaluate,
                primary=task.primary,
                patience=settings.patience,
            )

    def tune(
        name: str, weights: Callable[[], dict], training: Finetuning
    ) -> tuple[dict, dict, loop.Fitted]:
        """The training's numbers, the sums over the test images, and the training."""
        fitted = fit(name, weights, training)
        chosen = next(e for e in fitted.evaluations if e["step"] == fitted.step)
        LOG.info("%s measures the weights of step %d on the test images.", name, fitted.step)
        views = (scored("test", extra=extra) for extra in task.views())
        total = metric("test").sums(fitted.params, itertools.chain.from_iterable(views))
        videos = functools.partial(whole_videos.records, config.data, "test")
        total |= task.whole(network, fitted.params, context.codec, videos)
        tested, first = metric("test").result(total), next(iter(task.primary))
        tested = tested | task.details(total, known)
        return {
            "steps": fitted.step,
            **{f"validation_{n}": chosen[n] for n in (first, *task.validated)},
            **{f"test_{n}": value for n, value in tested.items() if n not in task.unreported},
            **fitted.sessions,
        }, total, fitted  # fmt: skip

    def from_scratch() -> dict:
        return jax.jit(network.init)(key)

    weights, training, beside, origin = from_scratch, scratch, {}, {"pretrained": False}
    if possible := config.tokens.kind != "none":
        found = pretrained.load(context)
        weights = lambda: begin_with(network, found.params, key)  # noqa: E731
        training, origin = adapting, found.numbers
    else:
        LOG.info("finetune trains from scratch: config.tokens.kind=none cannot be pretrained.")
    tuned, total, fitted = tune("finetune", weights, training)
    images = accuracy.images(config.data)
    if limit := task.validation_images:  # the images that the validation's numbers are of
        images["validation_images"] = min(limit, images["validation_images"])
    if "images" in total:
        images["test_images"] = int(total["images"]) // len(task.views())
    bounds = _write(context, task, total, known)
    if settings.scratch and possible:
        LOG.info("finetune_scratch trains random initial weights in the same way, as the floor.")
        numbers, *_ = tune("finetune_scratch", from_scratch, scratch)
        beside = {f"scratch_{name}": value for name, value in numbers.items()}
    if networks:
        begun = comparison.origin(context)
        if begun == comparison.ALONE:  # read only where the training begins
            weights = lambda: begin_with(network, pretrained.load(context, begun).params, key)  # noqa: E731
        alone = functools.partial(fit, weights=weights)
        beside |= _beside_teachers(context, training, frozen, fitted, scored, alone)
        if settings.distill.compare:
            beside["without_teacher_begins_with"] = begun
    named = {"classes": len(task.names)} if task.names else {}
    return {**named, **images, **tuned, **bounds, **beside, **origin}


def _beside_teachers(
    context: Context,
    training: Finetuning,
    frozen: dict,
    fitted: loop.Fitted,
    scored: Callable,
    fit: Callable,
) -> dict[str, float | int | None]:
    """Numbers of the student beside its teachers and, if asked for, beside itself without them."""
    settings, network = training.config.finetune, training.network
    metric = distillation.make_metric(network, training.teachers, frozen)
    splits = {split: functools.partial(scored, split) for split in ("validation", "test")}
    measured = functools.partial(comparison.measure, metric, splits)

    def train(name: str, steps: int) -> loop.Fitted:
        longer = dataclasses.replace(settings.train, steps=steps)
        alone = dataclasses.replace(settings, train=longer, distill=config_lib.Matching())
        config = dataclasses.replace(training.config, finetune=alone)
        plain = dataclasses.replace(training, config=config, teachers=())
        return fit(name, training=plain)

    own = measured(fitted.params)
    mine = {f"{split}_accuracy" for split in splits}  # which the summary has
    found = {name: value for name, value in own.items() if name not in mine}
    if settings.distill.compare:
        given = context.folder, "finetune", fitted, own, settings.train.steps, "test_accuracy"
        found |= comparison.without_teachers(*given, measured, train)
    return found


def _measured(context: Context) -> Task:
    """The task with what it knows of the training data, which the run folder keeps."""
    config, task = context.config, context.task
    path = context.folder.path / tasks.MEASURED

    def records(count: int) -> Iterator[Record]:
        log = context.images.damage_log
        how = {"annotated": True, "anywhere": config.data.frames > 0}
        return pipeline.images(config.data, "train", log, count, config.seed, **how)

    def content() -> bytes:
        # A training that has begun keeps what its weights mean.
        place = context.folder.checkpoints("finetune")
        if path.exists() and place.exists() and newest_step(place) > 0:
            return path.read_bytes()
        if found := task.measure(records):
            files.replace(path, found)
        return found

    return dataclasses.replace(task, measured=hosts.from_first(content))


def begin_with(network: Network, given: dict, key: jax.Array) -> dict:
    """The network's weights: those `given` of equal name and shape, and new ones for the others."""
    wanted, held = sharding.by_name(sharding.abstract(network.init)), sharding.by_name(given)
    taken = [n for n, leaf in wanted.items() if n in held and held[n].shape == leaf.shape]
    new = [name for name in wanted if name not in taken]
    left = [name for name in held if name not in taken]
    LOG.info(
        "finetune takes %s from the pretrained weights, begins anew: %s, and leaves out: %s.",
        *(shorten(names) or "nothing" for names in (taken, new, left)),
    )

    def fresh(key: jax.Array) -> dict:  # what is taken is not drawn, as nothing reads it
        drawn = sharding.by_name(network.init(key))
        return {name: drawn[name] for name in new}

    leaves = {name: held[name] for name in taken} | (jax.jit(fresh)(key) if new else {})
    structure = jax.tree.structure(sharding.abstract(network.init))
    return jax.tree.unflatten(structure, [leaves[name] for name in wanted])


def _pictured(codec: Codec | None, source: sources.Source, index: int) -> Record:
    """The record with its image, which the tokens of a cache stand for."""
    record = source[index]
    if "tokens" not in record:
        return record
    tokens = pipeline.to_tokens(codec, record)[None]
    return record | {"image": codec.picture(codec.decode(tokens))[0]}


def _write(context: Context, task: Task, total: dict, known: Records) -> dict[str, float | None]:
    """Writes what is known of the test images, and returns floors and ceilings of the numbers."""
    config, folder = context.config, context.folder.path
    if "confusion" in total:
        training = sources.open_source(config.data, "train").label_counts()
        confusion, names = total["confusion"], context.task.classes
        accuracy.write(folder / "finetune", confusion, names, training, split="test")
    if jax.process_index() == 0:
        for name, content in task.files(total, known).items():
            files.write_json(folder / "finetune" / name, content)
        examples = pipeline.open_examples(config.data, "test", config.data.eval_transforms)
        shown = functools.partial(_pictured, context.codec, examples.source)
        for name, picture in task.show(shown, total).items():
            pictures.save(picture, folder / "samples" / f"{name}.png")
    bounds = task.bounds(total, known)
    return {f"{b}_test_{n}": value for b, numbers in bounds.items() for n, value in numbers.items()}
