import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODERN, RECIPES, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import sharding
from gptv_jax.decode import cached, generation
from gptv_jax.model.splash_attention import LANES

pytestmark = pytest.mark.usefixtures("one_device")


def model_of(recipe):
    network = tiny_network(scan_layers=False, **recipe)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params, tokens = random_params(network), rows(random_batch(network, size=3)["tokens"])
        return network, params, tokens, full_logits(network, params, tokens)


@pytest.fixture(scope="module")
def model():
    """A network, its weights, random sequences and the logits of the full forward pass."""
    return model_of({})


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES)
def any_model(request):
    """As `model`, of every kind of network."""
    return model_of(request.param)


def rows(tokens):
    return sharding.from_everywhere(np.asarray(tokens, np.int32))


@jax.jit(static_argnums=0)
def full_logits(network, params, tokens):
    return network.bind(params)(tokens).logits


@jax.jit(static_argnums=0)
def read_one(network, params, tokens, position, cache, count):
    model, blocks = cached.weights(network.bind(params), params)
    return cached.extend(model, blocks, model.embed_one(tokens, position), cache, count)


@jax.jit(static_argnums=(0, 2, 3))
def room(network, params, samples, size):
    return cached.empty(network.bind(params), samples, size)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# The cache


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 7, 15])
def test_cached_decoding_gives_the_logits_of_the_full_forward_pass(kept, scan, any_model):
    network, params, tokens, full = any_model
    changed = dataclasses.replace(network.config, scan_layers=scan)
    network = dataclasses.replace(network, config=changed)
    logits, prompts = generation._prefill(network, False, params, tokens[:, :kept], None)
    found, cache = [logits], cached.Cache(prompts, room(network, params, len(tokens), 17 - kept))
    for position in range(kept + 1, network.length):
        unknown, count = tokens.at[:, position:].set(0), jnp.int32(position - kept - 1)
        logits, cache = read_one(network, params, unknown, jnp.int32(position), cache, count)
        found.append(logits)
    np.testing.assert_allclose(np.stack(found, axis=1), full[:, kept:], atol=1e-5, rtol=1e-5)


def test_prompts_longer_than_the_fast_attention_takes_at_once_are_padded_unseen():
    network = dataclasses.replace(tiny_network(axial_positions=False), grid=(12, 11))
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params, tokens = random_params(network), rows(random_batch(network, size=2)["tokens"])
        kept = network.length - 2
        assert kept > LANES and kept % LANES
        full = full_logits(network, params, tokens)
        logits, prompts = generation._prefill(network, False, params, tokens[:, :kept], None)
        np.testing.assert_allclose(logits, full[:, kept], atol=1e-5, rtol=1e-5)
        cache = cached.Cache(prompts, room(network, params, 2, 1))
        last = jnp.int32(kept + 1)
        logits, _ = read_one(network, params, tokens, last, cache, jnp.int32(0))
        np.testing.assert_allclose(logits, full[:, kept + 1], atol=1e-5, rtol=1e-5)


# Generation


def loops(network, mesh):
    """Of the loops that draw a sequence: `(length, what all steps read, what they carry)`."""
    with jax.set_mesh(make_mesh(mesh)):
        params, prefix = sharding.abstract(network.init), rows(np.zeros((8, 0)))
        draw = jax.make_jaxpr(lambda p: generation.generate(network, p, prefix, jax.random.key(0)))
        called = next(e for e in draw(params).eqns if e.params.get("name") == "_continue")
    for loop in called.params["jaxpr"].eqns:
        if loop.primitive.name == "scan":
            given, types = loop.params["num_consts"], [x.aval for x in loop.invars]
            yield loop.params["length"], types[:given], types[given:]


@pytest.mark.parametrize("rows", [16, 32])
def test_no_step_casts_or_gathers_weights_and_little_of_what_is_read_is_empty(rows):
    network = dataclasses.replace(tiny_network(dtype="bfloat16", **MODERN), grid=(rows, rows))
    steps = read = 0
    for length, given, carried in loops(network, (1, 2, 4)):
        assert not any(x.dtype == jnp.float32 or "fsdp" in x.sharding.spec for x in given if x.ndim)
        caches = [x for x in carried if x.ndim == 4]
        assert len(caches) == 4 and {x.dtype for x in caches} == {jnp.dtype(jnp.bfloat16)}
        (room,) = {x.shape[2] for x in caches}
        steps, read = steps + length, read + length * room
    assert steps == network.length - 1
    assert read <= 1.4 * steps * (steps + 1) / 2


