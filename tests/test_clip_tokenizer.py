"""Learned tokens that stand for several frames of a clip, causal in time."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import generator, make_mesh, random_image, random_params, tiny_network
from test_autoencoding import Training
from test_learned import random_tokenizer

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding, tokens, validation
from gptv_jax.config import Data, rules
from gptv_jax.data import sources
from gptv_jax.decode.sampler import by_pixel
from gptv_jax.errors import InputError
from gptv_jax.model import autoencoder, flops
from gptv_jax.tokens import label_maps, learned
from gptv_jax.weights.native import WeightsFile

IMAGES = config_lib.Autoencoder(
    channels=1, widths=(8,), encoder_blocks=1, decoder_blocks=1, levels=(5, 5), norm=True
)
CLIPS = dataclasses.replace(IMAGES, frames=2)
SPACED = dataclasses.replace(CLIPS, frames=3, downsample=8, widths=(4, 8), attention=True)
VECTORS = dataclasses.replace(CLIPS, quantizer="vq", codes=12, code_size=3)
ALL = {"halved": CLIPS, "attention": SPACED, "vectors": VECTORS}
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def bound(config: config_lib.Autoencoder) -> autoencoder.Autoencoder:
    """A network of random weights, none of them 0."""
    made = random_tokenizer(config)
    _, params = learned.place(config, made.params, jax.devices()[:1])
    return autoencoder.bind(config, params)


def random_clips(frames: int, count: int = 2) -> np.ndarray:
    shape = (count, frames, 16, 16, 1)
    return generator().uniform(-1, 1, shape).astype(np.float32)


def steps_of(config: config_lib.Autoencoder, steps: int) -> np.ndarray:
    """The step that each frame of a clip of so many steps belongs to."""
    return np.repeat(np.arange(steps), [1, *[config.frames] * (steps - 1)])


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_no_code_and_no_restored_frame_depends_on_what_comes_later(config):
    model, step = bound(config), steps_of(config, 4)
    encode, decode = jax.jit(model.encoder), jax.jit(model.decoder)
    clips = random_clips(len(step), count=1)
    z = np.asarray(encode(clips))
    assert z.shape[1] == 4
    for frame in range(len(step)):
        other = clips.copy()
        other[:, frame] *= -1
        change = abs(np.asarray(encode(other)) - z).max(axis=(0, 2, 3, 4))
        assert (change[: step[frame]] == 0).all() and change[step[frame]] > 1e-3
    values = generator().uniform(-1, 1, z.shape).astype(np.float32)
    restored = np.asarray(decode(values))
    assert restored.shape == clips.shape
    for k in range(4):
        other = values.copy()
        other[:, k] *= -1
        change = abs(np.asarray(decode(other)) - restored).max(axis=(0, 2, 3, 4))
        assert (change[step < k] == 0).all() and (change[step == k] > 1e-3).all()
        # Later frames are restored with the help of earlier codes.
        assert k == 3 or (change[step == k + 1] > 1e-4).all()


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_an_image_is_a_clip_of_its_first_frame_alone(config):
    model, clips = bound(config), jnp.asarray(random_clips(1 + 2 * config.frames))
    found, alone = (jax.jit(model.encode)(each) for each in (clips, clips[:, 0]))
    np.testing.assert_array_equal(found.codes[:, 0], alone.codes)
    assert alone.codes.ndim == 3 and found.codes.shape[1] == 3
    both = [jax.jit(model.decode)(each.codes) for each in (found, alone)]
    np.testing.assert_allclose(both[0][:, 0], both[1], atol=1e-5)
    assert both[0].shape == clips.shape


@pytest.mark.usefixtures("one_device")
def test_weights_of_images_begin_a_tokenizer_of_clips():
    images, clips = random_tokenizer(IMAGES), jnp.asarray(random_clips(7))
    init = jax.jit(functools.partial(autoencoder.init, CLIPS))
    fresh = sharding.by_name(jax.device_get(init(jax.random.key(0))))
    assert not images.params.keys() - fresh.keys()
    _, params = learned.place(CLIPS, fresh | images.params, jax.devices()[:1])
    model, frame_by_frame = autoencoder.bind(CLIPS, params), bound(IMAGES)
    codes = jax.jit(model.encode)(clips).codes
    # Each step begins as its last frame, of which all of its frames are restored.
    expected = jax.jit(frame_by_frame.encode)(clips[:, ::2]).codes
    np.testing.assert_array_equal(codes, expected)
    restored = np.asarray(jax.jit(frame_by_frame.decode)(codes))[:, steps_of(CLIPS, 4)]
    np.testing.assert_allclose(jax.jit(model.decode)(codes), restored, atol=1e-5)


def moving_digits(count: int, frames: int, split: str = "train") -> np.ndarray:
    source = sources.open_source(Data(name="moving_digits", frames=frames, image_size=16), split)
    return np.stack([source[i]["image"] for i in range(count)])


@pytest.mark.parametrize("config", [CLIPS, IMAGES, VECTORS], ids=["clips", "by frame", "vectors"])
def test_training_on_clips_lowers_the_loss_on_every_mesh(config):
    optimizer = config_lib.Optimizer("adamw", learning_rate=1e-2)
    train = config_lib.Train(steps=40, batch_size=8, optimizer=optimizer)
    settings = config_lib.Tokenizer(
        train=train, ssim=0.1, adversarial=0.01, discriminator_width=4, adversarial_from=0.0
    )
    rows, losses = moving_digits(64, 5), []
    for shape, steps in (((1, 1, 1), 40), ((2, 2, 1), 3)):
        with jax.set_mesh(make_mesh(shape)):
            training = Training(config, settings)
            for number in range(steps):
                batch = sharding.global_batch({"image": np.roll(rows, 8 * number, axis=0)[:8]})
                training.state, metrics = training.step(training.state, batch, None)
                losses.append(float(metrics["l2"]))
    assert np.mean(losses[36:40]) < 0.5 * losses[0]
    np.testing.assert_allclose(losses[40:], losses[:3], rtol=1e-3)


def make_codec(config: config_lib.Autoencoder, tokenizer, frames: int = 0) -> tokens.Codec:
    return tokens.make_codec(
        config_lib.Tokens("learned", autoencoder=config), 16, tokenizer, frames
    )


def test_the_codec_of_clips_knows_which_frames_a_token_stands_for():
    tokenizer = random_tokenizer(CLIPS)
    codec, images = (make_codec(CLIPS, tokenizer, frames) for frames in (5, 0))
    clips = random_image(19, 5, 16, 16, 1)
    found = codec.encode(clips)
    assert codec.grid == (3, 4, 4) and codec.image_shape == (5, 16, 16, 1)
    assert [each.tolist() for each in codec.sides] == [[1, 2, 2], [4] * 4, [4] * 4]
    np.testing.assert_array_equal(found[:, :16], images.encode(clips[:, 0]))
    restored = codec.decode(found)
    assert restored.shape == clips.shape and restored.dtype == np.uint8
    longer = codec.decode(np.tile(found, 2), (6, 4, 4))
    np.testing.assert_array_equal(longer[:, :5], restored)
    assert longer.shape == (19, 11, 16, 16, 1)
    for size in (1, 7):  # the other clips of a batch change nothing
        parts = [codec.encode(clips[i : i + size]) for i in range(0, 19, size)]
        np.testing.assert_array_equal(np.concatenate(parts), found)
    # Nats are spread over the pixels of a token, and pixels make a token known, frame by frame.
    nats = generator().uniform(size=(2, 48)).astype(np.float32)
    spread = by_pixel(nats, codec)
    assert spread.shape == (2, 5, 16, 16) and spread.dtype == np.float32
    np.testing.assert_allclose(spread[:, 0].sum(axis=(1, 2)), nats[:, :16].sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(spread.sum(axis=(1, 2, 3)), nats.sum(axis=1), rtol=1e-5)
    known = np.ones((5, 16, 16), bool)
    known[3, :4, :8] = False
    mask = validation.mask(known, 1, codec).reshape(3, 4, 4)
    assert (~mask).nonzero() == pytest.approx(np.array([[2, 2], [0, 0], [0, 1]]))


def test_a_tokenizer_of_clips_is_loaded_for_images_and_for_clips(tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    made_by = {"image_size": 16, "frames": 5}
    dataclasses.replace(random_tokenizer(CLIPS), provenance=made_by).save(path)
    assert gptv_jax.load_tokenizer(path).grid == (3, 4, 4)
    assert gptv_jax.load_tokenizer(path, (8, 16), frames=9).image_shape == (9, 8, 16, 1)
    assert gptv_jax.load_tokenizer(path, frames=0).grid == (4, 4)
    with pytest.raises(InputError, match="frames is 4; this tokenizer takes 0, or 1 more than a"):
        gptv_jax.load_tokenizer(path, frames=4)
    # Tokenizers of images, and files from before there were others, count as images.
    dataclasses.replace(random_tokenizer(IMAGES), provenance=made_by).save(path)
    assert gptv_jax.load_tokenizer(path).grid == (4, 4)
    older = random_tokenizer(IMAGES).description()
    del older["autoencoder"]["frames"]
    params = random_tokenizer(IMAGES).params
    assert learned.from_description(older, params, "a file").config == IMAGES
    maps = {"classes": 1, "shape": (16, 16), "autoencoder": older["autoencoder"]}
    assert label_maps.Learned.restore(params, **maps).config == IMAGES


@pytest.fixture(scope="module")
def model() -> gptv_jax.Model:
    """A model of clips of 5 frames, 3 steps of 2 x 2 tokens, of random weights."""
    coder = dataclasses.replace(CLIPS, downsample=8)
    network = dataclasses.replace(tiny_network().config, axial_positions=True)
    settings = config_lib.Tokens("learned", autoencoder=coder)
    tokenizer = random_tokenizer(coder)
    described = WeightsFile(network, settings, 16, {}, frames=5, definition=tokenizer)
    mesh = make_mesh((1, 1, 1))
    with jax.set_mesh(mesh):
        return gptv_jax.Model(described, random_params(described.network), mesh)


def test_a_clip_goes_on_by_whole_steps(model):
    frames = random_image(2, 7, 16, 16, 1)
    found = model.continue_clip(frames[:, :3], 2, temperature=0.0)
    assert found.shape == (2, 2, 16, 16, 1)
    filled = frames[:, [0, 1, 2, 2, 2]]
    whole = model.complete(filled, 2 / 3, temperature=0.0)
    np.testing.assert_array_equal(found, whole[:, 3:])
    one = model.continue_clip(frames[:, :1], 3, temperature=0.0)
    assert one.shape == (2, 3, 16, 16, 1)
    for count in (0, 2, 4):
        with pytest.raises(InputError, match="frames"):
            model.continue_clip(frames[:, :count], 2)
    with pytest.raises(InputError, match="the first frame for 1; give 1 more than a multiple of 2"):
        model.continue_clip(frames[:, :2], 2)


def test_a_window_that_moves_on_begins_with_the_tokens_of_a_first_frame(model):
    frames, codec = random_image(2, 7, 16, 16, 1), model.codec
    long = model.continue_clip(frames[:, :5], 5, temperature=0.0)
    assert long.shape == (2, 5, 16, 16, 1)
    short = model.continue_clip(frames[:, :5], 2, temperature=0.0)
    np.testing.assert_array_equal(short, long[:, :2])
    # Of more frames than fit, the last ones count.
    later = model.continue_clip(frames, 2, temperature=0.0)
    np.testing.assert_array_equal(model.continue_clip(frames[:, 2:], 2, temperature=0.0), later)
    # The window after five frames: the third restored frame alone, then the tokens of the last two.
    known = codec.encode(frames[:, :5]).reshape(2, 3, 4)
    shown = codec.decode(known.reshape(2, -1))
    window = codec.encode(np.repeat(shown[:, 2:3], 5, axis=1)).reshape(2, 3, 4)
    window[:, 1:] = known[:, 2:]
    for position in range(8, 12):
        rows = window.reshape(2, -1)
        rows[:, position] = model.logits(rows)[:, position].argmax(axis=-1)
    made = np.concatenate([known, window[:, 2:]], axis=1).reshape(2, -1)
    np.testing.assert_array_equal(codec.decode(made, (4, 2, 2))[:, 5:], long[:, :2])


def config_of(**changes) -> config_lib.Config:
    fields = {"frames": 5, "image_size": 16, **changes}
    coder = dataclasses.replace(CLIPS, **fields.pop("autoencoder", {}))
    kind = config_lib.Tokens("learned", autoencoder=coder)
    return config_lib.Config(data=Data(name="moving_digits", **fields), tokens=kind)


def test_settings_that_do_not_fit_are_told():
    assert config_of().grid == (3, 4, 4) and config_of(frames=0).grid == (4, 4)
    rules.check(config_of())
    rules.check(config_of(frames=0))
    for changes, words in (
        ({"frames": 6}, "config.data.frames is 6, .* 1 more than a multiple of 2, as 7"),
        ({"autoencoder": {"groups": 32}}, "autoencoder.frames is 2, .* a tokenizer of images"),
    ):
        with pytest.raises(InputError, match=words):
            rules.check(config_of(**changes))
    task = config_lib.Task(image_input="pixels", stem=(8, 8))
    pixels = dataclasses.replace(config_of(), task=task)
    with pytest.raises(InputError, match="the stem leaves positions for every frame"):
        rules.SECTIONS["finetune"](pixels)


def test_flops_of_a_clip_are_counted():
    one, clip = (flops.of_autoencoder(IMAGES, 16, frames).total for frames in (0, 5))
    assert clip == 5 * one
    steps = flops.of_autoencoder(CLIPS, 16, 5)
    assert steps["encoder"] > flops.of_autoencoder(IMAGES, 16, 5)["encoder"]


SMALL = {
    "data.name": "moving_digits",
    "data.image_size": 16,
    "data.frames": 5,
    "data.train_transforms": "()",
    "data.eval_transforms": "()",
    "tokens.kind": "learned",
    "tokens.autoencoder.channels": 1,
    "tokens.autoencoder.downsample": 8,
    "tokens.autoencoder.widths": "(8,)",
    "tokens.autoencoder.encoder_blocks": 1,
    "tokens.autoencoder.decoder_blocks": 1,
    "tokens.autoencoder.levels": "(5,5)",
    "tokenizer.train.steps": 8,
    "tokenizer.train.batch_size": 8,
    "tokenizer.train.checkpoint_every": 4,
    "tokenizer.train.optimizer.schedule": "constant",
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 1,
    "train.steps": 4,
    "train.batch_size": 8,
    "sample.count": 2,
    "sample.completions": 2,
    "sample.keep": 0.4,
    "sample.continuations": 3,
}


def mean_psnr(made: np.ndarray, true: np.ndarray) -> float:
    """The mean over all frames of each frame's PSNR in dB."""
    error = np.square(made.astype(float) - true).mean(axis=(2, 3, 4))
    return (10 * np.log10(255**2 / np.maximum(error, 0.25))).mean()


