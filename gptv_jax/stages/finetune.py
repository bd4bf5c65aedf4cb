"""Fine-tuning: the pretrained network learns to classify while it goes on predicting tokens.

Beside it the same network trained from scratch, with the same settings and budget.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gptv_jax import sharding
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.model import flops
from gptv_jax.model.gpt import Network
from gptv_jax.runs.context import Context
from gptv_jax.stages import pretrained
from gptv_jax.train import loop, objective, optimizer, step

STATISTICS = 2_000  # training images at most that the head's input is measured on
MIN_DEVIATION = 1e-6  # a feature that varies less is only centred


def run_stage(context: Context) -> dict:
    """Fine-tunes twice, pretrained and from scratch; returns the summary's numbers."""
    config, settings = context.config, context.config.finetune
    headless, network = context.network(), context.network(context.classes)
    eval_step = step.make_eval_step(network)
    loss = step.joint_loss(
        network, settings.generative_coefficient, settings.classification_coefficient
    )
    batch_size = settings.train.batch_size

    def batches(position: int):
        return context.data.train(batch_size, position, settings.train_transforms)

    def evaluate(params: dict, split: str = "validation") -> dict:
        return loop.evaluate_all(eval_step, params, context.data.evaluation(split, batch_size))

    @functools.cache  # compiled once where both trainings are alike
    def compiled(layer_decay: float) -> tuple[optax.GradientTransformation, Callable, Callable]:
        update, rate = optimizer.make_optimizer(
            settings.train.optimizer,
            settings.train.steps,
            layer_decay,
            config.model.relative_width,
        )
        start = jax.jit(lambda params: step.state_of(params, update, settings.train.ema))
        train_step = step.make_train_step(
            loss,
            update,
            rate,
            microbatches=settings.train.microbatches,
            seed=config.seed,
            ema=settings.train.ema,
        )
        return update, start, train_step

    def tune(name: str, weights: dict, layer_decay: float) -> dict:
        update, start, train_step = compiled(layer_decay)
        with Checkpoints(
            context.folder.checkpoints(name), settings.train.keep_checkpoints
        ) as checkpoints:
            fitted = loop.fit(
                name,
                settings.train,
                length=network.length,
                flops=flops.training(network).total,
                checkpoints=checkpoints,
                log=context.log,
                initial=lambda: start(_with_head(context, network, weights)),
                abstract=sharding.abstract(step.make_init(network, update, settings.train.ema)),
                train_step=train_step,
                batches=batches,
                evaluate=evaluate,
                patience=settings.patience,
            )
        chosen = next(e for e in fitted.evaluations if e["step"] == fitted.step)
        test = evaluate(fitted.params, "test")
        return {
            "steps": fitted.step,
            "validation_accuracy": chosen["accuracy"],
            "test_accuracy": test["accuracy"],
            "test_nats_per_token": test["nats_per_token"],
            **fitted.sessions,
        }

    found = pretrained.load(context, headless)
    tuned = tune("finetune", found.params, settings.layer_decay)
    initial = jax.jit(headless.init)(jax.random.key(config.seed))
    scratch = tune("finetune_scratch", initial, layer_decay=1.0)
    floor = {f"scratch_{name}": value for name, value in scratch.items()}
    return {"classes": context.classes, **tuned, **floor, **found.numbers}


def _with_head(context: Context, network: Network, weights: dict) -> dict:
    """The weights, which nobody else may use any more, with a fresh class head."""
    head = jax.jit(network.init)(jax.random.key(context.config.seed))["classifier"]
    if context.config.finetune.standardize:
        center, scale = _statistics(context, network, weights | {"classifier": head})
        head |= {"class_center": center, "class_scale": scale}
    return weights | {"classifier": head}


def _statistics(context: Context, network: Network, params: dict) -> tuple[jax.Array, jax.Array]:
    """Mean and inverse standard deviation of the head's input over training images, each [D]."""

    @jax.jit
    def sums(params, batch):
        pooled = objective.evaluated(network, params, batch)[0].pooled[-1]
        mask = batch["mask"][:, None]
        return mask.sum(), (mask * pooled).sum(axis=0), (mask * pooled**2).sum(axis=0)

    total = None
    for batch in context.data.evaluation(
        "train", context.config.finetune.train.batch_size, STATISTICS
    ):
        part = sums(params, sharding.global_batch(batch))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    count, first, second = total
    mean = first / count
    deviation = jnp.sqrt(jnp.maximum(second / count - mean**2, 0.0))
    return mean, 1 / jnp.maximum(deviation, MIN_DEVIATION)
