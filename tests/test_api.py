"""The Python interface on a run folder that the real command made on another number of devices."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jaxtyping
import numpy as np
import pytest
from PIL import Image

import gptv_jax
from gptv_jax.config import Data
from gptv_jax.data import sources
from gptv_jax.decode import generation

pytestmark = pytest.mark.process  # of the run that the tests share


@pytest.fixture(scope="module")
def pretrained(finished_run):
    return gptv_jax.load(finished_run.folder, stage="pretrain")


@pytest.fixture(scope="module")
def finetuned(finished_run):
    return gptv_jax.load(finished_run.folder)


def split(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a whole split."""
    source = sources.open_source(Data(), name)
    elements = [source[i] for i in range(len(source))]
    return np.stack([e["image"] for e in elements]), np.stack([e["label"] for e in elements])


@pytest.fixture(scope="module")
def held_out():
    return split("test")


@pytest.fixture(scope="module")
def images(held_out):
    return held_out[0][:13]  # eight devices do not divide 13


def test_load_takes_the_latest_stage_with_weights(finished_run, pretrained, finetuned):
    assert pretrained.network.classes == 0
    assert finetuned.network.classes == 10
    latest, named = finetuned, gptv_jax.load(str(finished_run.folder), stage="finetune")
    jax.tree.map(np.testing.assert_array_equal, latest.params, named.params)


LOAD = """
import sys
import gptv_jax
for folder in sys.argv[1:]:
    model = gptv_jax.load(folder)
    model.classify(model.sample(2))
"""


def test_using_a_model_prints_nothing_also_from_a_folder_that_is_read_only(finished_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished_run.folder, copy)
    for path in copy.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    copy.chmod(0o555)
    command = [sys.executable, "-c", LOAD, finished_run.folder, copy]
    ended = subprocess.run(command, capture_output=True, text=True)
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_tokenize_and_detokenize_are_inverse(pretrained, images):
    tokens = pretrained.tokenize(images)
    assert tokens.dtype == np.int32 and tokens.shape == (13, 64)
    found = pretrained.detokenize(tokens)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, images)


def test_jax_arrays_are_taken_too(pretrained, images):
    on_device = jax.numpy.asarray(images)
    tokens = pretrained.tokenize(on_device)
    np.testing.assert_array_equal(tokens, pretrained.tokenize(images))
    np.testing.assert_array_equal(pretrained.detokenize(jax.numpy.asarray(tokens)), images)
    np.testing.assert_array_equal(
        pretrained.log_likelihood(on_device), pretrained.log_likelihood(images)
    )


