"""Completion from any mask and beyond the edges, and surprise; with classes and without."""

import dataclasses
import inspect
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from conftest import make_mesh, random_image, random_params, tiny_network

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding, validation
from gptv_jax.config import Drawing
from gptv_jax.decode import generation
from gptv_jax.decode.sampler import Sampler, Section, kept_tokens, window_starts
from gptv_jax.tokens import GreyCodec
from gptv_jax.weights.native import WeightsFile

pytestmark = pytest.mark.usefixtures("one_device")

NETWORK = tiny_network(layers=1, scan_layers=False, class_tokens=2)
TOKENS = np.random.default_rng(0).integers(11, size=(3, 16), dtype=np.int32)
KEY = Section.NEW_IMAGES.key(0)
GREEDY = Drawing(temperature=0.0)


@pytest.fixture(scope="module")
def params():
    with jax.set_mesh(make_mesh((1, 1, 1))):
        return random_params(NETWORK)


def most_likely(params, tokens):
    """The most likely token at every position, by the full forward pass."""
    variant = np.full(len(tokens), NETWORK.unconditional, np.int32)
    return np.asarray(full_logits(params, *map(sharding.shard_rows, (tokens, variant)))).argmax(-1)


@jax.jit
def full_logits(params, tokens, variant):
    return NETWORK.bind(params)(tokens, variant).logits


def masked(mask):
    return np.where(mask, TOKENS, generation.UNKNOWN)


# Keys


def test_no_two_draws_share_a_key_and_no_training_step_does():
    seed, numbers, positions = 3, jnp.arange(6), jnp.arange(40)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = [jax.random.key(seed)[None], fold(jax.random.key(seed), jnp.arange(4096))]
    for section in Section:
        batches = fold(section.key(seed), numbers)
        tokens = jax.vmap(generation.token_key, (None, 0))
        keys += [section.key(seed)[None], batches]
        keys += [tokens(batches[n], positions) for n in numbers]
    data = np.concatenate([np.asarray(jax.random.key_data(key)) for key in keys])
    assert len(np.unique(data, axis=0)) == len(data)


def test_each_batch_and_each_window_has_draws_of_its_own(params):
    uniform = params | {"head": jnp.zeros_like(params["head"])}  # all that is drawn is the key's
    sampler, drawn = Sampler(NETWORK, uniform), []
    for section in (Section.NEW_IMAGES, Section.GENERATED):
        drawn += [sampler.new(3, section.key(0), number=n).reshape(-1) for n in (0, 1)]
    drawn += [sampler.new(3, Section.NEW_IMAGES.key(1)).reshape(-1)]
    for one, other in itertools.combinations(drawn, 2):
        assert (one != other).mean() > 0.7
    grid = sampler.outpaint(TOKENS, (0, 0, 0, 4), KEY)
    assert (grid[:, :, 4:6] != grid[:, :, 6:]).mean() > 0.5


# Masks of tokens


def test_a_mask_that_is_a_prefix_draws_what_the_prefix_draws(params):
    given = masked(np.arange(16) < 8)
    found, key = Sampler(NETWORK, params).draw(given, KEY), jax.random.fold_in(KEY, 0)
    # Read at once or one by one, the same tokens lead to the same draws.
    for prefix in (8, 4):
        tokens = sharding.shard_rows(given)
        wanted = generation.generate(NETWORK, params, tokens, key, prefix=prefix)
        np.testing.assert_array_equal(found, wanted)


def test_masks_of_the_same_rows_share_their_programs_which_end_with_the_last_unknown_row(
    params, monkeypatch
):
    calls, traced, generate, extend = [], [], generation.generate, generation.extend

    def noted(network, params, given, key, drawing, prefix, *further):
        calls.append((prefix, *given.shape))
        return generate(network, params, given, key, drawing, prefix, *further)

    monkeypatch.setattr(generation, "generate", noted)
    monkeypatch.setattr(
        generation, "extend", lambda *given: traced.append(len(calls)) or extend(*given)
    )
    # A network with a program of its own: other tests of the process trace that of NETWORK.
    own = dataclasses.replace(NETWORK.config, votes=NETWORK.config.votes + 1)
    sampler = Sampler(dataclasses.replace(NETWORK, config=own), params, GREEDY)
    for hidden in ([5, 10], [7, 8], [4, 11]):  # of the rows 4 to 7 and 8 to 11
        mask = ~np.isin(np.arange(16), hidden)
        found = sampler.draw(masked(mask), KEY)
        np.testing.assert_array_equal(found[:, mask], TOKENS[:, mask])
        np.testing.assert_array_equal(found[:, ~mask], most_likely(params, found)[:, ~mask])
    assert calls == [(4, 3, 12)] * 3 and set(traced) == {1}
    np.testing.assert_array_equal(sampler.draw(TOKENS, KEY, samples=2), TOKENS.repeat(2, axis=0))
    assert len(calls) == 3  # nothing is unknown


