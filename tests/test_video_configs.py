"""The planned configurations of videos: they are planned, and in miniature they train and draw."""

import json

import jax
import numpy as np
import pytest
from conftest import encoded, generator, make_folder
from test_configs import load

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.data import pipeline, reading
from gptv_jax.errors import InputError
from gptv_jax.model import autoencoder
from gptv_jax.planning import plan, table, topology
from gptv_jax.planning.training import Pretraining
from gptv_jax.tokens import Tokenizer

FRAMES, SIDE = 16, 16


def moving_squares(count: int, seed: int) -> np.ndarray:
    """Clips of 18 frames of 32 x 40 pixels; a square moves to the right at its own speed."""
    clips = np.full((count, FRAMES + 2, 32, 40, 3), 40, np.uint8)
    for clip, speed in zip(clips, generator(seed).integers(1, 3, count), strict=True):
        for number, frame in enumerate(clip):
            frame[8:20, speed * number % 32 :][:, :8] = (200, 150, 60)
    return clips


def write_arrays(folder) -> dict:
    """The data set of `video_ucf101` in miniature, of two classes."""
    arrays = {}
    for split, count in (("train", 32), ("test", 8)):
        arrays[f"{split}_images"] = moving_squares(count, count)
        arrays[f"{split}_labels"] = np.arange(count) % 2
    np.savez(folder / "videos.npz", **arrays)
    return {"name": "arrays", "path": str(folder / "videos.npz")}


def write_frames(folder) -> dict:
    """The data set of `video_k600` in miniature: folders of frames, as `prepare` writes them."""
    files = {}
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        for number, clip in enumerate(moving_squares(count, count)):
            names = (f"{split}/{number}/{i:06d}.png" for i in range(len(clip)))
            files |= {n: encoded(f) for n, f in zip(names, clip, strict=True)}
    return {"path": str(make_folder(folder / "frames", files))}


def in_miniature(name: str, folder) -> config_lib.Config:
    """The configuration with a tiny network, two steps and random weights of the tokenizer."""
    c = load(name)
    c.data.update(
        {"ucf101": write_arrays, "k600": write_frames}[name.removeprefix("video_")](folder)
    )
    decode = ("decode()",) * (c.data.name == "folder")
    c.data.image_size, c.data.workers = SIDE, 0
    c.data.train_transforms = (*decode, f"resize_short({SIDE})", f"random_crop({SIDE})", "flip()")
    c.data.eval_transforms = (*decode, f"resize_short({SIDE})", f"center_crop({SIDE})")
    c.tokens.autoencoder.update(
        {"widths": (8, 8, 8), "levels": (4, 4), "encoder_blocks": 0, "decoder_blocks": 0}
    )
    c.model.layers, c.model.width, c.model.heads = 1, 32, 2
    c.model.class_tokens = min(c.model.class_tokens, 2)
    c.train.batch_size, c.train.steps, c.train.log_every = 8, 2, 1
    c.train.eval_every = c.train.checkpoint_every = 2
    c.sample.count, c.sample.completions, c.sample.continuations = 2, 0, 2
    c.generate.count, c.generate.batch_size = 10, 5
    coder = config_lib.resolve(c).tokens.autoencoder
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh())):
        weights = sharding.by_name(jax.jit(lambda k: autoencoder.init(coder, k))(jax.random.key(0)))
    path = folder / "tokenizer.safetensors"
    Tokenizer(coder, {n: np.asarray(w) for n, w in weights.items()}, {}).save(path)
    c.tokens.tokenizer = str(path)
    return config_lib.resolve(c)


