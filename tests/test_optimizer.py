"""Optimizers by name: schedules, updates, decay, and what width and depth scale."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import MODERN, make_mesh, parts_network, random_params, tiny_network
from jax.sharding import NamedSharding

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.train import optimizer

pytestmark = pytest.mark.usefixtures("one_device")

MATRICES = {"qkv", "attention_out", "mlp_in", "mlp_gate_up", "mlp_out"}


def settings(name="adam", rate=0.01, **changes):
    return config_lib.Optimizer(name=name, learning_rate=rate, schedule="constant", **changes)


def step_of(config, steps=10):
    """`(params, state, gradient) -> (params, state)` and `params -> state`, both compiled."""
    update, _ = optimizer.make_optimizer(config, steps)
    step = jax.jit(lambda p, s, g: optimizer.apply_update(update, g, s, p))
    return step, jax.jit(update.init)


def random_gradient(params, seed):
    """Noise in the shapes and shardings of `params`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jax.device_put(rng.normal(size=p.shape).astype(np.float32), p.sharding), params
    )


def scaled(tree, factor):
    return jax.tree.map(lambda x: factor * x, tree)


def after(config, params, gradients):
    """Parameters after one step for each gradient, as NumPy by name."""
    step, init = step_of(config)
    state = init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return by_name(params)


def by_name(tree):
    return {path[-1].key: np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


@pytest.fixture(scope="module")
def params():
    """Every weight that a network can have, of iGPT's parts and of the modern ones together."""
    with jax.set_mesh(make_mesh((1, 1, 1))):
        igpt, modern = (random_params(tiny_network(classes=5, **c)) for c in ({}, MODERN))
        return modern | igpt | {"blocks": modern["blocks"] | igpt["blocks"]}


@pytest.fixture(scope="module")
def few_params(params):
    """A weight of each kind that optimizers treat differently; quick to compile."""
    blocks = {name: params["blocks"][name] for name in ("norm_1", "qkv", "mlp_out")}
    names = ("token_embedding", "start", "final_norm", "head", "classifier")
    return {"blocks": blocks, **{name: params[name] for name in names}}


# Schedule


def rates(at, **changes):
    config = config_lib.Optimizer(**changes)
    _, rate = optimizer.make_optimizer(config, 20)
    return [float(rate(step)) for step in at]


def test_warmup_is_linear_and_its_first_step_is_not_zero():
    found = rates(range(6), learning_rate=0.8, warmup_steps=4, schedule="constant")
    np.testing.assert_allclose(found, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rtol=1e-6)
    found = rates(range(3), learning_rate=0.8, warmup_steps=1, schedule="constant")
    np.testing.assert_allclose(found, [0.8, 0.8, 0.8], rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 4])
def test_cosine_falls_from_the_peak_to_the_final_fraction_of_it(warmup):
    changes = {"learning_rate": 0.8, "warmup_steps": warmup, "final_fraction": 0.1}
    found = rates(range(warmup, 21), **changes)
    assert (np.diff(found) < 0).all()
    np.testing.assert_allclose([found[0], found[-1]], [0.8, 0.08], rtol=1e-6)
    wanted = 0.08 + 0.72 * (1 + np.cos(np.pi * np.arange(21 - warmup) / (20 - warmup))) / 2
    np.testing.assert_allclose(found, wanted, atol=0.02)
    np.testing.assert_allclose(rates([1000], **changes), [0.08], rtol=1e-6)


def test_a_constant_schedule_stays_at_the_peak():
    np.testing.assert_allclose(rates([0, 7, 1000], learning_rate=0.8, schedule="constant"), 0.8)