@pytest.mark.process
def test_the_command_trains_resumes_and_continues_clips(command, tmp_path):
    def run(folder: str, stages: str, **changes) -> str:
        fields = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
        settings = [f"--config.{name}={value}" for name, value in fields.items()]
        config = f"--config={CONFIGS / 'digits.py'}", f"--workdir={tmp_path / folder}"
        ended = command("main", *config, *settings, f"--stages={stages}")
        assert ended.code == 0, ended.errors[-3000:]
        return ended.errors

    clips = {"tokens__autoencoder__frames": 2}
    run("images", "tokenizer")
    images = learned.load(tmp_path / "images")
    assert images.config.frames == 1 and images.provenance["frames"] == 5
    begin = clips | {"tokenizer__init_from": tmp_path / "images"}
    run("clips", "tokenizer", **begin, tokenizer__train__steps=4)
    # Before the first step each step in time is the image of its last frame.
    lines = (tmp_path / "clips/metrics.jsonl").read_text().splitlines()
    first = next(line for line in map(json.loads, lines) if "validation_psnr_db" in line)
    frames = moving_digits(400, 5, "validation")
    codec = make_codec(images.config, images, 5)
    shown = codec.decode(codec.encode(frames))[:, [0, 2, 2, 4, 4]]
    assert first["step"] == 0 and first["validation_psnr_db"] == pytest.approx(
        mean_psnr(shown, frames), abs=1e-2
    )
    run("clips", "tokenizer,pretrain,sample", **begin)  # goes on from step 4
    run("unbroken", "tokenizer", **begin)
    found = learned.load(tmp_path / "clips")
    assert found.hash == learned.load(tmp_path / "unbroken").hash != images.hash
    summary = json.loads((tmp_path / "clips/summary.json").read_text())
    assert summary["tokenizer/tokens"] == 3 * 2 * 2
    test = moving_digits(400, 5, "test")
    codec = make_codec(found.config, found, 5)
    psnr = mean_psnr(codec.decode(codec.encode(test)), test)
    assert summary["tokenizer/test_psnr_db"] == pytest.approx(psnr, abs=1e-3)
    steps = [name for name in summary if "nats_per_token_of_frame" in name]
    scored = {int(name[-1]) for name in summary if name.startswith("sample/continued_exact")}
    assert len(steps) == 3 and scored == {2, 3, 4, 5} and summary["sample/continued_clips"] == 3
    model = gptv_jax.load(tmp_path / "clips")
    assert model.continue_clip(test[:2, :3], 4).shape == (2, 4, 16, 16, 1)
    assert model.surprise(test[:2]).shape == (2, 5, 16, 16)
    assert (tmp_path / "clips/samples/reconstructions.webp").exists()
    assert "Loss by step of 2 frames" in (tmp_path / "clips/report.html").read_text()
