"""One step of training or evaluating an encoder and decoder, as pure functions for `jax.jit`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax.model import autoencoder, discriminator, lpips
from gptv_jax.model.quantizer import unit
from gptv_jax.tokens.learned import from_pixels, to_pixels
from gptv_jax.train import reconstruction
from gptv_jax.train.optimizer import apply_update, average
from gptv_jax.train.step import Metrics, state_of

TERMS = {
    "l1": reconstruction.l1,
    "l2": reconstruction.l2,
    "gradient": reconstruction.gradient,
    "ssim": lambda restored, images: 1 - reconstruction.ssim(restored, images),
}


def make_init(
    config: config_lib.Autoencoder,
    settings: config_lib.Tokenizer,
    optimizer: optax.GradientTransformation,
) -> Callable:
    """`key -> state`: as `step.state_of`, with what a codebook and a discriminator need beside it.

    "codebook" {"counts" [V], "sums" [V, Z]}: moving averages of the encodings that each code stands
    for; "critic" {"params", "opt"}.
    """

    def init(key: PRNGKeyArray) -> dict:
        params = autoencoder.init(config, key)
        state = state_of(params, optimizer, settings.train.ema)
        if config.quantizer == "vq":
            # As if each had stood for one encoding: it moves at once, and is not yet dead.
            codebook = unit(params["quantizer"]["codebook"])
            state["codebook"] = {"counts": jnp.ones(len(codebook)), "sums": codebook}
        if settings.adversarial:
            weights = discriminator.init(config, settings, jax.random.fold_in(key, 1))
            critic = state_of(weights, critic_optimizer(settings))
            state["critic"] = {"params": critic["params"], "opt": critic["opt"]}
        return state

    return init


def critic_optimizer(settings: config_lib.Tokenizer) -> optax.GradientTransformation:
    """Of the discriminator."""
    b1, b2 = settings.discriminator_betas
    return optax.adam(settings.discriminator_rate, b1=b1, b2=b2)


def abstract_batch(
    config: config_lib.Autoencoder, rows: int, size: int, split: NamedSharding | None = None
) -> dict:
    """Shapes of what a step reads of a batch of so many images of `size` pixels a side."""
    shape = (rows, size, size, config.channels)
    return {"image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=split)}


def make_loss(config: config_lib.Autoencoder, settings: config_lib.Tokenizer) -> Callable:
    """`(params, images, critic, share, vgg) -> (loss, (metrics, z, codes, restored))`.

    Images run from -1 to 1. The discriminator's weights, or None, are not to be trained by it, and
    count by their share of `settings.adversarial`; `vgg` is what `settings.lpips` needs.
    """
    terms = {name: term for name, term in TERMS.items() if getattr(settings, name)}

    def loss(params: dict, images: Float[Array, "B H W C"], critic: dict | None, share, vgg):
        model = autoencoder.bind(config, params)
        z = model.encoder(images)
        quantized = model.quantizer(z)
        restored = model.decoder(quantized.values)
        parts = {name: term(restored, images).mean() for name, term in terms.items()}
        if settings.lpips:
            parts["lpips"] = lpips.distance(vgg, restored, images).mean()
        if config.quantizer == "vq":
            parts["commitment"] = quantized.commitment
        total = sum(getattr(settings, name) * part for name, part in parts.items())
        if critic is not None:
            parts["adversarial"] = -discriminator.scores(config, settings, critic, restored).mean()
            total += settings.adversarial * share * parts["adversarial"]
        squared = reconstruction.l2(restored, images).mean()
        metrics = {"loss": total, "batch_psnr_db": reconstruction.psnr(squared), **parts}
        return total, (metrics, z, quantized.codes, restored)

    return loss


def make_train_step(
    config: config_lib.Autoencoder,
    settings: config_lib.Tokenizer,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    *,
    seed: int = 0,
) -> Callable:
    """`(state, batch, vgg=None) -> (state, metrics)`, donating the state.

    `vgg`, what `settings.lpips` needs, is an argument: as constants it would be compiled in.

    Args:
      config: of the network.
      settings: weights of the losses, and what of the state there is.
      optimizer: takes the gradient of the encoder and decoder.
      rate: learning rate by step, for the metrics.
      seed: of the encodings that dead codes begin anew as.
    """
    gradient = jax.grad(make_loss(config, settings), has_aux=True)

    def train_step(
        state: dict, batch: dict, vgg: lpips.Weights | None = None
    ) -> tuple[dict, Metrics]:
        images, at = from_pixels(batch["image"]), state["step"]
        begun = at >= round(settings.adversarial_from * settings.train.steps)
        critic = state["critic"]["params"] if settings.adversarial else None
        gradients, (metrics, z, codes, restored) = gradient(
            state["params"], images, critic, begun.astype(jnp.float32), vgg
        )
        params, opt = apply_update(optimizer, gradients, state["opt"], state["params"])
        new = {"step": at + 1, "params": params, "opt": opt}
        metrics |= {
            "grad_norm": optax.tree.norm(gradients),
            "param_norm": optax.tree.norm(params),
            "learning_rate": rate(at),
        }
        if config.quantizer == "vq":
            key = jax.random.fold_in(jax.random.key(seed), at)
            followed = follow(state["codebook"], z, codes, settings, key)
            params["quantizer"]["codebook"] = unit(followed["sums"])
            new["codebook"] = followed
        if settings.train.ema is not None:
            new["ema"] = average(state["ema"], params, at, settings.train.ema)
        if settings.adversarial:
            new["critic"], metrics["critic_loss"] = _judge(
                config, settings, state["critic"], images, restored, begun
            )
        return new, metrics

    return jax.jit(train_step, donate_argnums=0)


def follow(
    codebook: dict,
    z: Float[Array, "B h w Z"],
    codes: Int[Array, "B h w"],
    settings: config_lib.Tokenizer,
    key: PRNGKeyArray,
) -> dict:
    """The averages of a codebook, by one batch on; dead codes begin anew.

    Args:
      codebook: "counts" and "sums".
      z: what was quantized.
      codes: by which codes.
      settings: how fast codes follow, and when they are dead.
      key: of the encodings that these begin anew as.
    """
    # Small beside the images, and every device does the same.
    z, codes = jax.sharding.reshard((unit(z.astype(jnp.float32)), codes), P())
    z, codes = z.reshape(-1, z.shape[-1]), codes.reshape(-1)
    decay, V = settings.codebook_decay, len(codebook["counts"])
    seen = jnp.zeros(V).at[codes].add(1.0)
    summed = jnp.zeros_like(codebook["sums"]).at[codes].add(z)
    counts = decay * codebook["counts"] + (1 - decay) * seen
    sums = decay * codebook["sums"] + (1 - decay) * summed
    even = counts.sum() / V
    dead = counts < settings.restart_below * even
    drawn = z[jax.random.randint(key, (V,), 0, len(z))]
    return {
        "counts": jnp.where(dead, even, counts),
        "sums": jnp.where(dead[:, None], even * drawn, sums),
    }


def _judge(config, settings, critic, images, restored, begun) -> tuple[dict, Float[Array, ""]]:
    """One step of the discriminator, where it has begun: the hinge loss (Lim and Ye 2017)."""

    def loss(params):
        real, made = (
            discriminator.scores(config, settings, params, x)
            for x in (images, jax.lax.stop_gradient(restored))
        )
        return (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + made).mean()) / 2

    value, gradients = jax.value_and_grad(loss)(critic["params"])
    params, opt = apply_update(
        critic_optimizer(settings), gradients, critic["opt"], critic["params"]
    )
    moved = {"params": params, "opt": opt}
    return jax.tree.map(lambda new, old: jnp.where(begun, new, old), moved, critic), value


def make_eval_step(config: config_lib.Autoencoder) -> Callable:
    """`(params, batch) -> sums` over the batch's real rows (mask 1), of whole pixels 0 .. 255.

    "images", "squared_error" (mean over an image), "psnr_db", "ssim", "same_codes" (share of an
    image's codes that encoding what was restored gives again) and "counts" [V] of the codes.
    """

    def eval_step(params: dict, batch: dict) -> Metrics:
        model, images, mask = autoencoder.bind(config, params), batch["image"], batch["mask"]
        codes = model.encode(from_pixels(images)).codes
        restored = to_pixels(model.decode(codes))
        again = model.encode(from_pixels(restored)).codes
        given, made = images.astype(jnp.float32), restored.astype(jnp.float32)
        squared = reconstruction.l2(made, given)
        # An image that is restored exactly counts as one that misses by half a level.
        decibels = reconstruction.psnr(jnp.maximum(squared, 0.25), 255.0)
        of_images = {
            "images": jnp.ones_like(mask),
            "squared_error": squared,
            "psnr_db": decibels,
            "ssim": reconstruction.ssim(made, given, 255.0),
            "same_codes": (codes == again).mean(axis=(1, 2)),
        }
        sums = {name: (mask * values).sum() for name, values in of_images.items()}
        codes, real = jax.sharding.reshard((codes, mask.astype(jnp.int32)), P())
        real = jnp.broadcast_to(real[:, None, None], codes.shape)
        sums["counts"] = jnp.zeros(config.vocabulary, jnp.int32).at[codes].add(real)
        return sums

    return jax.jit(eval_step)


def health(totals: dict[str, np.ndarray]) -> dict[str, float]:
    """What the sums of `make_eval_step` over a split say.

    Returns:
      Means over images "psnr_db", "ssim" and "idempotence"; "mse", that of all pixels; and of the
      codes "codes_used" (share), "dead_codes", "perplexity", how many would be in use if all of
      these were equally frequent, and "most_used", the share that the split's tokens could use.
    """
    images, counts = float(totals["images"]), np.asarray(totals["counts"], np.float64)
    share = counts[counts > 0] / counts.sum()
    return {
        "psnr_db": float(totals["psnr_db"]) / images,
        "ssim": float(totals["ssim"]) / images,
        "mse": float(totals["squared_error"]) / images,
        "idempotence": float(totals["same_codes"]) / images,
        "codes_used": len(share) / len(counts),
        "dead_codes": len(counts) - len(share),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
        "most_used": min(float(counts.sum()) / len(counts), 1.0),
    }
