"""Pretraining: the network learns to predict the next image token."""

import functools

import jax

from gptv_jax import sharding
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.model.gpt import parameter_count
from gptv_jax.probe import features, ridge
from gptv_jax.run import Run
from gptv_jax.train import loop, metrics, optimizer, step


def run_stage(run: Run) -> dict:
    """Trains `config.train.steps` steps and measures the test split once; the summary's numbers."""
    config = run.config
    network, batch_size = run.network(), config.train.batch_size
    update, rate = optimizer.make_optimizer(config.train.optimizer, config.train.steps)
    init = step.make_init(network, update)
    eval_step = step.make_eval_step(network)

    def evaluate(params: dict, split: str = "validation") -> dict:
        return loop.evaluate_all(eval_step, params, run.data.evaluation(split, batch_size))

    def probe(params: dict) -> dict:
        raw, images = config.probe.features == "raw", features.batches(run.data, config.probe)
        read = features.of_network(network, params, images, raw=raw)
        return ridge.quick_table(read, run.classes, config.probe.ridge)

    with Checkpoints(run.checkpoints("pretrain"), config.train.keep_checkpoints) as checkpoints:
        fitted = loop.fit(
            "pretrain",
            config.train,
            network,
            checkpoints=checkpoints,
            log=run.metrics,
            initial=lambda: jax.jit(init)(jax.random.key(config.seed)),
            abstract=sharding.abstract(init),
            train_step=step.make_train_step(
                step.generative_loss(network),
                update,
                rate,
                microbatches=config.train.microbatches,
                seed=config.seed,
            ),
            batches=functools.partial(run.data.train, batch_size),
            evaluate=evaluate,
            measure=probe,
            measure_every=config.probe.every,
        )

    nats = evaluate(fitted.params, "test")["nats_per_token"]
    return {
        "params": parameter_count(fitted.params),
        "steps": fitted.step,
        "validation_nats_per_token": fitted.evaluations[-1]["nats_per_token"],
        "test_nats_per_token": nats,
        "test_bits_per_token": metrics.bits(nats),
        "train_tokens_per_second": fitted.tokens_per_second,
        "mfu": metrics.mfu(network, fitted.tokens_per_second),
    }
