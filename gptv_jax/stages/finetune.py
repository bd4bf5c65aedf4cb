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
from gptv_jax.runs.run import Run
from gptv_jax.train import loop, objective, optimizer, step

STATISTICS = 2_000  # training images at most that the head's input is measured on
MIN_DEVIATION = 1e-6  # a feature that varies less is only centred


def run_stage(run: Run) -> dict:
    """Fine-tunes twice, pretrained and from scratch; returns the summary's numbers."""
    config, settings = run.config, run.config.finetune
    headless, network = run.network(), run.network(run.classes)
    eval_step = step.make_eval_step(network)
    loss = step.joint_loss(
        network, settings.generative_coefficient, settings.classification_coefficient
    )
    batch_size = settings.train.batch_size

    def batches(position: int):
        return run.data.train(batch_size, position, settings.train_transforms)

    def evaluate(params: dict, split: str = "validation") -> dict:
        return loop.evaluate_all(eval_step, params, run.data.evaluation(split, batch_size))

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
        with Checkpoints(run.checkpoints(name), settings.train.keep_checkpoints) as checkpoints:
            fitted = loop.fit(
                name,
                settings.train,
                length=network.length,
                flops=flops.training(network).total,
                checkpoints=checkpoints,
                log=run.metrics,
                initial=lambda: start(_with_head(run, network, weights)),
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

    tuned = tune("finetune", run.pretrained(headless), settings.layer_decay)
    initial = jax.jit(headless.init)(jax.random.key(config.seed))
    scratch = tune("finetune_scratch", initial, layer_decay=1.0)
    return {"classes": run.classes} | tuned | {f"scratch_{k}": v for k, v in scratch.items()}


def _with_head(run: Run, network: Network, weights: dict) -> dict:
    """The weights, which nobody else may use any more, with a fresh class head."""
    head = jax.jit(network.init)(jax.random.key(run.config.seed))["classifier"]
    if run.config.finetune.standardize:
        center, scale = _statistics(run, network, weights | {"classifier": head})
        head |= {"class_center": center, "class_scale": scale}
    return weights | {"classifier": head}


def _statistics(run: Run, network: Network, params: dict) -> tuple[jax.Array, jax.Array]:
    """Mean and inverse standard deviation of the head's input over training images, each [D]."""

    @jax.jit
    def sums(params, batch):
        pooled = objective.evaluated(network, params, batch)[0].pooled[-1]
        mask = batch["mask"][:, None]
        return mask.sum(), (mask * pooled).sum(axis=0), (mask * pooled**2).sum(axis=0)

    total = None
    for batch in run.data.evaluation("train", run.config.finetune.train.batch_size, STATISTICS):
        part = sums(params, sharding.global_batch(batch))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    count, first, second = total
    mean = first / count
    deviation = jnp.sqrt(jnp.maximum(second / count - mean**2, 0.0))
    return mean, 1 / jnp.maximum(deviation, MIN_DEVIATION)
