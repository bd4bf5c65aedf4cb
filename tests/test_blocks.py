"""Tokens that are predicted a block at a time: what sees what, likelihoods, and drawing."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from conftest import MODERN, generator, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.config import rules
from gptv_jax.decode import generation
from gptv_jax.decode.sampler import Sampler, Section
from gptv_jax.errors import InputError
from gptv_jax.model.layout import Part, by_blocks, of_images
from gptv_jax.tasks import token_attack
from gptv_jax.train import step

pytestmark = pytest.mark.usefixtures("one_device")

ROTARY = MODERN | {"learned_positions": True}
RECIPES = {"igpt": {}, "rotary": ROTARY}
KEY = Section.NEW_IMAGES.key(0)


def block_network(block=(2, 2), recipe="rotary", **changes):
    return tiny_network(block=block, **RECIPES[recipe], **changes)


def block_of(place, block, columns=4):
    """Number of the block of a place in raster order."""
    row, column = place // columns, place % columns
    return row // block[0] * (columns // block[1]) + column // block[1]


def slope(network):
    """Loss and gradient."""
    loss, batch = step.make_loss(network), sharding.global_batch(random_batch(network))
    run = jax.jit(jax.value_and_grad(lambda p: loss(p, None, batch, jax.random.key(1))[0]))
    return jax.device_get(run(random_params(network)))


def test_positions_hold_block_after_block():
    image = Part("image", 5, (4, 4), block=(2, 2))
    assert image.raster_places.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    layout = by_blocks(image)
    assert layout.visible == (4,) * 4 + (8,) * 4 + (12,) * 4 + (16,) * 4 and layout.shift == 4
    assert layout.coordinates()[2].tolist() == [0, 1, 0]
    assert Part("image", 5, (4, 4), block=(2, 4)).raster_places.tolist() == list(range(16))
    with pytest.raises(ValueError, match="do not fill"):
        Part("image", 5, (4, 4), block=(3, 2))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("block", [(2, 2), (1, 4), (2, 1)], ids=str)
def test_a_token_changes_the_logits_of_all_later_blocks_and_of_no_other(block, recipe):
    network = block_network(block, recipe)
    params = random_params(network)
    tokens = generator().integers(11, size=(1, 16), dtype=np.int32)
    logits = jax.jit(lambda tokens: network.bind(params)(tokens).logits[0])
    blocks, before = np.array([block_of(p, block) for p in range(16)]), logits(tokens)
    for place in range(16):
        other = tokens.copy()
        other[0, place] = (other[0, place] + 1) % 11
        moved = np.abs(logits(other) - before).max(axis=-1) > 0
        np.testing.assert_array_equal(moved, blocks > blocks[place])
    rows = np.asarray(before)  # places of a block are told apart, in the first block as well
    for a, b in itertools.combinations(np.flatnonzero(blocks == 0), 2):
        assert np.abs(rows[a] - rows[b]).max() > 1e-4


def test_an_input_is_the_token_one_block_before_and_the_place_of_the_target():
    network = block_network((2, 2), "igpt")
    params, tokens = random_params(network), random_batch(network)["tokens"]
    read = jax.jit(lambda t: network.bind(params)(t, raw=True, keep=(0,)).kept[0])(tokens)
    table = {name: np.asarray(params[name]) for name in ("position", "row", "column", "start")}
    for place in range(16):
        row, column = divmod(place, 4)
        # Blocks lie in two columns: before the left one comes the right one of the block row above.
        before = (row, column - 2) if column >= 2 else (row - 2, column + 2)
        held = np.asarray(params["token_embedding"])[tokens[:, 4 * before[0] + before[1]]]
        held = table["start"][:1] if before[0] < 0 else held
        wanted = held + table["position"][place] + table["row"][row] + table["column"][column]
        np.testing.assert_allclose(read[:, place], np.broadcast_to(wanted, (8, 32)), atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_blocks_of_one_token_are_the_network_without_blocks(recipe):
    found = [slope(block_network(b, recipe, context_masking=0.5)) for b in ((1, 1), ())]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_the_probabilities_of_all_images_sum_to_one():
    network = block_network((1, 2), vocabulary=3, grid=(2, 2))
    every = np.array([*itertools.product(range(3), repeat=4)], np.int32)
    nats = Sampler(network, random_params(network)).nats(every).astype(np.float64)
    assert nats.std(axis=0).min() > 0.01
    assert np.exp(-nats.sum(axis=1)).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("block", [(2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("rows", [0, 3])
def test_drawn_blocks_are_what_whole_passes_choose(block, recipe, rows):
    network = block_network(block, recipe)
    params, greedy = random_params(network), config_lib.Drawing(temperature=0.0)
    given = generator(1).integers(11, size=(3, 16), dtype=np.int32)
    given[:, 4 * rows :] = generation.UNKNOWN
    given[1, 13] = 7  # known among unknown ones
    drawn = Sampler(network, params, greedy).draw(given, KEY, samples=2)
    whole, known = np.repeat(given, 2, axis=0), np.repeat(given != generation.UNKNOWN, 2, axis=0)
    np.testing.assert_array_equal(drawn[known], whole[known])
    chosen = np.asarray(jax.jit(lambda t: network.bind(params)(t).logits.argmax(axis=-1))(drawn))
    np.testing.assert_array_equal(drawn[~known], chosen[~known])
    assert len(np.unique(drawn[~known])) > 1  # not one token everywhere


def test_draws_follow_the_distribution_of_every_token():
    network = block_network((1, 2), vocabulary=3, grid=(2, 2))
    params = random_params(network)
    drawn = Sampler(network, params).new(4000, KEY)
    every = np.array([*itertools.product(range(3), repeat=4)], np.int32)
    likely = np.exp(-Sampler(network, params).nats(every).sum(axis=1, dtype=np.float64))
    counts = (drawn[:, None] == every[None]).all(axis=2).sum(axis=0)
    # Pearson's statistic of 81 cells: mean 80, deviation sqrt(160).
    assert ((counts - 4000 * likely) ** 2 / (4000 * likely)).sum() < 80 + 4 * math.sqrt(160)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 2, 2)], ids=str)
def test_losses_gradients_and_draws_are_the_same_on_every_mesh(shape):
    network = block_network(class_tokens=3)
    network = dataclasses.replace(network, starts=4)

    def run(mesh):
        with jax.set_mesh(make_mesh(mesh)):
            drawing = config_lib.Drawing(guidance=2.0, top_k=5)
            sampler = Sampler(network, random_params(network), drawing)
            return slope(network), sampler.new(3, KEY, np.array([0, 1, 2], np.int32))

    (found, drawn), (wanted, tokens) = run(shape), run((1, 1, 1))
    for f, w in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(f, w, rtol=1e-4, atol=1e-5 * max(np.abs(w).max(), 1e-3))
    np.testing.assert_array_equal(drawn, tokens)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.block": (3, 2)}, "divisors of the 8 x 8 tokens"),
        ({"model.block": (8, 8)}, "more than one block"),
        ({"model.block": (2, 2), "model.learned_positions": False}, "first block apart"),
        ({"model.block": (2, 2), "model.objective": "bert"}, "the whole image"),
        ({"model.block": (2, 2), "model.prefixes": (0.5,)}, "block is .* or block="),
        ({"model.block": (2, 2), "model.target_positions": True}, "one by one"),
        ({"model.block": (2, 2), "data.frames": 2}, "blocks are of images"),
        ({"model.block": (2, 2), "distill.cached": True, "data.name": "tokens"}, "take .., or"),
    ],
)
def test_blocks_refuse_what_makes_no_sense_with_them(changes, words):
    settings = config_lib.default()
    settings.update_from_flattened_dict(changes)
    config = config_lib.fields.from_dict(config_lib.Config, settings, "config")
    with pytest.raises(InputError, match=words):
        rules.check(config)
        rules.SECTIONS["train"](config)
        rules.SECTIONS["distill"](config)


def test_a_network_refuses_a_layout_of_other_blocks_and_an_attack():
    config = block_network().config
    with pytest.raises(InputError, match=r"blocks are \(\), but config.model.block is \(2, 2\)"):
        dataclasses.replace(block_network(), layout=of_images(11, (4, 4)))
    classifier = tiny_network(3, block=config.block)
    assert "block" in token_attack.check(classifier)
