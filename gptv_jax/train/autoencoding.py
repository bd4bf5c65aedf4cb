"""Training of the encoders and decoders whose codes are tokens: of images, and of label maps."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import autoencoder, layers, lpips
from gptv_jax.model.autoencoder import Discriminator, as_images
from gptv_jax.model.quantizers import unit
from gptv_jax.tokens.label_maps import Cells, Learned, as_channels
from gptv_jax.tokens.learned import from_pixels, to_pixels
from gptv_jax.train import optimizer, step
from gptv_jax.train.objective import cross_entropy, masked_mean
from gptv_jax.train.optimizer import apply_update
from gptv_jax.train.step import Metrics, state_of

Images = Float[Array, "B H W C"]
RANGE = 2.0  # of values from -1 to 1
WINDOW, SIGMA = 11, 1.5  # pixels, of SSIM's Gaussian window (Wang et al. 2004)
K1, K2 = 0.01, 0.03  # SSIM's constants, shares of the range: they keep the ratios finite
SCALES = 3  # of the gradient loss, each half as large as the one before


def l2(restored: Images, images: Images) -> Float[Array, " B"]:
    """Mean squared difference."""
    return jnp.square(restored - images).mean(axis=(1, 2, 3))


def gradient(restored: Images, images: Images) -> Float[Array, " B"]:
    """Mean absolute error of the differences between neighbouring pixels, at several scales.

    It asks for edges as sharp as the image's; the mean squared error accepts blurred ones.
    """
    difference, total = restored - images, 0.0
    for _ in range(SCALES):
        down, right = jnp.diff(difference, axis=1), jnp.diff(difference, axis=2)
        total += jnp.abs(down).mean(axis=(1, 2, 3)) + jnp.abs(right).mean(axis=(1, 2, 3))
        if min(difference.shape[1:3]) < 4:
            break
        # Means over squares of 2 x 2 pixels; an odd last row or column is left out.
        height, width = (size - size % 2 for size in difference.shape[1:3])
        rows = (difference[:, 0:height:2] + difference[:, 1:height:2]) / 2
        difference = (rows[:, :, 0:width:2] + rows[:, :, 1:width:2]) / 2
    return total


def psnr(mean_squared: Float[Array, "*any"], value_range: float = RANGE) -> Float[Array, "*any"]:
    """Peak signal-to-noise ratio in dB of mean squared errors; infinite for an error of 0."""
    return 10 * jnp.log10(value_range**2 / mean_squared)


def ssim(restored: Images, images: Images, value_range: float = RANGE) -> Float[Array, " B"]:
    """Structural similarity (Wang et al. 2004, doi:10.1109/TIP.2003.819861); 1 for equal images.

    Channel by channel under the paper's Gaussian window of 11 x 11 pixels, wherever it fits into
    the image, as in skimage's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False)` and TensorFlow's `image.ssim`. A smaller image has a window of its
    own size.
    """
    c1, c2 = (K1 * value_range) ** 2, (K2 * value_range) ** 2
    x, y = _blurred(restored), _blurred(images)
    xx, yy = _blurred(restored**2) - x**2, _blurred(images**2) - y**2
    xy = _blurred(restored * images) - x * y
    luminance = (2 * x * y + c1) / (x**2 + y**2 + c1)
    structure = (2 * xy + c2) / (xx + yy + c2)
    return (luminance * structure).mean(axis=(1, 2, 3))


def _blurred(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Means under the Gaussian window at every place where the whole window is in the image."""
    side = min(WINDOW, *x.shape[1:3])
    weights = np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / SIGMA) ** 2)
    window = (weights / weights.sum()).astype(x.dtype)
    for axis in (1, 2):
        count = x.shape[axis] - side + 1
        parts = [jax.lax.slice_in_dim(x, i, i + count, axis=axis) for i in range(side)]
        x = sum(weight * part for weight, part in zip(window, parts, strict=True))
    return x


