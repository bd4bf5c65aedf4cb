"""The probe by SGD: what its heads read, how they learn, and that a kill loses nothing."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from conftest import make_mesh, random_batch, random_params, tiny_network

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.model.layout import by_frames
from gptv_jax.probe import features, sgd
from gptv_jax.train import step
from gptv_jax.train.metrics import MetricWriter

CLASSES = 3
NETWORK = tiny_network()
CLIPS = tiny_network(grid=(4, 2, 2))  # 4 frames, each of which sees itself and the frames before it
CLIPS = dataclasses.replace(CLIPS, layout=by_frames(CLIPS.layout.parts[0]))
SGD = config_lib.ProbeSgd(
    steps=6, batch_size=8, learning_rates=(1.0, 0.1), eval_every=3, checkpoint_every=2, log_every=1
)


def settings(**changes) -> config_lib.Probe:
    return config_lib.Probe(**{"method": "sgd", "sgd": SGD} | changes)


def labelled(seed: int, network=NETWORK) -> dict:
    """A batch with labels and, for BERT, the images' numbers."""
    batch = random_batch(network, seed=seed)
    batch["label"] = (batch["tokens"][:, 0] % CLASSES).astype(np.int32)
    return batch | {"index": np.arange(8, dtype=np.int32) + 8 * seed}


def step_of(heads):
    """The heads' train step and optimizer."""
    update, rate = sgd.make_optimizer(heads.config.sgd)
    return step.make_train_step(sgd.make_loss(heads), update, rate), update


def trained(config, groups, network=NETWORK, steps=3, mesh=(1, 1, 1)) -> dict:
    """Weights of the heads after some steps."""
    heads = sgd.Heads(network, config, CLASSES, groups)
    take, update = step_of(heads)
    with jax.set_mesh(make_mesh(mesh)):
        state = jax.jit(lambda: step.state_of(heads.init(), update))()
        frozen = random_params(network)
        for i in range(steps):
            state, metrics = take(state, sharding.global_batch(labelled(i, network)), frozen)
        assert np.isfinite(metrics["best_class_nats"])
        return jax.device_get(state["params"])


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_heads_of_other_rates_and_layers_change_nothing(pooling):
    alone = dataclasses.replace(SGD, learning_rates=(0.1,))
    groups = ((0,), (2,), (0, 1, 2))
    together = trained(settings(pooling=pooling), groups)
    apart = trained(settings(pooling=pooling, sgd=alone), ((2,),))
    for name, leaf in apart["layers_1"].items():
        assert np.abs(leaf).max() > 1e-4
        np.testing.assert_allclose(together["layers_1"][name][1:, 1:], leaf, rtol=1e-4, atol=1e-7)
        assert np.abs(together["layers_1"][name][1:, :1] - leaf).max() > 1e-4  # the other rate's


def test_a_head_learns_by_sgd_with_momentum_and_a_cosine_schedule():
    found = trained(settings(), ((1,),))["layers_1"]
    with jax.set_mesh(make_mesh((1, 1, 1))):
        frozen = random_params(NETWORK)
        batches = [sharding.global_batch(labelled(i)) for i in range(3)]
        x = [
            np.asarray(features.read(NETWORK, frozen, b, raw=False, votes=1))[0, 1] for b in batches
        ]
    for r, rate in enumerate(SGD.learning_rates):
        weight, bias, momentum = np.zeros((CLASSES, 32)), np.zeros(CLASSES), 0.0
        for i, inputs in enumerate(x):
            logits = inputs @ weight.T + bias
            likely = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            wrong = (likely - np.eye(CLASSES)[labelled(i)["label"]]) / len(inputs)
            gradient = np.concatenate([wrong.T @ inputs, wrong.sum(axis=0)[:, None]], axis=1)
            momentum = SGD.momentum * momentum + gradient
            moved = rate * (1 + np.cos(np.pi * i / SGD.steps)) / 2 * momentum
            weight, bias = weight - moved[:, :-1], bias - moved[:, -1]
        np.testing.assert_allclose(found["weight"][0, r, :, 0], weight, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found["bias"][0, r], bias, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "network"),
    [("mean", NETWORK), ("attentive", tiny_network(objective="bert")), ("attentive", CLIPS)],
    ids=["mean", "bert", "clips"],
)
def test_heads_learn_the_same_on_every_mesh(pooling, network):
    groups = ((0,), (0, 1, 2))
    wanted = trained(settings(pooling=pooling), groups, network)
    found = trained(settings(pooling=pooling), groups, network, mesh=(2, 2, 2))
    for (path, f), w in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(f, w, rtol=1e-3, atol=1e-5, err_msg=str(path))