@pytest.mark.parametrize("kept", [0, 6, 15, 16])
def test_generated_sequences_keep_the_prefix_and_depend_on_the_key_alone(kept, model):
    network, params, tokens, _ = model

    def draw(seed):
        key = jax.random.key(seed)
        return np.asarray(generation.generate(network, params, tokens[:, :kept], key))

    drawn = draw(0)
    assert drawn.shape == tokens.shape and drawn.dtype == np.int32
    np.testing.assert_array_equal(drawn[:, :kept], tokens[:, :kept])
    assert drawn.min() >= 0 and drawn.max() < network.vocabulary
    np.testing.assert_array_equal(draw(0), drawn)
    if kept < 15:
        assert (draw(1)[:, kept:] != drawn[:, kept:]).any()


def greedy(network, params, prefix):
    key = jax.random.key(0)
    return np.asarray(generation.generate(network, params, prefix, key, temperature=0.0))


def test_temperature_0_takes_the_argmax_of_the_full_forward_pass_at_every_step(model):
    network, params, tokens, _ = model
    wanted = np.array(tokens)
    wanted[:, 6:] = 0
    for position in range(6, network.length):
        logits = full_logits(network, params, rows(wanted))
        wanted[:, position] = np.argmax(logits[:, position], axis=-1)
    np.testing.assert_array_equal(greedy(network, params, tokens[:, :6]), wanted)


def test_a_mesh_draws_the_greedy_tokens_of_one_device(any_model):
    network, params, tokens, _ = any_model
    wanted = greedy(network, params, tokens[:, :6])
    prefix = np.asarray(tokens)[[0, 1, 2, 2], :6]  # 4 rows, which 2 ways divide
    with jax.set_mesh(make_mesh((1, 2, 4))):
        found = greedy(network, random_params(network), rows(prefix))
    np.testing.assert_array_equal(found[:3], wanted)


def test_room_that_grows_on_the_way_changes_nothing(model, monkeypatch):
    network, params, tokens, _ = model
    prefix = tokens[:, :3]
    draw = lambda: np.asarray(generation.generate(network, params, prefix, jax.random.key(0)))  # noqa: E731
    wanted = draw()
    monkeypatch.setattr(generation, "FIRST_ROOM", 2)
    assert generation._rooms(12) == [2, 4, 8, 12]
    generation._continue.clear_cache()
    np.testing.assert_array_equal(draw(), wanted)
    generation._continue.clear_cache()


@pytest.mark.parametrize("kept", [0, 6])
def test_samples_of_one_prompt_are_those_of_as_many_equal_prompts(kept, model):
    network, params, tokens, _ = model
    prefix = np.asarray(tokens)[:2, :kept]
    key = jax.random.key(0)
    wanted = generation.generate(network, params, rows(np.repeat(prefix, 4, axis=0)), key)
    found = generation.generate(network, params, rows(prefix), key, samples=4)
    np.testing.assert_array_equal(found, wanted)
    assert len(np.unique(found, axis=0)) > 2
    _, prompts = generation._prefill(network, False, params, rows(prefix), None)
    assert prompts[0].keys.shape[0] == 2  # held once for four
    with jax.set_mesh(make_mesh((1, 2, 4))):
        on_mesh = random_params(network)
        key, settings = jax.random.key(0), {"samples": 4, "temperature": 0.0}
        found = generation.generate(network, on_mesh, rows(prefix), key, **settings)
    wanted = greedy(network, params, tokens[:2, :kept])
    np.testing.assert_array_equal(found, np.repeat(wanted, 4, axis=0))


def test_steps_are_the_first_ones_of_the_whole_sequence(model):
    network, params, tokens, _ = model
    key = jax.random.key(0)
    wanted = generation.generate(network, params, tokens[:, :6], key)
    found = generation.generate(network, params, tokens[:, :6], key, steps=5)
    np.testing.assert_array_equal(found, wanted[:, :11])


def test_drawn_tokens_follow_the_distribution_of_the_network(model):
    network, params, tokens, _ = model
    count, temperature, V = 4096, 0.7, network.vocabulary
    prefix = rows(np.repeat(np.asarray(tokens[:1, :14]), count, axis=0))
    drawn = generation.generate(network, params, prefix, jax.random.key(0), temperature=temperature)
    found = np.zeros((V, V))
    np.add.at(found, tuple(np.asarray(drawn[:, 14:]).T), 1)

    continued = np.repeat(np.asarray(tokens[:1]), V, axis=0)
    continued[:, 14] = np.arange(V)  # every value of the last token but one
    probability = softmax(np.asarray(full_logits(network, params, rows(continued))) / temperature)
    wanted = count * probability[0, 14][:, None] * probability[:, 15]
    likely = wanted > 5  # the other pairs together are one more cell
    found, wanted = (np.append(x[likely], x[~likely].sum()) for x in (found, wanted))
    chi_square = ((found - wanted) ** 2 / wanted).sum()
    assert len(found) > 50
    assert chi_square < len(found) + 4 * np.sqrt(2 * len(found))


