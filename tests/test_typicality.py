"""How usual images are, on a run that the real command made, and what is rejected."""

import itertools
import json
import shutil

import jax
import jaxtyping
import numpy as np
import pytest
import safetensors.numpy
from conftest import (
    generator,
    make_mesh,
    random_image,
    random_params,
    small_arguments,
    tiny_network,
)

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax.config import Data
from gptv_jax.data import sources
from gptv_jax.decode.typicality import MOST, Calibration, code_bits, statistics
from gptv_jax.errors import InputError
from gptv_jax.runs import rejection
from gptv_jax.runs.record import config_of
from gptv_jax.stages import select, setup, typicality
from gptv_jax.weights.native import WeightsFile

pytestmark = pytest.mark.process  # of the run that the tests share
CALIBRATION = "typicality/calibration.json"


def images_of(split: str) -> np.ndarray:
    source = sources.open_source(Data(), split)
    return np.stack([source[i]["image"] for i in range(len(source))])


@pytest.fixture(scope="module")
def run(finished_run, command, tmp_path_factory):
    """A copy of the finished run whose stage typicality has run too."""
    folder = tmp_path_factory.mktemp("typicality") / "run"
    shutil.copytree(finished_run.folder, folder)
    ended = command("main", *small_arguments(folder), "--stages=typicality")
    assert ended.code == 0, ended.errors[-3000:]
    return folder


@pytest.fixture(scope="module")
def models(run) -> dict[str, gptv_jax.Model]:
    return {stage: gptv_jax.load(run, stage) for stage in ("pretrain", "finetune")}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_typicality_is_uniform_on_images_that_neither_training_nor_validation_has(models, stage):
    found = np.sort(models[stage].typicality(images_of("test")))
    assert found.dtype == np.float32 and found.shape == (400,) and 0 <= found[0] <= found[-1] <= 1
    # Kolmogorov and Smirnov's distance of two samples, which one time in 1,000 is larger.
    assert np.abs(found - (np.arange(400) + 0.5) / 400).max() < 1.95 * np.sqrt(1 / 400 + 1 / 200)


def test_typicality_is_the_share_of_validation_images_that_are_less_usual(models):
    found = np.sort(models["pretrain"].typicality(images_of("validation")))
    np.testing.assert_allclose(found, np.arange(200) / 200, atol=2 / 200)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_noise_and_constants_are_rejected_though_constants_are_likely(models, stage):
    model, test = models[stage], images_of("test")
    noise = generator().integers(17, size=(50, 8, 8, 1), dtype=np.uint8)
    constants = np.broadcast_to(np.arange(17, dtype=np.uint8)[:, None, None, None], (17, 8, 8, 1))
    for other in (noise, constants):
        assert (model.typicality(other) < 0.01).all()
    likely = model.log_likelihood(constants).max()
    assert likely > model.log_likelihood(test).max()


def test_an_image_is_as_usual_in_any_batch(models):
    model, images = models["pretrain"], images_of("test")[:13]
    whole = model.typicality(images)
    for count in (1, 8):
        np.testing.assert_allclose(model.typicality(images[:count]), whole[:count], atol=1 / 200)


