"""Classes and classifier-free guidance: one doubled batch is two runs, on every mesh."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import RECIPES, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import sharding
from gptv_jax.config import Drawing
from gptv_jax.decode import generation
from gptv_jax.decode.sampler import Sampler, class_rows
from gptv_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("one_device")

LABELS = np.array([0, 1, 1], np.int32)
COSINE = Drawing(guidance=4.0, guidance_schedule="cosine")
GREEDY = dataclasses.replace(COSINE, temperature=0.0)
SCALES = generation.guidance_scales(COSINE, 16)
KEY = jax.random.key(0)


def conditional(**recipe):
    """One layer, 16 tokens, two classes."""
    return tiny_network(layers=1, scan_layers=False, class_tokens=2, **recipe)


def tokens_of(network, size=3):
    return random_batch(network, size)["tokens"]


@jax.jit(static_argnums=0)
def full_logits(network, params, tokens, variant):
    return network.bind(params)(tokens, variant).logits


def both(network, params, tokens, labels=LABELS):
    """Logits of two full forward passes: with the classes, and without any."""
    nothing = np.full_like(labels, network.unconditional)
    rows = [sharding.shard_rows(x) for x in (tokens, labels, nothing)]
    return [np.asarray(full_logits(network, params, rows[0], x)) for x in rows[1:]]


def guided(logits, scales=SCALES):
    """Guided logits of the paper: (1 + w) conditional - w unconditional, w = scale - 1."""
    w = (scales - 1)[:, None]
    return (1 + w) * logits[0] - w * logits[1]


@jax.jit(static_argnums=0)
def read_one(network, params, tokens, position, prompt, cache, count):
    model, blocks = generation.decoding_weights(network, params)
    x = jnp.repeat(model.embed_one(tokens, position), 2, axis=0, out_sharding=sharding.BATCH_FIRST)
    logits, cache = generation.extend(model, blocks, x, prompt, cache, count)
    return logits[:, 0], cache


def test_the_doubled_batch_is_two_runs_of_the_full_network():
    network, kept = conditional(**RECIPES["modern"]), 5
    params, tokens = random_params(network), tokens_of(network)
    prefix, labels = (sharding.shard_rows(x) for x in (tokens[:, :kept], LABELS))
    logits, prompt = generation.prefill(network, True, params, prefix, labels)
    found, cache = [logits], generation.empty_cache(network, 6, 16 - kept)
    for position in range(kept + 1, network.length):
        at = jnp.int32(position), prompt, cache, jnp.int32(position - kept - 1)
        logits, cache = read_one(network, params, sharding.shard_rows(tokens), *at)
        found.append(logits)
    found, wanted = np.stack(found, axis=1), both(network, params, tokens)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1
    for logits, of_run in zip((found[0::2], found[1::2]), wanted, strict=True):
        np.testing.assert_allclose(logits, of_run[:, kept:], atol=1e-5, rtol=1e-5)
    by_position = jnp.asarray(found.swapaxes(0, 1))
    found = [
        generation.guide(*x, 1) for x in zip(by_position, jnp.asarray(SCALES[kept:]), strict=True)
    ]
    wanted = guided(wanted)[:, kept:]
    np.testing.assert_allclose(np.stack(found, axis=1), wanted, atol=1e-4, rtol=1e-5)


@pytest.fixture(scope="module")
def model():
    network = conditional()
    with jax.set_mesh(make_mesh((1, 1, 1))):
        return network, random_params(network)


def draw(network, params, drawing, labels=LABELS, samples=2, length=16):
    unknown = np.full((len(labels), length), generation.UNKNOWN, np.int32)
    unknown, labels = (sharding.shard_rows(x) for x in (unknown, labels))
    options = {"labels": labels, "samples": samples}
    return np.asarray(generation.generate(network, params, unknown, KEY, drawing, **options))


def test_greedy_tokens_are_those_that_the_guided_full_network_finds_most_likely(model):
    network, params = model
    found = draw(network, params, GREEDY)
    wanted = guided(both(network, params, found, np.repeat(LABELS, 2)))
    np.testing.assert_array_equal(found, wanted.argmax(axis=-1))
    plain = draw(network, params, Drawing(temperature=0.0))
    np.testing.assert_array_equal(
        plain, both(network, params, plain, np.repeat(LABELS, 2))[0].argmax(axis=-1)
    )
    assert (found != plain).any()
    one = Sampler(network, params, GREEDY).draw(
        np.full((1, 16), generation.UNKNOWN), KEY, LABELS[:1]
    )
    np.testing.assert_array_equal(one, found[:1])
    given, prefix = np.array(found[::2]), 8  # what is known counts towards the position
    given[:, prefix:] = generation.UNKNOWN
    given[:, 12] = (found[::2, 12] + 1) % network.vocabulary  # what follows is to differ
    drawing = dataclasses.replace(GREEDY, guidance=32.0)
    partly = Sampler(network, params, drawing).draw(given, KEY, LABELS)
    scales = generation.guidance_scales(drawing, network.length)
    wanted = guided(both(network, params, partly), scales).argmax(axis=-1)
    np.testing.assert_array_equal(partly, np.where(given == generation.UNKNOWN, wanted, given))


def test_scale_1_draws_what_is_drawn_without_guidance(model):
    network, params = model
    wanted = draw(network, params, Drawing())
    almost = Drawing(guidance=1 + 1e-12)  # in float32 1, so the doubled batch has the scale 1
    assert (generation.guidance_scales(almost, 16) == 1).all()
    np.testing.assert_array_equal(draw(network, params, almost), wanted)
    for schedule in ("constant", "cosine"):  # and does not pay for the doubled batch
        drawing = Drawing(guidance_schedule=schedule, guidance_power=2.0)
        assert generation.guidance_scales(drawing, 16) is None
        np.testing.assert_array_equal(draw(network, params, drawing), wanted)


def test_one_program_serves_all_scales_and_schedules(model, monkeypatch):
    network, params = model
    draw(network, params, COSINE)
    traced, extend = [], generation.extend
    monkeypatch.setattr(generation, "extend", lambda *given: traced.append(1) or extend(*given))
    for schedule, scale in (("constant", 2.0), ("cosine", 2.0), ("cosine", 16.0)):
        draw(network, params, Drawing(guidance=scale, guidance_schedule=schedule))
    assert not traced
    draw(network, params, COSINE, samples=3)  # another shape
    assert traced


def test_tokens_are_drawn_as_often_as_the_guided_distribution_says(model):
    network, params = model
    label, count = np.zeros(1, np.int32), 4096
    logits = [x[0, 0] for x in both(network, params, tokens_of(network, 1), label)]
    telling = (logits[0] - logits[1]).argmax()

    def share_of_the_telling_token(scale):
        drawing = Drawing(guidance=scale)
        drawn = draw(network, params, drawing, label, samples=count, length=1)[:, 0]
        wanted = np.exp(guided(logits, np.float64([scale]))[0])
        wanted *= count / wanted.sum()
        found = np.bincount(drawn, minlength=len(wanted))
        assert ((found - wanted) ** 2 / wanted).sum() < 40  # 10 degrees: one of 50,000 is above
        return found[telling] / count

    shares = [share_of_the_telling_token(scale) for scale in (0.0, 1.0, 3.0)]
    assert shares[0] + 0.02 < shares[1] < shares[2] - 0.02


GIVEN = np.where(np.arange(16) % 5, generation.UNKNOWN, tokens_of(conditional(), 8))  # no prefix


def drawn_on(mesh, given, samples=1):
    network, labels = conditional(), np.resize(LABELS, len(given))
    with jax.set_mesh(make_mesh(mesh)):
        drawing = dataclasses.replace(COSINE, guidance=16.0)
        sampler = Sampler(network, random_params(network), drawing)
        return sampler.draw(given, jax.random.key(7), labels, samples)


@pytest.fixture(scope="module")
def of_one_device():
    return drawn_on((1, 1, 1), GIVEN)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 2, 4), (1, 2, 2, 2)])  # all ways of splitting
def test_a_seed_gives_the_same_pictures_on_every_mesh_however_many_rows_come_after(
    mesh, of_one_device
):
    np.testing.assert_array_equal(drawn_on(mesh, GIVEN), of_one_device)
    np.testing.assert_array_equal(drawn_on(mesh, GIVEN[:5]), of_one_device[:5])
    if mesh == (8, 1, 1):  # prompts that do not divide are repeated, not filled up with samples
        wanted = drawn_on((1, 1, 1), GIVEN[:3], samples=2)
        np.testing.assert_array_equal(drawn_on(mesh, GIVEN[:3], samples=2), wanted)


def test_guidance_scales_follow_the_schedules_of_rar():
    np.testing.assert_array_equal(generation.guidance_scales(Drawing(guidance=2.5), 4), [2.5] * 4)
    of_rar_b = Drawing(guidance=16.0, guidance_schedule="cosine", guidance_power=2.75)
    found = generation.guidance_scales(of_rar_b, 256)
    wanted = [1 + 15 * (1 - math.cos(math.pi * (t / 256) ** 2.75)) / 2 for t in range(256)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert found[0] == 1 and (np.diff(found) >= 0).all() and 15.9 < found[-1] < 16


@pytest.mark.parametrize(
    "changes", [{"class_tokens": 0}, {"class_tokens": 2, "label_dropout": 0.0}]
)
def test_guidance_needs_a_network_trained_with_and_without_classes(changes):
    with pytest.raises(InputError, match="guidance needs a network") as caught:
        Sampler(tiny_network(**changes), {}, Drawing(guidance=2.0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("count", "classes", "rows", "columns"), [(64, 10, 10, 6), (10, 10, 10, 1), (64, 1000, 8, 8)]
)
def test_class_rows_hold_every_class_or_evenly_spread_classes(count, classes, rows, columns):
    found = class_rows(count, classes)
    assert found.shape == (rows, columns) and (found == found[:, :1]).all()
    np.testing.assert_array_equal(found[:, 0], np.arange(rows) * (classes / rows))
