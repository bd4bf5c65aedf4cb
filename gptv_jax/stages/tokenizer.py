"""The tokenizer: an encoder and decoder learn to restore images from few codes.

Every later stage then works on these codes; the trained network is kept in the run folder as
tokenizer.safetensors, which other runs may name as config.tokens.tokenizer.
"""

import functools
import itertools
import logging
import math

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptv_jax import sharding, tokens
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.data import pipeline
from gptv_jax.model import flops
from gptv_jax.model.gpt import parameter_count
from gptv_jax.runs import pictures
from gptv_jax.runs.context import Context
from gptv_jax.tokens import Tokenizer
from gptv_jax.train import autoencoding, loop, metrics, optimizer
from gptv_jax.weights import lpips

LOG = logging.getLogger(__name__)
SHOWN = 16  # test images in the picture of reconstructions


def run_stage(context: Context) -> dict:
    """Trains `config.tokenizer.train.steps` steps; the test split's numbers for the summary."""
    config, settings = context.config, context.config.tokenizer
    network, train = config.tokens.autoencoder, config.tokenizer.train
    update, rate = optimizer.make_optimizer(train.optimizer, train.steps)
    init = autoencoding.make_init(network, settings, update)
    eval_step = autoencoding.make_eval_step(network)
    length = math.prod(config.tokens.grid(config.data.image_size))
    needed = flops.of_autoencoder(network, config.data.image_size).times(3).total // length
    train_step = autoencoding.make_train_step(network, settings, update, rate, seed=config.seed)
    if settings.lpips:
        vgg = lpips.load(settings.lpips_weights)
        vgg = jax.device_put(vgg, NamedSharding(context.mesh, P()))
        train_step = functools.partial(train_step, vgg=vgg)

    def batches(position: int):
        return context.images.train(train.batch_size, position, settings.train_transforms)

    def evaluate(params: dict, split: str = "validation") -> dict:
        images = context.images.evaluation(split, train.batch_size)
        found = autoencoding.health(loop.totals(eval_step, params, images))
        found["collapsed"] = found["codes_used"] < settings.least_used * found.pop("most_used")
        # Before the first step, when nothing is saved yet, few codes in use are no news.
        if found["collapsed"] and checkpoints.steps():
            LOG.warning(
                "the codebook collapses: %.1f%% of %d codes are in use on %s, less than the share "
                "config.tokenizer.least_used=%s of those that could be.",
                *(100 * found["codes_used"], network.vocabulary, split, settings.least_used),
            )
        return found

    with Checkpoints(
        context.folder.checkpoints("tokenizer"), train.keep_checkpoints
    ) as checkpoints:
        fitted = loop.fit(
            "tokenizer",
            train,
            length=length,
            flops=needed,
            checkpoints=checkpoints,
            log=context.log,
            initial=lambda: jax.jit(init)(jax.random.key(config.seed)),
            abstract=sharding.abstract(init),
            train_step=train_step,
            batches=batches,
            evaluate=evaluate,
        )
    found, speed = evaluate(fitted.params, "test"), fitted.tokens_per_second
    tokenizer = Tokenizer(network, _on_host(fitted.params), _provenance(context, fitted.step))
    if jax.process_index() == 0:
        tokens.save_lexicon(tokenizer, context.folder.path)
    _picture(context.with_lexicon(tokenizer))
    return {
        "params": parameter_count(fitted.params),
        "steps": fitted.step,
        "codes": network.vocabulary,
        "tokens": length,
        **{f"test_{name}": found[name] for name in ("psnr_db", "ssim", "mse", "idempotence")},
        **{name: found[name] for name in ("codes_used", "dead_codes", "perplexity", "collapsed")},
        "train_images_per_second": speed and speed / length,
        "mfu": metrics.mfu(needed, speed),
        **fitted.sessions,
    }


def _on_host(params: dict) -> dict[str, np.ndarray]:
    """The weights by flat name, whole, on every process."""
    whole = jax.jit(lambda tree: jax.tree.map(lambda x: jax.sharding.reshard(x, P()), tree))(params)
    return {name: np.asarray(leaf) for name, leaf in sharding.by_name(whole).items()}


def _provenance(context: Context, steps: int) -> dict:
    data, settings = context.config.data, context.config.tokenizer
    return {
        "data": data.name,
        "split": data.train_split,
        "image_size": data.image_size,
        "transforms": list(settings.train_transforms or data.train_transforms),
        "steps": steps,
        "batch_size": settings.train.batch_size,
        "seed": context.config.seed,
    }


def _picture(context: Context) -> None:
    """Writes samples/reconstructions.png: test images, each beside what its codes restore."""
    elements = pipeline.images(context.config.data, "test", context.images.ledger)
    images = np.stack([e["image"] for e in itertools.islice(elements, SHOWN)])
    restored = context.codec.decode(context.codec.encode(images))
    if jax.process_index() == 0:
        pairs = np.stack([context.codec.picture(x) for x in (images, restored)], axis=1)
        grid = pictures.grid(pairs.reshape(-1, *pairs.shape[2:]), columns=8)
        pictures.save(grid, context.folder.path / "samples" / "reconstructions.png")
