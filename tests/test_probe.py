"""What the probe computes, chooses and leaves alone."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.pipeline
import sklearn.preprocessing
from conftest import MESHES, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import config as config_lib
from gptv_jax import report, sharding
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.errors import InputError
from gptv_jax.probe import features, logistic, ridge, sgd
from gptv_jax.run import Run
from gptv_jax.stages import pretrain, probe
from gptv_jax.train import objective
from gptv_jax.train.metrics import MetricWriter, flops_per_token

CLASSES, LAYERS, WIDTH = 3, 2, 16
STRENGTHS = (1e-4, 1e-2)


# The ridge.


def badly_scaled(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Float32 [L, N, D], correlated, with means of up to 1000 deviations, and labels [N]."""
    rng = np.random.default_rng(seed)
    same = np.random.default_rng(9)  # for every seed
    labels = rng.integers(CLASSES, size=images)
    common = rng.normal(size=(LAYERS, images, 1))
    x = 3 * common + rng.normal(size=(LAYERS, images, WIDTH))
    x += 0.7 * same.normal(size=(LAYERS, CLASSES, WIDTH))[:, labels]
    mean, scale = same.uniform(-1000, 1000, (LAYERS, 1, WIDTH)), 10 ** same.uniform(-4, 4, WIDTH)
    x = (mean + x) * scale
    x[..., 5] = 0.3  # of no use, and no reason to divide by 0
    return x.astype(np.float32), labels.astype(np.int32)


def given(x: np.ndarray, labels: np.ndarray, size: int, fill: float = 0.0) -> features.Features:
    """Features in batches of `size`, the last one filled with rows of mask 0; all splits alike."""

    def split(_):
        for start in range(0, len(labels), size):
            real = min(size, len(labels) - start)
            rows = np.full((1, len(x), size, x.shape[-1]), fill, np.float32)
            rows[0, :, :real] = x[:, start : start + real]
            label = (np.arange(size) % CLASSES).astype(np.int32)  # of the rest some are right
            label[:real] = labels[start : start + real]
            mask = (np.arange(size) < real).astype(np.float32)
            batch = {"x": np.moveaxis(rows, 2, 0), "label": label, "mask": mask}
            batch = sharding.global_batch(batch)
            yield moved(batch.pop("x")), batch

    return split


@jax.jit
def moved(x):
    return jnp.moveaxis(x, 0, 2)


def moments_of(read: features.Features) -> ridge.Moments:
    moments = ridge.empty(LAYERS, WIDTH, CLASSES)
    for x, batch in read("train"):
        moments = ridge.add(moments, x, batch)
    return moments


def solved(read: features.Features) -> ridge.Solution:
    return ridge.solve(moments_of(read), np.tile(np.array(STRENGTHS)[:, None], LAYERS))


def scores_of(solution: ridge.Solution, x: np.ndarray) -> np.ndarray:
    """[S, L, N, C], in float64."""
    x = x.astype(np.float64) - solution.shift[:, None]
    return np.einsum("lnd,slcd->slnc", x, solution.weight) + solution.bias[:, :, None]


def sklearns(x: np.ndarray, labels: np.ndarray, new: np.ndarray) -> np.ndarray:
    found = np.zeros((len(STRENGTHS), LAYERS, new.shape[1], CLASSES))
    for (s, strength), layer in itertools.product(enumerate(STRENGTHS), range(LAYERS)):
        model = sklearn.linear_model.Ridge(alpha=strength * len(labels))
        scaled = sklearn.pipeline.make_pipeline(sklearn.preprocessing.StandardScaler(), model)
        scaled.fit(x[layer].astype(np.float64), np.eye(CLASSES)[labels])
        found[s, layer] = scaled.predict(new[layer].astype(np.float64))
    return found