def test_log_likelihood_is_the_sum_of_the_log_softmax_of_the_logits(pretrained, images):
    tokens = pretrained.tokenize(images)
    logits = pretrained.logits(tokens)
    assert logits.dtype == np.float32 and logits.shape == (13, 64, 17)
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    wanted = np.take_along_axis(log_probability, tokens[..., None], axis=-1)[..., 0].sum(axis=1)
    found = pretrained.log_likelihood(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_logits_of_a_position_depend_on_earlier_tokens_only(pretrained, images):
    tokens = pretrained.tokenize(images)
    changed = tokens.copy()
    changed[:, 30:] = (changed[:, 30:] + 1) % 17
    found, wanted = pretrained.logits(changed), pretrained.logits(tokens)
    np.testing.assert_array_equal(found[:, :31], wanted[:, :31])
    assert np.abs(found[:, 31] - wanted[:, 31]).max() > 1e-3


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_log_likelihood_of_the_test_split_is_the_test_loss_of_the_summary(
    finished_run, held_out, stage, request
):
    model = request.getfixturevalue(f"{stage[:-1] if stage == 'finetune' else stage}ed")
    nats = -model.log_likelihood(held_out[0]).mean() / 64
    assert nats == pytest.approx(finished_run.summary[f"{stage}/test_nats_per_token"], rel=1e-5)


def test_features_are_of_the_named_layer_or_of_the_layer_that_the_probe_chose(
    finished_run, pretrained, images
):
    layers = [pretrained.features(images, layer) for layer in (0, 1)]
    assert layers[0].dtype == np.float32 and layers[0].shape == (13, 16)
    assert np.abs(layers[0] - layers[1]).max() > 1e-3
    best = finished_run.summary["probe/best_layer"]
    np.testing.assert_array_equal(pretrained.features(images), layers[best])


@pytest.mark.parametrize("stage", ["pretrained", "finetuned"])
def test_features_of_regions_are_the_means_over_equal_parts_of_the_image(stage, images, request):
    model = request.getfixturevalue(stage)
    quarters = model.features(images, 1, regions=2).reshape(13, 4, 16)
    np.testing.assert_allclose(quarters.mean(axis=1), model.features(images, 1), atol=1e-6)
    rest = images.copy()
    rest[:, 4:] = 16 - rest[:, 4:]  # which the upper quarters, the first two, cannot see
    changed = model.features(rest, 1, regions=2).reshape(13, 4, 16)
    np.testing.assert_allclose(changed[:, :2], quarters[:, :2], atol=1e-6)
    assert np.abs(changed[:, 2:] - quarters[:, 2:]).max() > 1e-2
    left = images.copy()
    left[:, 3, 4:] = 16 - left[:, 3, 4:]  # the last tokens of the second quarter
    changed = model.features(left, 1, regions=2).reshape(13, 4, 16)
    assert np.abs(changed[:, 1] - quarters[:, 1]).max() > 1e-2
    np.testing.assert_allclose(changed[:, 0], quarters[:, 0], atol=1e-6)


def test_class_probabilities_sum_to_one_and_score_as_the_summary_says(
    finished_run, finetuned, held_out
):
    test_images, labels = held_out
    probabilities = finetuned.classify(test_images)
    assert probabilities.dtype == np.float32 and probabilities.shape == (400, 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    accuracy = (probabilities.argmax(axis=1) == labels).mean()
    assert accuracy == pytest.approx(finished_run.summary["finetune/test_accuracy"])


@pytest.mark.parametrize("count", [1, 8])
def test_an_image_is_read_the_same_in_any_batch(finetuned, images, count):
    for read in (finetuned.log_likelihood, finetuned.classify, lambda x: finetuned.features(x, 1)):
        found, wanted = read(images[:count]), read(images)[:count]
        assert len(found) == count
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_samples_depend_on_the_seed_alone(pretrained):
    first, again, other = (pretrained.sample(5, seed=seed) for seed in (0, 0, 1))
    assert first.dtype == np.uint8 and first.shape == (5, 8, 8, 1) and first.max() <= 16
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len(np.unique(first, axis=0)) == 5


@pytest.mark.parametrize(("keep", "rows"), [(0.5, 4), (0.0, 0), (1.0, 8)])
def test_completions_keep_the_upper_rows(pretrained, images, keep, rows):
    images = images[:5]
    first, again, other = (pretrained.complete(images, keep, seed=seed) for seed in (0, 0, 1))
    assert first.dtype == np.uint8 and first.shape == images.shape
    np.testing.assert_array_equal(first[:, :rows], images[:, :rows])
    np.testing.assert_array_equal(first, again)
    if rows < 8:
        assert (first[:, rows:] != images[:, rows:]).any(axis=(1, 2, 3)).all()
        assert (first != other).any()


def test_temperature_0_takes_the_most_likely_token(pretrained, images):
    images = images[:5]
    found = pretrained.tokenize(pretrained.complete(images, temperature=0.0))
    np.testing.assert_array_equal(pretrained.logits(found).argmax(-1)[:, 32:], found[:, 32:])
    for settings in ({"top_k": 1}, {"top_p": 1e-6}):
        other = pretrained.tokenize(pretrained.complete(images, seed=1, **settings))
        np.testing.assert_array_equal(other, found)


def test_many_samples_of_few_images_draw_no_more_than_fills_the_devices(
    pretrained, images, monkeypatch
):
    drawn, generate = [], generation.generate

    def counted(*arguments, **settings):
        drawn.append(generate(*arguments, **settings))
        return drawn[-1]

    monkeypatch.setattr(generation, "generate", counted)
    alone = pretrained.complete(images[:8], temperature=0.0)
    for count, samples, rows in ((1, 4, 8), (3, 2, 8), (8, 2, 16)):
        found = pretrained.complete(images[:count], samples=samples, temperature=0.0)
        assert found.shape == (count * samples, 8, 8, 1) and len(drawn[-1]) == rows
        np.testing.assert_array_equal(found, alone[:count].repeat(samples, axis=0))


IMAGES = np.zeros((2, 8, 8, 1), np.uint8)
TOKENS = np.zeros((2, 64), np.int32)
# case: (call, parts of the message: what was given, and what is accepted)
WRONG = {
    "float images": (lambda m: m.tokenize(IMAGES / 16), ["float64", "uint8"]),
    "one image": (lambda m: m.log_likelihood(IMAGES[0]), ["[8, 8, 1]", "[B, 8, 8, 1]"]),
    "other size": (lambda m: m.features(IMAGES[:, :4], 0), ["[2, 4, 8, 1]", "[B, 8, 8, 1]"]),
    "other channels": (
        lambda m: m.complete(IMAGES.repeat(3, axis=3)),
        ["[2, 8, 8, 3]", "[B, 8, 8, 1]"],
    ),
    "too bright": (lambda m: m.tokenize(IMAGES + np.uint8(17)), ["17", "0 to 16"]),
    "no images": (lambda m: m.log_likelihood(IMAGES[:0]), ["empty", "one"]),
    "float tokens": (lambda m: m.logits(TOKENS * 1.0), ["float64", "whole numbers"]),
    "short tokens": (lambda m: m.logits(TOKENS[:, :63]), ["[2, 63]", "[B, 64]"]),
    "tokens beyond the vocabulary": (lambda m: m.detokenize(TOKENS + 17), ["17", "0 to 16"]),
    "negative tokens": (lambda m: m.logits(TOKENS - 1), ["-1", "0 to 16"]),
    "layer beyond the last": (lambda m: m.features(IMAGES, 2), ["2", "0 to 1"]),
    "parts of an image": (lambda m: m.features(IMAGES, 0, regions=3), ["3", "8 x 8 tokens"]),
    "negative layer": (lambda m: m.features(IMAGES, -1), ["-1", "0 to 1"]),
    "no class head": (lambda m: m.classify(IMAGES), ["no class head", "finetune"]),
    "no samples": (lambda m: m.sample(0), ["n is 0", "1 or more"]),
    "negative temperature": (lambda m: m.sample(1, temperature=-1.0), ["-1", "0 or more"]),
    "temperature of nan": (lambda m: m.sample(1, temperature=float("nan")), ["nan", "0 or more"]),
    "top_k of 0": (lambda m: m.sample(1, top_k=0), ["top_k is 0", "1 or more"]),
    "top_p of 0": (lambda m: m.sample(1, top_p=0.0), ["top_p is 0", "above 0 up to 1"]),
    "top_p above 1": (lambda m: m.complete(IMAGES, top_p=1.5), ["top_p is 1.5", "up to 1"]),
    "no continuations": (lambda m: m.complete(IMAGES, samples=0), ["samples is 0", "1 or more"]),
    "keep above 1": (lambda m: m.complete(IMAGES, keep=4), ["keep is 4", "0 to 1"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_messages_say_what_was_given_and_what_is_accepted(pretrained, case, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    call, parts = WRONG[case]
    with pytest.raises(ValueError) as caught:
        call(pretrained)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("probe", ["no finished stage probe", "pretrain, finetune"]),
        ("dance", ["dance", "finetune"]),
    ],
)
def test_a_stage_without_weights_is_named(finished_run, stage, parts):
    with pytest.raises(ValueError) as caught:
        gptv_jax.load(finished_run.folder, stage=stage)
    for part in (str(finished_run.folder), *parts):
        assert part in str(caught.value)


def test_a_path_that_is_no_run_folder_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="is not a run folder"):
            gptv_jax.load(folder)
    assert not (tmp_path / "nothing").exists()  # loading creates no folder


def test_features_without_a_layer_need_a_probe(pretrained):
    unprobed = dataclasses.replace(pretrained.weights_file(), best_layer=None)
    model = gptv_jax.Model(unprobed, pretrained.params, pretrained.mesh)
    with pytest.raises(ValueError, match="0 to 1"):
        model.features(IMAGES)


def test_a_run_draws_with_the_pretrained_weights_unless_told(
    finished_run, pretrained, images, caplog
):
    model = gptv_jax.load(finished_run.folder)
    finetuned = gptv_jax.load(finished_run.folder, stage="finetune")
    for draw in (lambda m: m.sample(4, seed=3), lambda m: m.complete(images[:2], seed=3)):
        np.testing.assert_array_equal(draw(model), draw(pretrained))
        assert (draw(model) != draw(finetuned)).any()
    # All else is of the fine-tuned weights.
    np.testing.assert_array_equal(model.log_likelihood(images), finetuned.log_likelihood(images))
    np.testing.assert_array_equal(model.classify(images), finetuned.classify(images))


def test_a_run_without_its_pretrained_weights_draws_with_the_others_and_says_so(
    finished_run, tmp_path, caplog
):
    shutil.copytree(finished_run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "pretrain")
    found = gptv_jax.load(tmp_path / "run").sample(2)
    wanted = gptv_jax.load(finished_run.folder, stage="finetune").sample(2)
    np.testing.assert_array_equal(found, wanted)
    assert "drawn with the fine-tuned weights" in caplog.text


def test_a_run_that_began_with_other_weights_draws_with_these(
    finished_run, pretrained, tmp_path, caplog
):
    run = shutil.copytree(finished_run.folder, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "pretrain")
    summary = json.loads((run / "summary.json").read_text())
    kept = {name: value for name, value in summary.items() if not name.startswith("pretrain/")}
    (run / "summary.json").write_text(json.dumps(kept))
    pretrained.save(tmp_path / "x.safetensors")
    record, wanted = json.loads((run / "config.json").read_text()), pretrained.sample(2)
    for source in (tmp_path / "x.safetensors", finished_run.folder, tmp_path / "lost"):
        record["config"]["init_from"] = str(source)
        (run / "config.json").write_text(json.dumps(record))
        same = gptv_jax.load(run).sample(2) == wanted
        assert bool(same.all()) == (source.name != "lost") == ("lost" not in caplog.text)


def test_a_run_without_trained_weights_gives_those_that_it_was_given(
    finished_run, pretrained, tmp_path
):
    pretrained.save(tmp_path / "x.safetensors")
    record = json.loads((finished_run.folder / "config.json").read_text())
    record["config"]["init_from"] = str(tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(record))
    np.testing.assert_array_equal(gptv_jax.load(tmp_path).sample(2), pretrained.sample(2))


def test_classes_are_the_names_of_the_run_or_numbers(finished_run, pretrained, finetuned, tmp_path):
    assert finetuned.classes == tuple("0123456789") and pretrained.classes == ()
    shutil.copytree(finished_run.folder, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    names = [f"digit {i}" for i in range(10)]
    (tmp_path / "run" / "config.json").write_text(json.dumps(record | {"classes": names}))
    named = gptv_jax.load(tmp_path / "run")
    assert named.classes == tuple(names)
    assert gptv_jax.load(tmp_path / "run", stage="pretrain").classes == ()
    named.save(tmp_path / "x.safetensors")
    assert gptv_jax.load(tmp_path / "x.safetensors").classes == tuple(names)


def test_a_model_says_what_it_is(finetuned, pretrained, finished_run):
    shown = "1 layers, width 16, "
    for model, more in ((finetuned, "10 classes; step"), (pretrained, f"step {120}")):
        size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        assert repr(model).startswith(f"Model({shown}{size:,} parameters; 8 x 8 tokens of 17 grey")
        assert more in repr(model)
    assert f"step {finished_run.summary['finetune/steps']})" in repr(finetuned)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sizes", "Pillow images of L 8 x 8, L 9 x 8; give L images of 8 x 8"),
        ("mode", "Pillow images of RGBA 8 x 8; give L"),
        ("files", "images are file names"),
        ("arrays", "images are arrays of several sizes"),
    ],
)
def test_lists_of_images_are_taken_where_they_are_alike(
    finetuned, images, kind, words, monkeypatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    pictures = [Image.fromarray(image[..., 0]) for image in images]
    np.testing.assert_array_equal(finetuned.tokenize(pictures), finetuned.tokenize(images))
    others = {
        "sizes": [*pictures, Image.new("L", (9, 8))],
        "mode": [picture.convert("RGBA") for picture in pictures],
        "files": ["a.png", "b.png"],
        "arrays": [images[0], images[0][:, :7]],
    }
    with pytest.raises(ValueError, match=words) as caught:
        finetuned.tokenize(others[kind])
    assert len(str(caught.value)) <= 300
