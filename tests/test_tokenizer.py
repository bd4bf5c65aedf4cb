"""The real command trains a tokenizer, then a GPT on the tokenizer's codes."""

import json
import pathlib
import re
import signal
import time

import numpy as np
import pytest
from conftest import Ended, generator, made_once
from PIL import Image
from test_launch import launch

import gptv_jax
from gptv_jax.tokens import learned

pytestmark = pytest.mark.process

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
SMALL = {
    "data.name": "arrays",
    "data.image_size": 16,
    "data.train_split": "train",
    "data.validation_split": "validation",
    "data.train_transforms": '("flip()",)',
    "data.eval_transforms": "()",
    "tokens.autoencoder.widths": "(16,)",
    "tokens.autoencoder.encoder_blocks": 1,
    "tokens.autoencoder.decoder_blocks": 1,
    "tokens.autoencoder.levels": "(5,5,5)",
    "tokenizer.train.steps": 200,
    "tokenizer.train.optimizer.warmup_steps": 10,
    "tokenizer.train.optimizer.learning_rate": 0.01,
    "tokenizer.train.batch_size": 16,
    "tokenizer.train.checkpoint_every": 40,
    "tokenizer.train.log_every": 20,
    "model.class_tokens": 3,
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "train.steps": 6,
    "train.batch_size": 16,
    "train.log_every": 3,
    "sample.count": 6,
    "sample.completions": 2,
}


def arguments(folder, data, *more: str, place: str = "--workdir") -> list[str]:
    # A tuple given twice would be joined, so a flag in `more` replaces the small run's.
    own = {flag.partition("=")[0] for flag in more}
    small = {f"--config.{name}": value for name, value in SMALL.items()}
    settings = [f"{flag}={value}" for flag, value in small.items() if flag not in own]
    config = f"--config={CONFIGS / 'tokenizer_cifar10.py'}"
    return [config, f"{place}={folder}", *settings, f"--config.data.path={data}", *more]


@pytest.fixture(scope="session")
def run(command):
    """`run(folder, data, *more)` runs the command, or `module="prepare"`; returns `Ended`."""

    def call(folder, data, *more: str, module: str = "main", code: int = 0) -> Ended:
        place = "--workdir" if module == "main" else "--out"
        ended = command(module, *arguments(folder, data, *more, place=place))
        assert ended.code == code, ended.errors[-3000:]
        return ended

    return call


