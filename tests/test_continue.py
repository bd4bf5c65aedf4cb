"""The continuation of clips, by the network and by floors, for Python users and in runs."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from conftest import generator
from PIL import Image
from test_clips import clip_network, logits_of, parameters

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.config import Data
from gptv_jax.data import sources, transforms
from gptv_jax.decode.sampler import Sampler, Section
from gptv_jax.errors import InputError
from gptv_jax.quality import clips
from gptv_jax.quality.evaluate import evaluate
from gptv_jax.quality.features import FeatureExtractor, make_features, of_frames
from gptv_jax.quality.reference import compute
from gptv_jax.runs import pictures
from gptv_jax.validation import given_frames
from gptv_jax.weights import native
from gptv_jax.weights.native import WeightsFile

GREEDY = config_lib.Drawing(temperature=0.0)
SCORES = ("exact", "psnr_db", "ssim")


def write(path: pathlib.Path, file: WeightsFile) -> str:
    """Writes the file with random weights, and returns its path."""
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh())):
        params = sharding.by_name(parameters(file.network))
    arrays = {name: np.asarray(value) for name, value in params.items()}
    native.write(dataclasses.replace(file, params=arrays), path)
    return str(path)


def make_model(
    folder: pathlib.Path, classes: int = 0, patch=(2, 2), frames: int = 3, head: int = 0
):
    """A model of clips of `frames` frames of 4 x 8 pixels of two grey levels, of random weights.

    It takes one of `classes` classes, and a class head of `head` classes reads frame by frame.
    """
    tokens = config_lib.Tokens(kind="grey", levels=2, patch=patch)
    config = config_lib.Model(layers=2, width=32, heads=4, axial_positions=True)
    starts, names = 1, tuple("abcdef"[:classes])
    if classes:
        starts = classes + 1
        config = dataclasses.replace(config, class_tokens=classes, label_dropout=0.1)
    shape = {"frames": frames, "starts": starts, "class_names": names}
    shape |= {"classes": head, "pool": frames} if head else {}
    path = folder / "clips.safetensors"
    return gptv_jax.load(write(path, WeightsFile(config, tokens, (4, 8), {}, **shape)))


def make_frames(count: int, batch: int = 2) -> np.ndarray:
    return generator(4).integers(2, size=(batch, count, 4, 8, 1), dtype=np.uint8)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("given", [1, 2, 3, 5])
def test_a_greedy_continuation_is_what_whole_passes_over_the_window_choose(given):
    network = clip_network()
    params = parameters(network)
    tokens = generator().integers(11, size=(2, 8 * given), dtype=np.int32)
    drawn = Sampler(network, params, GREEDY).continue_clips(tokens, 4, Section.CONTINUED.key(0))
    assert drawn.shape == (2, 32)
    # A frame's window holds the two frames before it or, at the beginning, the clip's first frames.
    frames = np.concatenate([tokens, drawn], axis=1).reshape(2, -1, 8)
    starts = [max(at - 2, 0) for at in range(given, given + 4)]
    padded = np.pad(frames, ((0, 0), (0, 2), (0, 0)))
    windows = np.concatenate([padded[:, start : start + 3].reshape(2, 24) for start in starts])
    chosen = logits_of(network, params, windows).argmax(axis=-1).reshape(4, 2, 3, 8)
    for number, start in enumerate(starts):
        at = given + number
        np.testing.assert_array_equal(frames[:, at], chosen[number, :, at - start])


def test_a_clip_goes_on_from_its_last_frames_and_the_beginning_stays(tmp_path):
    model, frames = make_model(tmp_path), make_frames(5)
    long = model.continue_clip(frames, 6, seed=3)
    assert long.shape == (2, 6, 4, 8, 1) and long.dtype == np.uint8
    np.testing.assert_array_equal(model.continue_clip(frames, 2, seed=3), long[:, :2])
    np.testing.assert_array_equal(model.continue_clip(frames[:, 2:], 6, seed=3), long)
    assert (model.continue_clip(frames, 6, seed=4) != long).any()
    # Within the window it is what `complete` draws, where nothing is left to chance.
    whole = model.complete(np.concatenate([frames[:, :1]] * 3, axis=1), 1 / 3, temperature=0.0)
    found = model.continue_clip(frames[:, :1], 2, temperature=0.0)
    np.testing.assert_array_equal(found, whole[:, 1:])


def test_the_frames_of_tubes_are_given_together(tmp_path):
    model = make_model(tmp_path, patch=(2, 2, 2), frames=6)
    found = model.continue_clip(make_frames(2), 3, temperature=0.0)
    assert found.shape == (2, 3, 4, 8, 1)
    longer = model.continue_clip(make_frames(2), 8, temperature=0.0)
    np.testing.assert_array_equal(longer[:, :3], found)
    with pytest.raises(InputError, match="3 frames are given, but each token stands for 2 frames"):
        model.continue_clip(make_frames(3), 2)


def test_a_class_and_guidance_change_what_follows(tmp_path):
    model, frames = make_model(tmp_path, classes=3), make_frames(2)
    by = {c: model.continue_clip(frames, 3, labels=c, temperature=0.0) for c in (None, 0, "b")}
    assert (by[0] != by["b"]).any() and (by[0] != by[None]).any()
    mixed = model.continue_clip(frames, 3, labels=[0, 1], temperature=0.0)
    np.testing.assert_array_equal(mixed[:1], by[0][:1])
    np.testing.assert_array_equal(mixed[1:], by["b"][1:])
    guided = model.continue_clip(frames, 3, labels=0, temperature=0.0, guidance=4.0)
    assert (guided != by[0]).any()
    with pytest.raises(InputError, match="no class is given"):
        model.continue_clip(frames, 3, guidance=4.0)


def test_other_methods_take_and_give_clips(tmp_path):
    model, given = make_model(tmp_path), make_frames(3)
    assert "3 x 2 x 4 tokens of 16 grey levels; 3x4x8x1 clips" in repr(model)
    tokens = model.tokenize(given)
    np.testing.assert_array_equal(model.detokenize(tokens), given)
    assert model.sample(2).shape == given.shape
    surprise = model.surprise(given)
    assert surprise.shape == (2, 3, 4, 8)
    likelihood = model.log_likelihood(given)
    np.testing.assert_allclose(surprise.sum(axis=(1, 2, 3)), -likelihood, rtol=1e-5)
    assert model.features(given, 1).shape == (2, 32)
    head = make_model(tmp_path, classes=0, head=5)
    assert head.features(given, 1).shape == (2, 3 * 32)  # frames side by side
    np.testing.assert_allclose(head.classify(given).sum(axis=1), [1, 1], rtol=1e-5)
    # Half of the middle frame is unknown, said by pixels and by tokens.
    pixels, by_token = np.ones((3, 4, 8), bool), np.ones((3, 2, 4), bool)
    pixels[1, 1:, :3], by_token[1, :, :2] = False, False
    made = model.complete(given, mask=pixels)
    np.testing.assert_array_equal(model.complete(given, mask=by_token), made)
    known = by_token.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(made[:, known], given[:, known])
    assert (made != given).any()


def test_what_is_no_clip_is_told(tmp_path):
    model, given = make_model(tmp_path), make_frames(3)
    picture = Image.new("L", (8, 4))
    for call, words in (
        (lambda: model.tokenize(given[:, :2]), r"clips are uint8 \[2, 2, 4, 8, 1\]; give uint8"),
        (lambda: model.tokenize([picture]), "clips are Pillow images of L 8 x 4; give an array"),
        (lambda: model.outpaint(given, right=2), r"model.continue_clip\(frames, n\) draws"),
        (lambda: model.complete(given, mask=np.ones((4, 8), bool)), r"give bool \[3, 4, 8\]"),
        (lambda: given_frames([given[0], given[1, :1]], model.codec), "several lengths or sizes"),
        (lambda: model.continue_clip(given[..., :4, :], 2), r"frames are uint8 \[2, 3, 4, 4, 1\]"),
        (lambda: model.continue_clip(given[:, :0], 2), "of K frames, 1 or more"),
        (lambda: model.continue_clip(given, 0), "n is 0"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_a_model_of_images_or_of_single_frames_continues_no_clip(finished_run, tmp_path):
    model = gptv_jax.load(finished_run.folder)
    with pytest.raises(InputError, match="this model is of images"):
        model.continue_clip(np.zeros((1, 2, 8, 8, 1), np.uint8), 2)
    with pytest.raises(InputError, match="this one is of one frame"):
        make_model(tmp_path, frames=1).continue_clip(make_frames(1), 2)


@pytest.mark.parametrize("motion", [(0, 0), (1, -2), (-3, 0), (2, 3)])
def test_a_constant_motion_is_what_the_floor_of_constant_velocity_continues(motion):
    around = generator(1).integers(256, size=(3, 16, 20, 3), dtype=np.uint8)
    torus = np.stack([np.roll(around, np.multiply(motion, t), (1, 2)) for t in range(6)], axis=1)
    np.testing.assert_array_equal(clips.shifted(torus[:, :2], 4), torus[:, 2:])
    # A light on a dark canvas, which it does not leave; each clip has a motion of its own.
    canvas = np.zeros((2, 5, 32, 32, 1), np.uint8)
    for row, (down, right) in enumerate((motion, motion[::-1])):
        for t in range(5):
            y, x = 12 + t * down, 12 + t * right
            canvas[row, t, y : y + 2, x : x + 2, 0] = 200, 100
    np.testing.assert_array_equal(clips.shifted(canvas[:, :2], 3), canvas[:, 2:])


def test_a_single_frame_and_a_still_clip_are_copied():
    frames = generator(2).integers(256, size=(2, 1, 8, 8, 3), dtype=np.uint8)
    expected = np.repeat(frames, 3, axis=1)
    np.testing.assert_array_equal(clips.copied(frames, 3), expected)
    np.testing.assert_array_equal(clips.shifted(frames, 3), expected)
    # One of three colours in every pixel: all are equally bright, so every shift fits.
    colours = np.eye(3, dtype=np.uint8)[generator().integers(3, size=(1, 1, 8, 8))] * 90
    still = colours.repeat(4, axis=1)
    np.testing.assert_array_equal(clips.shifted(still[:, :2], 2), still[:, 2:])


def test_what_moves_in_over_an_edge_repeats_where_that_fits_better():
    ramp = np.arange(16, dtype=np.uint8) * 10
    rows = np.stack([np.concatenate([ramp[:1].repeat(t), ramp[: 16 - t]]) for t in range(4)])
    pan = np.broadcast_to(rows[None, :, None, :, None], (1, 4, 16, 16, 1))
    np.testing.assert_array_equal(clips.shifted(pan[:, :2], 2), pan[:, 2:])


def test_scores_of_frames():
    true = generator().integers(256, size=(2, 3, 12, 12, 3), dtype=np.uint8)
    perfect = clips.scores(true, true)
    assert perfect["exact"].tolist() == [[1] * 3] * 2
    np.testing.assert_allclose(perfect["ssim"], 1, atol=1e-4)
    np.testing.assert_allclose(perfect["psnr_db"], 10 * np.log10(255**2 / 0.25), rtol=1e-5)
    made = true.copy()
    made[1, 2, 0, 0, 0] ^= 128
    found = clips.scores(made, true)
    assert found["exact"].tolist() == [[1, 1, 1], [1, 1, 0]]
    squared = 128**2 / made[1, 2].size
    np.testing.assert_allclose(found["psnr_db"][1, 2], 10 * np.log10(255**2 / squared), rtol=1e-5)
    assert found["ssim"].argmin() == 5


def test_an_animation_has_the_frames_of_the_clips_and_loops(tmp_path):
    shown = generator().integers(256, size=(3, 4, 8, 8, 3), dtype=np.uint8)
    pictures.save_grid(shown, tmp_path / "clips.png", columns=3)
    with Image.open(tmp_path / "clips.png") as strip, Image.open(tmp_path / "clips.webp") as film:
        assert film.n_frames == 4 and film.info["loop"] == 0
        assert strip.width > 3 * film.width and strip.height == film.height
        for t in range(4):
            film.seek(t)
            found = np.asarray(film.convert("RGB"))
            width = found.shape[1] // 3  # of a clip of 8 x 8 pixels, enlarged to 64, and its border
            for i in range(3):
                frame = found[:64:8, i * width : i * width + 64 : 8]
                np.testing.assert_array_equal(frame, shown[i, t])
    pictures.save_grid(shown[:, 0], tmp_path / "images.png")
    assert not (tmp_path / "images.webp").exists()


def digit_clips(split: str, count: int, frames: int = 8) -> np.ndarray:
    """The first moving digits of a split, of four grey levels, [count, F, 16, 16, 1]."""
    config = Data(name="moving_digits", frames=frames, image_size=16)
    source, quantize = sources.open_source(config, split), transforms.parse("quantize(4)")
    return np.stack([quantize(source[i], None)["image"] for i in range(count)])


@pytest.mark.parametrize("features", ["pixels", "model of clips", "model of frames", "function"])
def test_clips_that_stand_still_or_jump_are_far_from_real_ones(features, tmp_path):
    if features == "pixels":
        extractor = make_features(None, (8, 16, 16, 1))
        assert extractor.name.startswith("pixels 4x4x1 of 16x16, of 8 frames, and changes of")
    elif features == "function":
        # The place of the ink in each frame: the published distance would take a network here.
        def centres(found):
            ink = found[..., 0].astype(np.float32)
            where = [(ink * axis).sum(axis=(2, 3)) for axis in np.indices((16, 16))]
            return np.concatenate(where, axis=1) / np.tile(ink.sum(axis=(2, 3)), 2)

        extractor = FeatureExtractor(centres, "centres", "1", 16)
    else:
        config = config_lib.Model(layers=1, width=16, heads=2)
        tokens = config_lib.Tokens(kind="grey", levels=4, patch=(2, 2))
        file = WeightsFile(config, tokens, 16, {}, frames=8 * (features == "model of clips"))
        path = write(tmp_path / "weights.safetensors", file)
        extractor = make_features(path, (8, 16, 16, 1))
        assert extractor.size == 8 * 16 + 7 * 16
    reference = compute(extractor, [digit_clips("train", 300)], {})
    fresh, rng = digit_clips("validation", 300), generator()
    order = np.stack([rng.permutation(8) for _ in fresh])
    sets = {
        "fresh": fresh,
        "frozen": fresh[:, :1].repeat(8, axis=1),
        "shuffled": np.take_along_axis(fresh, order[..., None, None, None], axis=1),
    }
    distance = {k: evaluate([v], reference, extractor)["frechet_distance"] for k, v in sets.items()}
    assert distance["frozen"] > 1.5 * distance["fresh"]
    assert distance["shuffled"] > 1.5 * distance["fresh"]


def test_many_features_of_frames_are_mapped_to_fewer_and_keep_distances():
    wide = FeatureExtractor(lambda x: x.reshape(len(x), -1), "raw", "1", 32 * 32)
    extractor = of_frames(wide, (16, 32, 32, 1))
    found = generator().integers(256, size=(6, 16, 32, 32, 1), dtype=np.uint8)
    values, _ = extractor(found)
    mapped = values[:, : 16 * 128]
    assert values.shape == (6, 16 * 128 + 15 * 16) and "mapped to 128" in extractor.name
    flat = found.reshape(6, -1).astype(np.float64)
    for i in range(1, 6):
        exact = np.linalg.norm(flat[i] - flat[0])
        assert abs(np.linalg.norm(mapped[i] - mapped[0]) / exact - 1) < 0.1


SMALL = {
    "data.frames": 4,
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 1,
    "train.steps": 20,
    "train.eval_every": 20,
    "train.checkpoint_every": 20,
    "sample.count": 3,
    "sample.completions": 2,
    "sample.keep": 0.5,
    "sample.continuations": 70,
    "generate.count": 20,
    "generate.batch_size": 10,
}


@pytest.mark.process
def test_a_run_scores_continuations_and_shows_clips(command, tmp_path):
    config = pathlib.Path(__file__).parent.parent / "configs" / "video_digits.py"
    fields = [f"--config.{name}={value}" for name, value in SMALL.items()]
    flags = f"--config={config}", f"--workdir={tmp_path}", *fields
    ended = command("main", *flags, "--stages=pretrain,sample,generate")
    assert ended.code == 0, ended.errors[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["sample/continued_clips"] == 70
    ways = [f"{way}_{score}" for way in ("continued", "copied", "shifted") for score in SCORES]
    frames = [f"sample/{way}_frame_{number}" for way in ways for number in (3, 4)]
    assert {name for name in summary if "_frame_" in name and "sample/" in name} == {*frames}

    # The numbers are those of the Python interface.
    model, test = gptv_jax.load(tmp_path), digit_clips("test", 70, frames=4)
    made = model.continue_clip(test[:, :2], 2, temperature=0.0)
    for way, found in (("continued", made), ("shifted", clips.shifted(test[:, :2], 2))):
        expected = clips.scores(*map(model.codec.picture, (found, test[:, 2:])))
        for score, values in expected.items():
            for number, value in enumerate(values.mean(axis=0), start=3):
                name = f"sample/{way}_{score}_frame_{number}"
                np.testing.assert_allclose(summary[name], value, rtol=1e-5)

    samples, page = tmp_path / "samples", (tmp_path / "report.html").read_text()
    assert page.count("data:image/webp") == 4
    assert "first 2 of 4 frames" in page and "Loss by frame" in page
    for score in ("share of frames exactly right", "PSNR, dB", "SSIM"):
        assert f"{score}: 70 test clips, continued greedily" in page
    for name in ("unconditional", "completions", "inpainted", "surprise"):
        with Image.open(samples / f"{name}.webp") as film:
            assert 1 < film.n_frames <= 4
    assert summary["generate/features"].startswith("pixels 4x4x1 of 16x16, of 4 frames")
    kept = np.load(tmp_path / "generated/samples.npz")["arr_0"]
    assert kept.shape == (20, 4, 16, 16, 3)
    assert len([*(tmp_path / "generated").glob("*.webp")]) == 20
