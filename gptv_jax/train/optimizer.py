"""Optax optimizers by name, with the schedule, the clipping and the decay of the config."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from optax.contrib import MuonDimensionNumbers

from gptv_jax import config as config_lib

# The blocks' matrices, which Muon orthogonalises, with the axes that are a matrix's inputs and
# outputs. All other axes (the layer; which of q, k, v; gate or up) are batch axes: every slice
# along them is a matrix by itself.
MATRICES = {
    "qkv": MuonDimensionNumbers(reduction_axis=1, output_axis=(3, 4)),  # L [D] 3 [H K]
    "attention_out": MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=3),  # L [H K] [D]
    "mlp_in": MuonDimensionNumbers(reduction_axis=1, output_axis=2),  # L [D] [F]
    "mlp_gate_up": MuonDimensionNumbers(reduction_axis=1, output_axis=3),  # L [D] 2 [F]
    "mlp_out": MuonDimensionNumbers(reduction_axis=1, output_axis=2),  # L [F] [D]
    **dict.fromkeys(  # [height width inputs] [outputs]
        ("conv", "from_pixels", "to_pixels", "from_code", "to_code"),
        MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3),
    ),
}
# Weights whose steps depend on the width; not norms, start vectors, embeddings and positions. By
# name, because a stacked norm gain has two dimensions as well.
PRODUCTS = {*MATRICES, "head", "level_rows", "place_head", "class_head"}
# Weight decay is for matrices. The stem's sum over channels, not over the width.
DECAYED = {*PRODUCTS, "stem_conv", "from_stem"} - {"place_head"}
# What lies above all layers, and what no pretraining has, by first name; the rest lies below them.
ABOVE = {"final_norm", "head", "classifier", "reading", "parts", "stem", "feature_maps"}

RMS = 0.2  # of Muon's update, that of a typical Adam update (Liu et al. 2025, arXiv:2502.16982)


def make_optimizer(
    config: config_lib.Optimizer, steps: int, layer_decay: float = 1.0, relative_width: float = 1.0
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its learning rate by step; name="muon" gives the rate of Muon's matrices.

    `layer_decay` is the learning rate of a layer over that of the layer above it (Clark et al.
    2020, arXiv:2003.10555); the embeddings are the lowest layer, the final norm and the heads the
    highest. Parts after the first one and the stem, which fine-tuning begins anew, take the highest
    rate too. `relative_width` is the network's width over the one the learning rates were found at.
    """
    rate = _schedule(config, config.learning_rate, steps)
    betas = {"b1": config.beta1, "b2": config.beta2}
    decay = {"weight_decay": config.weight_decay, "mask": _by_name(DECAYED.__contains__)}
    match config.name:
        case "adam":
            optimizer = optax.adam(rate, **betas)
        case "adamw" | "nadamw":
            optimizer = getattr(optax, config.name)(rate, **betas, **decay)
        case "muon":
            # Two optimizers, because the AdamW inside optax's muon decays everything it trains.
            matrices = optax.contrib.muon(
                rate,
                weight_decay=config.weight_decay,
                consistent_rms=RMS,
                muon_weight_dimension_numbers=_by_name(MATRICES.get),
            )
            rest_rate = config.rest_learning_rate or config.learning_rate
            rest = optax.adamw(_schedule(config, rest_rate, steps), **betas, **decay)
            optimizer = optax.partition(
                {"matrices": matrices, "rest": rest},  # the names are part of a checkpoint
                _by_name(lambda name: "matrices" if name in MATRICES else "rest"),
            )
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if layer_decay != 1:
        optimizer = optax.chain(optimizer, _decay_layers(layer_decay))
    if relative_width != 1:
        optimizer = optax.chain(optimizer, _scale_to_width(relative_width, config.name == "muon"))
    return optimizer, rate


def _scale_to_width(relative_width: float, muon: bool) -> optax.GradientTransformation:
    """Scales updates so that they move activations as much as at the width of the learning rates.

    A product sums over its inputs, so what an update adds to its result grows with the width. The
    entries of Adam's updates are all of one size: their rate falls with the width (muP: Yang et al.
    2022, arXiv:2203.03466, table 8). Muon's updates have singular values of one size times the root
    of the width, which makes the RMS of their entries Adam's; the root is divided out again (Yang
    et al. 2023, arXiv:2310.17813).
    """

    def scale(path, update):
        name = path[-1].key
        power = 0 if name not in PRODUCTS else 0.5 if muon and name in MATRICES else 1
        return update * relative_width**-power

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(scale, updates))


def _decay_layers(decay: float) -> optax.GradientTransformation:
    def decayed(updates: dict, _) -> dict:
        layers = len(updates["blocks"]["norm_1"])

        def scale(path, update):
            if path[0].key == "blocks":  # layer l of L lies L - l below the heads
                below = jnp.arange(layers, 0, -1).reshape(-1, *[1] * (update.ndim - 1))
                return update * decay**below
            return update if path[0].key in ABOVE else update * decay ** (layers + 1)

        return jax.tree.map_with_path(scale, updates)

    return optax.stateless(decayed)


@jax.named_scope("average")
def average(old: dict, params: dict, step: Int[Array, ""], decay: float) -> dict:
    """The moving average of the weights after step number `step`, the first one being 0.

    The weights before the first step start the average. Early steps count for more than `decay`
    says, so that those weights soon have no influence.
    """
    share = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: a + share * (p - a), old, params)


@jax.named_scope("optimizer")
def apply_update(
    optimizer: optax.GradientTransformation, grads: dict, state: optax.OptState, params: dict
) -> tuple[dict, optax.OptState]:
    """New parameters and optimizer state, in the shardings of the old ones.

    Muon flattens heads into matrices, which explicit axes do not allow: within the update the
    compiler chooses shardings, only the results are pinned.
    """

    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (params, state))
    return jax.sharding.auto_axes(update, out_sharding=specs)(grads, state, params)


def _schedule(config: config_lib.Optimizer, peak: float, steps: int) -> optax.Schedule:
    constant, length = optax.constant_schedule(peak), max(steps - config.warmup_steps, 1)
    match config.schedule:
        case "constant":
            after = constant
        case "cosine":
            after = optax.cosine_decay_schedule(peak, length, config.final_fraction)
        case "wsd":
            falling = max(min(round(config.decay_share * steps), length), 1)
            fall = optax.linear_schedule(peak, config.final_fraction * peak, falling)
            after = optax.join_schedules([constant, fall], [length - falling])
    if not config.warmup_steps:
        return after
    # From peak / warmup_steps, not 0, so that the first step already moves the weights.
    warmup_steps = config.warmup_steps
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def _by_name(value: Callable) -> Callable:
    """`params -> tree` with `value(name)` at each leaf, where name is the leaf's last key."""
    return functools.partial(jax.tree.map_with_path, lambda path, _: value(path[-1].key))
