"""Training of the autoencoder whose codes are the tokens of label maps."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import autoencoder
from gptv_jax.tokens.label_maps import Cells, Learned, as_channels
from gptv_jax.train import optimizer, step
from gptv_jax.train.objective import cross_entropy, masked_mean

OPTIMIZER = config_lib.Optimizer(
    name="adam", learning_rate=5e-3, beta2=0.99, clip_norm=1.0, warmup_steps=20
)
NEVER = -1e9  # logit of a class that training has not
LOGIT = 10.0  # of an output of 1: the decoder is made for outputs of about -1 to 1


def make_loss(config: config_lib.Autoencoder) -> Callable:
    """The mean cross-entropy, in nats, of the pixels that have a class; see `train.step`.

    `batch["maps"]`, int32 [B, H, W], has `config.channels`, the number of classes, where a pixel
    has no class. `config.quantizer` is "fsq".
    """

    def loss(params, frozen, batch, key, step) -> tuple[Array, dict]:
        del frozen, key, step
        model, maps = autoencoder.bind(config, params), batch["maps"]
        restored = model.decoder(
            model.quantizer(model.encoder(as_channels(maps, config.channels))).values
        )
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
    train_step = step.make_train_step(make_loss(config), update, rate)

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
