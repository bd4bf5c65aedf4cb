"""What the probe computes, what it chooses by, and that it changes nothing else."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import make_mesh, random_batch, random_params, tiny_network
from test_ridge import badly_scaled
from test_sgd import SGD, events

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.errors import InputError
from gptv_jax.probe import features, logistic, ridge
from gptv_jax.runs.context import Context
from gptv_jax.stages import STAGES, finetune, pretrain, probe, reports, setup
from gptv_jax.stages import pretrained as pretrained_weights
from gptv_jax.train import objective

# Features.


@pytest.mark.parametrize(
    ("scan_layers", "raw", "keep"), [(True, True, (0, 2)), (False, False, (2, 0))]
)
def test_the_mean_of_a_layers_kept_features_is_its_pooled_feature(
    one_device, scan_layers, raw, keep
):
    network = tiny_network(scan_layers=scan_layers)
    params, batch = random_params(network), sharding.global_batch(random_batch(network))

    @jax.jit
    def forward(params):
        return objective.evaluate_batch(network, params, batch, raw=raw, keep=keep)[0]

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
                objective.evaluate_batch(network, params, batch, raw=raw, keep=(0, 1, 2))[0].kept
                for raw in (True, False)
            ]
            return *kept, network.bind(params).embed(batch["tokens"][:, :-1], batch["variant"])

        raw, normed, embedded = jax.tree.map(np.asarray, forward(params))
    gains = [*params["blocks"]["norm_1"], params["final_norm"]]
    np.testing.assert_allclose(raw[0], embedded, rtol=0, atol=1e-6)
    for h, n, gain in zip(raw, normed, map(np.asarray, gains), strict=True):
        wanted = h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + 1e-5) * gain
        np.testing.assert_allclose(n, wanted, rtol=1e-5, atol=1e-5)


def test_features_that_are_not_used_are_not_computed(one_device):
    network = tiny_network(width=32, scan_layers=True)
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
def test_neighbouring_layers_have_the_best_layer_in_the_middle_except_at_the_ends(layer, window):
    assert features.around(layer, 3, layers=5) == window
    assert features.around(layer, 1, layers=5) == (layer,)
    assert features.around(layer, 5, layers=5) == (0, 1, 2, 3, 4)


def test_the_statistics_scale_features_that_vary_and_only_centre_constant_ones(one_device):
    rng, mask = np.random.default_rng(0), np.ones(512, np.float32)
    x = np.repeat(rng.normal(size=(1, 2, 512, 1)), 4, axis=-1).astype(np.float32)
    x[..., 1] = 3 + 1e-3 * x[..., 0]  # a small deviation about a large mean
    x[..., 2] = 3e4  # constant, but for rounding
    x[0, 1, :, 2] = np.nextafter(np.float32(3e4), np.float32(4e4 * rng.integers(2, size=512)))
    x[..., 3] *= 1e-9
    batch = sharding.global_batch({"x": np.moveaxis(x, 2, 0), "mask": mask})
    given = jnp.moveaxis(batch.pop("x"), 0, 2), batch
    mean, deviation = features.statistics(lambda split: iter([given]))
    wanted = x[0].astype(np.float64)
    np.testing.assert_allclose(mean, wanted.mean(axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(deviation[:, :2], wanted[..., :2].std(axis=1), rtol=1e-9)
    np.testing.assert_array_equal(deviation[:, 2:], 1)


# L-BFGS: votes and few labels.


def test_the_majority_of_several_votes_decides(one_device):
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
    # Only the first vote of validation joins the final fit.
    several = {"train": (certain, labels), "validation": (np.concatenate([certain, wrong]), labels)}
    assert logistic.fit_probe(config, several | {"test": (certain, labels)})["test_accuracy"] == 1


def test_few_labels_are_a_seeded_draw_of_different_images_from_each_class():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), (20, 30, 40, 50, 60)))
    for per_class in (1, 4, 20):
        chosen = logistic.draw(labels, per_class, np.random.default_rng(1))
        assert np.array_equal(np.bincount(labels[chosen]), [per_class] * 5)
        assert len(np.unique(chosen)) == len(chosen)
        again = logistic.draw(labels, per_class, np.random.default_rng(1))
        np.testing.assert_array_equal(chosen, again)
    with pytest.raises(InputError, match="has 21, but class 0 has 20"):
        logistic.draw(labels, 21, np.random.default_rng(1))


def test_the_few_label_probe_fits_every_draw_alone():
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


# The stage, on digits.

TINY = config_lib.Config(
    model=config_lib.Model(layers=2, width=16, heads=2, scan_layers=False),
    train=config_lib.Train(steps=4, batch_size=16, checkpoint_every=2, log_every=1, eval_every=0),
    probe=config_lib.Probe(c=(0.1,), batch_size=200, every=2, train_images=400),
)


def at_work(*_, **__):
    """Replaces a function that must not be called."""
    pytest.fail("called although nothing was to be done")


def pretrained(folder, config) -> tuple[Context, dict]:
    run = setup.open_run(config, str(folder))
    with jax.set_mesh(run.mesh):
        run.finish("pretrain", pretrain.run_stage(run))
        return run, jax.device_get(pretrained_weights.load(run).params)


@pytest.fixture(scope="module")
def probed_in_passing(tmp_path_factory) -> tuple[Context, dict]:
    """A pretraining with ridge tables on the way, and its weights."""
    return pretrained(tmp_path_factory.mktemp("probed") / "run", TINY)


def test_ridge_tables_during_pretraining_are_logged_and_change_nothing(probed_in_passing, tmp_path):
    run, params = probed_in_passing
    quiet = dataclasses.replace(TINY, probe=dataclasses.replace(TINY.probe, every=0))
    other, wanted = pretrained(tmp_path / "quiet", quiet)
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    tables = [e for e in events(run.folder.path) if "ridge_best_layer" in e]
    assert [table["step"] for table in tables] == [0, 2, 4]
    assert all(0.1 < table["ridge_validation_accuracy"] <= 1 for table in tables)
    rest = [e for e in events(run.folder.path) if "ridge_best_layer" not in e]
    assert rest == events(other.folder.path)
    plots = []
    for each in run, other:
        results = reports.Results(TINY, each.folder.path, {}, events(each.folder.path))
        plots.append(reports.pretrain(results)[0].count("<img"))
    assert plots == [2, 1]  # the losses, and in the run with ridge tables their accuracies


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> config_lib.Config:
    """The configuration of a probe of a pretrained BERT network."""
    model = dataclasses.replace(TINY.model, objective="bert", votes=2)
    quiet = dataclasses.replace(TINY.probe, every=0)
    config = dataclasses.replace(TINY, model=model, probe=quiet)
    run, _ = pretrained(tmp_path_factory.mktemp("bert") / "run", config)
    return dataclasses.replace(config, init_from=str(run.folder.path))


@pytest.fixture
def autoregressive(probed_in_passing) -> config_lib.Config:
    """The configuration of a probe of the pretrained autoregressive network."""
    return dataclasses.replace(TINY, init_from=str(probed_in_passing[0].folder.path))


LBFGS = {"refine": 1, "concatenate": 3, "labels_per_class": (2, 5), "draws": 2}
ATTENTIVE = {"method": "sgd", "refine": 2, "concatenate": 3, "pooling": "attentive"}


def test_a_probe_that_continues_fits_only_what_is_left(autoregressive, tmp_path, monkeypatch):
    changes = LBFGS | {"refine": None, "labels_per_class": ()}
    config = dataclasses.replace(
        autoregressive, probe=dataclasses.replace(autoregressive.probe, **changes)
    )
    fits, fit_probe = [], probe.fit_probe

    def stopped(_, splits):
        fits.append(splits["train"][0])
        if len(fits) == stop:
            raise KeyboardInterrupt
        return fit_probe(config.probe, splits)

    monkeypatch.setattr(probe, "fit_probe", stopped)
    numbers, counts, whole = [], [], []  # `whole`: features of the fits of a run without a stop
    for name, stops in (("whole", [0]), ("stopped", [2, 6, 0])):
        run = setup.open_run(config, str(tmp_path / name))
        for stop in stops:
            fits.clear()
            with jax.set_mesh(run.mesh):
                if stop:
                    with pytest.raises(KeyboardInterrupt):
                        probe.run_stage(run)
                    kept = json.loads((run.folder.path / "probe" / probe.FITS).read_text())
                    values = [value for row in kept.values() for value in row.values()]
                    assert all(isinstance(value, float) for value in values)  # and no matrix
                else:
                    numbers.append(probe.run_stage(run))
            counts.append(len(fits))
            whole = whole or list(fits)
    assert numbers[0] == numbers[1]
    # For each network four fits: three layers, and the three joined. The ninth is of the pixels.
    assert counts == [9, 2, 6, 3]
    np.testing.assert_array_equal(whole[3], np.concatenate(whole[:3], axis=-1))
    np.testing.assert_array_equal(whole[7], np.concatenate(whole[4:7], axis=-1))
    assert all((of_one != other).any() for of_one, other in zip(whole[:3], whole[4:7], strict=True))
    folders = [
        sorted(p.name for p in (tmp_path / n / "probe").iterdir()) for n in ("whole", "stopped")
    ]
    assert folders[0] == folders[1] and probe.FITS not in folders[0]
    confusions = [(tmp_path / n / "probe/confusion.json").read_text() for n in ("whole", "stopped")]
    assert confusions[0] == confusions[1]
    assert json.loads(confusions[0])["layer"] == numbers[0]["best_layer"]


def test_features_too_large_to_be_kept_are_read_again(autoregressive, tmp_path, monkeypatch):
    changes = {"refine": 1, "concatenate": 3, "train_images": 200}
    config = dataclasses.replace(
        autoregressive, probe=dataclasses.replace(autoregressive.probe, **changes)
    )
    read, kept, numbers = [], features.kept, []
    monkeypatch.setattr(features, "kept", lambda x, layers: read.append(layers) or kept(x, layers))
    for size in (probe.KEPT, 0):
        monkeypatch.setattr(probe, "KEPT", size)
        run = setup.open_run(config, str(tmp_path / str(size)))
        with jax.set_mesh(run.mesh):
            numbers.append(probe.run_stage(run))
        pixels, *again = read  # those of pixels are always kept
        assert len(pixels) == 1 and len(again) == (0 if size else 4)
        read.clear()
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ("autoregressive", {"method": "sgd", "features": "raw"}),
        ("autoregressive", {"refine": 1, "regions": 2, "attention": "whole", "concatenate": 3}),
        ("bert", LBFGS),
        ("bert", ATTENTIVE),
    ],
)
def test_the_stage_writes_its_numbers_and_files(request, tmp_path, monkeypatch, network, changes):
    config = request.getfixturevalue(network)
    small = dataclasses.replace(SGD, batch_size=16, train_transforms=("shift(pixels=1)",))
    config = dataclasses.replace(
        config, probe=dataclasses.replace(config.probe, sgd=small, **changes)
    )
    run = setup.open_run(config, str(tmp_path / "run"))
    asked, train = [], run.data.train
    monkeypatch.setattr(run.data, "train", lambda *given: asked.append(given) or train(*given))
    with jax.set_mesh(run.mesh):
        numbers = probe.run_stage(run)
        run.finish("probe", numbers)
        reports.write(run)
        if config.probe.method == "sgd":
            assert asked == [(16, 0, ("shift(pixels=1)",))]  # the probe's own transforms
            monkeypatch.setattr(ridge, "tabulate", at_work)  # the heads are still there
            assert probe.run_stage(run) == numbers
    summary = run.folder.summary()
    rows = json.loads((run.folder.path / "probe" / "layers.json").read_text())
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
        floor = summary.get("probe/concatenated_random_init_test_accuracy")
        assert (floor is None) == (config.probe.method == "sgd")
    for per_class in config.probe.labels_per_class:
        name = f"probe/labels_{per_class}_test_accuracy"
        assert 0 < summary[name] < 1 and summary[f"{name}_deviation"] >= 0
    matrix = json.loads((run.folder.path / "probe" / "confusion.json").read_text())["confusion"]
    right = np.trace(matrix) / summary["probe/test_images"]
    assert np.sum(matrix) == summary["probe/test_images"] == 400
    assert right == pytest.approx(summary["probe/test_accuracy"])
    assert (run.folder.path / "probe" / "layers.png").exists()
    report = (run.folder.path / "report.html").read_text()
    assert "ridge, test" in report
    assert ("layers 0 to 2 together " in report) == (config.probe.concatenate > 1)
    assert ("means over 2 x 2 parts" in report) == (config.probe.regions > 1)


def test_few_labels_are_those_of_the_best_layer(autoregressive, tmp_path, monkeypatch):
    settings = dataclasses.replace(autoregressive.probe, labels_per_class=(2,))
    run, given = (
        setup.open_run(dataclasses.replace(autoregressive, probe=settings), str(tmp_path / "run")),
        {},
    )

    def recorded(_, splits, seed):
        given.update(splits)
        return [{"labels_per_class": 2, "test_accuracy": 0.5}]

    monkeypatch.setattr(probe, "with_few_labels", recorded)
    monkeypatch.setattr(probe, "CONFUSION_CLASSES", 9)  # fewer than the digits
    with jax.set_mesh(run.mesh):
        best = probe.run_stage(run)["best_layer"]
        network, images = run.network(), features.batches(run.data, settings)
        read = features.of_network(network, pretrained_weights.load(run).params, images, raw=False)
        wanted = features.kept(read, [0, 1, 2])
    np.testing.assert_array_equal(given["train"][0], wanted.taken([best])["train"][0])
    others = [wanted.taken([layer])["train"][0] for layer in {0, 1, 2} - {best}]
    assert not any(np.array_equal(given["train"][0], other) for other in others)


def test_bert_is_read_under_every_vote_but_for_training(bert, tmp_path):
    run = setup.open_run(bert, str(tmp_path / "run"))
    with jax.set_mesh(run.mesh):
        network, images = run.network(), features.batches(run.data, bert.probe)
        read = features.of_network(network, pretrained_weights.load(run).params, images, raw=False)
        votes = {split: next(read(split))[0] for split in ("train", "validation", "test")}
    assert [len(x) for x in votes.values()] == [1, 2, 2]
    assert np.abs(votes["test"][0] - votes["test"][1]).max() > 1e-4


# Fine-tuning shares the statistics.


def test_fine_tuning_only_centres_a_constant_feature(probed_in_passing, tmp_path):
    path = tmp_path / "flat.safetensors"
    gptv_jax.load(probed_in_passing[0].folder.path).save(path)
    with safetensors.safe_open(path, "numpy") as file:
        record = file.metadata()
    weights = safetensors.numpy.load_file(path)
    weights["final_norm"][3] = 1e-8
    safetensors.numpy.save_file(weights, path, record)
    train = dataclasses.replace(TINY.train, steps=1)
    settings = config_lib.Finetune(train=train, standardize=True)
    config = dataclasses.replace(TINY, init_from=str(path), finetune=settings)
    run = setup.open_run(config, str(tmp_path / "run"))
    with jax.set_mesh(run.mesh):
        finetune.run_stage(run)
        abstract = sharding.abstract(run.task.network().init)
        with Checkpoints(run.folder.checkpoints("finetune"), read_only=True) as checkpoints:
            state, _ = checkpoints.restore_latest({"params": abstract})
    scale = np.asarray(state["params"]["classifier"]["class_scale"])
    assert scale[3] == 1 and 1 < np.delete(scale, 3).min() < np.delete(scale, 3).max() < 1e4


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
def test_settings_that_do_not_fit_together_are_refused(changes, words):
    config = config_lib.Config(probe=config_lib.Probe(**changes))
    with pytest.raises(InputError) as error:
        STAGES["probe"].check(config)
    assert all(word in str(error.value) for word in words)


def test_tables_of_images_without_labels_are_refused(tmp_path):
    config = dataclasses.replace(TINY, data=config_lib.Data(labels=False))
    with pytest.raises(InputError, match=r"config\.probe\.every is 2, .*no labels"):
        setup.open_run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_more_labels_than_images_are_refused_before_any_work(autoregressive, tmp_path, monkeypatch):
    monkeypatch.setattr(ridge, "tabulate", at_work)
    asked = dataclasses.replace(TINY.probe, labels_per_class=(4, 400))
    run = setup.open_run(dataclasses.replace(autoregressive, probe=asked), str(tmp_path / "run"))
    with jax.set_mesh(run.mesh), pytest.raises(InputError, match="labels_per_class has 400, but"):
        probe.run_stage(run)
    assert not (run.folder.path / "probe").exists()
