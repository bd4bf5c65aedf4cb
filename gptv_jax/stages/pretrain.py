"""Pretraining: the network learns to predict the next image token, also from teachers.

A class-conditional network is evaluated with the images' classes.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import jax
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import hosts, sharding
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.model.gpt import parameter_count
from gptv_jax.planning.training import Pretraining
from gptv_jax.probe import features, ridge
from gptv_jax.runs.context import Context
from gptv_jax.stages import comparison, pretrained, teachers
from gptv_jax.tasks.network import network_of
from gptv_jax.tokens.codec import Codec, TokenStatistics
from gptv_jax.train import distillation, loop, metrics, step

LOG = logging.getLogger(__name__)
SCORE = "nats_per_token"  # by which a student is compared with its teacher


def run_stage(context: Context) -> dict:
    """Trains `config.train.steps` steps and measures the test split once; the summary's numbers.

    Begins with the weights of `config.init_from`, if given, else with random weights.
    """
    config, train = context.config, context.config.train
    networks, frozen = teachers.load(context, "pretrain")
    training = Pretraining(config, networks)
    network, metric = training.network, step.make_metric(training.network)
    token_flops = training.flops.total
    origin = {"init_from": config.init_from} if config.init_from else {}

    def initial(training: Pretraining) -> dict:
        """The state before the first step."""
        if not config.init_from:
            return jax.jit(training.init)(jax.random.key(config.seed))
        found = pretrained.load_given(context)
        LOG.info("Pretraining goes on from the weights of %s.", config.init_from)
        return jax.jit(training.start)(found.params)

    def evaluate(params: dict, split: str = "validation") -> dict:
        return metric.measure(params, context.data.evaluation(split, train.batch_size))

    def probe(params: dict) -> dict:
        raw, images = config.probe.features == "raw", features.batches(context.data, config.probe)
        probed = network_of(config, read=config.probe)
        read = features.of_network(probed, params, images, raw=raw)
        rows = ridge.tabulate(read, context.classes, config.probe.ridge, test=False)
        return ridge.summarise(rows)

    taught = config.distill.cached
    read = functools.partial(context.data.train, train.batch_size, stills=True, taught=taught)

    def fit(name: str, training: Pretraining, frozen: dict | None, **more) -> loop.Fitted:
        """The finished training of this name; `more` are arguments of `loop.fit`."""
        place = context.folder.checkpoints(name)
        with Checkpoints(place, train.keep_checkpoints) as checkpoints:
            return loop.fit(
                name,
                training.train,
                length=network.length,
                flops=training.flops.total,
                checkpoints=checkpoints,
                log=context.log,
                initial=functools.partial(initial, training),
                abstract=sharding.abstract(training.init),
                train_step=lambda state, batch: training.train_step(state, batch, frozen),
                batches=read,
                evaluate=evaluate,
                **more,
            )

    more = {"measure": probe, "measure_every": config.probe.every}
    more["profiler"] = metrics.Profiler(config.profile.window, context.folder.path / "profile")
    fitted = fit("pretrain", training, frozen, **more)
    LOG.info("pretrain measures the weights of step %d on the test images.", fitted.step)
    sums = metric.sums(fitted.params, context.data.evaluation("test", train.batch_size))
    nats = metric.result(sums)["nats_per_token"]
    bits, by_frame = nats / math.log(2), sums.get("by_frame", np.zeros(0)) / sums["images"]
    taught = _beside_teachers(context, training, frozen, fitted, fit) if frozen else {}
    return {
        "steps": fitted.step,
        "validation_nats_per_token": fitted.evaluations[-1]["nats_per_token"],
        "test_nats_per_token": nats,
        "test_bits_per_token": bits,
        **{f"test_nats_per_token_of_frame_{i}": float(x) for i, x in enumerate(by_frame, start=1)},
        **_image_numbers(context, bits),
        **taught,
        "train_tokens_per_second": fitted.tokens_per_second,
        "mfu": metrics.mfu(token_flops, fitted.tokens_per_second),
        **fitted.sessions,
        **origin,
        "model/params": parameter_count(fitted.params),
    }


def _beside_teachers(
    context: Context, training: Pretraining, frozen: dict, fitted: loop.Fitted, fit: Callable
) -> dict[str, float | int | None]:
    """Numbers of the student beside its teachers and, if asked for, beside itself without them."""
    config, count, network = context.config, context.config.train.batch_size, training.network
    metric = distillation.make_metric(network, training.teachers, frozen)
    read = functools.partial(context.data.evaluation, batch_size=count)
    splits = {split: functools.partial(read, split) for split in ("validation", "test")}
    measured = functools.partial(comparison.measure, metric, splits)
    alone = dataclasses.replace(config, distill=config_lib.Distill())

    def train(name: str, steps: int) -> loop.Fitted:
        settings = dataclasses.replace(config.train, steps=steps)
        return fit(name, Pretraining(dataclasses.replace(alone, train=settings)), None)

    own = measured(fitted.params)
    found = {n: v for n, v in own.items() if n not in ("validation_" + SCORE, "test_" + SCORE)}
    if config.distill.compare:
        given = context.folder, "pretrain", fitted, own, config.train.steps, f"test_{SCORE}"
        found |= comparison.without_teachers(*given, measured, train)
    return found


def _image_numbers(context: Context, bits: float) -> dict[str, float | None]:
    """Bits per dimension for lossless tokens; for other tokens the distortion of the test images.

    Lossy tokens have no bits per dimension: fewer bits for a coarser image are no better model.
    """
    codec, per_dimension, error, psnr = context.codec, None, None, None
    if codec.lossless:
        error = 0.0
        if context.config.model.objective == "autoregressive":  # BERT's are of masked tokens only
            per_dimension = bits * (math.prod(codec.grid) / math.prod(codec.image_shape))
    elif context.data.has_pixels():
        own = token_statistics(context.images, codec, context.config.train.batch_size)
        # Sums of whole numbers, exact in any order.
        shares = hosts.from_all([own.squared_error, own.values])
        own.squared_error, own.values = map(sum, zip(*shares, strict=True))
        error, psnr = (own.numbers()[name] for name in ("mean_squared_error", "psnr"))
    return {
        "test_bits_per_dimension": per_dimension,
        "test_distortion_mse": error,
        "test_distortion_psnr_db": psnr,
    }


def token_statistics(images: Pipeline, codec: Codec, batch_size: int) -> TokenStatistics:
    """Statistics of this process's share of the test images."""
    statistics = TokenStatistics(codec)
    for batch in images.evaluation("test", batch_size):
        real = batch["image"][batch["mask"] > 0]
        if len(real):
            statistics.add(real, codec.encode(real))
    return statistics
