"""Decoding with a key/value cache: the full network's logits, greedy and random draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODERN, RECIPES, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import sharding
from gptv_jax.config import Drawing
from gptv_jax.decode import generation
from gptv_jax.decode.restriction import Restriction
from gptv_jax.model.attention import LANES

pytestmark = pytest.mark.usefixtures("one_device")

GREEDY = Drawing(temperature=0.0)
KEY = jax.random.key(0)


def model_of(recipe):
    network = tiny_network(scan_layers=False, **recipe)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params, tokens = random_params(network), rows(random_batch(network, size=3)["tokens"])
        return network, params, tokens


@pytest.fixture(scope="module")
def model():
    """A network, its weights and random sequences."""
    return model_of({})


def rows(tokens):
    return sharding.shard_rows(np.asarray(tokens, np.int32))


@jax.jit(static_argnums=0)
def full_logits(network, params, tokens):
    return network.bind(params)(tokens).logits


@jax.jit(static_argnums=0)
def read_one(network, params, tokens, position, prompt, cache, count):
    model, blocks = generation.decoding_weights(network, params)
    x = model.embed_one(tokens, position)
    logits, cache = generation.extend(model, blocks, x, prompt, cache, count)
    return logits[:, 0], cache


@jax.jit(static_argnums=(0, 1, 2))
def empty_cache(network, samples, capacity):
    return generation.empty_cache(network, samples, capacity)


def draw(network, params, given, drawing=GREEDY, key=KEY, length=16, **options):
    """Sequences of `length` tokens that begin with the given ones."""
    unknown = np.full((len(given), length - given.shape[1]), generation.UNKNOWN)
    whole, kept = rows(np.concatenate([given, unknown], axis=1)), given.shape[1]
    found = generation.generate(network, params, whole, key, drawing, kept, **options)
    return np.asarray(found)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# The cache


@pytest.mark.parametrize(
    ("recipe", "scan", "kept"),
    [("igpt", False, 0), ("igpt", True, 15), ("modern", False, 7), ("modern", True, 1)],
)
def test_cached_decoding_gives_the_logits_of_the_full_forward_pass(recipe, scan, kept):
    network, params, tokens = model_of(RECIPES[recipe])
    full = full_logits(network, params, tokens)
    changed = dataclasses.replace(network.config, scan_layers=scan)
    network = dataclasses.replace(network, config=changed)
    logits, prompt = generation.prefill(network, False, params, tokens[:, :kept], None)
    found, cache = [logits], empty_cache(network, len(tokens), 17 - kept)
    for position in range(kept + 1, network.length):
        unknown, count = tokens.at[:, position:].set(0), jnp.int32(position - kept - 1)
        at = jnp.int32(position), prompt, cache, count
        logits, cache = read_one(network, params, unknown, *at)
        found.append(logits)
    np.testing.assert_allclose(np.stack(found, axis=1), full[:, kept:], atol=1e-5, rtol=1e-5)


def test_long_prompts_are_padded_unseen_and_a_growing_cache_changes_nothing():
    network = tiny_network(axial_positions=False, grid=(12, 11))
    kept = network.length - 2
    assert kept > LANES and kept % LANES  # a length that the fast attention does not take
    assert len(generation.cache_capacities(network.length - 1)) == 3
    params, none = random_params(network), rows(np.zeros((2, 0)))
    tokens = draw(network, params, none, length=network.length)
    full = full_logits(network, params, rows(tokens))
    np.testing.assert_array_equal(tokens, np.argmax(full, axis=-1))
    prefix = rows(tokens)[:, :kept]
    logits, prompt = generation.prefill(network, False, params, prefix, None)
    np.testing.assert_allclose(logits, full[:, kept], atol=1e-5, rtol=1e-5)
    at = jnp.int32(kept + 1), prompt, empty_cache(network, 2, 1), jnp.int32(0)
    logits, _ = read_one(network, params, rows(tokens), *at)
    np.testing.assert_allclose(logits, full[:, kept + 1], atol=1e-5, rtol=1e-5)


def test_one_row_is_drawn_with_a_growing_cache_that_no_step_copies():
    network = tiny_network(axial_positions=False, grid=(12, 11))
    params, unknown = random_params(network), rows(np.full((1, network.length), generation.UNKNOWN))
    logits, prompt = generation.prefill(network, False, params, unknown[:, :0], None)
    restriction = Restriction.of(GREEDY, network.vocabulary)
    arguments = params, unknown, logits, prompt, KEY, None, restriction
    program = generation.draw_tokens.lower(network, 0, 1, *arguments).compile()
    tokens = program(*arguments)[0]
    full = full_logits(network, params, tokens)
    np.testing.assert_array_equal(tokens, np.argmax(full, axis=-1))
    # The loops' computations stand before the entry computation, which may copy a cache once.
    loops = program.as_text().split("ENTRY")[0].splitlines()
    for capacity in generation.cache_capacities(network.length - 1):
        of_cache = [line for line in loops if f",{capacity},{prompt[0].keys.shape[-1]}]" in line]
        assert of_cache and not [line for line in of_cache if " copy(" in line]


def test_capacities_double_so_that_at_most_half_of_the_cache_is_unused():
    assert generation.cache_capacities(0) == []
    assert generation.cache_capacities(64) == [64]
    assert generation.cache_capacities(1023) == [64, 128, 256, 512, 1023]


# Generation


def loops(network, mesh):
    """For each loop that draws: `(steps, types that every step reads, types that are carried)`."""
    with jax.set_mesh(make_mesh(mesh)):
        params = sharding.abstract(network.init)
        unknown = rows(np.full((8, network.length), generation.UNKNOWN))
        traced = jax.make_jaxpr(lambda p: generation.generate(network, p, unknown, KEY))(params)
    programs = [e.params["jaxpr"] for e in traced.eqns if e.primitive.name == "jit"]
    for loop in (e for program in programs for e in program.eqns if e.primitive.name == "scan"):
        types = [x.aval for x in loop.invars]
        constants = len(loop.invars) - len(loop.outvars)  # a loop gives back all that it carries
        yield loop.params["length"], types[:constants], types[constants:]


@pytest.mark.parametrize("side", [16, 32])
def test_no_step_casts_or_gathers_weights_and_little_of_the_cache_is_unused(side):
    network = tiny_network(dtype="bfloat16", grid=(side, side), **MODERN)
    steps = read = 0
    for length, constants, carried in loops(network, (1, 2, 4)):
        arrays = [x for x in constants if x.ndim]
        assert arrays  # the weights
        assert not any(x.dtype == jnp.float32 or "fsdp" in x.sharding.spec for x in arrays)
        caches = [x for x in carried if x.ndim == 4]
        assert len(caches) == 4 and {x.dtype for x in caches} == {jnp.dtype(jnp.bfloat16)}
        (capacity,) = {x.shape[2] for x in caches}
        steps, read = steps + length, read + length * capacity
    assert steps == network.length - 1
    assert read <= 1.4 * steps * (steps + 1) / 2


def test_generated_sequences_keep_the_prefix_and_depend_on_the_key_alone(model):
    network, params, tokens = model
    for kept in (0, 6):
        given = tokens[:, :kept]
        drawn = draw(network, params, given, Drawing())
        assert drawn.shape == tokens.shape and drawn.dtype == np.int32
        np.testing.assert_array_equal(drawn[:, :kept], given)
        assert drawn.min() >= 0 and drawn.max() < network.vocabulary
        np.testing.assert_array_equal(draw(network, params, given, Drawing()), drawn)
        other = draw(network, params, given, Drawing(), jax.random.key(1))
        assert (other[:, kept:] != drawn[:, kept:]).any()
    np.testing.assert_array_equal(draw(network, params, tokens), tokens)  # nothing is left to draw


@pytest.mark.parametrize("recipe", RECIPES)
def test_temperature_0_takes_the_argmax_of_the_full_forward_pass_at_every_step(recipe):
    network, params, tokens = model_of(RECIPES[recipe])
    found = draw(network, params, tokens[:, :6])
    wanted = np.argmax(full_logits(network, params, rows(found)), axis=-1)
    np.testing.assert_array_equal(found[:, 6:], wanted[:, 6:])
    if recipe == "modern":  # on a mesh, from 4 rows, which 2 ways divide
        prefix = np.asarray(tokens)[[0, 1, 2, 2], :6]
        with jax.set_mesh(make_mesh((1, 2, 4))):
            on_mesh = draw(network, random_params(network), rows(prefix))
        np.testing.assert_array_equal(on_mesh[:3], found)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_single_row_is_drawn_as_it_is_among_others(recipe):
    network, params, tokens = model_of(RECIPES[recipe])
    given = np.asarray(tokens)[:, :3]
    found = draw(network, params, given[:1])
    np.testing.assert_array_equal(found, draw(network, params, given)[:1])


def test_samples_of_one_prompt_are_those_of_as_many_equal_prompts(model):
    network, params, tokens = model
    prefix = np.asarray(tokens)[:2, :6]
    wanted = draw(network, params, rows(np.repeat(prefix, 4, axis=0)), Drawing())
    found = draw(network, params, rows(prefix), Drawing(), samples=4)
    np.testing.assert_array_equal(found, wanted)
    assert len(np.unique(found, axis=0)) > 2
    _, prompt = generation.prefill(network, False, params, rows(prefix), None)
    assert prompt[0].keys.shape[0] == 2  # held once for four
    wanted = draw(network, params, rows(prefix), samples=4)
    with jax.set_mesh(make_mesh((1, 2, 4))):
        found = draw(network, random_params(network), rows(prefix), samples=4)
    np.testing.assert_array_equal(found, wanted)


def test_the_tokens_of_a_shorter_sequence_are_the_first_ones_of_the_whole_sequence(model):
    network, params, tokens = model
    wanted = draw(network, params, tokens[:, :6], Drawing())
    found = draw(network, params, tokens[:, :6], Drawing(), length=11)
    np.testing.assert_array_equal(found, wanted[:, :11])


def test_drawn_tokens_follow_the_distribution_of_the_network(model):
    network, params, tokens = model
    count, temperature, V = 4096, 0.7, network.vocabulary
    prefix = rows(np.repeat(np.asarray(tokens[:1, :14]), count, axis=0))
    drawn = draw(network, params, prefix, Drawing(temperature))
    found = np.zeros((V, V))
    np.add.at(found, tuple(drawn[:, 14:].T), 1)

    continued = np.repeat(np.asarray(tokens[:1]), V, axis=0)
    continued[:, 14] = np.arange(V)  # every value of the last token but one
    probability = softmax(np.asarray(full_logits(network, params, rows(continued))) / temperature)
    wanted = count * probability[0, 14][:, None] * probability[:, 15]
    likely = wanted > 5  # the other pairs together are one more cell
    found, wanted = (np.append(x[likely], x[~likely].sum()) for x in (found, wanted))
    chi_square = ((found - wanted) ** 2 / wanted).sum()
    assert len(found) > 50
    assert chi_square < len(found) + 4 * np.sqrt(2 * len(found))


def test_all_settings_share_one_compiled_program_whose_compilation_is_not_timed(model, monkeypatch):
    network, params, tokens = model
    given = tokens[:2, :3]  # a shape that no other test has
    traced, now, extend = [], 0.0, generation.extend

    def slow_to_trace(*arguments):
        nonlocal now
        traced.append(1)
        now += 1000
        return extend(*arguments)

    def clock():
        nonlocal now
        now += 1
        return now

    monkeypatch.setattr(generation, "extend", slow_to_trace)
    monkeypatch.setattr(generation.time, "perf_counter", clock)
    stopwatch = generation.Stopwatch()
    timed = draw(network, params, given, Drawing(), stopwatch=stopwatch)
    assert traced and stopwatch.seconds == 2  # a tick of the clock for each of the two programs
    np.testing.assert_array_equal(draw(network, params, given, Drawing()), timed)
    traced.clear()
    for settings in (
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"temperature": 0.9, "top_k": 5, "top_p": 0.9},
    ):
        draw(network, params, given, Drawing(**settings))
    assert not traced


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