def test_an_attentive_head_finds_the_frame_that_tells_the_class_of_a_clip():
    def told(seed: int) -> dict:
        batch = labelled(seed, CLIPS)
        return batch | {"label": (batch["tokens"][:, 9] % CLASSES).astype(np.int32)}  # third frame

    right, rates = {}, dataclasses.replace(SGD, steps=300, learning_rates=(10.0,))
    with jax.set_mesh(make_mesh((1, 1, 1))):
        frozen, test = random_params(CLIPS), [told(i) for i in range(1000, 1020)]
        for pooling in ("mean", "attentive"):
            config = settings(pooling=pooling, sgd=rates)
            heads = sgd.Heads(CLIPS, config, CLASSES, ((0,),))
            take, update = step_of(heads)
            state = jax.jit(
                lambda update=update, heads=heads: step.state_of(heads.init(), update)
            )()
            for i in range(300):
                state, _ = take(state, sharding.global_batch(told(i)), frozen)
            count, head = sgd.make_eval_step(heads), np.zeros(2, np.int32)
            sums = [count(state["params"], frozen, sharding.global_batch(b), head) for b in test]
            images = sum(float(each["images"]) for each in sums)
            right[pooling] = sum(float(s["accuracy"]["layers_1"][0, 0]) for s in sums) / images
    assert right["attentive"] > 0.95 and right["mean"] < 0.6


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_standardised_heads_get_the_statistics_of_their_features_and_keep_them(pooling):
    network = tiny_network()
    config = settings(pooling=pooling, sgd=dataclasses.replace(SGD, standardize=True))
    heads = sgd.Heads(network, config, CLASSES, ((2,), (1,), (0, 1, 2)))
    take, update = step_of(heads)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        frozen, batch = random_params(network), sharding.global_batch(labelled(0))
        x = features.read(network, frozen, batch, raw=False, votes=1)
        mask = batch["mask"]
        weights = heads.standardised(jax.jit(heads.init)(), lambda _: iter([(x, batch)]))
        state = jax.jit(lambda w: step.state_of(w, update))(weights)
        for _ in range(2):
            state, _ = take(state, batch, frozen)
        found = jax.device_get(state["params"])
    x = np.asarray(x, np.float64)[0][:, np.asarray(mask) > 0]
    for name, groups in heads.stacks().items():
        for g, group in enumerate(groups):
            for r in range(2):
                center, scale = found[name]["center"][g, r], found[name]["scale"][g, r]
                np.testing.assert_allclose(center, x.mean(axis=1)[list(group)], rtol=1e-5)
                np.testing.assert_allclose(scale, 1 / x.std(axis=1)[list(group)], rtol=1e-5)


def test_a_standardised_head_learns_from_standardised_features():
    config = settings(sgd=dataclasses.replace(SGD, standardize=True, momentum=0.0))
    heads = sgd.Heads(NETWORK, config, CLASSES, ((1,),))
    take, update = step_of(heads)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        frozen, batch = random_params(NETWORK), sharding.global_batch(labelled(0))
        x = features.read(NETWORK, frozen, batch, raw=False, votes=1)
        weights = heads.standardised(jax.jit(heads.init)(), lambda _: iter([(x, batch)]))
        state = jax.jit(lambda w: step.state_of(w, update))(weights)
        state, _ = take(state, batch, frozen)
        found, x = jax.device_get((state["params"]["layers_1"], x))
    z = (x[0, 1] - x[0, 1, :-1].mean(axis=0)) / x[0, 1, :-1].std(axis=0)  # the last row is masked
    wrong = (1 / CLASSES - np.eye(CLASSES)[labelled(0)["label"]]) / len(z)
    for r, rate in enumerate(SGD.learning_rates):
        wanted = -rate * wrong.T @ z
        np.testing.assert_allclose(found["weight"][0, r, :, 0], wanted, rtol=1e-3, atol=1e-5)


