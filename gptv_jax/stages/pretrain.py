"""Pretraining: the network learns to predict the next image token.

Of a class-conditional network nats per token are those of an image whose class is told.
"""

import functools
import math

import jax

from gptv_jax import sharding
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.data import pipeline
from gptv_jax.model import flops
from gptv_jax.model.gpt import parameter_count
from gptv_jax.probe import features, ridge
from gptv_jax.runs.context import Context
from gptv_jax.tokens.statistics import TokenStatistics
from gptv_jax.train import loop, metrics, optimizer, profiling, step


def run_stage(context: Context) -> dict:
    """Trains `config.train.steps` steps and measures the test split once; the summary's numbers."""
    config = context.config
    network, batch_size = context.network(), config.train.batch_size
    needed = flops.training(network).total
    update, rate = optimizer.make_optimizer(
        config.train.optimizer, config.train.steps, relative_width=config.model.relative_width
    )
    init = step.make_init(network, update, config.train.ema)
    eval_step = step.make_eval_step(network)

    def evaluate(params: dict, split: str = "validation") -> dict:
        return loop.evaluate_all(eval_step, params, context.data.evaluation(split, batch_size))

    def probe(params: dict) -> dict:
        raw, images = config.probe.features == "raw", features.batches(context.data, config.probe)
        read = features.of_network(network, params, images, raw=raw)
        return ridge.quick_table(read, context.classes, config.probe.ridge)

    with Checkpoints(
        context.folder.checkpoints("pretrain"), config.train.keep_checkpoints
    ) as checkpoints:
        fitted = loop.fit(
            "pretrain",
            config.train,
            length=network.length,
            flops=needed,
            checkpoints=checkpoints,
            log=context.log,
            initial=lambda: jax.jit(init)(jax.random.key(config.seed)),
            abstract=sharding.abstract(init),
            train_step=step.make_train_step(
                step.generative_loss(network, config.train.steps),
                update,
                rate,
                microbatches=config.train.microbatches,
                seed=config.seed,
                ema=config.train.ema,
            ),
            batches=functools.partial(context.data.train, batch_size),
            evaluate=evaluate,
            measure=probe,
            measure_every=config.probe.every,
            profiler=profiling.Profiler(config.profile.window, context.folder.path / "profile"),
        )

    nats = evaluate(fitted.params, "test")["nats_per_token"]
    bits = metrics.bits(nats)
    return {
        "params": parameter_count(fitted.params),
        "steps": fitted.step,
        "validation_nats_per_token": fitted.evaluations[-1]["nats_per_token"],
        "test_nats_per_token": nats,
        "test_bits_per_token": bits,
        **_against_pixels(context, bits),
        "train_tokens_per_second": fitted.tokens_per_second,
        "mfu": metrics.mfu(needed, fitted.tokens_per_second),
        **fitted.sessions,
    }


def _against_pixels(context: Context, bits: float) -> dict[str, float | None]:
    """What bits per token are of the images themselves, which only lossless tokens can tell.

    Of a palette, its distortion instead: fewer bits for a coarser image are no better model of it,
    so they do not compare with bits per dimension.
    """
    codec, distortion = context.codec, {}
    likely = context.config.model.objective == "autoregressive"  # bert tells of hidden tokens alone
    if not codec.lossless and context.data.has_pixels("test"):
        statistics = TokenStatistics(codec)
        images = pipeline.images(context.config.data, "test", context.data.ledger)
        for batch in pipeline.tokenized(codec, images):
            statistics.add(batch["image"], batch["tokens"])
        distortion = statistics.numbers()
    per_dimension = math.prod(codec.grid) / math.prod(codec.image_shape)
    return {
        "test_bits_per_dimension": bits * per_dimension if codec.lossless and likely else None,
        "test_distortion_mse": 0.0 if codec.lossless else distortion.get("mean_squared_error"),
        "test_distortion_psnr_db": distortion.get("psnr"),
    }