def test_one_compiled_prefill_and_one_compiled_loop_serve_all_settings(model):
    network, params, tokens, _ = model
    prefix = tokens[:2, :3]  # shapes that no other test has

    def compiled(**settings):
        generation.generate(network, params, prefix, jax.random.key(0), **settings)
        return np.array([generation._prefill._cache_size(), generation._continue._cache_size()])

    before = np.array([generation._prefill._cache_size(), generation._continue._cache_size()])
    first = compiled()
    np.testing.assert_array_equal(first - before, [1, 1])
    for settings in (
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"temperature": 0.9, "top_k": 5, "top_p": 0.9},
    ):
        np.testing.assert_array_equal(compiled(**settings), first)


@pytest.mark.parametrize(
    ("keep", "kept"), [(0.0, 0), (0.25, 4), (0.3, 4), (0.5, 8), (0.7, 12), (1.0, 16)]
)
def test_kept_tokens_are_whole_rows(keep, kept):
    assert generation.kept_tokens(tiny_network(), keep) == kept


# Restriction to the most likely tokens


@jax.jit
def restrict(*arguments):
    return generation.restrict(*arguments)


def kept_by(row, temperature=1.0, top_k=None, top_p=1.0):
    """Indices of the tokens that stay; checks that they keep their logits."""
    top_k = len(row) if top_k is None else top_k
    settings = (jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
    found = np.asarray(restrict(jnp.asarray(row, jnp.float32)[None], *settings))[0]
    kept = np.flatnonzero(found > -np.inf)
    if temperature:
        scaled = np.asarray(row, np.float32) / np.float32(temperature)
        np.testing.assert_allclose(found[kept], scaled[kept], rtol=1e-6)
    return kept.tolist()


def ranking(row):
    """Indices, the most likely first, among equals the lower one."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def random_rows():
    rng = np.random.default_rng(0)
    for _ in range(20):
        yield rng.normal(scale=3, size=11).astype(np.float32)
        yield rng.integers(4, size=11).astype(np.float32)  # many ties


@pytest.mark.parametrize("temperature", [0.01, 0.3, 30.0])
def test_the_temperature_divides_the_logits(temperature):
    for row in random_rows():
        assert kept_by(row, temperature) == list(range(len(row)))


def test_no_more_is_drawn_than_there_is_room_for(model):
    network, params, tokens, _ = model
    with pytest.raises(ValueError, match="room for 10 tokens"):
        generation.generate(network, params, tokens[:, :6], jax.random.key(0), steps=11)


def test_top_k_keeps_exactly_the_k_most_likely():
    for row in random_rows():
        for k in (1, 2, 5, 10, 11):
            assert kept_by(row, top_k=k) == sorted(ranking(row)[:k])


@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
def test_top_p_keeps_the_fewest_most_likely_tokens_that_reach_p(temperature):
    for row in random_rows():
        order = ranking(row)
        reached = np.cumsum(softmax(row.astype(np.float64) / temperature)[order])
        for count in range(1, 11):
            below = reached[count - 2] if count > 1 else 0.0
            if reached[count - 1] - below > 1e-4:  # p well between two sums, for float32
                p = (below + reached[count - 1]) / 2
                assert kept_by(row, temperature, top_p=p) == sorted(order[:count])


@pytest.mark.parametrize(("p", "count"), [(0.125, 1), (0.25, 2), (0.5, 4), (0.51, 5), (0.875, 7)])
def test_top_p_takes_no_token_more_when_p_is_reached_exactly(p, count):
    assert kept_by(np.zeros(8), top_p=p) == list(range(count))


def test_top_p_1_keeps_all_and_a_tiny_one_the_most_likely():
    peaked = np.array([0.0, 40.0, 0.0, 39.0, -60.0])  # float32 sums reach 1 after two tokens
    for row in (peaked, *random_rows()):
        assert kept_by(row, top_p=1.0) == list(range(len(row)))
        assert kept_by(row, top_p=1e-9) == ranking(row)[:1]


def test_top_k_and_top_p_restrict_together():
    row = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept_by(row, top_k=3, top_p=0.65) == [0, 1]
    assert kept_by(row, top_k=2, top_p=0.85) == [0, 1]
    assert kept_by(row, top_k=1, top_p=0.85) == [0]


def test_temperature_0_keeps_the_most_likely_alone():
    for row in random_rows():
        assert kept_by(row, temperature=0.0) == ranking(row)[:1]
        assert kept_by(row, temperature=0.0, top_k=5, top_p=0.9) == ranking(row)[:1]
