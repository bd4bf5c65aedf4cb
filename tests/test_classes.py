"""Class-conditional networks: where the class is seen, and what the class token does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SMALL, make_mesh, random_batch, random_params, tiny_network

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax.config import fields
from gptv_jax.errors import InputError
from gptv_jax.model import attention
from gptv_jax.probe import features, sgd
from gptv_jax.stages import pretrain, pretrained, setup
from gptv_jax.train import objective, step

pytestmark = pytest.mark.usefixtures("one_device")
CLASSES = 2  # and one start vector more, of `tiny_network`
NETWORK = tiny_network(class_tokens=CLASSES, label_dropout=0.25)


@pytest.fixture(scope="module")
def given():
    """Weights with a class head, and a batch of it."""
    with jax.set_mesh(make_mesh((1, 1, 1))):
        headed = dataclasses.replace(NETWORK, classes=CLASSES)
        batch = {name: jnp.asarray(rows) for name, rows in random_batch(NETWORK).items()}
        return headed, random_params(headed), batch


def headless(params):
    return {name: leaf for name, leaf in params.items() if name != "classifier"}


def labelled(batch, label):
    return batch | {"label": jnp.full_like(batch["label"], label)}


@jax.jit(static_argnums=0)
def logits_of(network, params, tokens, variant=None):
    return network.bind(params)(tokens, variant).logits


def nats(network, params, batch, variant):
    """Per token, of each row."""
    logits = logits_of(network, params, batch["tokens"], variant)
    return np.asarray(objective.cross_entropy(logits, jnp.asarray(batch["tokens"])).mean(axis=1))


# Where the class is seen


def test_training_drops_the_label_of_a_share_of_the_rows_and_nothing_else_does():
    rows, key = 4096, jax.random.key(3)
    batch = {"label": jnp.arange(rows) % CLASSES, "variant": jnp.zeros(rows, jnp.int32)}
    found = np.asarray(objective.start_vectors(NETWORK, batch, key, condition_on_label=True))
    dropped = found == NETWORK.unconditional
    assert NETWORK.unconditional == CLASSES
    np.testing.assert_array_equal(found[~dropped], np.asarray(batch["label"])[~dropped])
    assert dropped.mean() == pytest.approx(0.25, abs=0.035)  # five deviations
    assert np.mean(dropped[:-1] & dropped[1:]) == pytest.approx(1 / 16, abs=0.02)
    other = objective.start_vectors(NETWORK, batch, jax.random.key(4), condition_on_label=True)
    assert ((np.asarray(other) == CLASSES) != dropped).mean() > 0.2
    assert objective.start_vectors(NETWORK, batch, condition_on_label=True) is batch["label"]
    assert objective.start_vectors(NETWORK, batch, key, condition_on_label=False) is None


def test_pretraining_and_its_evaluation_see_the_class(given):
    _, params, batch = given
    params, mask = headless(params), np.asarray(batch["mask"])
    conditional = nats(NETWORK, params, batch, batch["label"])
    sums = step.make_eval_step(NETWORK)(params, batch)
    assert float(sums["nats_per_token"]) == pytest.approx(conditional @ mask, rel=1e-5)
    loss, key = jax.jit(step.make_loss(NETWORK)), jax.random.key(1)
    assert float(loss(params, None, batch, None)[0]) == pytest.approx(conditional.mean(), rel=1e-5)
    start = objective.start_vectors(NETWORK, batch, key, condition_on_label=True)
    mixed = nats(NETWORK, params, batch, start)
    assert 0 < (mixed != conditional).sum() < len(conditional)
    assert float(loss(params, None, batch, key)[0]) == pytest.approx(mixed.mean(), rel=1e-5)


def test_without_a_label_a_row_begins_with_the_vector_for_no_class(given):
    _, params, batch = given
    params, none = headless(params), np.full(8, NETWORK.unconditional, np.int32)
    wanted = logits_of(NETWORK, params, batch["tokens"], none)
    np.testing.assert_array_equal(logits_of(NETWORK, params, batch["tokens"]), wanted)


def test_features_and_class_logits_do_not_know_the_label(given):
    headed, params, batch = given
    both = [labelled(batch, label) for label in range(CLASSES)]
    pooled = [features.read(headed, params, b, raw=False, votes=1) for b in both]
    np.testing.assert_array_equal(*pooled)
    evaluated = jax.jit(
        lambda batch: objective.evaluate_batch(headed, params, batch)[0].class_logits
    )
    np.testing.assert_array_equal(*map(evaluated, both))

    joint, key = jax.jit(step.make_loss(headed, 1.0, 1.0)), jax.random.key(0)
    evaluate = step.make_eval_step(headed)
    for found in (
        [joint(params, None, b, key)[1] for b in both],
        [evaluate(params, b) for b in both],
    ):
        assert float(found[0]["nats_per_token"]) == float(found[1]["nats_per_token"])
        assert float(found[0]["class_nats"]) != float(found[1]["class_nats"])  # of other targets
    unknown, mask = nats(headed, params, batch, None), np.asarray(batch["mask"])
    assert float(found[0]["nats_per_token"]) == pytest.approx(unknown @ mask, rel=1e-5)


def test_heads_trained_by_sgd_do_not_know_the_label(given):
    """A step on images of one class adds the same to that class's weights, whichever it is."""
    _, params, batch = given
    config = config_lib.Probe("sgd", sgd=config_lib.ProbeSgd(learning_rates=(1.0,)))
    heads = sgd.Heads(NETWORK, config, CLASSES, ((1,), (2,)))
    update = optax.sgd(1.0)
    take, added = step.make_train_step(sgd.make_loss(heads), update, lambda _: 1.0), []
    for label in range(CLASSES):
        state = step.state_of(jax.jit(heads.init)(), update)
        state, _ = take(state, labelled(batch, label), headless(params))
        added.append(np.asarray(state["params"]["layers_1"]["weight"])[:, 0, label])
    np.testing.assert_array_equal(*added)
    assert np.abs(added[0]).max() > 1e-3


