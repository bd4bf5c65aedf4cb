"""The real command that writes many samples and says how good they are."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from conftest import encoded, make_folder, random_image, small_arguments
from PIL import Image

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import tokens
from gptv_jax.data import pipeline, sources
from gptv_jax.data.damage import DamageLog
from gptv_jax.decode import generation
from gptv_jax.quality import reference
from gptv_jax.quality.features import pixels
from gptv_jax.runs.context import Context
from gptv_jax.stages import generate as stage

pytestmark = pytest.mark.process


@pytest.fixture
def generate(command):
    """`generate(folder, *settings)` runs the stage; the summary that it prints."""

    def call(folder, *settings: str) -> dict:
        ended = command("main", *small_arguments(folder, *settings), "--stages=generate")
        assert ended.code == 0, ended.errors[-3000:]
        return json.loads(ended.output)

    return call


class SamplerOfLabels:
    """A sampler whose every drawn token is the label of its row."""

    def draw(self, given, key, labels, number):
        return np.where(given == generation.UNKNOWN, labels[:, None], given).astype(np.int32)


def context(**fields) -> Context:
    """A context that has nothing but these fields."""
    made = object.__new__(Context)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def test_every_image_is_of_its_class_whatever_the_folder_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "Sampler", lambda *_: SamplerOfLabels())
    model, kept = config_lib.Model(class_tokens=10), tmp_path / "tokens"
    for count, batch_size in ((18, 4), (14, 3), (22, 4), (3, 16)):
        config = config_lib.Config(model=model, generate=config_lib.Generate(count, batch_size))
        run = context(config=config)
        labels = stage.labels_in_turn(run)
        np.testing.assert_array_equal(labels, np.arange(count) % 10)
        drawn = np.concatenate(list(stage.draw(run, tmp_path, labels, {})))
        np.testing.assert_array_equal(drawn, np.repeat(labels[:, None], 64, axis=1))
        next(kept.iterdir()).write_bytes(b"damaged")


def test_given_beginnings_are_those_of_test_images_in_order_with_their_classes(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(stage, "Sampler", lambda *_: SamplerOfLabels())
    images, classes = random_image(5, 8, 8, 1), np.array([0, 0, 1, 1, 1])
    names = [f"{label}/{number}.png" for number, label in enumerate(classes)]
    contents = [encoded(image) for image in images]
    contents[3] = b"damaged"  # the next one takes its place
    test = {f"test/{name}": each for name, each in zip(names, contents, strict=True)}
    train = {f"train/{name}": contents[0] for name in names}
    decode = ("decode(channels=1)",)
    data = config_lib.Data(
        name="folder",
        path=str(make_folder(tmp_path / "images", test | train)),
        train_transforms=decode,
        eval_transforms=decode,
        max_damaged=0.5,
    )
    config = config_lib.Config(
        data=data,
        tokens=config_lib.Tokens(levels=256),
        model=config_lib.Model(class_tokens=2),
        generate=config_lib.Generate(14, 4, keep=0.25),
    )
    codec, log = tokens.codec_of(config), DamageLog(data, None)
    given = pipeline.Pipeline(data, None, 0, damage_log=log)
    run = context(config=config, images=given, codec=codec)
    drawn = np.concatenate(list(stage.draw(run, tmp_path, None, {})))
    source = sources.open_source(data, "test")
    order = [int(pathlib.Path(source.name(i)).stem) for i in range(5)]
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    rows = np.array([following[3] if each == 3 else each for each in order])[np.arange(14) % 5]
    wanted = np.repeat(classes[rows][:, None], 64, axis=1)
    wanted[:, :16] = codec.encode(images)[rows, :16]  # two of eight rows of pixels
    np.testing.assert_array_equal(drawn, wanted)
    assert len(log.names) == 1 and log.names[0].endswith("1/3.png")


def test_images_are_written_and_compared_and_a_later_call_draws_the_missing_batches(
    generate, finished_run, tmp_path
):
    folder, made = tmp_path / "run", tmp_path / "run" / "generated"
    shutil.copytree(finished_run.folder, folder)
    sizes = ["--config.generate.count=10", "--config.generate.batch_size=4"]
    found = generate(folder, *sizes)
    samples = np.load(made / "samples.npz")["arr_0"]
    assert samples.shape == (10, 8, 8, 3) and samples.dtype == np.uint8
    for i, wanted in enumerate(samples):
        np.testing.assert_array_equal(np.asarray(Image.open(made / f"{i:06d}.png")), wanted)
    assert len(np.unique(samples.reshape(10, -1), axis=0)) == 10
    quality = json.loads((made / "quality.json").read_text())
    assert found["generate/count"] == 10 and found["generate/frechet_distance"] > 0
    assert found["generate/reference_count"] == 1197 and found["generate/biased"]
    assert 0 <= found["generate/precision"] <= 1 and found["generate/inception_score"] is None
    assert quality["reference"]["data"] == "digits" and quality["reference"]["split"] == "train"
    assert reference.load(made / "reference.npz").fits(pixels((8, 8, 1)))
    # One batch is deleted and more images are asked for: all other batches stay as they are.
    first, lost = (made / "tokens" / f"0000{i}_of_4.npy" for i in (0, 1))
    kept, before = lost.read_bytes(), first.stat().st_mtime_ns
    lost.unlink()
    (made / "000099.png").write_bytes(b"of an earlier call with more images")
    # The features are now those of a network, which gives class probabilities.
    seen = f"--config.generate.features={finished_run.folder}"
    more = generate(folder, "--config.generate.count=14", *sizes[1:], seen)
    assert more["generate/count"] == 14 and lost.read_bytes() == kept
    # Numbers carry the name of their features, so that a distance of pixels is no FID.
    assert found["generate/features"] == quality["features"] == pixels((8, 8, 1)).name
    assert more["generate/features"] != found["generate/features"]
    assert first.stat().st_mtime_ns == before
    np.testing.assert_array_equal(np.load(made / "samples.npz")["arr_0"][:10], samples)
    assert more["generate/inception_score"] >= 1
    assert sorted(p.name for p in made.glob("*.png")) == [f"{i:06d}.png" for i in range(14)]
    width = gptv_jax.load(finished_run.folder).network.config.width
    assert len(reference.load(made / "reference.npz").mean) == width