@pytest.mark.parametrize("warmup", [0, 4])
def test_wsd_stays_at_the_peak_and_falls_in_a_line_to_the_end(warmup):
    changes = {"schedule": "wsd", "learning_rate": 0.8, "warmup_steps": warmup}
    found = rates(range(warmup, 21), **changes, decay_share=0.5, final_fraction=0.25)
    wanted = [*[0.8] * (10 - warmup), *np.linspace(0.8, 0.2, 11)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    # The fall takes no more steps than are left after the warm-up, and at least one.
    whole = rates(range(warmup, 21), **changes, decay_share=1.0)
    np.testing.assert_allclose(whole, np.linspace(0.8, 0, 21 - warmup), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(rates([19, 20], **changes, decay_share=0.0), [0.8, 0], rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_every_step_uses_the_rate_of_the_schedule(name):
    config = config_lib.Optimizer(
        name=name, learning_rate=0.8, warmup_steps=3, beta1=0.5, beta2=0.5
    )
    update, rate = optimizer.make_optimizer(config, 8)
    params = {"norm": jnp.zeros(3)}
    state, gradient = update.init(params), {"norm": jnp.array([1e3, -1e3, 1e3])}
    for step in range(8):
        updates, state = update.update(gradient, state, params)
        # For a constant gradient Adam's update is the gradient's sign.
        np.testing.assert_allclose(updates["norm"], -rate(step) * jnp.array([1, -1, 1]), rtol=1e-5)


# Optimizers


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])  # muon: the AdamW part
def test_adam_has_the_betas_of_the_config(name):
    gradients = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    update, _ = optimizer.make_optimizer(settings(name, beta1=0.8, beta2=0.7), 10)
    params, m, v = {"final_norm": jnp.zeros(5)}, 0, 0
    state = update.init(params)
    for t, g in enumerate(gradients, start=1):
        updates, state = update.update({"final_norm": jnp.asarray(g)}, state, params)
        m, v = 0.8 * m + 0.2 * g, 0.7 * v + 0.3 * g**2
        wanted = -0.01 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.7**t)) + 1e-8)
        np.testing.assert_allclose(updates["final_norm"], wanted, rtol=1e-5)


def test_each_name_is_a_different_optimizer():
    params = {"head": jnp.ones((4, 4))}
    gradients, found = [random_gradient(params, seed) for seed in range(2)], []
    for name in ("adam", "adamw", "nadamw"):
        decay = 0.0 if name == "adam" else 0.1
        update, _ = optimizer.make_optimizer(settings(name, weight_decay=decay), 10)
        state = update.init(params)
        for gradient in gradients:
            updates, state = update.update(gradient, state, params)
        found.append(updates["head"])
    adam, adamw, nadamw = found
    np.testing.assert_allclose(adamw - adam, np.full((4, 4), -0.01 * 0.1), rtol=1e-3)
    assert np.abs(nadamw - adamw).max() > 1e-4


def test_clipping_bounds_the_global_norm_and_keeps_smaller_gradients():
    shape = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    sizes, gradients = (9, 0.1, 3), [random_gradient(shape, seed) for seed in range(3)]
    gradients = [scaled(g, size) for g, size in zip(gradients, sizes, strict=True)]
    norms = [float(optax.tree.norm(g)) for g in gradients]
    assert norms[0] > 1.5 and norms[1] < 1.5 and norms[2] > 1.5

    def updates(config, gradients):
        update, _ = optimizer.make_optimizer(config, 10)
        state, out = update.init(shape), []
        for g in gradients:
            change, state = update.update(g, state, shape)
            out.append(change)
        return out

    clipped = [scaled(g, min(1, 1.5 / norm)) for g, norm in zip(gradients, norms, strict=True)]
    found, wanted = updates(settings(clip_norm=1.5), gradients), updates(settings(), clipped)
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-4), found, wanted)


