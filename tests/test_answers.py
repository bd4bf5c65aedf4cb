"""Decoding the parts after an image: the full pass in every part, the grammar, shared prompts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODERN, make_mesh, random_params

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.decode import answers, generation
from gptv_jax.decode.restriction import Restriction
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import Layout, Part, causal, prefixed

pytestmark = pytest.mark.usefixtures("one_device")

IMAGE = Part("image", 7, (2, 3))
# Objects of a height, a width and a class: more positions than the cache's first capacity.
OBJECTS = Part("objects", 11, (23, 3), bins=4, summed=True)
TITLE = Part("title", 5, (4,))
KEY = jax.random.key(0)
GREEDY = Restriction(0.0, 2**20, 1.0)
FREE = Restriction(1.0, 2**20, 1.0)
TINY = {"layers": 2, "width": 16, "heads": 2, "scan_layers": False}


def network_of(layout=prefixed, **recipe) -> Network:
    config = dataclasses.replace(config_lib.Model(), **TINY, **recipe)
    return Network(config, layout(IMAGE, OBJECTS, TITLE), stem=(4,))


@dataclasses.dataclass(frozen=True)
class Grammar:
    """Of an object the second token is above the first, and the third a class; titles are free."""

    def __call__(self, part, position, tokens):
        if part != "objects":
            return None
        slot, every = position % 3, jnp.arange(OBJECTS.vocabulary)[None]
        before = jax.lax.dynamic_slice_in_dim(tokens, jnp.maximum(position - 1, 0), 1, axis=1)
        second = (every > before) & (every < 8)
        return jnp.where(slot == 0, every < 4, jnp.where(slot == 1, second, every >= 8))


@functools.cache
def drawn(layout, rotary, restriction, samples=2, rows=3):
    network = network_of(layout, **(MODERN if rotary else {}))
    rng = np.random.default_rng(0)
    tokens = rng.integers(IMAGE.vocabulary, size=(rows, IMAGE.size)).astype(np.int32)
    pixels = rng.integers(256, size=(rows, 4, 6, 1)).astype(np.uint8)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = random_params(network)
        given = sharding.shard_rows(tokens), sharding.shard_rows(pixels)
        found = answers.answer(
            network, params, *given, KEY, restriction, allowed=Grammar(), samples=samples
        )
        sequences = jax.device_get(found[0])
        repeated = np.repeat(pixels, samples, axis=0)
        whole = sharding.shard_rows(sequences), sharding.shard_rows(repeated)
        logits = full_logits(network, params, *whole)
    return network, jax.device_get(found), jax.device_get(logits), tokens


@functools.partial(jax.jit, static_argnums=0)
def full_logits(network, params, tokens, pixels):
    return network.bind(params)(tokens, pixels=pixels).logits


def likely(network, sequences, logits):
    """For every position after the image: probabilities of all tokens and of the allowed ones.

    They are of the full pass; the position's tokens come third.
    """
    found = []
    for part in (OBJECTS, TITLE):
        tokens = sequences[:, network.layout.slices[part.name]]
        for position in range(part.size):
            mask = Grammar()(part.name, position, jnp.array(tokens))
            at = logits[part.name][:, position]
            possible = at if mask is None else np.where(mask, at, -np.inf)
            both = (jax.nn.softmax(x.astype(np.float64), axis=-1) for x in (at, possible))
            found.append((*map(np.asarray, both), tokens[:, position]))
    return found


@pytest.mark.parametrize(("layout", "rotary"), [(prefixed, False), (causal, True)])
def test_every_part_is_decoded_as_the_full_pass_reads_it(layout, rotary):
    network, (sequences, probabilities), logits, _ = drawn(layout, rotary, FREE)
    for position, (chances, _, tokens) in enumerate(likely(network, sequences, logits), start=6):
        expected = chances[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(probabilities[:, position], expected, rtol=2e-4, atol=1e-6)


def test_greedy_answers_are_the_most_likely_allowed_tokens():
    network, (sequences, _), logits, _ = drawn(prefixed, False, GREEDY)
    for _, chances, tokens in likely(network, sequences, logits):
        chosen = chances[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(chosen, chances.max(axis=1), rtol=1e-4)


def test_images_stay_and_answers_keep_to_the_grammar():
    _, (sequences, probabilities), _, tokens = drawn(prefixed, False, FREE)
    np.testing.assert_array_equal(sequences[:, :6], np.repeat(tokens, 2, axis=0))
    assert (probabilities[:, :6] == 1).all()
    first, second, third = np.moveaxis(sequences[:, 6:75].reshape(6, 23, 3), -1, 0)
    assert (first < 4).all() and (second > first).all() and (second < 8).all()
    assert (third >= 8).all() and (third < 11).all()
    assert len({tuple(row) for row in sequences[:, 6:]}) == 6  # samples of an image differ


def test_each_position_is_drawn_with_its_own_settings():
    temperature = np.ones(79, np.float32)
    temperature[6:75:3] = 0  # the first token of every object is the most likely one
    settings = Restriction(temperature, np.full(79, 2**20), np.ones(79, np.float32))
    network = network_of()
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = random_params(network)
        tokens = sharding.shard_rows(np.zeros((1, 6), np.int32))
        pixels = sharding.shard_rows(np.zeros((64, 4, 6, 1), np.uint8))
        found, _ = answers.answer(network, params, tokens, pixels[:1], KEY, settings, samples=64)
        logits = full_logits(network, params, found, pixels)
    found, best = np.asarray(found), np.asarray(logits["objects"]).argmax(axis=-1)
    objects = found[:, 6:75]
    np.testing.assert_array_equal(objects[:, ::3], best[:, ::3])
    assert (objects[:, 1::3] != best[:, 1::3]).any()


READ = dataclasses.replace(TITLE, name="read", predicted=False)


def test_a_part_after_the_image_that_is_not_predicted_is_refused():
    network = Network(config_lib.Model(**TINY), causal(IMAGE, READ, TITLE))
    with pytest.raises(InputError, match="the parts read of the sequence are not predicted"):
        answers.answer(network, {}, jnp.zeros((1, 6), jnp.int32), None, KEY, FREE)


@pytest.mark.parametrize(
    ("layout", "prefix", "reason"),
    [
        (Layout((IMAGE, READ, TITLE), (*range(1, 7), 7, 10, 10, *range(10, 15))), 6, "6 to 13"),
        (prefixed(IMAGE, TITLE), 2, "positions 2 to 9"),
        (causal(IMAGE, TITLE), 2, "the first part must be: 6 tokens"),
    ],
)
def test_positions_that_see_later_ones_are_not_drawn(layout, prefix, reason):
    network = Network(config_lib.Model(**TINY), layout)
    given = jnp.zeros((1, network.length), jnp.int32)
    with pytest.raises(InputError, match=reason):
        generation.draw_tokens(network, prefix, 1, {}, given, None, None, KEY, None, None)