def test_the_ridge_is_scikit_learns(one_device):
    (x, labels), (new, _) = badly_scaled(2000), badly_scaled(300, seed=1)
    found, wanted = scores_of(solved(given(x, labels, 64)), new), sklearns(x, labels, new)
    assert np.abs(wanted).max() > 0.8  # it has something to tell
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("size", [8, 104])
def test_batches_of_any_size_on_any_mesh_give_the_same_ridge(mesh, size):
    (x, labels), (new, _) = badly_scaled(2000), badly_scaled(300, seed=1)
    with jax.set_mesh(make_mesh(mesh)):
        found = scores_of(solved(given(x, labels, size)), new)
    np.testing.assert_allclose(found, sklearns(x, labels, new), rtol=0, atol=1e-4)


def test_many_batches_lose_nothing_to_rounding(one_device):
    x, labels = badly_scaled(2000)
    [(x, batch)] = given(x, labels, 2000)("train")
    moments, products = ridge.empty(LAYERS, WIDTH, CLASSES), {}
    for count in range(1, 3001):
        moments = ridge.add(moments, x, batch)
        if count in (1, 3000):
            total, lost = (np.asarray(m.products, np.float64) for m in moments[1:])
            products[count] = total - lost
    deviation = np.sqrt(np.einsum("ldd->ld", products[1]) + 1e-300)
    error = (products[3000] / 3000 - products[1]) / np.einsum("ld,le->lde", deviation, deviation)
    assert np.abs(error).max() < 1e-7


def test_masked_rows_do_not_count(one_device):
    x, labels = badly_scaled(100)
    wanted = solved(given(x, labels, 100))
    new = badly_scaled(300, seed=1)[0]
    for size in (64, 104):  # rows of mask 0 in the last batch, and in the first
        found = solved(given(x, labels, size, fill=1e6))
        np.testing.assert_allclose(scores_of(found, new), scores_of(wanted, new), rtol=0, atol=1e-5)
    read, whole = given(x, labels, 64, fill=1e6), given(x, labels, 100)
    assert ridge.tabulate(read, CLASSES, STRENGTHS) == ridge.tabulate(whole, CLASSES, STRENGTHS)


def test_the_tables_accuracies_are_scikit_learns(one_device):
    (x, labels), (new, truth) = badly_scaled(200), badly_scaled(300, seed=1)

    def read(split):
        return given(*((x, labels) if split == "train" else (new, truth)), 64)(split)

    right = sklearns(x, labels, new).argmax(axis=-1) == truth
    for layer, row in enumerate(ridge.tabulate(read, CLASSES, STRENGTHS, test=False)):
        of_strength = right[:, layer].mean(axis=-1)
        assert row["ridge_validation_accuracy"] == pytest.approx(of_strength.max())
        assert row["ridge"] == STRENGTHS[len(STRENGTHS) - 1 - of_strength[::-1].argmax()]


def test_the_ridge_is_chosen_on_validation_alone_and_test_is_of_the_fit_to_both(one_device):
    parts = [badly_scaled(120, seed) for seed in range(3)]
    splits = dict(zip(("train", "validation", "test"), parts, strict=True))

    def table(**other):
        return ridge.tabulate(lambda s: given(*(splits | other)[s], 64)(s), CLASSES, STRENGTHS)

    x, labels = splits["test"]
    for row, other in zip(table(), table(test=(x, (labels + 1) % CLASSES)), strict=True):
        assert row.pop("ridge_test_accuracy") != other.pop("ridge_test_accuracy")
        assert row == other
    both = [
        np.concatenate(p, axis=a) for p, a in zip(zip(*parts[:2], strict=True), (1, 0), strict=True)
    ]
    right = sklearns(*both, x).argmax(axis=-1) == labels
    for layer, row in enumerate(table()):
        accuracy = right[STRENGTHS.index(row["ridge"]), layer].mean()
        assert row["ridge_test_accuracy"] == pytest.approx(accuracy)


# Features.


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize(("raw", "keep"), [(True, (0, 2)), (False, (2, 0))])
def test_what_is_kept_of_a_layer_is_what_was_pooled(one_device, scan_layers, raw, keep):
    network = tiny_network(scan_layers=scan_layers)
    params, batch = random_params(network), sharding.global_batch(random_batch(network))

    @jax.jit
    def forward(params):
        return objective.evaluated(network, params, batch, raw=raw, keep=keep)[0]

    output = forward(params)
    assert output.kept.shape == (2, 8, 16, 32)
    for found, layer in zip(output.kept, keep, strict=True):
        np.testing.assert_allclose(found.mean(axis=1), output.pooled[layer], rtol=0, atol=1e-6)