TERMS = {  # of the loss: `(restored, images) -> number for each image`
    "l1": lambda restored, images: jnp.abs(restored - images).mean(axis=(1, 2, 3)),
    "l2": l2,
    "gradient": gradient,
    "ssim": lambda restored, images: 1 - ssim(restored, images),
}


def make_init(
    config: config_lib.Autoencoder,
    settings: config_lib.Tokenizer,
    optimizer: optax.GradientTransformation,
) -> Callable:
    """`(key, given) -> state`: the state of `step.state_of`, with "codebook" and "critic" added.

    "codebook" {"counts" [V], "sums" [V, Z]}: moving averages over the encodings of each code;
    "critic" {"params", "opt"}: the discriminator. `given` weights, by flat name, replace fresh
    ones.
    """

    def init(key: PRNGKeyArray, given: dict[str, Array] | None = None) -> dict:
        params = autoencoder.init(config, key)
        chosen = {**sharding.by_name(params), **(given or {})}
        params = jax.tree.unflatten(jax.tree.structure(params), chosen.values())
        state = state_of(params, optimizer, settings.train.ema)
        if config.quantizer == "vq":
            # As if each code had one encoding: codes move at once, and none is dead yet.
            codebook = unit(params["quantizer"]["codebook"])
            state["codebook"] = {"counts": jnp.ones(len(codebook)), "sums": codebook}
        if settings.adversarial:
            key = jax.random.fold_in(key, 1)
            weights = layers.init(Discriminator, config, settings, key=key)
            critic = state_of(weights, _critic_optimizer(settings))
            state["critic"] = {name: critic[name] for name in ("params", "opt")}
        return state

    return init


def _critic_optimizer(settings: config_lib.Tokenizer) -> optax.GradientTransformation:
    return optax.adam(settings.discriminator_rate, *settings.discriminator_betas)


def _critic_has_begun(settings: config_lib.Tokenizer, step: Int[Array, ""]) -> Bool[Array, ""]:
    return step >= round(settings.adversarial_from * settings.train.steps)


def make_loss(config: config_lib.Autoencoder, settings: config_lib.Tokenizer) -> Callable:
    """The weighted sum of the terms in `settings`, as `step.make_train_step` takes a loss.

    `frozen` holds "vgg", LPIPS's weights, where `settings.lpips` is not 0, and "critic", the
    discriminator's state, where `settings.adversarial` is not.
    """

    def loss(params, frozen, batch, key, step) -> tuple[Array, dict]:
        del key
        model, images = autoencoder.bind(config, params), from_pixels(batch["image"])
        z = model.encoder(images)
        quantized = model.quantizer(z)
        restored = model.decoder(quantized.values)
        restored, images = as_images(restored), as_images(images)
        parts = {k: f(restored, images).mean() for k, f in TERMS.items() if getattr(settings, k)}
        if settings.lpips:
            parts["lpips"] = lpips.distance(frozen["vgg"], restored, images).mean()
        if config.quantizer == "vq":
            parts["commitment"] = quantized.commitment
        total = sum(getattr(settings, name) * part for name, part in parts.items())
        if settings.adversarial:
            critic = frozen["critic"]["params"]
            scores = layers.bind(Discriminator, config, settings, params=critic)(restored)
            parts["adversarial"] = -scores.mean()
            begun = _critic_has_begun(settings, step).astype(jnp.float32)
            total += settings.adversarial * begun * parts["adversarial"]
        squared = l2(restored, images).mean()
        metrics = {"loss": total, "batch_psnr_db": psnr(squared), **parts}
        return total, metrics | {"aux": (images, restored, z, quantized.codes)}

    return loss


def make_after(config: config_lib.Autoencoder, settings: config_lib.Tokenizer) -> Callable:
    """Updates the codebook and the discriminator, as the `after` of `step.make_train_step`."""

    def after(state: dict, passed: tuple, batch: dict, key: PRNGKeyArray) -> tuple[dict, Metrics]:
        del batch
        (images, restored, z, codes), new, metrics = passed, {}, {}
        if config.quantizer == "vq":
            book = update_codebook(state["codebook"], z, codes, settings, key)
            new = {"codebook": book}
            new["params"] = state["params"] | {"quantizer": {"codebook": unit(book["sums"])}}
        if settings.adversarial:
            new["critic"], metrics["critic_loss"] = _train_critic(
                config, settings, state["critic"], images, restored, state["step"]
            )
        return state | new, metrics

    return after