@pytest.mark.parametrize(
    ("keep", "kept"), [(0.0, 0), (0.25, 4), (0.3, 4), (0.5, 8), (0.7, 12), (1.0, 16)]
)
def test_kept_tokens_are_whole_rows(keep, kept):
    assert kept_tokens(NETWORK, keep) == kept


def test_a_token_is_known_where_all_its_pixels_are():
    mask, codec = np.ones((2, 4, 6), bool), GreyCodec(11, 4)
    codec.image_shape, codec.grid = (4, 6, 1), (2, 3)
    mask[0, 1, 5] = mask[1, 2, 0] = False
    known = [[1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1]]
    np.testing.assert_array_equal(validation.mask(mask, 2, codec), known)
    np.testing.assert_array_equal(validation.mask(mask[1], 2, codec), known[1:] * 2)


# Beyond the edges


@pytest.mark.parametrize("side", [2, 4, 5, 16])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 1), (3, 0), (7, 40), (16, 16)])
def test_windows_move_outward_half_a_side_at_most_and_leave_no_gap(side, before, after):
    starts = window_starts(before, after, side)
    assert starts[0] == before and set(starts) >= {0, before + after}
    assert starts == list(dict.fromkeys(starts)) and min(starts) == 0
    seen = {before}
    for start in starts[1:]:
        assert min(abs(start - other) for other in seen) <= side // 2
        seen.add(start)
    assert max(seen) == before + after


def test_outpainting_draws_window_by_window_around_tokens_that_stay(params):
    sampler = Sampler(NETWORK, params, GREEDY)
    grid = sampler.outpaint(TOKENS, (1, 2, 3, 3), KEY)
    assert grid.shape == (3, 7, 10) and grid.min() >= 0
    np.testing.assert_array_equal(grid[:, 1:5, 3:7].reshape(3, -1), TOKENS)
    # Later windows leave tokens to the right of the image and below it as they were drawn.
    for row, column, new in (
        (1, 5, np.s_[:, :, 2:]),
        (1, 6, np.s_[:, :, 3:]),
        (3, 3, np.s_[:, 2:]),
    ):
        window = grid[:, row : row + 4, column : column + 4]
        likely = most_likely(params, window.reshape(3, -1)).reshape(window.shape)
        np.testing.assert_array_equal(window[new], likely[new])


# What a user calls


@pytest.fixture(scope="module")
def model(params):
    tokens = config_lib.Tokens(kind="grey", levels=11)
    described = WeightsFile(NETWORK.config, tokens, image_size=4, params={}, starts=NETWORK.starts)
    return gptv_jax.Model(described, params, make_mesh((1, 1, 1)))


class Blocks(GreyCodec):
    """A token for the upper left one of 2x2 pixels."""

    def __init__(self, levels, size):
        super().__init__(levels, size)
        self.image_shape = (2 * size, 2 * size, 1)

    def encode(self, images):
        return super().encode(images[:, ::2, ::2])

    def decode(self, tokens, grid=None):
        return super().decode(tokens, grid).repeat(2, axis=1).repeat(2, axis=2)


@pytest.fixture(scope="module")
def coarse(model):
    """The same network, whose tokens are of 2x2 pixels."""
    found = gptv_jax.Model(model.weights_file(), model.params, model.mesh)
    found.codec = Blocks(11, 4)
    return found


IMAGES = TOKENS.astype(np.uint8).reshape(3, 4, 4, 1)
LARGE = random_image(3, 8, 8, 1) % np.uint8(11)
MIDDLE = np.ones((4, 4), bool)
MIDDLE[1:3, 1:3] = False


def test_known_pixels_stay_and_the_seed_decides_the_unknown_pixels(model):
    each = np.stack([MIDDLE, ~MIDDLE, MIDDLE.T & (np.arange(4) < 3)])
    for mask in (MIDDLE, each):
        first, again, other = (model.complete(IMAGES, mask=mask, seed=s) for s in (0, 0, 1))
        known = np.broadcast_to(mask, (3, 4, 4))
        np.testing.assert_array_equal(first[known], IMAGES[known])
        np.testing.assert_array_equal(first, again)
        assert (first[~known] != IMAGES[~known]).any() and (first != other).any()
    twice = model.complete(IMAGES, mask=MIDDLE, samples=2, temperature=0.0)
    once = model.complete(IMAGES, mask=MIDDLE, temperature=0.0)
    np.testing.assert_array_equal(twice, once.repeat(2, axis=0))


