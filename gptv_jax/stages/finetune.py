"""Fine-tuning: the pretrained network learns to classify while it goes on predicting tokens.

Unless `finetune.scratch` is False, the same network is trained from scratch beside it, with the
same settings and budget.
"""

import functools
import logging
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptv_jax import sharding
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.data import sources
from gptv_jax.model import flops
from gptv_jax.model.gpt import Network
from gptv_jax.probe import features
from gptv_jax.runs import accuracy
from gptv_jax.runs.context import Context
from gptv_jax.stages import pretrained
from gptv_jax.train import loop, optimizer, step

LOG = logging.getLogger(__name__)


def run_stage(context: Context) -> dict:
    """Fine-tunes pretrained weights, then from scratch; returns the summary's numbers."""
    config, settings = context.config, context.config.finetune
    train, batch_size = settings.train, settings.train.batch_size
    headless, network = context.network(), context.network(context.classes)
    metric = step.make_metric(network, confusion=True)
    coefficients = settings.generative_coefficient, settings.classification_coefficient
    loss = step.make_loss(network, *coefficients)
    batches = functools.partial(context.data.train, batch_size, entries=settings.train_transforms)

    def evaluate(params: dict, split: str = "validation") -> dict:
        return metric.measure(params, context.data.evaluation(split, batch_size))

    @functools.cache  # both trainings share the compiled step where their layer decay is the same
    def compiled(layer_decay: float) -> tuple[optax.GradientTransformation, Callable, Callable]:
        update, rate = optimizer.make_optimizer(
            train.optimizer, train.steps, layer_decay, config.model.relative_width
        )
        start = jax.jit(lambda params: step.state_of(params, update, train.ema))
        train_step = step.make_train_step(
            loss, update, rate, microbatches=train.microbatches, seed=config.seed, ema=train.ema
        )
        return update, start, train_step

    def tune(name: str, weights: dict, layer_decay: float) -> tuple[dict, dict]:
        """The training's numbers, and the sums over the test images."""
        update, start, train_step = compiled(layer_decay)
        with Checkpoints(context.folder.checkpoints(name), train.keep_checkpoints) as checkpoints:
            fitted = loop.fit(
                name,
                train,
                length=network.length,
                flops=flops.training(network).total,
                checkpoints=checkpoints,
                log=context.log,
                initial=lambda: start(_with_head(context, headless, network, weights)),
                abstract=sharding.abstract(step.make_init(network, update, train.ema)),
                train_step=train_step,
                batches=batches,
                evaluate=evaluate,
                primary=metric.primary,
                patience=settings.patience,
            )
        chosen = next(e for e in fitted.evaluations if e["step"] == fitted.step)
        LOG.info("%s measures the weights of step %d on the test images.", name, fitted.step)
        sums = metric.sums(fitted.params, context.data.evaluation("test", batch_size))
        test = metric.result(sums)
        return {
            "steps": fitted.step,
            "validation_accuracy": chosen["accuracy"],
            "test_accuracy": test["accuracy"],
            "test_nats_per_token": test["nats_per_token"],
            **fitted.sessions,
        }, sums

    found, floor = pretrained.load(context, headless), {}
    tuned, sums = tune("finetune", found.params, settings.layer_decay)
    images = accuracy.images(config.data) | {"test_images": int(sums["images"])}
    if "confusion" in sums:
        training = sources.open_source(config.data, "train").label_counts()
        folder, names = context.folder.path / "finetune", context.class_names
        accuracy.write(folder, sums["confusion"], names, training, split="test")
    if settings.scratch:
        LOG.info("finetune_scratch trains random initial weights in the same way, as the floor.")
        initial = jax.jit(headless.init)(jax.random.key(config.seed))
        scratch, _ = tune("finetune_scratch", initial, layer_decay=1.0)
        floor = {f"scratch_{name}": value for name, value in scratch.items()}
    return {"classes": context.classes, **images, **tuned, **floor, **found.numbers}


def _with_head(context: Context, headless: Network, network: Network, weights: dict) -> dict:
    """The weights with a new class head, whose input is standardised where the config says so."""
    settings = context.config.finetune
    LOG.info("finetune adds a head for %d classes to the weights.", context.classes)
    head = jax.jit(network.init)(jax.random.key(context.config.seed))["classifier"]
    if settings.standardize:

        def batches(split: str):
            return context.data.evaluation(split, settings.train.batch_size, features.MEASURED)

        def last_layer(split: str):
            every = features.of_network(headless, weights, batches, raw=False)(split)
            return ((x[:, -1:], batch) for x, batch in every)

        mean, deviation = features.statistics(last_layer)
        whole = NamedSharding(context.mesh, P())
        for name, value in (("class_center", mean[0]), ("class_scale", 1 / deviation[0])):
            head[name] = jax.device_put(value.astype(np.float32), whole)
    return weights | {"classifier": head}