def update_codebook(
    codebook: dict,
    z: Float[Array, "B *K h w Z"],
    codes: Int[Array, "B *K h w"],
    settings: config_lib.Tokenizer,
    key: PRNGKeyArray,
) -> dict:
    """The moving averages "counts" and "sums" of a codebook after a batch's encodings and codes.

    The key draws the encodings that dead codes restart from.
    """
    # Small beside the images; every device computes all of it.
    z, codes = jax.sharding.reshard((unit(z.astype(jnp.float32)), codes), jax.P())
    z, codes = z.reshape(-1, z.shape[-1]), codes.reshape(-1)
    decay, V = settings.codebook_decay, len(codebook["counts"])
    seen = jnp.zeros(V).at[codes].add(1.0)
    summed = jnp.zeros_like(codebook["sums"]).at[codes].add(z)
    counts = decay * codebook["counts"] + (1 - decay) * seen
    sums = decay * codebook["sums"] + (1 - decay) * summed
    even = counts.sum() / V
    dead = counts < settings.restart_below * even
    drawn = even * z[jax.random.randint(key, (V,), 0, len(z))]
    counts, sums = jnp.where(dead, even, counts), jnp.where(dead[:, None], drawn, sums)
    return {"counts": counts, "sums": sums}


def _train_critic(config, settings, critic, images, restored, step) -> tuple[dict, Array]:
    """One step of the discriminator on the hinge loss (Lim and Ye 2017), once it has begun."""

    def loss(params):
        scores = layers.bind(Discriminator, config, settings, params=params)
        real, made = scores(images), scores(jax.lax.stop_gradient(restored))
        return (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + made).mean()) / 2

    params, optimizer = critic["params"], _critic_optimizer(settings)
    value, gradients = jax.value_and_grad(loss)(params)
    params, opt = apply_update(optimizer, gradients, critic["opt"], params)
    begun, moved = _critic_has_begun(settings, step), {"params": params, "opt": opt}
    return jax.tree.map(lambda new, old: jnp.where(begun, new, old), moved, critic), value


def make_eval_step(config: config_lib.Autoencoder) -> Callable:
    """`(params, batch) -> sums` over the rows whose "mask" is 1, of whole pixels 0 .. 255; jitted.

    "images", "mse" (over an image), "psnr_db", "ssim", "idempotence" (share of an image's codes
    that encoding the restored image gives again) and "counts" [V] of the codes. A clip counts as
    one image, with the means over its frames.
    """

    def eval_step(params: dict, batch: dict) -> Metrics:
        model, images, mask = autoencoder.bind(config, params), batch["image"], batch["mask"]
        codes = model.encode(from_pixels(images)).codes
        restored = to_pixels(model.decode(codes))
        again = model.encode(from_pixels(restored)).codes
        given, made = (as_images(each.astype(jnp.float32)) for each in (images, restored))
        squared = l2(made, given)
        by_image = {
            "mse": squared,
            # An image that is restored exactly counts as one that misses by half a level.
            "psnr_db": psnr(jnp.maximum(squared, 0.25), 255.0),
            "ssim": ssim(made, given, 255.0),
        }
        spec, axes = {"out_sharding": sharding.BATCH_FIRST}, tuple(range(1, codes.ndim))
        by_image = {k: v.reshape(len(mask), -1, **spec).mean(axis=1) for k, v in by_image.items()}
        by_image["idempotence"] = (codes == again).mean(axis=axes)
        by_image["images"] = jnp.ones_like(mask)
        sums = {name: (mask * values).sum() for name, values in by_image.items()}
        codes, real = jax.sharding.reshard((codes, mask.astype(jnp.int32)), jax.P())
        real = jnp.broadcast_to(jnp.expand_dims(real, axes), codes.shape)
        sums["counts"] = jnp.zeros(config.vocabulary, jnp.int32).at[codes].add(real)
        return sums

    return jax.jit(eval_step)