# Muon's other part is AdamW, and the transformations of Adam are among those of NAdamW.
@pytest.mark.parametrize("name", ["nadamw", "muon"])
def test_steps_are_finite_keep_their_shardings_and_are_the_same_on_a_mesh(name):
    config = settings(name, clip_norm=1.0, weight_decay=0.1)

    def change_in_two_steps(shape):
        mesh = make_mesh(shape)
        with jax.set_mesh(mesh):
            params = random_params(tiny_network(classes=5))
            step, init = step_of(config)
            old = new = (params, init(params))
            for seed in range(2):
                new = step(*new, random_gradient(params, seed))
        for (path, b), a in zip(jax.tree.leaves_with_path(new), jax.tree.leaves(old), strict=True):
            assert (b.shape, b.dtype) == (a.shape, a.dtype), path
            assert b.sharding.is_equivalent_to(a.sharding, b.ndim), path
        for path, leaf in jax.tree.leaves_with_path(new[0]):
            wanted = NamedSharding(mesh, sharding.PARAMETERS[path[-1].key])
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), path
        old, new = by_name(old[0]), by_name(new[0])
        return {key: new[key] - old[key] for key in old}

    found, wanted = (change_in_two_steps(shape) for shape in ((1, 2, 4), (1, 1, 1)))
    for key, change in wanted.items():
        assert np.isfinite(change).all() and (change != 0).any(), key
        np.testing.assert_allclose(found[key], change, atol=2e-5 * np.abs(change).max())


# Weight decay


@pytest.mark.parametrize("name", ["adamw", "nadamw", "muon"])
def test_decay_acts_on_matrices_and_heads_alone(name, params):
    config = settings(name, weight_decay=0.1)
    zero = jax.tree.map(jnp.zeros_like, params)
    new, old = after(config, params, [zero]), by_name(params)
    decayed = {key for key in old if (new[key] != old[key]).any()}
    assert decayed == {*MATRICES, "head", "class_head"} & old.keys()
    for key in decayed:
        np.testing.assert_allclose(new[key], old[key] * (1 - 0.01 * 0.1), rtol=1e-6)


# Width


def one_step(update, params, gradient):
    """What one step of an optimizer adds to every weight, in float64 by name."""
    step = jax.jit(lambda p, g: optimizer.apply_update(update, g, update.init(p), p)[0])
    new = by_name(step(params, gradient))
    return {name: new[name].astype(np.float64) - old for name, old in by_name(params).items()}


def test_products_of_a_wider_network_take_smaller_steps_and_the_rest_does_not(few_params):
    moved = [
        one_step(
            optimizer.make_optimizer(settings("muon"), 10, relative_width=width)[0],
            few_params,
            random_gradient(few_params, 0),
        )
        for width in (1.0, 4.0)
    ]
    for key, change in moved[0].items():
        # Muon's steps shrink with the root of the width, Adam's with the width.
        factor = 1 / 2 if key in MATRICES else 1 / 4 if key in {"head", "class_head"} else 1
        np.testing.assert_allclose(moved[1][key], factor * change, atol=1e-6, err_msg=key)


# Muon


def matrices(tree):
    """The matrices (inputs, outputs) inside the stacked and head-split weights."""
    blocks, found = tree["blocks"], {}
    for layer in range(2):
        for c in range(3):
            found[f"qkv {layer} {c}"] = np.asarray(blocks["qkv"])[layer, :, c].reshape(32, 32)
        gate, up = np.moveaxis(np.asarray(blocks["mlp_gate_up"])[layer], 1, 0)
        found |= {f"gate {layer}": gate, f"up {layer}": up}
        found[f"mlp_in {layer}"] = np.asarray(blocks["mlp_in"])[layer]
        found[f"attention_out {layer}"] = np.asarray(blocks["attention_out"])[layer].reshape(32, 32)
        found[f"mlp_out {layer}"] = np.asarray(blocks["mlp_out"])[layer]
    return found


