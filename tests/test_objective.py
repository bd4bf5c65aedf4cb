"""The BERT objective: which tokens are masked, what is predicted, how images are evaluated."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import generator, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.tokens.palette import Palette
from gptv_jax.train import objective, step, voting
from gptv_jax.weights import openai
from gptv_jax.weights.strict_reader import StrictReader


def bert(classes: int = 0, **changes):
    network = tiny_network(classes, objective="bert", **changes)
    return dataclasses.replace(network, starts=1)


@pytest.fixture
def given(one_device):
    network = bert(classes=3, masked_share=0.4)
    batch = random_batch(network) | {"variant": np.zeros(8, np.int32)}
    batch["index"] = np.arange(100, 108, dtype=np.int32)
    return network, random_params(network), {k: jnp.asarray(v) for k, v in batch.items()}


@jax.jit(static_argnums=0)
def logits_of(network, params, tokens, hidden):
    return network.bind(params)(tokens, hidden=hidden).logits


evaluate_batch = jax.jit(objective.evaluate_batch, static_argnums=(0, 3))


def test_the_network_is_the_released_variant_in_float64():
    variables = oracle.variables(generator(), 2, 24, 3, 13, 16)
    tokens = generator(1).integers(13, size=(4, 16), dtype=np.int32)
    hidden = generator(2).random((4, 16)) < 0.3
    there = StrictReader.of_arrays(variables)
    colors = Palette(np.zeros((13, 3), np.float32), {})
    weights_file = openai.convert(there, pathlib.Path("igpt-s-bert/model.ckpt-7"), colors)
    assert weights_file.model.objective == "bert" and "start" not in weights_file.params
    exact = dataclasses.replace(
        weights_file,
        model=dataclasses.replace(weights_file.model, dtype="float64"),
        params={name: array.astype(np.float64) for name, array in weights_file.params.items()},
    )
    wanted = oracle.forward(variables, tokens, 1 - hidden)[0]
    with jax.enable_x64(True), jax.set_mesh(make_mesh((1, 1, 1))):
        network, params = exact.network, exact.on_mesh()
        model, tokens_on = network.bind(params), jnp.asarray(tokens)
        output = model(tokens_on, hidden=jnp.asarray(hidden))
        np.testing.assert_allclose(output.logits, wanted, rtol=0, atol=1e-10)
        nats = objective.nats_per_token(model, output, tokens_on, jnp.asarray(hidden))
        nats = float(nats.mean())
    assert nats == pytest.approx(oracle.loss(variables, tokens, 1 - hidden), 1e-12)


def test_masked_tokens_are_not_seen_and_every_position_sees_all_the_others(given):
    network, params, batch = given
    tokens = batch["tokens"]
    hidden = jnp.asarray(generator(3).random(tokens.shape) < 0.4)
    before = logits_of(network, params, tokens, hidden)
    unseen = jnp.where(hidden, (tokens + 1) % network.vocabulary, tokens)
    np.testing.assert_array_equal(logits_of(network, params, unseen, hidden), before)
    for position in (0, 15):  # the last token is seen by the first position, and the other way
        changed = tokens.at[:, position].set((tokens[:, position] + 1) % network.vocabulary)
        differ = np.abs(logits_of(network, params, changed, hidden) - before).max(axis=(1, 2))
        np.testing.assert_array_equal(differ > 0, ~np.asarray(hidden[:, position]))
        seen = np.abs(logits_of(network, params, changed, hidden) - before).max(axis=2) > 0
        assert seen[~np.asarray(hidden[:, position])].all()


def test_the_position_of_a_masked_token_is_still_known(given):
    network, params, batch = given
    everything = jnp.ones(batch["tokens"].shape, bool)
    logits = logits_of(network, params, batch["tokens"], everything)
    assert np.abs(np.diff(logits, axis=1)).max(axis=2).min() > 1e-4
    np.testing.assert_allclose(logits[1:], logits[:-1], atol=1e-6)  # and nothing else is


@pytest.mark.usefixtures("one_device")
def test_the_loss_of_an_image_is_the_mean_over_its_masked_tokens():
    logits = jnp.asarray(generator().normal(size=(2, 4, 5)), jnp.float32)
    tokens = jnp.asarray([[0, 1, 2, 3], [4, 3, 2, 1]])
    hidden = jnp.asarray([[True, False, False, False], [True, True, True, False]])
    nats = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), np.asarray(tokens)[..., None], axis=-1
    )[..., 0]
    found = objective.masked_mean(objective.cross_entropy(logits, tokens), hidden)
    np.testing.assert_allclose(found, [nats[0, 0], nats[1, :3].mean()], rtol=1e-6)
    nothing = objective.masked_mean(jnp.ones((2, 4)), jnp.zeros_like(hidden))
    np.testing.assert_array_equal(nothing, 0)  # NaN would stop the run


def test_a_share_of_the_tokens_is_masked_by_a_new_draw_at_every_step(one_device):
    network = bert(masked_share=0.15, grid=(16, 16))
    drawn = [np.asarray(objective.draw_mask(network, 64, jax.random.key(i))) for i in range(3)]
    for hidden in drawn:
        assert hidden.mean() == pytest.approx(0.15, abs=0.01)
        assert len(np.unique(hidden, axis=0)) == 64
    assert (drawn[0] != drawn[1]).mean() > 0.2 and (drawn[1] != drawn[2]).mean() > 0.2
    assert objective.draw_mask(tiny_network(), 64, None) is None


def test_the_first_loss_is_ln_v(one_device):
    network = bert()
    params = jax.jit(network.init)(jax.random.key(0))
    batch = {k: jnp.asarray(v) for k, v in random_batch(network).items()}
    nats, _ = jax.jit(step.make_loss(network))(params, None, batch, jax.random.key(1))
    assert float(nats) == pytest.approx(np.log(network.vocabulary), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 2, 2)])
def test_masks_and_gradients_are_the_same_on_every_mesh(shape, given):
    network, params, batch = given
    wanted = value_and_gradients(network, params, batch)
    with jax.set_mesh(make_mesh(shape)):
        placed = sharding.global_batch({k: np.asarray(v) for k, v in batch.items()})
        found = value_and_gradients(network, random_params(network), placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def value_and_gradients(network, params, batch):
    loss = jax.jit(jax.value_and_grad(step.make_loss(network, 1.0, 1.0), has_aux=True))
    return jax.device_get(loss(params, None, batch, jax.random.key(4)))


# Evaluation.


def hidden_of(network, params, batch, vote=0):
    return np.asarray(evaluate_batch(network, params, batch, vote)[1])


def test_evaluation_masks_depend_on_the_images_number_alone(given):
    network, params, batch = given
    hidden = hidden_of(network, params, batch)
    assert 0.2 < hidden.mean() < 0.6 and len(np.unique(hidden, axis=0)) == 8
    backwards = {k: v[::-1] for k, v in batch.items()}
    np.testing.assert_array_equal(hidden_of(network, params, backwards)[::-1], hidden)
    part = {k: v[2:4] for k, v in batch.items()}
    np.testing.assert_array_equal(hidden_of(network, params, part), hidden[2:4])
    assert (hidden_of(network, params, batch, vote=1) != hidden).any(axis=1).all()


def test_the_class_has_most_votes_and_the_loss_is_the_mean_over_the_votes(given):
    network, params, batch = given
    # Centred on their mean, features differ between the masks.
    pooled = [evaluate_batch(network, params, batch, vote)[0].pooled[-1] for vote in range(5)]
    center = jnp.mean(jnp.stack(pooled), axis=(0, 1))
    params = params | {"classifier": params["classifier"] | {"class_center": center}}
    outputs = [evaluate_batch(network, params, batch, vote) for vote in range(network.votes)]
    assert len(outputs) == 5
    logits = np.stack([output.class_logits for output, _ in outputs])
    votes = logits.argmax(axis=-1)
    assert (votes != votes[0]).any()
    counts = np.array([np.bincount(column, minlength=3) for column in votes.T])
    elected = np.asarray(voting.majority_class(jnp.asarray(logits)))
    np.testing.assert_array_equal(counts[np.arange(8), elected], counts.max(axis=1))

    sums = step.make_eval_step(network)(params, batch)
    mask = np.asarray(batch["mask"])
    assert float(sums["accuracy"]) == ((elected == np.asarray(batch["label"])) * mask).sum()
    model, tokens = network.bind(params), batch["tokens"]
    nats = [objective.nats_per_token(model, *pair[:1], tokens, *pair[1:]) for pair in outputs]
    wanted = (np.mean(nats, axis=0) * mask).sum()
    assert float(sums["nats_per_token"]) == pytest.approx(wanted, rel=1e-5)
    chosen = np.asarray(jax.nn.log_softmax(logits))[:, np.arange(8), batch["label"]]
    assert float(sums["class_nats"]) == pytest.approx(-(chosen.mean(axis=0) * mask).sum(), rel=1e-5)


def test_a_tie_goes_to_the_likelier_class():
    sure, unsure = jnp.asarray([9.0, 0.0, 0.0]), jnp.asarray([0.0, 0.1, 0.0])
    assert int(voting.majority_class(jnp.stack([sure, unsure])[:, None])[0]) == 0
    assert int(voting.majority_class(jnp.stack([unsure, sure])[:, None])[0]) == 0
    assert int(voting.majority_class(jnp.stack([unsure, sure, unsure])[:, None])[0]) == 1


def test_bert_refuses_start_vectors_of_variants():
    config = config_lib.default()
    config.model.objective, config.model.start_per_variant = "bert", True
    with pytest.raises(InputError, match=r"start_per_variant is True, but .*objective=bert"):
        config_lib.resolve(config)


# Logits in parts


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2, 2)])
def test_logits_in_parts_change_neither_the_loss_nor_its_gradient(shape, monkeypatch):
    network = tiny_network()

    def loss_and_gradient(mesh):
        with jax.set_mesh(make_mesh(mesh)):
            params, batch = random_params(network), sharding.global_batch(random_batch(network))
            loss = step.make_loss(network)
            run = jax.jit(jax.value_and_grad(lambda p: loss(p, None, batch, None)[0]))
            compiled = run.lower(params).compile()
            return jax.device_get(compiled(params)), compiled.as_text()

    (wanted, of_wanted), whole = loss_and_gradient((1, 1, 1))
    monkeypatch.setattr(objective, "LOGITS_BYTES", 4 * 11 * 8 * 4)  # 4 positions of 8 images
    assert objective.loss_chunks(network, 8, {}) == 4
    assert objective.loss_chunks(network, 2, {}) == 1
    assert objective.loss_chunks(network, 8, {"data": 4}) == 1
    monkeypatch.setattr(objective, "LOGITS_BYTES", 4 * 11 * 2)  # two positions of one image
    (found, of_found), parts = loss_and_gradient(shape)
    assert found == pytest.approx(wanted, rel=1e-6)
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, atol=2e-6), of_found, of_wanted)
    assert "f32[8,16,11]" in whole and ",16,11]" not in parts


@pytest.mark.parametrize("make", [tiny_network, bert], ids=["autoregressive", "bert"])
def test_an_odd_number_of_positions_comes_in_parts_too(make, monkeypatch, one_device):
    network = make(grid=(3, 3))
    params, batch = random_params(network), sharding.global_batch(random_batch(network))

    def loss():
        return float(jax.jit(step.make_loss(network))(params, None, batch, jax.random.key(0))[0])

    wanted = loss()
    monkeypatch.setattr(objective, "LOGITS_BYTES", 1)
    assert objective.loss_chunks(network, 8, {}) == 3
    assert loss() == pytest.approx(wanted, rel=1e-6)