def test_a_token_of_many_pixels_stays_where_all_of_them_are_known(coarse):
    mask = MIDDLE.repeat(2, axis=0).repeat(2, axis=1)
    mask[0, 0] = False  # so the whole token is unknown
    found = coarse.tokenize(coarse.complete(LARGE, mask=mask, temperature=0.0))
    coarsely = MIDDLE.copy()
    coarsely[0, 0] = False
    np.testing.assert_array_equal(found, coarse.tokenize(
        coarse.complete(LARGE, mask=coarsely, temperature=0.0)))  # fmt: skip
    stays = coarsely.reshape(-1)
    np.testing.assert_array_equal(found[:, stays], coarse.tokenize(LARGE)[:, stays])
    assert (found[:, ~stays] == most_likely(coarse.params, found)[:, ~stays]).all()


def test_labels_are_start_vectors_and_none_is_the_last_one(model):
    labels = {None: 2, 0: 0, 1: 1, (1, 0, 1): (1, 0, 1), (2**0, 0, 0): (1, 0, 0)}
    for given, variant in labels.items():
        variant = np.broadcast_to(np.int32(variant), 3).copy()
        wanted = full_logits(model.params, *map(sharding.shard_rows, (TOKENS, variant)))
        np.testing.assert_array_equal(model.logits(TOKENS, given), wanted)
        nats = Sampler(NETWORK, model.params).nats(TOKENS, variant)
        np.testing.assert_allclose(model.log_likelihood(IMAGES, given), -nats.sum(1), rtol=1e-6)
    assert len({model.log_likelihood(IMAGES, label)[0].item() for label in (None, 0, 1)}) == 3