def test_the_frozen_weights_are_an_argument_not_a_constant(one_device):
    network = tiny_network(width=64)
    heads = sgd.Heads(network, settings(), CLASSES, ((1,),))
    take, update = step_of(heads)
    state = sharding.abstract(lambda _: step.state_of(heads.init(), update))
    frozen = sharding.abstract(network.init)
    lowered = take.lower(state, sharding.global_batch(labelled(0)), frozen)
    weights = network.config.layers * 12 * network.config.width**2
    assert len(lowered.as_text()) < 4 * weights  # a constant is written with 8 letters a weight


class StopError(Exception):
    """The simulated end of the process."""


def fit(folder, config=None, stop=None, test_shift=0, network=NETWORK) -> dict:
    """The whole SGD probe, on random labels; it is stopped before it gets batch number `stop`."""
    config = config or settings()
    heads = sgd.Heads(network, config, CLASSES, ((0,), (1,), (0, 1, 2)))

    def training(position):
        for i in itertools.count(position):
            if i == stop:
                raise StopError
            yield {k: v for k, v in labelled(i, network).items() if k not in ("index", "mask")}

    def evaluation(split):
        batch = labelled({"train": 99, "validation": 100, "test": 101}[split], network)
        shift = test_shift if split == "test" else 0
        yield batch | {"label": (batch["label"] + np.int32(shift)) % np.int32(CLASSES)}

    with jax.set_mesh(make_mesh((1, 1, 1))), Checkpoints(folder / "checkpoints") as checkpoints:
        return sgd.fit(
            heads,
            random_params(network),
            checkpoints=checkpoints,
            log=MetricWriter(folder),
            training=training,
            evaluation=evaluation,
            seed=0,
        )


def events(folder) -> list[dict]:
    times = {"time", "tokens_per_second", "data_wait_share", "mfu"}
    return [{k: v for k, v in e.items() if k not in times} for e in MetricWriter(folder).read()]


def test_a_killed_sgd_probe_ends_as_the_one_that_was_not(tmp_path):
    config = settings(sgd=dataclasses.replace(SGD, standardize=True))
    wanted = fit(tmp_path / "whole", config)
    with pytest.raises(StopError):
        fit(tmp_path / "stopped", config, stop=5)
    assert fit(tmp_path / "stopped", config) == wanted
    assert events(tmp_path / "stopped") == events(tmp_path / "whole")
    assert fit(tmp_path / "stopped", config, stop=0) == wanted  # nothing is left to do


def test_heads_are_chosen_on_validation_alone(tmp_path):
    found, other = fit(tmp_path / "a"), fit(tmp_path / "b", test_shift=1)
    assert found.keys() == {(0,), (1,), (0, 1, 2)}
    for group, row in found.items():
        assert 0 <= row["validation_accuracy"] <= 1
        test = {"test_accuracy", "confusion"}
        assert {k: v for k, v in row.items() if k not in test} == {
            k: v for k, v in other[group].items() if k not in test
        }
    assert found != other


def test_heads_of_bert_learn_from_masked_images():
    groups, learned = ((1,),), []
    for share in (0.0, 0.5):
        network = tiny_network(objective="bert", masked_share=share)
        network = dataclasses.replace(network, starts=1)
        learned.append(trained(settings(), groups, network)["layers_1"]["weight"])
    assert np.abs(learned[0] - learned[1]).max() > 1e-3