def health(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Numbers of a split from the sums of `make_eval_step`: means over images, and of the codes.

    "perplexity" is the number of codes in use if all of these were equally frequent, "codes_used" a
    share, and "most_used" the largest share that so many tokens could use.
    """
    images, counts = float(sums["images"]), np.asarray(sums["counts"], np.float64)
    share = counts[counts > 0] / counts.sum()
    return {
        **{k: float(sums[k]) / images for k in ("psnr_db", "ssim", "mse", "idempotence")},
        "codes_used": len(share) / len(counts),
        "dead_codes": len(counts) - len(share),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
        "most_used": min(float(counts.sum()) / len(counts), 1.0),
    }


OPTIMIZER = config_lib.Optimizer(
    name="adam", learning_rate=5e-3, beta2=0.99, clip_norm=1.0, warmup_steps=20
)
NEVER = -1e9  # logit of a class that training has not
LOGIT = 10.0  # of an output of 1: the decoder is made for outputs of about -1 to 1


def make_label_loss(config: config_lib.Autoencoder) -> Callable:
    """The mean cross-entropy, in nats, of the pixels that have a class; see `train.step`.

    `batch["maps"]`, int32 [B, H, W], has `config.channels`, the number of classes, where a pixel
    has no class. `config.quantizer` is "fsq".
    """

    def loss(params, frozen, batch, key, step) -> tuple[Array, dict]:
        del frozen, key, step
        model, maps = autoencoder.bind(config, params), batch["maps"]
        restored = model.decoder(model.encode(as_channels(maps, config.channels)).values)
        known = maps < config.channels
        nats = cross_entropy(LOGIT * restored, jnp.where(known, maps, 0))
        flat = (len(maps), -1)
        spec = {"out_sharding": sharding.BATCH_FIRST}
        total = masked_mean(nats.reshape(flat, **spec), known.reshape(flat, **spec)).mean()
        return total, {"loss": total}

    return loss


def fit_learned(
    maps: Sequence[Integer[np.ndarray, "H W"]],
    classes: int,
    steps: int,
    batch_size: int,
    seed: int,
    *,
    downsample: int,
    widths: tuple[int, ...],
    levels: tuple[int, ...],
) -> Learned:
    """Trains the label tokenizer on maps of one shape, in memory, on one device of this process.

    `downsample`, `widths` and `levels` are those of `config.train.Autoencoder`. No code stands for
    a class that the maps do not have. Equal maps, settings and seeds give equal weights on equal
    machines.
    """
    config = config_lib.Autoencoder(
        channels=classes,
        downsample=downsample,
        widths=widths,
        encoder_blocks=1,
        decoder_blocks=1,
        levels=levels,
    )
    padded = Cells(classes, maps[0].shape, config.downsample).padded(np.stack(maps))
    rng = np.random.default_rng(seed)
    mesh = sharding.make_mesh(config_lib.Mesh(), jax.local_devices()[:1])
    update, rate = optimizer.make_optimizer(OPTIMIZER, steps)
    train_step = step.make_train_step(make_label_loss(config), update, rate)

    def initial(key):
        return step.state_of(autoencoder.init(config, key), update)

    with jax.set_mesh(mesh):
        state = jax.jit(initial)(jax.random.key(seed))
        for _ in range(steps):
            rows = padded[rng.integers(len(padded), size=batch_size)].astype(np.int32)
            state, _ = train_step(state, sharding.global_batch({"maps": rows}))
        params = jax.device_get(sharding.by_name(state["params"]))
    bias = params["decoder.to_pixels.bias"].reshape(-1, classes).copy()  # of a pixel's classes
    bias[:, np.bincount(padded.ravel(), minlength=classes)[:classes] == 0] = NEVER
    params["decoder.to_pixels.bias"] = bias.ravel()
    return Learned(classes, maps[0].shape, config, params)