def test_the_nats_of_a_mesh_are_those_of_one_device(params):
    wanted = Sampler(NETWORK, params).nats(TOKENS)
    with jax.set_mesh(make_mesh((1, 2, 2, 2))):  # which does not divide three rows
        found = Sampler(NETWORK, random_params(NETWORK)).nats(TOKENS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_labels_and_guidance_reach_what_is_drawn(model):
    settings = {"top_k": 3, "guidance": 3.0, "guidance_schedule": "cosine"}
    sampler = Sampler(NETWORK, model.params, Drawing(**settings))
    labels = np.array([0, 1, 1], np.int32)
    wanted = sampler.new(3, Section.NEW_IMAGES.key(5), labels).reshape(IMAGES.shape)
    np.testing.assert_array_equal(model.sample(3, 5, labels=labels, **settings), wanted)
    np.testing.assert_array_equal(model.sample(3, 5, label=[0, 1, 1], **settings), wanted)
    assert (model.sample(3, 5, labels=1, **settings) != wanted)[0].any()
    key, given = Section.COMPLETIONS.key(5), masked(np.arange(16) < 8)
    wanted = sampler.draw(given, key, labels).reshape(IMAGES.shape)
    found = model.complete(IMAGES, seed=5, labels=labels, **settings)
    np.testing.assert_array_equal(found, wanted)
    wanted = sampler.outpaint(TOKENS, (0, 0, 0, 2), Section.OUTPAINTED.key(5), labels)
    found = model.outpaint(IMAGES, right=2, seed=5, labels=labels, **settings)
    np.testing.assert_array_equal(found[..., 0], wanted)


@pytest.mark.parametrize("name", ["logits", "log_likelihood", "surprise", "complete", "outpaint"])
def test_label_is_taken_in_place_of_labels_everywhere(model, name):
    call, given = getattr(model, name), TOKENS if name == "logits" else IMAGES
    np.testing.assert_array_equal(call(given, label=1), call(given, labels=1))
    with pytest.raises(TypeError, match="label and labels are both given"):
        call(given, label=1, labels=1)


@pytest.mark.parametrize("name", ["sample", "complete", "outpaint"])
def test_help_shows_every_setting_of_drawing_with_its_default_and_meaning(name):
    method = getattr(gptv_jax.Model, name)
    parameters = inspect.signature(method).parameters
    for setting in dataclasses.fields(Drawing):
        assert parameters[setting.name].default == setting.default
        assert parameters[setting.name].annotation == setting.type
        assert f"\n{setting.name}: " in method.__doc__
    assert not {"drawing", "label"} & set(parameters)


def test_temperature_top_k_and_top_p_may_follow_the_seed(model):
    wanted = model.sample(3, 5, temperature=0.5, top_k=3)
    np.testing.assert_array_equal(model.sample(3, 5, 0.5, 3), wanted)
    wanted = model.complete(IMAGES, 0.5, 5, temperature=0.5, top_k=3, top_p=0.9)
    np.testing.assert_array_equal(model.complete(IMAGES, 0.5, 5, 0.5, 3, 0.9), wanted)
    with pytest.raises(TypeError):
        model.sample(3, 5, 0.5, 3, 0.9, 1)
    with pytest.raises(TypeError):
        model.sample(3, 5, 0.5, temperature=0.5)


def test_an_unknown_setting_is_named_beside_the_known_settings(model):
    for call, argument in ((model.sample, 1), (model.complete, IMAGES), (model.outpaint, IMAGES)):
        with pytest.raises(TypeError, match=r"temperatur is not a setting.* temperature, top_k"):
            call(argument, temperatur=1.0)


@pytest.mark.parametrize("name", ["model", "coarse"])
def test_surprise_is_the_nats_of_each_token_spread_over_the_tokens_pixels(name, request):
    model, images = request.getfixturevalue(name), {"model": IMAGES, "coarse": LARGE}[name]
    found = model.surprise(images, labels=[0, 1, 0])
    assert found.dtype == np.float32 and found.shape == images.shape[:3] and (found > 0).all()
    likely = model.log_likelihood(images, labels=[0, 1, 0])
    np.testing.assert_allclose(-found.sum(axis=(1, 2)), likely, rtol=1e-5)
    tokens = model.tokenize(images)
    logits = np.float64(model.logits(tokens, labels=[0, 1, 0]))
    nats = (
        np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    )
    side = images.shape[1] // 4
    wanted = nats.reshape(3, 4, 4).repeat(side, 1).repeat(side, 2) / side**2
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_outpainted_images_have_the_asked_size_and_the_image_in_its_place(coarse):
    found = coarse.outpaint(LARGE, top=2, right=4, seed=3)
    assert found.dtype == np.uint8 and found.shape == (3, 10, 12, 1)
    kept = coarse.detokenize(coarse.tokenize(LARGE))
    np.testing.assert_array_equal(found[:, 2:, :8], kept)
    np.testing.assert_array_equal(found, coarse.outpaint(LARGE, top=2, right=4, seed=3))
    assert (found != coarse.outpaint(LARGE, top=2, right=4, seed=4)).any()


# case: (call, parts of the message: what was given, and what is accepted)
WRONG = {
    "label beyond the last": (lambda m: m.sample(2, labels=2), ["2", "0 to 1"]),
    "negative label": (lambda m: m.logits(TOKENS, -1), ["-1", "0 to 1"]),
    "too few labels": (lambda m: m.surprise(LARGE, [0, 1]), ["[2]", "3 of them"]),
    "float label": (lambda m: m.sample(2, labels=0.5), ["float64", "whole number"]),
    "guidance to nothing": (lambda m: m.sample(2, guidance=2.0), ["guidance is 2", "no class"]),
    "negative guidance": (lambda m: m.sample(2, guidance=-1.0, labels=0), ["-1.0", "0 or more"]),
    "no schedule": (lambda m: m.sample(2, guidance_schedule="up"), ["'up'", "constant, cosine"]),
    "grey mask": (lambda m: m.complete(LARGE, mask=LARGE[..., 0]), ["uint8", "bool [8, 8]"]),
    "other mask": (lambda m: m.complete(LARGE, mask=MIDDLE[:3]), ["[3, 4]", "[8, 8] or [4, 4]"]),
    "too few masks": (lambda m: m.complete(LARGE, mask=MIDDLE[None]), ["[1, 4, 4]", "3 images"]),
    "half a token": (lambda m: m.outpaint(LARGE, left=3), ["left is 3", "multiple of 2"]),
    "less than nothing": (lambda m: m.outpaint(LARGE, top=-2), ["top is -2", "0 or more"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_messages_say_what_was_given_and_what_is_accepted(coarse, case, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    call, parts = WRONG[case]
    with pytest.raises(ValueError) as caught:
        call(coarse)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_are_refused_for_a_network_without_classes(params):
    network, tokens = tiny_network(), config_lib.Tokens(kind="grey", levels=11)
    described = WeightsFile(network.config, tokens, image_size=4, params={}, starts=3)
    model = gptv_jax.Model(described, params, make_mesh((1, 1, 1)))
    with pytest.raises(ValueError, match="labels are given, but this network"):
        model.sample(2, labels=0)