def test_the_normed_features_are_the_raw_ones_normed_and_the_raw_ones_the_residual_stream():
    with jax.set_mesh(make_mesh((2, 2, 2))):
        network = tiny_network()
        params, batch = random_params(network), sharding.global_batch(random_batch(network))

        @jax.jit
        def forward(params):
            kept = [
                objective.evaluated(network, params, batch, raw=raw, keep=(0, 1, 2))[0].kept
                for raw in (True, False)
            ]
            return *kept, network.bind(params).embed(batch["tokens"][:, :-1], batch["variant"])

        raw, normed, embedded = jax.tree.map(np.asarray, forward(params))
    gains = [*params["blocks"]["norm_1"], params["final_norm"]]
    np.testing.assert_allclose(raw[0], embedded, rtol=0, atol=1e-6)
    for h, n, gain in zip(raw, normed, map(np.asarray, gains), strict=True):
        wanted = h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + 1e-5) * gain
        np.testing.assert_allclose(n, wanted, rtol=1e-5, atol=1e-5)


def test_features_that_nobody_asks_for_take_no_room(one_device):
    network = tiny_network(width=32)
    params, batch = random_params(network), sharding.global_batch(random_batch(network))

    def compiled(what):
        def forward(params):
            return getattr(network.bind(params)(batch["tokens"], batch["variant"]), what)

        return jax.jit(forward).lower(params).compile().as_text()

    assert "f32[2,8,32]" in compiled("pooled")  # of the scan over two layers
    assert "f32[2,8,32]" not in compiled("logits")
    assert "f32[8,16,11]" in compiled("logits") and "f32[8,16,11]" not in compiled("pooled")


@pytest.mark.parametrize(
    ("layer", "window"), [(0, (0, 1, 2)), (1, (0, 1, 2)), (2, (1, 2, 3)), (4, (2, 3, 4))]
)
def test_neighbouring_layers_have_the_best_one_in_their_middle_but_at_the_ends(layer, window):
    assert features.around(layer, 3, layers=5) == window
    assert features.around(layer, 1, layers=5) == (layer,)
    assert features.around(layer, 5, layers=5) == (0, 1, 2, 3, 4)


# L-BFGS: votes and few labels.


def test_of_several_votes_the_majority_counts(one_device):
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    certain = 10 * np.eye(3)[labels] + rng.normal(size=(300, 3))
    wrong = 10 * np.eye(3)[(labels + 1) % 3]
    config = config_lib.Probe(c=(1.0,))

    def accuracy(*votes):
        several = (np.concatenate(votes), labels)
        return logistic.fit_probe(
            config, {"train": (certain, labels), "validation": several, "test": several}, fold=False
        )

    assert accuracy(certain, wrong, certain)["test_accuracy"] == 1
    assert accuracy(certain, wrong, wrong)["validation_accuracy"] == 0
    # What is folded in is the first vote.
    several = {"train": (certain, labels), "validation": (np.concatenate([certain, wrong]), labels)}
    assert logistic.fit_probe(config, several | {"test": (certain, labels)})["test_accuracy"] == 1


def test_few_labels_are_as_many_of_each_class_all_different_and_seeded():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), (20, 30, 40, 50, 60)))
    for per_class in (1, 4, 20):
        chosen = logistic.draw(labels, per_class, np.random.default_rng(1))
        assert np.array_equal(np.bincount(labels[chosen]), [per_class] * 5)
        assert len(np.unique(chosen)) == len(chosen)
        again = logistic.draw(labels, per_class, np.random.default_rng(1))
        np.testing.assert_array_equal(chosen, again)
    with pytest.raises(InputError, match="has 21, but class 0 has 20"):
        logistic.draw(labels, 21, np.random.default_rng(1))


