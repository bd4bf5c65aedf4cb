"""What the stages choose, what they start from, and what they leave."""

import dataclasses
import itertools
import json
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.pipeline
import sklearn.preprocessing
from conftest import SMALL, make_mesh, random_params, tiny_network
from PIL import Image

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding, tokens
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.data import sources
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.decode import generation
from gptv_jax.decode.sampler import Sampler
from gptv_jax.errors import InputError
from gptv_jax.runs import accuracy, pictures
from gptv_jax.runs.record import config_of
from gptv_jax.stages import finetune, pretrain, probe, reports, sample, setup
from gptv_jax.train import loop
from gptv_jax.train.metrics import MetricWriter
from gptv_jax.train.step import CLASSIFICATION
from gptv_jax.weights.native import WeightsFile


def images_of(split: str) -> np.ndarray:
    source = sources.open_source(config_lib.Data(), split)
    return np.stack([source[i]["image"] for i in range(len(source))])


# The probe.


def noisy_split(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two classes; one feature tells them apart, more or less, and 60 others are noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(size) % 2
    features = rng.normal(size=(size, 61))
    features[:, 0] += 2 * labels
    return features, labels


STRENGTHS = config_lib.Probe(c=(0.0001, 100.0))


def test_the_strength_is_chosen_on_validation_alone():
    seen, new = noisy_split(50, seed=0), noisy_split(2000, seed=1)
    # Who has seen the noise is best at remembering it, on everything else at not having done so.
    remembers = probe.fit_probe(STRENGTHS, {"train": seen, "validation": seen, "test": new})
    generalises = probe.fit_probe(STRENGTHS, {"train": seen, "validation": new, "test": seen})
    assert remembers["c"] == 100.0 and remembers["validation_accuracy"] == 1.0
    assert generalises["c"] == 0.0001


def test_validation_is_scored_without_itself_and_test_with_it():
    splits = {name: noisy_split(100, seed) for seed, name in enumerate(("train", "validation"))}
    splits["test"] = noisy_split(1000, seed=2)
    found = probe.fit_probe(config_lib.Probe(c=(0.1,)), splits)

    def reference(*names):
        model = sklearn.linear_model.LogisticRegression(C=0.1, max_iter=1000)
        scaled = sklearn.pipeline.make_pipeline(sklearn.preprocessing.StandardScaler(), model)
        both = [np.concatenate(parts) for parts in zip(*(splits[n] for n in names), strict=True)]
        return scaled.fit(*both)

    train = reference("train")
    assert found["validation_accuracy"] == train.score(*splits["validation"])
    assert found["test_accuracy"] == reference("train", "validation").score(*splits["test"])
    assert found["test_accuracy"] != train.score(*splits["test"])  # else nothing is shown


@pytest.mark.process
def test_the_layer_is_chosen_on_validation_alone(finished_run, tmp_path, monkeypatch):
    # In the order of the fits: the trained layers 0 and 1, the random ones, the raw pixels.
    scores = iter([(0.8, 0.3), (0.7, 0.9), (0.5, 0.6), (0.6, 0.4), (0.2, 0.1)])

    def scripted(*_):
        validation, test = next(scores)
        found = {"c": 1.0, "validation_accuracy": validation, "validation_nats": 1.0}
        return found | {"test_accuracy": test, "predicted": np.full(400, int(10 * test))}

    monkeypatch.setattr(probe, "fit_probe", scripted)
    config = config_of(finished_run.folder)
    run = setup.open_run(
        dataclasses.replace(config, init_from=str(finished_run.folder)), str(tmp_path)
    )
    with jax.set_mesh(run.mesh):
        numbers = probe.run_stage(run)
    assert numbers["best_layer"] == 0
    assert numbers["test_accuracy"] == 0.3
    assert numbers["random_init_test_accuracy"] == 0.4
    assert numbers["raw_pixels_test_accuracy"] == 0.1
    rows = json.loads((tmp_path / "probe" / "layers.json").read_text())
    assert [row["test_accuracy"] for row in rows] == [0.3, 0.9]
    confusion = json.loads((tmp_path / "probe" / "confusion.json").read_text())["confusion"]
    assert np.sum(confusion, axis=0)[3] == 400  # the chosen layer's, which takes all for a 3


# Early stopping and the best checkpoint, on a training that only counts.

NETWORK = tiny_network()


def count_up(
    folder,
    accuracies: list[float],
    patience: int,
    wait: float = 0,
    ema: float | None = None,
    save_all: bool = True,
) -> loop.Fitted:
    """20 steps, evaluated every other one; `params` is the number of steps taken.

    The first batch comes after `wait` seconds. With `ema` the average is that number, and the
    weights are 100 more. Without `save_all`, only what is better or last is saved, and kept.
    """
    offset = {"params": 0 if ema is None else 100} | ({} if ema is None else {"ema": 0})

    def state_after(taken):
        weights = {name: {"taken": jnp.float32(more) + taken} for name, more in offset.items()}
        return {"step": jnp.int32(taken), **weights, "opt": ()}

    def init(_):
        return state_after(0)

    @jax.jit
    def train_step(state, batch):
        return state_after(state["step"] + 1), {"nats_per_token": jnp.float32(1)}

    def batches(position):
        time.sleep(wait)
        yield from itertools.repeat({"tokens": np.zeros((4, 16), np.int32)})

    def evaluate(params):
        step = int(params["taken"])
        return {"accuracy": accuracies[step // 2], "class_nats": 0.5 if step == 14 else 1.0}

    mesh = make_mesh((1, 1, 1))
    with (
        jax.set_mesh(mesh),
        Checkpoints(folder / "checkpoints", keep=1 if save_all else 20) as checkpoints,
    ):
        return loop.fit(
            "finetune",
            config_lib.Train(
                steps=20, ema=ema, eval_every=2, checkpoint_every=2 if save_all else 1000
            ),
            length=NETWORK.length,
            flops=1,
            checkpoints=checkpoints,
            log=MetricWriter(folder),
            initial=lambda: jax.jit(init)(None),
            abstract=sharding.abstract(init),
            train_step=train_step,
            batches=batches,
            evaluate=evaluate,
            primary=CLASSIFICATION,
            patience=patience,
        )


ACCURACIES = [0.1, 0.2, 0.5, 0.4, 0.5, 0.3, 0.9, 0.9, 0.2, 0.1, 0.1]  # of steps 0, 2, 4 ...


@pytest.mark.parametrize(
    ("patience", "last", "best"),
    # An equal accuracy is no better one, but with a lower cross-entropy, as at step 14, it is.
    [(1, 6, 4), (3, 10, 4), (4, 20, 14), (0, 20, 14)],
)
def test_training_stops_when_patience_ends_and_returns_the_best(tmp_path, patience, last, best):
    fitted = count_up(tmp_path, ACCURACIES, patience)
    assert fitted.evaluations[-1]["step"] == fitted.taken == last
    assert fitted.step == best
    assert float(fitted.params["taken"]) == best
    again = count_up(tmp_path, [], patience)  # nothing is left to evaluate
    assert again.step == best and float(again.params["taken"]) == best
    assert again.evaluations == fitted.evaluations
    assert (again.taken, again.seconds) == (last, fitted.seconds)
    if patience == 0:
        speed = 20 * config_lib.Train().batch_size * 16 / fitted.seconds
        assert fitted.tokens_per_second == pytest.approx(speed)


def test_an_evaluation_that_ties_with_the_best_saves_no_checkpoint(tmp_path):
    count_up(tmp_path, ACCURACIES, patience=0, save_all=False)
    saved = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    # Step 8 ties with step 4; step 14 has the accuracy of step 12 and a lower cross-entropy.
    assert saved == {0, 2, 4, 12, 14, 20}


def test_an_average_is_what_is_evaluated_and_returned(tmp_path):
    fitted = count_up(tmp_path, ACCURACIES, patience=0, ema=0.5)
    assert fitted.step == float(fitted.params["taken"]) == 14
    better = [step / 20 for step in range(11)]  # the best one is still at hand, not restored
    last = count_up(tmp_path / "last", better, patience=0, ema=0.5)
    assert last.step == float(last.params["taken"]) == 20


@pytest.mark.parametrize("stop", [12, 16, 20])
def test_the_best_weights_outlive_a_stop(tmp_path, stop):
    with pytest.raises(IndexError):  # where the accuracies end
        count_up(tmp_path, ACCURACIES[: stop // 2], patience=0)
    fitted = count_up(tmp_path, ACCURACIES, patience=0)
    assert fitted.step == 14
    assert float(fitted.params["taken"]) == 14


def test_a_damaged_best_checkpoint_is_named_and_another_one_taken(tmp_path, caplog):
    count_up(tmp_path, ACCURACIES, patience=0)
    for path in (tmp_path / "checkpoints" / "14" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with caplog.at_level(logging.WARNING, "gptv_jax"):
        fitted = count_up(tmp_path, [], patience=0)
    assert fitted.step == float(fitted.params["taken"]) == 20
    [message] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "14 is damaged" in message and "Falling back to step 20" in message
    assert count_up(tmp_path, [], patience=0).step == 20


def test_the_wait_for_the_first_batch_is_no_part_of_the_speed(tmp_path):
    count_up(tmp_path, ACCURACIES, patience=0, wait=3, save_all=False)
    [speed] = [e for e in MetricWriter(tmp_path).read() if "tokens_per_second" in e]
    assert 0 <= speed["data_wait_share"] <= 1
    # The speed counts the batch size of the settings, and would be this if the wait counted.
    assert speed["tokens_per_second"] > 2 * 20 * config_lib.Train().batch_size * 16 / 3


# Fine-tuning.


@pytest.mark.process
def test_fine_tuning_begins_with_the_pretrained_weights_and_its_floor_with_none(finished_run):
    events = MetricWriter(finished_run.folder).read()
    first = {
        event["stage"]: event["validation_nats_per_token"]
        for event in events
        if event["step"] == 0 and "validation_nats_per_token" in event
    }
    trained = finished_run.summary["pretrain/validation_nats_per_token"]
    assert first["finetune"] == pytest.approx(trained, rel=1e-5)
    assert first["finetune_scratch"] == pytest.approx(np.log(17), rel=1e-5)


@pytest.mark.process
def test_the_head_is_standardised_by_the_statistics_of_the_training_split(finished_run):
    given = gptv_jax.load(finished_run.folder, "pretrain")
    features = given.features(images_of("train"), layer=SMALL["model.layers"]).astype(np.float64)
    head = gptv_jax.load(finished_run.folder, "finetune").params["classifier"]
    np.testing.assert_allclose(head["class_center"], features.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(head["class_scale"], 1 / features.std(axis=0), rtol=1e-3)


@pytest.mark.process
def test_weights_of_another_network_are_refused(finished_run, tmp_path):
    config = config_of(finished_run.folder)
    wider = dataclasses.replace(config.model, width=32)
    config = dataclasses.replace(config, init_from=str(finished_run.folder), model=wider)
    with pytest.raises(InputError) as caught:
        setup.open_run(config, str(tmp_path / "run"))
    assert "config.model.width is 32, expected 16" in str(caught.value)
    assert str(finished_run.folder) in str(caught.value) and not (tmp_path / "run").exists()


# Samples.


def cells(picture: np.ndarray, columns: int) -> np.ndarray:
    """The small images [N, 8, 8, 3] of a grid whose cells are 64 pixels and a border."""
    side = picture.shape[1] // columns
    rows = picture.shape[0] // side
    found = picture.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return found.reshape(-1, side, side, 3)[:, 4:64:8, 4:64:8]


UPPER, AROUND = np.zeros((8, 8), bool), np.ones((8, 8), bool)
UPPER[:4], AROUND[2:6, 2:6] = True, False


def test_only_stages_that_run_are_checked(tmp_path):
    for section, words in (
        ({"probe": config_lib.Probe(batch_size=3)}, r"config\.probe\.batch_size is 3, which 8"),
        ({"probe": config_lib.Probe(concatenate=99)}, r"config\.probe\.concatenate is 99"),
    ):
        config = dataclasses.replace(config_lib.Config(), **section)
        with pytest.raises(InputError, match=words):
            setup.open_run(config, str(tmp_path / "all"))
        assert setup.open_run(config, str(tmp_path / words.split()[-1]), ["pretrain"]).classes == 10


@pytest.mark.process
@pytest.mark.parametrize(("name", "known"), [("completions", UPPER), ("inpainted", AROUND)])
def test_completions_stand_beside_their_originals_and_keep_what_is_known(finished_run, name, known):
    with Image.open(finished_run.folder / "samples" / f"{name}.png") as picture:
        pairs = cells(np.asarray(picture), columns=8).reshape(-1, 2, 8, 8, 3)
    assert len(pairs) == SMALL["sample.completions"]
    codec = gptv_jax.load(finished_run.folder).codec
    originals, completions = pairs[:, 0], pairs[:, 1]
    np.testing.assert_array_equal(originals, codec.picture(images_of("test")[: len(pairs)]))
    np.testing.assert_array_equal(completions[:, known], originals[:, known])
    different = (completions[:, ~known] != originals[:, ~known]).any(axis=(1, 2))
    assert different.all()


@pytest.mark.process
def test_surprise_stands_beside_test_images_on_one_scale_that_the_summary_tells(finished_run):
    with Image.open(finished_run.folder / "samples" / "surprise.png") as picture:
        pairs = cells(np.asarray(picture), columns=8).reshape(-1, 2, 8, 8, 3)
    model, images = gptv_jax.load(finished_run.folder, "pretrain"), images_of("test")[: len(pairs)]
    np.testing.assert_array_equal(pairs[:, 0], model.codec.picture(images))
    maps, brightest = pictures.heat_map(model.surprise(images))
    assert brightest == pytest.approx(finished_run.summary["sample/surprise_brightest_nats"])
    assert np.abs(pairs[:, 1].astype(int) - maps).max() <= 2  # rounding


@pytest.mark.process
def test_as_many_new_images_are_shown_as_asked_for(finished_run):
    with Image.open(finished_run.folder / "samples" / "unconditional.png") as picture:
        shown = cells(np.asarray(picture), columns=3)  # as square as six get
    assert len(np.unique(shown, axis=0)) == len(shown) == SMALL["sample.count"]


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> config_lib.Config:
    """Of a run that only samples a class-conditional network, of weights without training."""
    model = tiny_network(layers=1, class_tokens=10).config
    tokens = config_lib.Tokens(kind="grey", levels=17)
    described = WeightsFile(model, tokens, image_size=8, params={}, starts=11)
    mesh = make_mesh((1, 1, 1))
    with jax.set_mesh(mesh):
        params = random_params(described.network)
    path = tmp_path_factory.mktemp("conditional") / "weights.safetensors"
    gptv_jax.Model(described, params, mesh).save(path)
    drawn = config_lib.Sample(count=20, completions=0, guidance=3.0, guidance_schedule="cosine")
    return config_lib.Config(init_from=str(path), model=model, tokens=tokens, sample=drawn)


def test_a_class_conditional_network_shows_a_row_of_each_class(conditional, tmp_path):
    run = setup.open_run(conditional, str(tmp_path), ["sample"])
    with jax.set_mesh(run.mesh):
        numbers = sample.run_stage(run)
    assert numbers["count"] == 20 and numbers["tokens_per_second"] > 0
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["classes.png"]
    with Image.open(tmp_path / "samples" / "classes.png") as picture:
        shown = cells(np.asarray(picture), columns=2)
    model = gptv_jax.load(conditional.init_from)
    settings = {"guidance": 3.0, "guidance_schedule": "cosine"}
    wanted = model.sample(20, conditional.seed, labels=np.arange(20) // 2, **settings)
    np.testing.assert_array_equal(shown, model.codec.picture(wanted))


def test_test_images_are_completed_and_judged_as_of_their_class(conditional, tmp_path, monkeypatch):
    config = dataclasses.replace(conditional.sample, count=10, completions=3)
    run = setup.open_run(dataclasses.replace(conditional, sample=config), str(tmp_path), ["sample"])
    told, keys, draw, nats = [], [], Sampler.draw, Sampler.nats

    def noted(self, given, key, labels, **options):
        told.append(labels)
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return draw(self, given, key, labels, **options)

    monkeypatch.setattr(Sampler, "draw", noted)
    monkeypatch.setattr(Sampler, "nats", lambda *given: told.append(given[2]) or nats(*given))
    with jax.set_mesh(run.mesh):
        sample.run_stage(run)
    (batch,) = itertools.islice(run.data.evaluation("test", 3), 1)
    new, completed, inpainted, judged = told  # each is drawn once
    assert new.tolist() == list(range(10))
    seed = jax.random.key(conditional.seed)
    of_tokens = [jax.random.key_data(generation.token_key(seed, p)).tolist() for p in range(64)]
    assert len({*keys, *map(tuple, of_tokens)}) == 3 + 64  # no section's key is a token's
    for labels in (completed, inpainted, judged):
        np.testing.assert_array_equal(labels, batch["label"])


def test_guidance_without_classes_is_refused_before_any_work(conditional, tmp_path):
    model = dataclasses.replace(conditional.model, class_tokens=0)
    with pytest.raises(InputError) as caught:
        setup.open_run(dataclasses.replace(conditional, model=model), str(tmp_path / "run"))
    assert "config.sample.guidance is 3" in str(caught.value)
    assert "config.model.class_tokens is 0" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_each_process_decodes_its_share_of_the_test_images_alone():
    codec = tokens.make_codec(config_lib.Tokens(), 8)

    def statistics(index: int, count: int):
        images = Pipeline(config_lib.Data(), None, 0, share=(index, count))
        return pretrain.token_statistics(images, codec, batch_size=64)

    whole, shares = statistics(0, 1), [statistics(i, 2) for i in range(2)]
    assert whole.images == sum(share.images for share in shares) == 400
    np.testing.assert_array_equal(whole.counts, sum(share.counts for share in shares))


@pytest.mark.process
def test_without_scratch_one_network_is_tuned_and_the_report_names_its_classes(
    finished_run, tmp_path
):
    config = config_of(finished_run.folder)
    tuning = dataclasses.replace(config.finetune, scratch=False)
    config = dataclasses.replace(config, init_from=str(finished_run.folder), finetune=tuning)
    run = setup.open_run(config, str(tmp_path), ["finetune"])
    run = dataclasses.replace(run, task=dataclasses.replace(run.task, classes=tuple("abcdefghij")))
    with jax.set_mesh(run.mesh):
        run.finish("finetune", finetune.run_stage(run))
    record = json.loads((tmp_path / "config.json").read_text())
    record["found"] = record.get("found", {}) | {
        "left_out": ["3 .txt files"],
        "notes": ["a <note>"],
    }
    (tmp_path / "config.json").write_text(json.dumps(record))
    reports.write(run)
    summary, page = run.folder.summary(), (tmp_path / "report.html").read_text()
    known = {k: v for k, v in finished_run.summary.items() if k.startswith("finetune/")}
    scratch = {k for k in known if k.startswith("finetune/scratch_")}
    assert summary.keys() >= known.keys() - scratch and not summary.keys() & scratch
    assert summary["finetune/test_accuracy"] == known["finetune/test_accuracy"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"finetune"}
    error = f"± {summary['finetune/test_accuracy_standard_error']:.2%}"
    assert error in page and "<td>j</td>" in page and "from scratch" not in page
    assert "1,197 train, 200 validation, 400 test" in page
    assert "left out: 3 .txt files" in page and "a &lt;note&gt;" in page


def test_a_report_lists_the_worst_of_many_classes_and_names_every_confusion(tmp_path):
    matrix = 5 * np.eye(40, dtype=int)
    matrix[7, 7], matrix[7, 8] = 1, 4
    names = [f"class <{c}>" for c in range(40)]
    accuracy.write(tmp_path / "finetune", matrix, names, None)
    event = {"stage": "finetune", "step": 0, "validation_accuracy": 0.5}
    results = reports.Results(config_lib.Config(), tmp_path, {}, [event])
    content, _ = reports.finetune(results)
    assert content.count("<img") == 1  # the curve; a matrix of 40 classes would be illegible
    assert "<td>class &lt;7&gt;</td><td></td><td>5</td><td>20.00%" in content
    assert "<td>class &lt;7&gt;</td><td>class &lt;8&gt;</td><td>4</td>" in content
    accuracy.write(tmp_path / "finetune", matrix[:9, :9], names[:9], None)
    assert reports.finetune(results)[0].count("<img") == 2


def test_captions_name_the_classes_where_they_have_names(tmp_path):
    model = config_lib.Model(class_tokens=3)
    results = reports.Results(config_lib.Config(model=model), tmp_path, {}, [])
    assert [results.class_name(label) for label in (0, 2)] == ["0", "2"]
    (tmp_path / "config.json").write_text(json.dumps({"classes": ["cat", "dog", "owl"]}))
    pictures.save(np.zeros((4, 4, 3), np.uint8), tmp_path / "samples" / "classes.png")
    results = dataclasses.replace(results)
    assert "each row shows one class: cat, dog, owl." in reports.sample(results)[0]