def test_a_rejected_image_is_of_no_class(models):
    model = models["finetune"]
    noise = generator(1).integers(17, size=(4, 8, 8, 1), dtype=np.uint8)
    images = np.concatenate([images_of("test")[:40], noise])
    plain, found = model.classify(images), model.classify(images, reject_below=0.3)
    rejected = model.typicality(images) < np.float32(0.3)
    assert plain.shape == (44, 10) and found.shape == (44, 11) and found.dtype == np.float32
    assert rejected[40:].all() and 0 < rejected[:40].sum() < 40
    np.testing.assert_array_equal(found.argmax(axis=1) == 10, rejected)
    np.testing.assert_array_equal(found[rejected], np.eye(11, dtype=np.float32)[[10]].repeat(
        rejected.sum(), axis=0
    ))  # fmt: skip
    np.testing.assert_allclose(found[~rejected, :10], plain[~rejected], rtol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    assert not model.classify(images, reject_below=0.0)[:, 10].any()


def test_the_summary_and_the_report_say_what_rejection_gains(run, models):
    summary, page = (
        json.loads((run / "summary.json").read_text()),
        (run / "report.html").read_text(),
    )
    share = models["pretrain"].typicality(images_of("test"))
    assert summary["typicality/test_rejected_below_0.05"] == pytest.approx((share < 0.05).mean())
    assert summary["typicality/train_images"] == 1197 and summary["typicality/test_images"] == 400
    nats = summary["pretrain/test_nats_per_token"]
    assert summary["typicality/test_nats_per_token"] == pytest.approx(nats, rel=1e-5)
    curve = json.loads((run / "typicality" / "coverage.json").read_text())
    accuracy = summary["finetune/test_accuracy"]
    for way in ("typicality", "confidence"):
        assert curve[f"accuracy_by_{way}"][-1] == pytest.approx(accuracy)
        area = summary[f"typicality/risk_coverage_area_by_{way}"]
        assert summary["typicality/best_risk_coverage_area"] <= area
    assert "Accuracy where the least typical" in page and "least usual test images" in page


def test_the_stage_measures_the_same_again(run, command):
    before = (run / CALIBRATION).read_bytes()
    (run / CALIBRATION).unlink()  # a kill may have come before it was written
    ended = command("main", *small_arguments(run), "--stages=typicality")
    assert ended.code == 0 and (run / CALIBRATION).read_bytes() == before


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_saved_weights_know_what_is_usual(models, stage, tmp_path):
    images = images_of("test")[:20]
    models[stage].save(tmp_path / "x.safetensors")
    found = gptv_jax.load(tmp_path / "x.safetensors").typicality(images)
    np.testing.assert_array_equal(found, models[stage].typicality(images))


def changed_header(path, change) -> None:
    """Writes the file's weights with a header that `change` has changed."""
    with safetensors.safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["gptv_jax"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header["typicality"])
    safetensors.numpy.save_file(arrays, path, {"gptv_jax": json.dumps(header)})


DAMAGED = {
    "no distances": lambda known: known.update(distances=[]),
    "one statistic": lambda known: known.update(center=[1.0]),
    "not finite": lambda known: known.update(center=[1.0, 1.0, float("nan")]),
    "in no order": lambda known: known["distances"].reverse(),
    "no step": lambda known: known.pop("step"),
    "a text": lambda known: known.update(precision="none"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_calibrations_are_refused(models, damage, tmp_path):
    path = tmp_path / "x.safetensors"
    models["pretrain"].save(path)
    changed_header(path, DAMAGED[damage])
    with pytest.raises(InputError, match=r"typicality in .*x\.safetensors is damaged"):
        gptv_jax.load(path)


def test_a_model_of_which_nothing_was_measured_says_what_to_run(run, finished_run, tmp_path):
    images, unmeasured = images_of("test")[:2], gptv_jax.load(finished_run.folder)
    calls = (unmeasured.typicality, lambda x: unmeasured.classify(x, reject_below=0.01))
    for call in calls:
        with pytest.raises(InputError) as caught:
            call(images)
        place = finished_run.folder
        wanted = f"python -m gptv_jax.main --config={place} --workdir={place} --stages=typicality"
        assert wanted in str(caught.value)
    unmeasured.save(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"--stages=typicality.*save the model again"):
        gptv_jax.load(tmp_path / "x.safetensors").typicality(images)
    # Measured for weights of another step is not measured.
    copy = shutil.copytree(run, tmp_path / "run")
    known = json.loads((copy / CALIBRATION).read_text())
    known["finetune"]["step"] += 1
    (copy / CALIBRATION).write_text(json.dumps(known))
    with pytest.raises(InputError, match="nobody has measured"):
        gptv_jax.load(copy).typicality(images)
    gptv_jax.load(copy, "pretrain").typicality(images)


WRONG = {
    "a share above 1": (
        {"reject_below": 1.5},
        "reject_below is 1.5; it takes a number from 0 to 1",
    ),
    "clips": ({"reject_below": 0.1, "clips": 2}, "images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rejections_are_refused(models, case, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given, words = WRONG[case]
    with pytest.raises(InputError, match=words):
        models["finetune"].classify(images_of("test")[:2], **given)


def test_networks_without_likelihoods_have_no_typicality():
    model = config_lib.Model(objective="bert")
    for config in (
        config_lib.Config(model=model),
        config_lib.Config(tokens=config_lib.Tokens("none")),
    ):
        with pytest.raises(InputError, match="--stages has typicality, but config"):
            select.choose_stages(config, {"label"}, ["typicality"])
    network = tiny_network(objective="bert")
    described = WeightsFile(network.config, config_lib.Tokens(levels=11), 4, {})
    mesh = make_mesh((1, 1, 1))
    with jax.set_mesh(mesh):
        bert = gptv_jax.Model(described, random_params(described.network), mesh)
        with pytest.raises(InputError, match="objective bert cannot give likelihoods"):
            bert.typicality(np.zeros((1, 4, 4, 1), np.uint8))


def test_given_weights_are_measured_on_the_images_of_the_run(models, run, tmp_path):
    path = tmp_path / "x.safetensors"
    models["pretrain"].save(path)
    changed_header(path, lambda known: known.update(distances=[1e9]))
    config = config_of(run)
    config = config_lib.Config(init_from=str(path), data=config.data, model=config.model)
    opened = setup.open_run(config, str(tmp_path / "run"), ["typicality"])
    with jax.set_mesh(opened.mesh):
        opened.finish("typicality", typicality.run_stage(opened))
    images = images_of("test")
    assert (gptv_jax.load(path).typicality(images) == 1).all()
    found = gptv_jax.load(tmp_path / "run").typicality(images)
    np.testing.assert_allclose(found, models["pretrain"].typicality(images), atol=1 / 200)


# Of the parts.


def test_the_coder_is_a_code():
    """Over all images of a size, two to the power of minus the bits adds up to 1 (Kraft)."""
    one = np.arange(256, dtype=np.uint8).reshape(-1, 1, 1, 1)
    assert np.exp2(-code_bits(one)).sum() == pytest.approx(1)
    pairs = np.array([*itertools.product(range(256), repeat=2)], np.uint8)
    for shape in ((1, 2, 1), (2, 1, 1)):
        assert np.exp2(-code_bits(pairs.reshape(-1, *shape))).sum() == pytest.approx(1)


def test_the_coder_takes_few_bits_for_simple_images():
    constant = np.full((1, 16, 16, 3), 77, np.uint8)
    ramp = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None], (1, 16, 16, 3))
    noise = random_image(1, 16, 16, 3)
    bits = [float(code_bits(each)[0]) for each in (constant, ramp, noise)]
    assert bits[0] < bits[1] < bits[2] / 4
    assert bits[2] > 8 * noise.size  # nobody codes noise in less
    clip = random_image(2, 3, 8, 8, 1)
    frames = clip.reshape(2, 24, 8, 1)
    assert code_bits(clip).shape == (2,) and (code_bits(clip) != code_bits(frames)).all()


def test_statistics_are_means_over_tokens_and_pixels():
    nats, images = np.arange(8, dtype=np.float32).reshape(2, 4), random_image(2, 4, 4, 3)
    found = statistics(nats, images)
    np.testing.assert_allclose(found[:, 0], [1.5, 5.5])
    np.testing.assert_allclose(found[:, 1], np.sqrt(1.25))
    np.testing.assert_allclose(found[:, 2], code_bits(images) / 16)


def test_a_calibration_keeps_few_distances_and_the_same_shares():
    rng = generator()
    training, validation, new = (
        rng.normal(size=(n, 3)) @ [[1, 0.9, 0], [0, 0.1, 0], [0, 0, 1]] for n in (500, 5000, 300)
    )
    made = Calibration.fit(training, validation, step=7)
    assert len(made.distances) == MOST and made.step == 7
    less_usual = made.distance(validation)[None] > made.distance(new)[:, None]
    np.testing.assert_allclose(made.typicality(new), less_usual.mean(axis=1), atol=2 / MOST)
    again = Calibration.from_json(json.loads(json.dumps(made.to_json())), "a file")
    assert again == made
    # Unusual in either direction, also along the combination that hardly varies.
    for far in ([9, 9, 0], [-9, -9, 0], [0, 1, 0], [0, -1, 0], [0, 0, 9]):
        assert made.typicality(np.array([far], float)) == 0


def test_training_images_that_are_all_alike_leave_finite_distances():
    alike = np.ones((10, 3))
    made = Calibration.fit(alike, alike)
    np.testing.assert_array_equal(made.typicality(np.array([[1.0] * 3, [2.0] * 3])), [0, 0])
    assert np.isfinite(made.distance(np.array([[2.0] * 3]))).all()


def test_accuracy_by_coverage():
    labels = np.repeat([0, 1], 50)
    sure = np.linspace(0.5, 1, 100)
    probabilities = np.stack([sure, 1 - sure], axis=1)  # always class 0: right in the first half
    found = rejection.curves(probabilities, labels, np.arange(100, 0, -1.0))
    np.testing.assert_allclose(found["coverage"], np.arange(1, 101) / 100)
    by_typicality, by_confidence = (np.array(found[f"accuracy_by_{w}"]) for w in rejection.WAYS)
    np.testing.assert_allclose(by_typicality[:50], 1)
    np.testing.assert_allclose(by_confidence[:50], 0)
    assert by_typicality[-1] == by_confidence[-1] == 0.5
    assert found["risk_coverage_area_by_typicality"] == found["best_risk_coverage_area"]
    numbers = rejection.numbers(found)
    assert numbers["accuracy_at_0.8_coverage_by_typicality"] == pytest.approx(50 / 80)
