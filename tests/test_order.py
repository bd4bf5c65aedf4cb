"""Random orders: what a position sees, when orders are drawn, and that raster is one of them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import generator, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.config import fields
from gptv_jax.decode import generation
from gptv_jax.errors import InputError
from gptv_jax.planning import plan, topology
from gptv_jax.planning.training import Pretraining
from gptv_jax.train import objective, step

pytestmark = pytest.mark.usefixtures("one_device")
BARE = {"learned_positions": False, "axial_positions": False}
KINDS = {
    "target": {"target_positions": True},
    "rotary": {"rotary": True},
    "both": {"target_positions": True, "rotary": True},
}
ROWS, LENGTH = 17, 16
ANNEALED = {**KINDS["both"], "random_order": (0.4, 0.6), "class_tokens": 2, "label_dropout": 0.5}


@jax.jit(static_argnums=0)
def logits_of(network, params, tokens, order, variant=None):
    return network.bind(params)(tokens, variant, order=order).logits


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def kind(request):
    """A network that can read any order, its weights, and ROWS rows of tokens and orders."""
    network = tiny_network(**request.param)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        tokens = random_batch(network, ROWS)["tokens"]
        orders = generator(1).permuted(np.tile(np.arange(LENGTH), (ROWS, 1)), axis=1)
        return network, random_params(network), tokens, orders.astype(np.int32)


# The network


def test_raster_as_an_order_is_raster_bit_for_bit(kind):
    network, params, tokens, _ = kind
    raster = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    found = logits_of(network, params, tokens, raster)
    np.testing.assert_array_equal(found, logits_of(network, params, tokens, None))


def test_logits_depend_only_on_the_tokens_that_come_before_in_the_order(kind):
    network, params, tokens, orders = kind
    order, changed = orders[0], np.repeat(tokens[:1], ROWS, axis=0)
    for t in range(LENGTH):  # the last row stays unchanged
        changed[t, order[t]] = (changed[t, order[t]] + 5) % network.vocabulary
    *found, base = np.asarray(
        logits_of(network, params, changed, np.repeat(order[None], ROWS, axis=0))
    )
    for t, logits in enumerate(found):
        np.testing.assert_array_equal(logits[: t + 1], base[: t + 1])
        assert (np.abs(logits[t + 1 :] - base[t + 1 :]).max(axis=-1) > 1e-6).all()


def test_logits_depend_on_the_place_to_be_predicted(kind):
    """Two orders that begin alike give different logits from the first place that differs."""
    network, params, tokens, orders = kind
    swapped = np.repeat(orders[:1], ROWS, axis=0)
    for t in range(LENGTH - 1):
        swapped[t, [t, t + 1]] = swapped[t, [t + 1, t]]
    found = np.asarray(logits_of(network, params, np.repeat(tokens[:1], ROWS, axis=0), swapped))
    base = found[-1]
    for t in range(LENGTH - 1):
        np.testing.assert_array_equal(found[t, :t], base[:t])
        assert np.abs(found[t, t] - base[t]).max() > 1e-6


def oracle(network, params, tokens, orders):
    """Logits of every token [B, T, V], in NumPy and float64.

    Nothing is reordered: every token stays at its place and sees the tokens of lower rank.
    """
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    config, columns, T = network.config, network.grid[1], network.length

    def norm(x, gain):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * gain

    def turned(x, places):
        half, quarter = x.shape[1] // 2, x.shape[1] // 4
        frequencies = 10_000 ** -(np.arange(quarter) / quarter)
        angles = np.concatenate([np.outer(a, frequencies) for a in divmod(places, columns)], axis=1)
        numbers = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
        return np.concatenate([numbers.real, numbers.imag], axis=1)

    places, logits = np.arange(T), []
    for row, order in zip(tokens, orders, strict=True):
        rank = np.argsort(order)
        held = np.where(rank == 0, -1, order[rank - 1])
        h = np.where((held < 0)[:, None], p["start"][0], p["token_embedding"][row[held]])
        own = held if config.target_positions else places
        if config.learned_positions:
            h = h + p["position"][own + 1 if config.target_positions else own]
        if config.axial_positions:
            h = h + np.where((own < 0)[:, None], 0, p["row"][own // columns])
            h = h + np.where((own < 0)[:, None], 0, p["column"][own % columns])
        if config.target_positions:
            h = h + p["target_position"]
        for i in range(config.layers):
            blocks = {name: stacked[i] for name, stacked in p["blocks"].items()}
            n, mixed = norm(h, blocks["norm_1"]), 0
            for head in range(config.heads):
                q, k, v = (n @ blocks["qkv"][:, c, head] for c in range(3))
                if config.rotary:
                    q, k = turned(q, places), turned(k, held)
                scores = q @ k.T / math.sqrt(k.shape[1])
                e = np.exp(scores - scores.max()) * (rank[:, None] >= rank[None])
                mixed += e / e.sum(axis=1, keepdims=True) @ v @ blocks["attention_out"][head]
            h = h + mixed
            up = norm(h, blocks["norm_2"]) @ blocks["mlp_in"]
            h = h + up / (1 + np.exp(-1.702 * up)) @ blocks["mlp_out"]
        logits.append(norm(h, p["final_norm"]) @ p["head"].T)
    return np.stack(logits)


def test_logits_match_attention_masked_by_rank_in_float64(kind):
    network, params, tokens, orders = kind
    found = np.asarray(logits_of(network, params, tokens, orders, np.zeros(ROWS, np.int32)))
    wanted = oracle(network, params, tokens, orders)
    wanted = np.take_along_axis(wanted, orders[..., None], axis=1)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6 * np.abs(wanted).max())


def test_cached_decoding_matches_the_full_pass_with_target_positions_and_class_tokens():
    network = tiny_network(scan_layers=False, class_tokens=2, **KINDS["both"])
    params, batch = random_params(network), random_batch(network, 3)
    tokens, variant = (sharding.shard_rows(batch["tokens"]), np.array([0, 1, 2], np.int32))
    full = logits_of(network, params, tokens, None, variant)

    @jax.jit
    def by_one(params, tokens):
        whole = network.bind(params)
        x = whole.embed(tokens[:, :5], jnp.asarray(variant))
        logits, prompt = generation.read_prompt(whole, x)
        model, blocks = generation.decoding_weights(network, params)

        def one(cache, position):
            x = model.embed_one(tokens, position)
            logits, cache = generation.extend(model, blocks, x, prompt, cache, position - 6)
            return cache, logits[:, 0]

        cache = generation.empty_cache(network, 3, LENGTH)
        return logits, jax.lax.scan(one, cache, jnp.arange(6, LENGTH))[1]

    first, rest = by_one(params, tokens)
    np.testing.assert_allclose(first, full[:, 5], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(jnp.moveaxis(rest, 0, 1), full[:, 6:], atol=1e-5, rtol=1e-5)


# Training


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [
        ((0.5, 0.75), {0: 1, 0.5: 1, 0.5625: 0.75, 0.625: 0.5, 0.75: 0, 1: 0}),
        ((0.5, 0.5), {0: 1, 0.49: 1, 0.51: 0, 1: 0}),
        ((0.0, 1.0), {0: 1, 0.25: 0.75, 1: 0}),
        ((1.0, 1.0), {0: 1, 0.99: 1}),
    ],
)
def test_orders_are_random_up_to_the_first_share_and_raster_from_the_second_on(shares, wanted):
    for done, chance in wanted.items():
        found = objective.random_order_share(shares, jnp.float32(done))
        assert float(found) == pytest.approx(chance, abs=1e-6)


def test_every_row_draws_its_own_order_uniformly():
    network, rows = tiny_network(**ANNEALED), 4096

    @jax.jit
    def draw(seed, taken):
        return objective.draw_order(network, rows, jax.random.key(seed), taken, 1000)

    random, half, raster = (np.asarray(draw(0, jnp.int32(taken))) for taken in (400, 500, 600))
    np.testing.assert_array_equal(np.sort(random, axis=1), np.tile(np.arange(LENGTH), (rows, 1)))
    assert len(np.unique(random, axis=0)) == rows
    for place in range(LENGTH):  # five deviations of a binomial distribution
        assert np.mean(random[:, place] == 3) == pytest.approx(1 / 16, abs=0.019)
    assert (raster == np.arange(LENGTH)).all()
    is_random = (half != np.arange(LENGTH)).any(axis=1)
    assert is_random.mean() == pytest.approx(0.5, abs=0.04)
    np.testing.assert_array_equal(half[is_random], random[is_random])
    assert (np.asarray(draw(1, jnp.int32(400))) != random).any(axis=1).all()
    assert objective.draw_order(network, rows, None, None, None) is None


@functools.partial(jax.jit, static_argnums=0)
def drawn(network, batch, key, taken):
    order = objective.draw_order(network, len(batch["tokens"]), key, taken, 4)
    return order, objective.start_vectors(network, batch, key, condition_on_label=True)


def nats_by_hand(network, params, batch, key, taken):
    """Mean nats per token of one part of a batch."""
    order, variant = drawn(network, batch, key, taken)
    logits = np.asarray(logits_of(network, params, batch["tokens"], order, variant), np.float64)
    targets = np.take_along_axis(np.asarray(batch["tokens"]), np.asarray(order), axis=1)
    chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return np.mean(np.log(np.exp(logits).sum(axis=-1)) - chosen)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_takes_the_orders_of_its_share_of_the_training(parts):
    """Four steps of (0.4, 0.6): random, random, half random, raster; each part draws its own."""
    network, still = tiny_network(layers=1, **ANNEALED), optax.sgd(0.0)
    batch = sharding.global_batch(random_batch(network))
    loss = step.make_loss(network, steps=4)
    take = step.make_train_step(loss, still, lambda _: 0.0, microbatches=parts, seed=7)
    params = random_params(network)
    state, found = step.state_of(random_params(network), still), []
    for taken in range(4):
        state, metrics = take(state, batch)
        key = jax.random.fold_in(jax.random.key(7), taken)
        keys = [key] if parts == 1 else jax.random.split(key, parts)
        wanted = [
            nats_by_hand(network, params, part, key, jnp.int32(taken))
            for part, key in zip(split(batch, parts), keys, strict=True)
        ]
        assert float(metrics["nats_per_token"]) == pytest.approx(np.mean(wanted), rel=1e-5)
        found.append(float(metrics["nats_per_token"]))
    assert len(set(found)) == 4


def split(batch, parts):
    """Rows r, r + parts, r + 2 parts ... make part r."""
    return [{name: x[r::parts] for name, x in batch.items()} for r in range(parts)]


def value_and_gradients(shape=(1, 1, 1), **changes):
    """Loss and gradients of a batch with half random orders and half dropped labels."""
    with jax.set_mesh(make_mesh(shape)):
        network = tiny_network(**ANNEALED | {"scan_layers": True} | changes)
        batch, key = sharding.global_batch(random_batch(network)), jax.random.key(5)
        loss = step.make_loss(network, steps=2)
        run = jax.jit(jax.value_and_grad(lambda p: loss(p, None, batch, key, jnp.int32(1))[0]))
        return jax.device_get(run(random_params(network)))


@functools.cache
def reference():
    return value_and_gradients()


WAYS = [(shape, {}) for shape in ((2, 2, 2), (1, 2, 2, 2))]
WAYS += [((1, 1, 1), {"scan_layers": False}), ((1, 1, 1), {"remat": "full"})]


@pytest.mark.parametrize(("shape", "changes"), WAYS, ids=str)
def test_orders_and_classes_are_the_same_on_every_mesh_scan_and_remat(shape, changes):
    (value, grads), (wanted, of_wanted) = value_and_gradients(shape, **changes), reference()
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for (path, found), leaf in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(of_wanted), strict=True
    ):
        scale = np.abs(leaf).max() + 1e-30
        np.testing.assert_allclose(found / scale, leaf / scale, atol=1e-5, err_msg=str(path))


def test_a_loss_with_random_orders_needs_the_length_of_the_training():
    with pytest.raises(ValueError, match=r"pass `steps` to make_loss"):
        step.make_loss(tiny_network(**ANNEALED))


# Settings and plans


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"random_order": (0.5, 0.75)}, "set config.model.rotary, or target_positions"),
        ({"random_order": (0.5, 0.75), "target_positions": True, **BARE}, "set config.model"),
        ({"random_order": (0.5, 0.75), "rotary": True, "objective": "bert"}, "bert has no order"),
        ({"target_positions": True, "objective": "bert"}, "same position"),
    ],
)
def test_settings_that_do_not_work_with_random_orders_are_refused(changes, named):
    def resolved(changes):
        flat = {f"model.{name}": value for name, value in changes.items()}
        default = fields.flatten(config_lib.Config())
        return config_lib.resolve(fields.unflatten(default | flat))

    with pytest.raises(InputError, match=named):
        resolved(changes)
    assert resolved({"random_order": (0.5, 0.75), "rotary": True, **BARE})
    assert resolved({"random_order": (0.5, 0.75), "target_positions": True})


def test_a_plan_counts_class_tokens_and_target_positions():
    model = config_lib.Model(layers=1, width=32, heads=4, **ANNEALED)
    config = config_lib.Config(model=model, train=config_lib.Train(batch_size=2))
    found = plan.make(Pretraining(config), topology.parse("cpu:1"))
    assert found.params == sum(
        math.prod(leaf.shape)
        for leaf in jax.tree.leaves(jax.eval_shape(found.training.network.init, jax.random.key(0)))
    )
    assert found.memory.batch == 2 * 4 * (64 + 2)  # two rows: tokens, variant and label
    assert found.compiled.arguments > found.memory.parameters