def summary_of(folder: pathlib.Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def write_discs(folder: pathlib.Path) -> None:
    """Discs of any colour on any background, which few codes can describe."""
    rng, arrays = generator(), {}
    rows, columns = np.mgrid[:16, :16]
    for split, count in (("train", 200), ("validation", 40), ("test", 40)):
        y, x = rng.uniform(3, 13, (2, count, 1, 1))
        radius = rng.uniform(2, 5, (count, 1, 1))
        inside = ((rows - y) ** 2 + (columns - x) ** 2 < radius**2)[..., None]
        colors, grounds = rng.integers(256, size=(2, count, 1, 1, 3))
        arrays[f"{split}_images"] = np.where(inside, colors, grounds).astype(np.uint8)
        arrays[f"{split}_labels"] = rng.integers(3, size=count)
    folder.mkdir()
    np.savez(folder / "discs.npz", **arrays)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> pathlib.Path:
    return made_once(tmp_path_factory, "discs", write_discs)[0] / "discs.npz"


@pytest.fixture(scope="session")
def finished(run, start, data, tmp_path_factory) -> pathlib.Path:
    """A run that was killed during the training of its tokenizer, and then finished."""

    def make(folder: pathlib.Path) -> str:
        stages = "--stages=tokenizer,pretrain,sample"
        begun = start("main", *arguments(folder, data, stages))
        while not (folder / "checkpoints/tokenizer/40/_CHECKPOINT_METADATA").exists():
            assert begun.poll() is None
            time.sleep(0.05)
        begun.send_signal(signal.SIGKILL)
        assert begun.wait() == -signal.SIGKILL
        assert not (folder / learned.FILE).exists()
        ended = run(folder, data, stages)
        assert "tokenizer continues from step" in ended.errors
        return ended.errors

    return made_once(tmp_path_factory, "tokenizer_run", make)[0]


def test_a_killed_training_ends_with_the_tokenizer_of_an_unbroken_one(
    run, finished, data, tmp_path
):
    # Demanding that every code is in use raises the alarm as well.
    ended = run(tmp_path, data, "--stages=tokenizer", "--config.tokenizer.least_used=1.0")
    assert learned.load(tmp_path).hash == learned.load(finished).hash
    alarms = re.findall(r"codebook collapses: .* of 125 codes are in use on (\w+)", ended.errors)
    assert alarms == ["validation", "test"]  # none before the first step
    assert summary_of(tmp_path)["tokenizer/collapsed"]
    assert not summary_of(finished)["tokenizer/collapsed"]
    assert "The codebook has collapsed" in (tmp_path / "report.html").read_text()


def test_a_tokenizer_is_trained_measured_and_shown(finished, data):
    summary, images = summary_of(finished), np.load(data)["test_images"].astype(float)
    plain = images.mean(axis=(1, 2), keepdims=True)  # the best that one colour could do
    floor = (10 * np.log10(255**2 / np.square(images - plain).mean(axis=(1, 2, 3)))).mean()
    assert summary["tokenizer/test_psnr_db"] > floor
    assert 0 < summary["tokenizer/test_ssim"] < 1 and summary["tokenizer/codes"] == 125
    assert 1 < summary["tokenizer/perplexity"] <= 125 * summary["tokenizer/codes_used"]
    assert summary["tokenizer/dead_codes"] == 125 - round(125 * summary["tokenizer/codes_used"])
    codec = learned.LearnedCodec(learned.load(finished), 16)
    images = np.load(data)["test_images"]
    made = codec.decode(codec.encode(images)).astype(float)
    error = np.maximum(np.square(made - images).mean(axis=(1, 2, 3)), 0.25)
    assert summary["tokenizer/test_psnr_db"] == pytest.approx(
        (10 * np.log10(255**2 / error)).mean(), abs=1e-3
    )
    with Image.open(finished / "samples" / "reconstructions.png") as picture:
        assert picture.width > 16
    page = (finished / "report.html").read_text()
    assert "Tokenizer" in page and "perplexity" in page


def test_a_gpt_on_codes_has_their_vocabulary_and_draws_images(finished, data, tmp_path):
    summary = summary_of(finished)
    assert summary["pretrain/test_nats_per_token"] < 1.1 * np.log(125)
    assert summary["pretrain/test_distortion_psnr_db"] > 0
    model = gptv_jax.load(finished)
    images = np.load(data)["test_images"][:3]
    tokens = model.tokenize(images)
    assert tokens.shape == (3, 16) and model.logits(tokens).shape == (3, 16, 125)
    assert model.sample(2).shape == (2, 16, 16, 3)
    kept = model.tokenize(model.complete(images, keep=0.5))
    assert kept.shape == tokens.shape
    with pytest.raises(ValueError, match=r"tokens\.kind=learned"):
        gptv_jax.to_huggingface(model, tmp_path / "hf")
    model.save(tmp_path / "whole.safetensors")
    again = gptv_jax.load(tmp_path / "whole.safetensors")
    np.testing.assert_array_equal(again.tokenize(images), tokens)
    np.testing.assert_allclose(again.logits(tokens), model.logits(tokens), atol=1e-5)


def test_a_gpt_that_predicts_codes_by_levels_is_trained_loaded_and_draws_images(
    run, finished, data, tmp_path
):
    given = f"--config.tokens.tokenizer={finished}", "--config.model.code_head=levels"
    for stage in ("pretrain", "sample"):
        run(tmp_path, data, *given, f"--stages={stage}")
    model, images = gptv_jax.load(tmp_path), np.load(data)["test_images"][:3]
    tokens, summary = model.tokenize(images), summary_of(tmp_path)
    found = model.logits(tokens)
    np.testing.assert_allclose(np.exp(found).sum(axis=-1), 1, atol=1e-5)
    likely = np.take_along_axis(found, tokens[..., None], axis=-1)[..., 0].sum(axis=1)
    np.testing.assert_allclose(model.log_likelihood(images), likely, rtol=1e-5)
    assert summary["pretrain/test_nats_per_token"] < 1.1 * np.log(125)
    assert summary["sample/tokens_per_second"] > 0
    model.save(tmp_path / "whole.safetensors")
    again = gptv_jax.load(tmp_path / "whole.safetensors")
    np.testing.assert_allclose(again.logits(tokens), found, atol=1e-5)


def test_a_gpt_that_reads_pixels_is_trained_probed_fine_tuned_and_loaded(
    run, finished, data, tmp_path
):
    given = f"--config.tokens.tokenizer={finished}", "--config.model.image_input=pixels"
    given += ("--config.model.class_tokens=0", "--config.probe.c=(0.1,)")
    given += ("--config.finetune.train.steps=2", "--config.finetune.scratch=False")
    run(tmp_path, data, *given)  # the stages that draw are left out
    summary, arrays = summary_of(tmp_path), np.load(data)
    assert summary["pretrain/test_nats_per_token"] < 1.1 * np.log(125)
    assert not any(name.startswith("sample/") for name in summary)
    model, images = gptv_jax.load(tmp_path, stage="finetune"), arrays["test_images"]
    right = model.classify(images).argmax(axis=1) == arrays["test_labels"]
    assert right.mean() == pytest.approx(summary["finetune/test_accuracy"])
    model.save(tmp_path / "whole.safetensors")
    again = gptv_jax.load(tmp_path / "whole.safetensors")
    features = again.features(images[:3], layer=1)
    np.testing.assert_allclose(features, model.features(images[:3], layer=1), atol=1e-5)
    assert np.abs(model.features(images[:3] ^ 1, layer=1) - features).max() > 0  # not codes
    for call in (model.sample, lambda n: model.logits(model.tokenize(images[:n]))):
        with pytest.raises(ValueError, match="reads pixels"):
            call(2)


def test_two_processes_train_one_tokenizer_and_generate_images(finished, data, tmp_path):
    stages, sizes = "--stages=tokenizer,pretrain,generate", ("count=11", "batch_size=4")
    more = stages, *(f"--config.generate.{size}" for size in sizes)
    settings = ["--processes=2", "--", *arguments(tmp_path / "run", data, *more)]
    ended = launch("local.sh", settings, tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    alone, both = summary_of(finished), summary_of(tmp_path / "run")
    for name in ("tokenizer/test_psnr_db", "pretrain/test_nats_per_token"):
        assert both[name] == pytest.approx(alone[name], rel=0.03)
    # Each process restores a share of the test images.
    codec, images = learned.LearnedCodec(learned.load(tmp_path / "run"), 16), np.load(data)
    images = images["test_images"]
    error = np.square(codec.decode(codec.encode(images)).astype(float) - images).mean()
    assert both["pretrain/test_distortion_mse"] == pytest.approx(error, rel=1e-9)
    made = tmp_path / "run" / "generated"
    assert np.load(made / "samples.npz")["arr_1"].tolist() == [i % 3 for i in range(11)]
    reference = json.loads((made / "quality.json").read_text())["reference"]
    assert (reference["split"], reference["count"], reference["image_size"]) == ("train", 200, 16)


def test_another_run_and_a_cache_use_an_existing_tokenizer(run, finished, data, tmp_path):
    named, stage = f"--config.tokens.tokenizer={finished}", "--stages=pretrain"
    ended = run(tmp_path / "cache", data, named, module="prepare")
    assert json.loads(ended.output)["test"]["psnr"] > 0
    run(tmp_path / "images", data, named, stage)
    plain = "--config.data.train_transforms=()"
    run(tmp_path / "plain", data, named, stage, plain)
    # A cache has no flips: mirroring the grid of codes would not mirror the squares of pixels.
    cached = tmp_path / "cache", "--config.data.name=tokens"
    ended = run(tmp_path / "cached", *cached, stage)
    assert "flip(), which needs pixels" in ended.errors
    key = "pretrain/test_nats_per_token"
    assert summary_of(tmp_path / "cached")[key] == summary_of(tmp_path / "plain")[key]
    assert summary_of(tmp_path / "images")[key] != summary_of(tmp_path / "plain")[key]
    for folder in ("images", "cached"):
        assert learned.load(tmp_path / folder).hash == learned.load(finished).hash


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--stages=pretrain"], ["needs a tokenizer", "--stages=tokenizer", "tokens.tokenizer"]),
        (["--config.data.image_size=18"], ["image_size is 18", "multiple of 4"]),
        (["--config.tokens.kind=palette", "--stages=tokenizer"], ["kind=palette", "to train"]),
        (["--config.tokens.tokenizer=nowhere"], ["there is no tokenizer", "nowhere"]),
        (["--config.data.image_size=32"], ["an image is 16 x 16 x 3", "32 x 32 x 3 is needed"]),
    ],
)
def test_impossible_settings_end_with_one_sentence(run, data, tmp_path, more, words):
    ended = run(tmp_path / "run", data, *more, code=1)
    assert "Traceback" not in ended.errors
    assert all(word in ended.errors for word in words), ended.errors
