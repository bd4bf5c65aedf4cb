"""Fine-tuning: the pretrained network learns to classify while it goes on predicting tokens.

Beside it the same network trained from scratch, with the same settings and budget.
"""

import jax
import jax.numpy as jnp

from gptv_jax import sharding
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.data import pipeline
from gptv_jax.run import Run
from gptv_jax.train import loop, optimizer, step

MIN_DEVIATION = 1e-6  # a feature that varies less is only centred


def run_stage(run: Run) -> dict:
    """Fine-tunes twice, pretrained and from scratch; returns the summary's numbers."""
    network = run.network()
    tuned = _tune(run, "finetune", run.pretrained(network))
    fresh = jax.jit(network.init)(jax.random.key(run.config.seed))
    scratch = _tune(run, "finetune_scratch", fresh)
    return (
        {"classes": run.classes}
        | tuned
        | {f"scratch_{name}": value for name, value in scratch.items()}
    )


def _tune(run: Run, name: str, weights: dict) -> dict:
    config, settings = run.config, run.config.finetune
    network = run.network(run.classes)
    update, rate = optimizer.make_optimizer(settings.train.optimizer, settings.train.steps)
    eval_step = step.make_eval_step(network)
    batch_size = settings.train.batch_size

    def initial() -> dict:
        head = jax.jit(network.init)(jax.random.key(config.seed))["classifier"]
        if settings.standardize:
            center, scale = _statistics(run, network, weights | {"classifier": head})
            head |= {"class_center": center, "class_scale": scale}
        params = weights | {"classifier": head}
        # A copy: the first step donates its state, and `weights` is the caller's.
        return jax.jit(lambda p: step.state_of(jax.tree.map(jnp.copy, p), update))(params)

    def evaluate(params: dict, split: str = "validation") -> dict:
        held_out = pipeline.evaluation_batches(config.data, run.codec, split, batch_size)
        return loop.evaluate_all(eval_step, params, held_out)

    loss = step.joint_loss(
        network, settings.generative_coefficient, settings.classification_coefficient
    )
    with Checkpoints(run.checkpoints(name), settings.train.keep_checkpoints) as checkpoints:
        fitted = loop.fit(
            name,
            settings.train,
            network,
            checkpoints=checkpoints,
            log=run.metrics,
            initial=initial,
            abstract=sharding.abstract(step.make_init(network, update)),
            train_step=step.make_train_step(
                loss, update, rate, microbatches=settings.train.microbatches, seed=config.seed
            ),
            batches=lambda position: pipeline.train_batches(
                config.data, run.codec, batch_size, config.seed, position
            ),
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
    }


def _statistics(run: Run, network, params: dict) -> tuple[jax.Array, jax.Array]:
    """Mean and inverse standard deviation of the head's input over the training split, each [D]."""

    @jax.jit
    def sums(params, batch):
        pooled = network.bind(params)(batch["tokens"], batch["variant"]).pooled[-1]
        mask = batch["mask"][:, None]
        return mask.sum(), (mask * pooled).sum(axis=0), (mask * pooled**2).sum(axis=0)

    total = None
    for batch in pipeline.evaluation_batches(
        run.config.data, run.codec, "train", run.config.finetune.train.batch_size
    ):
        part = sums(params, sharding.global_batch(batch))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    count, first, second = total
    mean = first / count
    deviation = jnp.sqrt(jnp.maximum(second / count - mean**2, 0.0))
    return mean, 1 / jnp.maximum(deviation, MIN_DEVIATION)