def test_the_few_label_probe_is_fitted_to_a_new_draw_each_time_and_to_nothing_else():
    x, labels = badly_scaled(300)
    splits = {"train": (x[0], labels), "validation": (x[0], labels), "test": (x[1], labels)}
    config = config_lib.Probe(c=(0.1,), labels_per_class=(4, 10), draws=3)
    fitted = []

    def recorded(_, splits, *, fold):
        assert not fold
        fitted.append(splits["train"][0])
        return {"test_accuracy": 0.5}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logistic, "fit_probe", recorded)
        rows = logistic.with_few_labels(config, splits, seed=0)
        logistic.with_few_labels(config, splits, seed=0)
        logistic.with_few_labels(config, splits, seed=1)
    assert [(r["labels_per_class"], r["draw"]) for r in rows] == [
        (k, d) for k in (4, 10) for d in range(3)
    ]
    assert [len(f) for f in fitted[:6]] == [12] * 3 + [30] * 3
    first, again, other = fitted[:6], fitted[6:12], fitted[12:]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    different = [*itertools.combinations(first[:3], 2), *zip(first, other, strict=True)]
    assert not any(np.array_equal(a, b) for a, b in different)


# SGD.

NETWORK = tiny_network()
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


def trained(config, groups, network=NETWORK, steps=3, mesh=(1, 1, 1)) -> dict:
    """Weights of the heads after some steps."""
    heads = sgd.Heads(network, config, CLASSES, groups)
    update = sgd.make_optimizer(config.sgd)
    with jax.set_mesh(make_mesh(mesh)):
        take = sgd.make_train_step(heads, update, seed=0)
        start = jax.jit(lambda: sgd.step.state_of(heads.init(), update))
        state, frozen = start(), random_params(network)
        for i in range(steps):
            state, metrics = take(state, frozen, sharding.global_batch(labelled(i, network)))
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


