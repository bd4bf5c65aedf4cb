"""The greedy attack on the class of an image: its budget, its choice, and what it is worth."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh, random_batch, random_params, tiny_network

from gptv_jax import sharding
from gptv_jax.model.gpt import GPT
from gptv_jax.tasks import token_attack
from gptv_jax.tasks.token_attack import Budget, attack, budget_of

NETWORK = tiny_network(classes=4, vocabulary=5)
KEY = jax.random.key(3)


@functools.partial(jax.jit, static_argnames="network")
def forward(network, params, tokens):
    return network.bind(params)(tokens).class_logits


def logits(network, params, tokens) -> np.ndarray:
    return np.asarray(forward(network, params, sharding.shard_rows(tokens)))


def on_mesh(network, params, size: int = 8, seed: int = 0) -> tuple[dict, dict]:
    """A batch whose labels are what the network says, and the batch as global arrays."""
    batch = random_batch(network, size, seed) | {"index": np.arange(size, dtype=np.int32)}
    batch["variant"][:] = 0
    batch["label"] = logits(network, params, batch["tokens"]).argmax(axis=1).astype(np.int32)
    return batch, sharding.global_batch(batch)


def margins(network, params, tokens, labels) -> np.ndarray:
    found = logits(network, params, tokens)
    true = labels[:, None] == np.arange(found.shape[1])
    return found[true] - np.where(true, -np.inf, found).max(axis=1)


@pytest.mark.parametrize(("tokens", "calls"), [(1, 3), (4, 128), (3, 20), (5, 11)])
def test_a_budget_has_as_many_candidates_as_its_calls_allow(tokens, calls):
    budget = budget_of(tokens, calls)
    assert budget.calls <= calls < Budget(tokens, budget.candidates + 1).calls
    assert budget.tokens == tokens and budget.candidates >= 1
    with pytest.raises(ValueError, match="passes or more"):
        budget_of(tokens, 2 * tokens)


@pytest.mark.parametrize("guided", [True, False])
def test_no_more_tokens_change_and_no_more_passes_are_taken_than_allowed(
    guided, monkeypatch, one_device
):
    network = tiny_network(classes=3, vocabulary=6 + guided)  # compiled by no other test
    params, passes, call = random_params(network), [0], GPT.__call__
    batch, given = on_mesh(network, params)

    def count():
        passes[0] += 1

    def counted(self, *arguments, **options):
        jax.debug.callback(count)
        return call(self, *arguments, **options)

    monkeypatch.setattr(GPT, "__call__", counted)
    budget = Budget(3, 5, guided)
    found = attack(network, params, given, budget, KEY)
    jax.effects_barrier()
    differ = found.tokens != batch["tokens"]
    changes = differ.sum(axis=1)
    assert (changes <= 3).all() and changes.max() > 0
    assert not differ[:, -1].any()  # the last token is never read
    np.testing.assert_array_equal(found.calls, 1 + changes * (5 + guided))
    assert passes[0] == found.calls.max() <= budget.calls
    np.testing.assert_array_equal(found.original, batch["tokens"])
    assert (found.tokens < network.vocabulary).all() and (found.tokens >= 0).all()


def test_an_image_stops_to_change_when_its_class_is_wrong_and_says_when(one_device):
    params = random_params(NETWORK)
    batch, given = on_mesh(NETWORK, params)
    batch["label"][:2] = (batch["label"][:2] + 1) % 4  # wrong as they are
    given = sharding.global_batch(batch)
    found = attack(NETWORK, params, given, Budget(4, 6), KEY)
    end = logits(NETWORK, params, found.tokens).argmax(axis=1)
    np.testing.assert_array_equal(found.given, end)
    changes = (found.tokens != batch["tokens"]).sum(axis=1)
    right = end == batch["label"]
    np.testing.assert_array_equal(found.fell, np.where(right, 5, changes))
    assert (changes[right] == 4).all()
    assert found.fell[:2].tolist() == [0, 0]
    assert (found.calls[:2] == 1).all()


def test_with_every_change_among_the_candidates_the_first_change_is_the_best_possible(one_device):
    params = random_params(NETWORK, seed=1)
    batch, given = on_mesh(NETWORK, params)
    every = (NETWORK.length - 1) * (NETWORK.vocabulary - 1)
    changed = [
        np.where(np.arange(len(row)) == place, (row[place] + more) % 5, row)
        for row in batch["tokens"]
        for place, more in itertools.product(range(len(row) - 1), range(1, 5))
    ]
    labels = batch["label"]
    least = margins(NETWORK, params, np.stack(changed), np.repeat(labels, every))
    least = least.reshape(-1, every).min(axis=1)
    assert (least < margins(NETWORK, params, batch["tokens"], labels)).all()
    for guided in (True, False):
        found = attack(NETWORK, params, given, Budget(1, every, guided), KEY)
        own = margins(NETWORK, params, found.tokens, labels)
        np.testing.assert_allclose(own, least, atol=1e-5)


def test_the_gradient_at_the_inputs_is_that_of_the_embeddings(one_device):
    """The sum over all positions with a token of the gradient is the gradient of its embedding."""
    params = random_params(NETWORK)
    batch, _ = on_mesh(NETWORK, params)
    tokens = jnp.asarray(batch["tokens"])

    def score(table, added):
        model = NETWORK.bind(params | {"token_embedding": table})
        return model(tokens, added=added).class_logits[:, 0].sum()

    zeros = jnp.zeros((*tokens.shape, 32))
    table, inputs = jax.jit(jax.grad(score, argnums=(0, 1)))(params["token_embedding"], zeros)
    read, found = np.asarray(inputs)[:, 1:].reshape(-1, 32), np.zeros((5, 32))
    np.add.at(found, batch["tokens"][:, :-1].ravel(), read)
    np.testing.assert_allclose(found, table, rtol=1e-4, atol=1e-5)


def test_the_gradient_names_the_change_of_the_steepest_fall(one_device):
    """Steepest by differences of the margin along each change's embedding, at its position."""
    params = random_params(NETWORK, seed=2)
    batch, given = on_mesh(NETWORK, params)
    table, tokens, labels = np.asarray(params["token_embedding"]), batch["tokens"], batch["label"]
    places, values = np.indices((NETWORK.length - 1, NETWORK.vocabulary)).reshape(2, -1)
    true = labels[:, None] == np.arange(NETWORK.classes)

    @jax.jit
    def class_logits(added):
        return NETWORK.bind(params)(jnp.asarray(tokens), added=added).class_logits

    def margin(place, value, size):
        added = np.zeros((*tokens.shape, 32), np.float32)
        # Position place + 1 has the token of the place as its input.
        added[:, place + 1] = size * (table[value] - table[tokens[:, place]])
        found = np.asarray(class_logits(added))
        return found[true] - np.where(true, -np.inf, found).max(axis=1)

    step = 0.02
    ends = [[margin(p, v, s) for s in (-step, step)] for p, v in zip(places, values, strict=True)]
    falls = np.array([(before - after) / (2 * step) for before, after in ends])  # [changes, B]
    falls = np.where(values[:, None] == tokens[:, places].T, -np.inf, falls)
    found = attack(NETWORK, params, given, Budget(1, 1), KEY)
    place = (found.tokens != tokens).argmax(axis=1)
    rows = np.arange(len(tokens))
    chosen = falls[place * NETWORK.vocabulary + found.tokens[rows, place], rows]
    np.testing.assert_allclose(chosen, falls.max(axis=0), rtol=0.02)