# The class token


@pytest.mark.parametrize("recipe", [{}, {"rotary": True, "qk_norm": True}], ids=["igpt", "rotary"])
def test_the_class_token_is_attended_to_like_any_other(recipe, monkeypatch):
    """By its key, too: a table of rotations that is 0 in its place, as in LlamaGen, hides that."""
    network = dataclasses.replace(NETWORK, config=dataclasses.replace(NETWORK.config, **recipe))
    params, attend = random_params(network), attention.self_attention
    tokens, length = jnp.asarray(random_batch(network, size=1)["tokens"]), []

    def by_keys_alone(q, k, v, *, visible):
        length.extend(jnp.linalg.norm(x, axis=-1)[0].min(axis=1) for x in (q, k))
        return attend(q, k, jax.lax.stop_gradient(v), visible=visible)

    monkeypatch.setattr(attention, "self_attention", by_keys_alone)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(start, at):
        length.clear()
        output = network.bind(params | {"start": start})(tokens, jnp.array([1]))
        return (objective.cross_entropy(output.logits, tokens) * at).sum(), length

    for position in (1, 15):  # whose own input has nothing of the class
        by_start, lengths = gradient(params["start"], np.eye(16, dtype=np.float32)[[position]])
        size = np.abs(np.asarray(by_start)).max(axis=1)
        assert size[1] > 1e-5 and (size[[0, 2]] == 0).all()
    for of_positions in lengths:  # of queries and keys, which a rotation does not make shorter
        assert of_positions[0] > 0.1 * np.median(of_positions)


# A run


def resolved(**changes):
    flat = fields.flatten(config_lib.Config()) | SMALL | {"data.test_split": "test[:48]"}
    return config_lib.resolve(fields.unflatten(flat | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.class_tokens": 9}, r"class_tokens is 9, .*digits have 10 classes; take 10\."),
        ({"model.class_tokens": 10, "data.labels": False}, r"digits have no labels; take 0\."),
    ],
)
def test_class_tokens_must_be_as_many_as_the_classes_of_the_data(changes, named, tmp_path):
    with pytest.raises(InputError, match=named):
        setup.open_run(resolved(**changes), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_run_pretrains_with_labels_and_a_loaded_model_works_without(tmp_path):
    changes = {"model.class_tokens": 10, "model.rotary": True, "train.steps": 60}
    changes |= {"model.random_order": (0.2, 0.6), "model.target_positions": True}
    changes |= {"train.checkpoint_every": 60, "train.optimizer.learning_rate": 0.02}
    run = setup.open_run(resolved(**changes), str(tmp_path))
    with jax.set_mesh(run.mesh):
        run.finish("pretrain", pretrain.run_stage(run))
        params = pretrained.load(run).params
    model, (batch,) = gptv_jax.load(tmp_path), run.data.evaluation("test", 48)
    conditional = nats(model.network, jax.device_get(params), batch, batch["label"]).mean()
    found = run.folder.summary()["pretrain/test_nats_per_token"]
    assert found == pytest.approx(conditional, rel=1e-5) and found < 2.2  # ln 17 is 2.83
    of_image = model.log_likelihood(model.detokenize(batch["tokens"]))
    unknown = nats(model.network, jax.device_get(params), batch, None)
    np.testing.assert_allclose(of_image / 64, -unknown, rtol=1e-5)