def test_a_head_learns_as_sgd_with_momentum_and_a_cosine_has_it():
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
            step = rate * (1 + np.cos(np.pi * i / SGD.steps)) / 2 * momentum
            weight, bias = weight - step[:, :-1], bias - step[:, -1]
        np.testing.assert_allclose(found["weight"][0, r, :, 0], weight, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found["bias"][0, r], bias, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
@pytest.mark.parametrize("objective_", ["autoregressive", "bert"])
def test_heads_learn_the_same_on_every_mesh(pooling, objective_):
    network = tiny_network(objective=objective_)
    groups = ((0,), (0, 1, 2))
    wanted = trained(settings(pooling=pooling), groups, network)
    found = trained(settings(pooling=pooling), groups, network, mesh=(2, 2, 2))
    for (path, f), w in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(f, w, rtol=1e-3, atol=1e-5, err_msg=str(path))


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_heads_may_standardise_what_they_read_and_do_not_train_that(pooling):
    network = tiny_network()
    config = settings(pooling=pooling, sgd=dataclasses.replace(SGD, standardize=True))
    heads = sgd.Heads(network, config, CLASSES, ((2,), (1,), (0, 1, 2)))
    update = sgd.make_optimizer(config.sgd)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        frozen, batch = random_params(network), sharding.global_batch(labelled(0))
        x = features.read(network, frozen, batch, raw=False, votes=1)
        mask = batch["mask"]
        weights = heads.standardised(jax.jit(heads.init)(), lambda _: iter([(x, batch)]))
        state = jax.jit(lambda w: sgd.step.state_of(w, update))(weights)
        take = sgd.make_train_step(heads, update, seed=0)
        for _ in range(2):
            state, _ = take(state, frozen, batch)
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
    update = sgd.make_optimizer(config.sgd)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        frozen, batch = random_params(NETWORK), sharding.global_batch(labelled(0))
        x = features.read(NETWORK, frozen, batch, raw=False, votes=1)
        weights = heads.standardised(jax.jit(heads.init)(), lambda _: iter([(x, batch)]))
        state = jax.jit(lambda w: sgd.step.state_of(w, update))(weights)
        state, _ = sgd.make_train_step(heads, update, seed=0)(state, frozen, batch)
        found, x = jax.device_get((state["params"]["layers_1"], x))
    z = (x[0, 1] - x[0, 1, :-1].mean(axis=0)) / x[0, 1, :-1].std(axis=0)  # the last row is masked
    wrong = (1 / CLASSES - np.eye(CLASSES)[labelled(0)["label"]]) / len(z)
    for r, rate in enumerate(SGD.learning_rates):
        wanted = -rate * wrong.T @ z
        np.testing.assert_allclose(found["weight"][0, r, :, 0], wanted, rtol=1e-3, atol=1e-5)


def test_the_frozen_weights_are_an_argument_not_a_constant(one_device):
    network = tiny_network(width=64)
    heads, update = sgd.Heads(network, settings(), CLASSES, ((1,),)), sgd.make_optimizer(SGD)
    state = jax.jit(lambda: sgd.step.state_of(heads.init(), update))()
    arguments = (state, random_params(network), sharding.global_batch(labelled(0)))
    lowered = sgd.make_train_step(heads, update, seed=0).lower(*arguments)
    weights = network.config.layers * 12 * network.config.width**2
    assert len(lowered.as_text()) < 4 * weights  # a constant is written with 8 letters a weight


class StopError(Exception):
    """The simulated end of the process."""


def fit(folder, config=None, stop=None, test_shift=0, network=NETWORK) -> dict:
    """The whole SGD probe, on random labels; its end comes before the batch of number `stop`."""
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

    with (
        jax.set_mesh(make_mesh((1, 1, 1))),
        Checkpoints(folder / "checkpoints") as checkpoints,
    ):
        return sgd.fit(
            heads,
            random_params(network),
            checkpoints=checkpoints,
            log=MetricWriter(folder),
            training=training,
            evaluation=evaluation,
            features=features.of_network(network, random_params(network), evaluation, raw=False),
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
        test = {"test_accuracy"}
        assert {k: v for k, v in row.items() if k not in test} == {
            k: v for k, v in other[group].items() if k not in test
        }
    assert found != other


def test_forward_passes_alone_are_a_third_of_the_work():
    whole, forward = flops_per_token(NETWORK), flops_per_token(NETWORK, forward_only=True)
    assert whole == 3 * forward


# The stage, on digits.

TINY = config_lib.Config(
    model=config_lib.Model(layers=2, width=16, heads=2, scan_layers=False),
    train=config_lib.Train(steps=4, batch_size=16, checkpoint_every=2, log_every=1, eval_every=0),
    probe=config_lib.Probe(c=(0.1,), batch_size=200, every=2, train_images=400),
)


def at_work(*_, **__):
    """In place of what must not be done, or not again."""
    pytest.fail("it works")


def pretrained(folder, config) -> tuple[Run, dict]:
    run = Run(config, str(folder))
    with jax.set_mesh(run.mesh):
        run.finish("pretrain", pretrain.run_stage(run))
        return run, jax.device_get(run.pretrained(run.network()))


@pytest.fixture(scope="module")
def probed_in_passing(tmp_path_factory) -> tuple[Run, dict]:
    """A pretraining with ridge tables on the way, and its weights."""
    return pretrained(tmp_path_factory.mktemp("probed") / "run", TINY)


def test_tables_in_pretraining_are_logged_and_change_nothing(probed_in_passing, tmp_path):
    run, params = probed_in_passing
    quiet = dataclasses.replace(TINY, probe=dataclasses.replace(TINY.probe, every=0))
    other, wanted = pretrained(tmp_path / "quiet", quiet)
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    tables = [e for e in events(run.folder) if "ridge_best_layer" in e]
    assert [table["step"] for table in tables] == [0, 2, 4]
    assert all(0.1 < table["ridge_validation_accuracy"] <= 1 for table in tables)
    rest = [e for e in events(run.folder) if "ridge_best_layer" not in e]
    assert rest == events(other.folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> config_lib.Config:
    """What a probe of a pretrained BERT starts from."""
    model = dataclasses.replace(TINY.model, objective="bert", votes=2)
    quiet = dataclasses.replace(TINY.probe, every=0)
    config = dataclasses.replace(TINY, model=model, probe=quiet)
    run, _ = pretrained(tmp_path_factory.mktemp("bert") / "run", config)
    return dataclasses.replace(config, init_from=str(run.folder))


@pytest.fixture
def autoregressive(probed_in_passing) -> config_lib.Config:
    """What a probe of the other one starts from."""
    return dataclasses.replace(TINY, init_from=str(probed_in_passing[0].folder))


LBFGS = {"refine": 1, "concatenate": 3, "labels_per_class": (2, 5), "draws": 2}
ATTENTIVE = {"method": "sgd", "refine": 2, "concatenate": 3, "pooling": "attentive"}


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ("autoregressive", LBFGS),
        ("autoregressive", {"method": "sgd", "features": "raw"}),
        ("bert", LBFGS),
        ("bert", ATTENTIVE),
    ],
)
def test_the_stage_leaves_its_numbers(request, tmp_path, monkeypatch, network, changes):
    config = request.getfixturevalue(network)
    small = dataclasses.replace(SGD, batch_size=16)
    config = dataclasses.replace(
        config, probe=dataclasses.replace(config.probe, sgd=small, **changes)
    )
    run = Run(config, str(tmp_path / "run"))
    with jax.set_mesh(run.mesh):
        numbers = probe.run_stage(run)
        run.finish("probe", numbers)
        report.write(run)
        if config.probe.method == "sgd":  # goes on with the heads that it began, or ended, with
            monkeypatch.setattr(ridge, "tabulate", at_work)
            assert probe.run_stage(run) == numbers
    summary = run.summary()
    rows = json.loads((run.folder / "probe" / "layers.json").read_text())
    assert [row["layer"] for row in rows] == [0, 1, 2]
    refined = [r for r in rows if r["validation_accuracy"] is not None]
    assert len(refined) == (config.probe.refine or 3)
    best = rows[summary["probe/best_layer"]]
    assert best["validation_accuracy"] == max(r["validation_accuracy"] for r in refined)
    assert summary["probe/test_accuracy"] == best["test_accuracy"]
    quick = rows[summary["probe/ridge_best_layer"]]
    assert quick["ridge_validation_accuracy"] == max(r["ridge_validation_accuracy"] for r in rows)
    # Digits are easy: chance is 0.1.
    assert summary["probe/ridge_test_accuracy"] > 0.2
    assert summary["probe/raw_pixels_test_accuracy"] > 0.8
    if config.probe.concatenate > 1:
        assert summary["probe/concatenated_first_layer"] == 0
        assert summary["probe/concatenated_last_layer"] == 2
        assert 0 < summary["probe/concatenated_test_accuracy"] <= 1
    for per_class in config.probe.labels_per_class:
        name = f"probe/labels_{per_class}_test_accuracy"
        assert 0 < summary[name] < 1 and summary[f"{name}_deviation"] >= 0
    assert (run.folder / "probe" / "layers.png").exists()
    assert "ridge, test" in (run.folder / "report.html").read_text()


# What is refused.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pooling": "attentive"}, ["probe.pooling", "attentive", "method=sgd"]),
        ({"labels_per_class": (4,), "method": "sgd"}, ["labels_per_class", "method=lbfgs"]),
        ({"concatenate": 27}, ["probe.concatenate is 27", "25"]),
        ({"refine": 26}, ["probe.refine is 26", "25"]),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, words):
    config = dataclasses.asdict(config_lib.Config(probe=config_lib.Probe(**changes)))
    with pytest.raises(InputError) as error:
        config_lib.resolve(config)
    assert all(word in str(error.value) for word in words)


def test_tables_of_images_without_labels_are_refused(tmp_path):
    config = dataclasses.replace(TINY, data=config_lib.Data(labels=False))
    with pytest.raises(InputError, match=r"config\.probe\.every is 2, .*no labels"):
        Run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_more_labels_than_there_are_are_refused_before_any_work(
    autoregressive, tmp_path, monkeypatch
):
    monkeypatch.setattr(ridge, "tabulate", at_work)
    asked = dataclasses.replace(TINY.probe, labels_per_class=(4, 400))
    run = Run(dataclasses.replace(autoregressive, probe=asked), str(tmp_path / "run"))
    with jax.set_mesh(run.mesh), pytest.raises(InputError, match="labels_per_class has 400, but"):
        probe.run_stage(run)
    assert not (run.folder / "probe").exists()