def trained(name: str, folder, stage: str) -> tuple:
    """The configuration in miniature, its model and its summary after pretraining and `stage`."""
    config = in_miniature(name, folder)
    model = gptv_jax.train(config, folder / "run", ["pretrain", stage])
    assert model.network.grid == (FRAMES, SIDE // 8, SIDE // 8)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert 0 < summary["pretrain/test_nats_per_token"] < np.log(16) + 0.1
    return config, model, summary


def test_ucf101_in_miniature_trains_and_draws_its_classes(tmp_path):
    _, _, summary = trained("video_ucf101", tmp_path, "sample")
    assert summary["sample/count"] == 2
    assert (tmp_path / "run" / "samples" / "classes.webp").exists()
    # Five frames of a test clip are given.
    frames = [f"sample/continued_psnr_db_frame_{number}" for number in (5, 6, 16)]
    assert [each in summary for each in frames] == [False, True, True]


def test_k600_in_miniature_trains_and_continues_five_frames(tmp_path):
    config, model, _ = trained("video_k600", tmp_path, "generate")
    made = tmp_path / "run" / "generated"
    kept = np.load(made / "samples.npz")["arr_0"]
    assert kept.shape == (10, FRAMES, SIDE, SIDE, 3)
    assert len([*made.glob("*.webp")]) == 10
    reference = json.loads((made / "quality.json").read_text())["reference"]
    assert (reference["frames"], reference["frame_stride"]) == (FRAMES, 1)
    assert reference["split"] == "test"
    test = pipeline.open_examples(config.data, "test", config.data.eval_transforms)
    clips = np.stack([test.record(i)["image"] for i in range(8)])
    given = model.detokenize(model.tokenize(clips))[np.arange(10) % 8]  # there are 8 test clips
    np.testing.assert_array_equal(kept[:, :5], given[:, :5])
    assert (kept[:, 5:] != given[:, 5:]).any()


def test_the_largest_network_is_planned_for_a_slice():
    config = config_lib.resolve(load("video_ucf101", "l"))
    devices = topology.parse("v5e-64")

    def planned(**mesh: int) -> plan.Plan:
        training = Pretraining(config).with_train(1, mesh=config_lib.Mesh(**mesh))
        return plan.make(training, devices, compiling=False)

    found, split = planned(data=1, fsdp=-1), planned(data=1, fsdp=32, sequence=2)
    assert found.sizes["fsdp"] == 64 and found.fits
    assert found.flops_per_step == found.training.flops.total * 4096 * 64
    shown = table.show(found, None)
    assert "of a batch of 64 clips" in shown and "encoding pixels" in shown
    # Of clips that are split over two devices, here two clips, keys and values are gathered: once
    # forward, and once more backward; their gradients are scattered once.
    along = {each.kind: each.bytes for each in split.traffic if each.axes == ("sequence",)}
    of_layer = 2 * 2 * 4096 * 1536 * 2  # keys and values of two clips, in two bytes a number
    assert along["all-gather"] == 2 * 48 * of_layer
    assert along["reduce-scatter"] == 48 * of_layer
    # Keys and values of 48 layers in two bytes a number, beside float32 and bfloat16 weights.
    drawing, each = found.drawing, 2 * 2 * 48 * 4096 * 1536
    assert drawing["bytes_per_sequence"] == each and drawing["weights_bytes"] == 2 * found.params
    free = devices.memory_bytes - 2 * found.params - found.memory.parameters
    assert drawing["sequences"] == free // each * 64
    read = 4096 * (2 * found.params + free // each * each / 2)
    assert drawing["seconds"] == pytest.approx(read / devices.hardware.memory_bandwidth)
    # Encoding 16 frames of 64 clips costs little beside the step.
    frames = found.numbers()["flops_per_step_encoding"] / found.flops_per_step
    assert 0.001 < frames < 0.1
    with pytest.raises(
        InputError, match=r"tokens of a clip, from config\.data\.frames, .* is 4096"
    ):
        sharding.check(config, sharding.abstract_mesh((1, 1, 3, 1), "cpu", "cpu"), ["model"])


def test_large_clips_are_read_ahead_in_fewer_batches():
    images = config_lib.Data(image_size=224)
    clips = config_lib.Data(name="moving_digits", image_size=128, frames=16)
    assert reading.batches_ahead(images, 128) == 16
    assert [reading.batches_ahead(clips, rows) for rows in (16, 256, 4096)] == [16, 5, 2]
