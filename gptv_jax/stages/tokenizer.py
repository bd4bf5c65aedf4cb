"""The tokenizer: an encoder and decoder learn to restore images or clips from few codes.

Every later stage works on these codes. The run folder keeps the trained network as
tokenizer.safetensors, which other runs may name as config.tokens.tokenizer.
"""

import functools
import itertools
import logging
import math

import jax
import numpy as np

from gptv_jax import hosts, sharding, tokens
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.data import pipeline
from gptv_jax.model.gpt import parameter_count
from gptv_jax.planning.tokenizing import TokenizerTraining
from gptv_jax.runs import pictures
from gptv_jax.runs.context import Context
from gptv_jax.stages import pretrained
from gptv_jax.tokens import Tokenizer
from gptv_jax.train import autoencoding, loop, metrics, step
from gptv_jax.weights.strict_reader import load_lpips

LOG = logging.getLogger(__name__)
SHOWN = 16  # test images or clips in the picture of reconstructions


def run_stage(context: Context) -> dict:
    """Trains `config.tokenizer.train.steps` steps; the test split's numbers for the summary."""
    config, settings = context.config, context.config.tokenizer
    training, train = TokenizerTraining(config), settings.train
    network, length, image_flops = training.network, math.prod(config.grid), training.flops.total
    frozen = None
    if settings.lpips:
        weights = load_lpips(settings.lpips_weights)
        frozen = {"vgg": jax.device_put(weights, jax.NamedSharding(context.mesh, jax.P()))}
    metric = step.Metric(autoencoding.make_eval_step(network), autoencoding.health)
    entries = settings.train_transforms
    batches = functools.partial(context.images.train, train.batch_size, entries=entries)

    def evaluate(params: dict, split: str = "validation") -> dict:
        found = metric.measure(params, context.images.evaluation(split, train.batch_size))
        found["collapsed"] = found["codes_used"] < settings.least_used * found.pop("most_used")
        # An untrained codebook, before anything is saved, may well use few codes.
        if found["collapsed"] and checkpoints.steps():
            LOG.warning(
                "the codebook collapses: %.1f%% of %d codes are in use on %s, less than the share "
                "config.tokenizer.least_used=%s of the codes that so few tokens could use.",
                *(100 * found["codes_used"], network.vocabulary, split, settings.least_used),
            )
        return found

    def initial() -> dict:
        """The state before the first step."""
        key, given = jax.random.key(config.seed), {}
        if settings.init_from:
            LOG.info("The tokenizer begins with the weights of %s.", settings.init_from)
            given = hosts.from_first(lambda: pretrained.given_tokenizer(config)).params
        shapes = sharding.by_name(sharding.abstract(training.init)["params"])
        given = {
            name: jax.make_array_from_callback(each.shape, shapes[name].sharding, each.__getitem__)
            for name, each in given.items()
        }
        return jax.jit(training.init)(key, given)

    folder = context.folder.checkpoints("tokenizer")
    with Checkpoints(folder, train.keep_checkpoints) as checkpoints:
        fitted = loop.fit(
            "tokenizer",
            train,
            length=length,
            flops=image_flops // length,
            checkpoints=checkpoints,
            log=context.log,
            initial=initial,
            abstract=sharding.abstract(training.init),
            train_step=functools.partial(training.train_step, frozen=frozen),
            batches=batches,
            evaluate=evaluate,
        )
    found, speed = evaluate(fitted.params, "test"), fitted.tokens_per_second
    # The weights by flat name, unsharded, on every process.
    whole = jax.jit(functools.partial(jax.tree.map, lambda x: jax.sharding.reshard(x, jax.P())))
    weights = {k: np.asarray(v) for k, v in sharding.by_name(whole(fitted.params)).items()}
    data, transforms = config.data, settings.train_transforms or config.data.train_transforms
    made_by = {"data": data.name, "split": data.train_split, "image_size": data.image_size}
    made_by |= {"transforms": list(transforms), "steps": fitted.step}
    made_by |= {"batch_size": train.batch_size, "seed": config.seed}
    made_by |= {"frames": data.frames} if data.frames else {}
    tokenizer = Tokenizer(network, weights, made_by)
    if jax.process_index() == 0:
        tokens.save_definition(tokenizer, context.folder.path)
    elements = pipeline.images(data, "test", context.images.damage_log)
    images = np.stack([e["image"] for e in itertools.islice(elements, SHOWN)])
    codec = context.with_definition(tokenizer).codec
    shown = (codec.picture(x) for x in (images, codec.decode(codec.encode(images))))
    pictures.save_pairs(*shown, context.folder.path / "samples" / "reconstructions.png")
    return {
        "params": parameter_count(fitted.params),
        "steps": fitted.step,
        "codes": network.vocabulary,
        "tokens": length,
        **{f"test_{name}": found[name] for name in ("psnr_db", "ssim", "mse", "idempotence")},
        **{name: found[name] for name in ("codes_used", "dead_codes", "perplexity", "collapsed")},
        "train_images_per_second": speed and speed / length,
        "mfu": metrics.mfu(image_flops // length, speed),
        **fitted.sessions,
    }
