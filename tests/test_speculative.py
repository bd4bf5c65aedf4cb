"""Speculative sampling: the large network's own distribution, whatever the draft proposes."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import RECIPES, make_mesh, random_params, tiny_network

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.config import Drawing
from gptv_jax.decode import cache, generation, restriction, speculative
from gptv_jax.decode.generation import UNKNOWN
from gptv_jax.decode.sampler import Sampler
from gptv_jax.errors import InputError
from gptv_jax.stages import pretrained
from gptv_jax.tokens import GreyCodec
from gptv_jax.weights import native
from gptv_jax.weights.native import WeightsFile

one_device = pytest.mark.usefixtures("one_device")
KEY = jax.random.key(0)
GREEDY = Drawing(temperature=0.0, draft_tokens=3)


def pair(mesh=(1, 1, 1), layers=2, **recipe):
    """A network and a draft of one layer with weights of its own: `(network, params, draft)`."""
    network = tiny_network(layers=layers, scan_layers=False, **recipe)
    small = tiny_network(layers=1, scan_layers=False, **recipe)
    with jax.set_mesh(make_mesh(mesh)):
        return (
            network,
            random_params(network),
            speculative.Draft(small, random_params(small, seed=1)),
        )


def draw(network, params, draft, given, drawing=GREEDY, **options):
    """Tokens that are drawn with the draft, or without one where it is None."""
    found = Sampler(network, params, drawing, draft).draw(np.asarray(given), KEY, **options)
    return np.asarray(found)


# The distribution

GRID, V, DRAWS = (1, 4), 3, 24_000
EVERY = np.array(list(itertools.product(range(V), repeat=GRID[1])), np.int32)  # [81, 4]
CASES = {
    "plain": Drawing(draft_tokens=2),
    "filters": Drawing(temperature=0.8, top_k=2, draft_tokens=2),
    "nucleus": Drawing(temperature=1.5, top_p=0.9, draft_tokens=2),
    "guidance": Drawing(guidance=2.0, guidance_schedule="cosine", draft_tokens=2),
    "a known token": Drawing(draft_tokens=2),
}


@pytest.fixture(scope="module")
def tiny():
    """Three tokens, two classes, and a draft that is far off, yet shares some of the mass."""
    recipe = {"vocabulary": V, "grid": GRID, "class_tokens": 2, "label_dropout": 0.1}
    network, params, draft = pair(layers=1, width=16, heads=2, **recipe)
    params, weights = (p | {"head": 3 * p["head"]} for p in (params, draft.params))
    return network, params, dataclasses.replace(draft, params=weights)


def exact(network, params, drawing, labels, given):
    """Probability of each sequence of `EVERY`, by full forward passes of the large network."""
    known = sharding.shard_rows(EVERY)

    @jax.jit
    def log_probabilities(params):
        variants = jnp.full(len(EVERY), network.unconditional if labels is None else labels)
        variants = jax.sharding.reshard(variants.astype(jnp.int32), sharding.BATCH_FIRST)
        logits = network.bind(params)(known, variants).logits
        scales = None if labels is None else restriction.guidance_scales(drawing, network.length)
        if scales is not None:
            without = network.bind(params)(known).logits
            logits = without + scales[None, :, None] * (logits - without)
        settings = restriction.Restriction.of(drawing, V)
        flat = logits.reshape(-1, V, out_sharding=sharding.BATCH_FIRST)
        return jax.nn.log_softmax(restriction.restrict(flat, *settings)).reshape(logits.shape)

    p = np.exp(np.asarray(log_probabilities(params), np.float64))
    p = np.take_along_axis(p, EVERY[..., None], axis=-1)[..., 0]
    p = np.where(given == UNKNOWN, p, given == EVERY)  # a known token is drawn for sure
    return p.prod(axis=1)


@one_device
@pytest.mark.parametrize("case", CASES)
def test_sequences_are_distributed_as_the_large_network_alone_says(tiny, case):
    network, params, draft = tiny
    drawing, given = CASES[case], np.full((1, 4), UNKNOWN, np.int32)
    labels = np.array([1], np.int32) if case == "guidance" else None
    if case == "a known token":
        given[:, 2] = 1
    drawn = draw(network, params, draft, given, drawing, labels=labels, samples=DRAWS)
    found = np.bincount(drawn @ V ** np.arange(4)[::-1], minlength=V**4)
    wanted = DRAWS * exact(network, params, drawing, labels, given)
    assert wanted.sum() == pytest.approx(DRAWS, rel=1e-4)
    assert not found[wanted == 0].any()
    likely = wanted > 5  # the other sequences together are one more cell
    cells = [np.append(x[likely], x[~likely].sum()) for x in (found, wanted)]
    statistic = ((cells[0] - cells[1]) ** 2 / np.maximum(cells[1], 1)).sum()
    freedom = likely.sum()
    assert freedom >= 4
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


# Equal to plain decoding where nothing is random


@one_device
@pytest.mark.parametrize("recipe", RECIPES)
def test_temperature_0_draws_what_plain_decoding_draws(recipe, monkeypatch):
    monkeypatch.setattr(cache, "FIRST_CAPACITY", 6)  # the cache grows twice
    network, params, draft = pair(**RECIPES[recipe])
    given = np.full((3, 16), UNKNOWN, np.int32)
    given[:, :4] = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 0, 1, 2]]
    given[1, 9] = 3
    wanted = draw(network, params, None, given, samples=2)
    np.testing.assert_array_equal(draw(network, params, draft, given, samples=2), wanted)
    assert len(np.unique(wanted, axis=0)) == 3
    if recipe == "modern":
        given = given[[0, 1, 2, 2]]
        with jax.set_mesh(make_mesh((1, 2, 4))):
            found = draw(*pair((1, 2, 4), **RECIPES[recipe]), given, samples=2)
        np.testing.assert_array_equal(found[:6], wanted)


@one_device
def test_a_network_that_is_its_own_draft_has_every_token_accepted():
    network, params, _ = pair()
    draft, stopwatch = speculative.Draft(network, params), generation.Stopwatch()
    given = np.full((3, 16), UNKNOWN, np.int32)
    drawn = draw(network, params, draft, given, Drawing(draft_tokens=4), stopwatch=stopwatch)
    assert stopwatch.passes == 3 * (1 + 4)  # the first token, then 15 tokens by fours
    one = draw(network, params, draft, given[:1], Drawing(draft_tokens=4))
    np.testing.assert_array_equal(one, drawn[:1])  # a row does not depend on those beside it
    assert (drawn[1:] != drawn[:1]).any(axis=1).all()


# What users call


def weights_file(path, levels=5, image_size=4, **model):
    """The path of a file of random weights."""
    config = config_lib.Model(layers=1, width=16, heads=2, **model)
    tokens = config_lib.Tokens(kind="grey", levels=levels)
    file = WeightsFile(config, tokens, image_size, {})
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh())):
        params = sharding.by_name(random_params(file.network))
    arrays = {name: np.asarray(value) for name, value in params.items()}
    native.write(dataclasses.replace(file, params=arrays), path)
    return str(path)


def test_models_draw_with_a_draft_and_refuse_one_of_other_tokens(tmp_path):
    model = gptv_jax.load(weights_file(tmp_path / "model.safetensors"))
    small = gptv_jax.load(weights_file(tmp_path / "small.safetensors", axial_positions=True))
    images = model.sample(2, draft=small, draft_tokens=3)
    assert images.shape == (2, 4, 4, 1) and images.max() < 5
    many = [model.sample(2, draft=small, draft_tokens=count) for count in (16, 10**9)]
    np.testing.assert_array_equal(*many)  # an image has 16 tokens
    completed = model.complete(images, 0.5, draft=small, temperature=0.0)
    np.testing.assert_array_equal(completed, model.complete(images, 0.5, temperature=0.0))
    for name, changes, told in (
        ("levels", {"levels": 6}, "vocabulary 6, not 5"),
        ("size", {"image_size": 6}, "grid (6, 6), not (4, 4)"),
    ):
        other = gptv_jax.load(weights_file(tmp_path / f"{name}.safetensors", **changes))
        with pytest.raises(InputError) as raised:
            model.sample(1, draft=other)
        assert told in str(raised.value)
    masked = gptv_jax.load(weights_file(tmp_path / "bert.safetensors", objective="bert"))
    with pytest.raises(InputError, match="objective bert cannot draw"):
        model.sample(1, draft=masked)
    with pytest.raises(InputError, match="draft_tokens is 0"):
        model.sample(1, draft=small, draft_tokens=0)


def test_a_draft_of_another_palette_is_refused():
    network = tiny_network()
    codecs = [GreyCodec(11, 4), GreyCodec(11, 4)]

    class Definition:
        def equivalent(self, other):
            return self is other

    for codec in codecs:
        codec.definition = Definition()
    with pytest.raises(InputError, match="another palette or tokenizer"):
        speculative.check_draft(network, codecs[0], network, codecs[1])
    speculative.check_draft(network, codecs[0], network, codecs[0])
    codecs[1].definition = None
    with pytest.raises(InputError, match="another palette or tokenizer"):
        speculative.check_draft(network, codecs[0], network, codecs[1])
    # Before the network's palette is made, the kinds of tokens tell colours from grey levels.
    with pytest.raises(InputError, match="kind of tokens grey, not palette; a draft"):
        speculative.check_draft(network, codecs[1], network, None, kinds=("grey", "palette"))


def test_a_draft_that_reads_pixels_is_refused():
    reads = tiny_network(image_input="pixels", patch=(2, 2, 1))
    with pytest.raises(InputError, match="the draft has inputs pixels, not tokens"):
        speculative.check_draft(reads, None, tiny_network(), None)


def test_a_run_draws_its_samples_with_the_draft_of_the_config(tmp_path):
    settings = {"levels": 17, "image_size": 8}
    model = config_lib.Model(layers=1, width=16, heads=2)
    config = config_lib.Config(
        init_from=weights_file(tmp_path / "model.safetensors", **settings),
        data=config_lib.Data(name="digits", image_size=8),
        tokens=config_lib.Tokens(levels=17),
        model=model,
        sample=config_lib.Sample(
            count=4,
            completions=0,
            draft=weights_file(tmp_path / "draft.safetensors", rotary=True, **settings),
        ),
    )
    gptv_jax.train(config, tmp_path / "run", ["sample"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 1 <= summary["sample/tokens_per_pass"] <= 4
    wrong = weights_file(tmp_path / "wrong.safetensors")
    sample = dataclasses.replace(config.sample, draft=wrong)
    with pytest.raises(InputError, match="vocabulary 5, not 17"):
        gptv_jax.train(dataclasses.replace(config, sample=sample), tmp_path / "other", ["sample"])
    assert not (tmp_path / "other" / "config.json").exists()
    with pytest.raises(InputError, match="vocabulary"):
        pretrained.check_draft(dataclasses.replace(config, sample=sample), None)