def test_random_changes_depend_on_the_key_and_the_number_of_the_image_alone(one_device):
    params = random_params(NETWORK)
    batch, given = on_mesh(NETWORK, params)
    budget = Budget(3, 1, guided=False)
    found = attack(NETWORK, params, given, budget, KEY)
    again = attack(NETWORK, params, given, budget, KEY)
    jax.tree.map(np.testing.assert_array_equal, found, again)
    turned = sharding.global_batch({name: x[::-1] for name, x in batch.items()})
    backward = attack(NETWORK, params, turned, budget, KEY)
    np.testing.assert_array_equal(backward.tokens[::-1], found.tokens)
    other = attack(NETWORK, params, given, budget, jax.random.key(4))
    assert (other.tokens != found.tokens).any()


def test_a_mesh_attacks_as_one_device_does():
    network = tiny_network(classes=4, vocabulary=5)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = random_params(network)
        batch, given = on_mesh(network, params)
        one = [attack(network, params, given, Budget(2, 4, g), KEY) for g in (True, False)]
    with jax.set_mesh(make_mesh((2, 2, 2))):
        given = sharding.global_batch(batch)
        params = random_params(network)
        many = [attack(network, params, given, Budget(2, 4, g), KEY) for g in (True, False)]
    jax.tree.map(np.testing.assert_array_equal, one, many)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"classes": 0}, "no class head"), ({"classes": 3, "objective": "bert"}, "objective=bert")],
)
def test_networks_that_the_attack_does_not_take_are_refused(changes, words, one_device):
    network = tiny_network(**changes)
    assert words in token_attack.check(network)
    with pytest.raises(ValueError, match=words):
        attack(network, {}, {}, Budget(1, 1), KEY)


def test_random_changes_take_every_token_once_and_differ_between_images(one_device):
    params = random_params(NETWORK)
    head = params["classifier"] | {"class_head": 0 * params["classifier"]["class_head"]}
    batch, _ = on_mesh(NETWORK, params | {"classifier": head})  # every class is 0, to the end
    batch["tokens"][:] = batch["tokens"][:1]
    given, budget = sharding.global_batch(batch), Budget(15, 1, guided=False)
    found = attack(NETWORK, params | {"classifier": head}, given, budget, KEY)
    np.testing.assert_array_equal((found.tokens != batch["tokens"]).sum(axis=1), 15)
    assert len(np.unique(found.tokens, axis=0)) == 8 and (found.fell == 16).all()
    # A budget of more tokens than are read: the class has fallen after no number of changes.
    more = attack(NETWORK, params | {"classifier": head}, given, Budget(40, 1, False), KEY)
    assert (more.fell == 41).all()