def test_muon_orthogonalises_each_matrix_of_each_layer_by_itself(params):
    gradients = [random_gradient(params, seed) for seed in range(2)]
    step, init = step_of(settings("muon"))
    new, state = params, init(params)
    reference = optax.contrib.muon(0.01, consistent_rms=0.2)
    wanted = matrices(params)
    wanted_state, update = reference.init(wanted), jax.jit(reference.update)
    for gradient in gradients:
        new, state = step(new, state, gradient)
        updates, wanted_state = update(matrices(gradient), wanted_state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    found = matrices(new)
    for name, old in matrices(params).items():
        change = wanted[name] - old
        assert np.abs(change).max() > 1e-3
        np.testing.assert_allclose(
            found[name] - old, change, atol=1e-5 * np.abs(change).max(), err_msg=name
        )


def test_muon_takes_the_matrices_at_one_rate_and_the_rest_at_the_other(few_params):
    gradient = random_gradient(few_params, 0)

    def changes(**rates):
        update, _ = optimizer.make_optimizer(settings("muon", **rates), 10)
        return one_step(update, few_params, gradient)

    base, rest = changes(rate=0.01), changes(rate=0.01, rest_learning_rate=0.03)
    matrix = changes(rate=0.03, rest_learning_rate=0.01)
    for key, change in base.items():
        in_rest, in_matrix = (1, 3) if key in MATRICES else (3, 1)
        close = {"atol": 1e-6 + 1e-4 * np.abs(change).max(), "err_msg": key}
        np.testing.assert_allclose(rest[key], in_rest * change, **close)
        np.testing.assert_allclose(matrix[key], in_matrix * change, **close)


@pytest.mark.parametrize("name", ["adam", "nadamw", "muon"])
def test_layer_decay_scales_the_steps_of_each_layer(name, few_params):
    """As a learning rate for each layer would: the embeddings least, the heads in full."""
    gradient, decay = random_gradient(few_params, 1), 0.5
    moved = {
        factor: one_step(
            optimizer.make_optimizer(settings(name), 10, factor)[0], few_params, gradient
        )
        for factor in (1.0, decay)
    }
    layers = tiny_network().config.layers
    for weight, wanted in moved[1.0].items():
        if weight in by_name(few_params["blocks"]):
            powers = decay ** np.arange(layers, 0, -1).reshape(-1, *[1] * (wanted.ndim - 1))
        else:
            powers = 1.0 if weight in HIGHEST else decay ** (layers + 1)
        np.testing.assert_allclose(moved[decay][weight], wanted * powers, rtol=2e-3, atol=1e-7)


HIGHEST = {"final_norm", "head", "class_head", "class_center", "class_scale"}


def test_what_finetuning_begins_anew_takes_the_highest_rate_and_a_stems_matrices_decay():
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = random_params(parts_network())
        del params["blocks"]["qkv"], params["position"]  # fewer arrays to compile
        gradient, still = random_gradient(params, 1), jax.tree.map(jnp.zeros_like, params)

        def changes(gradient, name="adam", decay=1.0, **changes):
            update = optimizer.make_optimizer(settings(name, **changes), 10, decay)[0]
            state = update.init(params)
            after, _ = jax.jit(lambda p, s, g: optimizer.apply_update(update, g, s, p))(
                params, state, gradient
            )
            leaves = jax.tree.map(lambda a, b: np.asarray(a - b), after, params)
            return sharding.by_name(leaves)

        plain, decayed = changes(gradient), changes(gradient, decay=0.5)
        for name in (n for n in plain if n.startswith(("parts", "stem"))):
            np.testing.assert_array_equal(plain[name], decayed[name])
        lowest = np.abs(decayed["token_embedding"] / plain["token_embedding"])
        np.testing.assert_allclose(lowest, 1 / 8, rtol=1e-2)
        fallen = changes(still, "adamw", weight_decay=0.5)
    moved = {name.rsplit(".", 1)[-1] for name, change in fallen.items() if np.any(change)}
    assert moved == {"attention_out", "mlp_in", "mlp_out", "head", "stem_conv", "from_stem"}
