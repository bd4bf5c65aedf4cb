"""Features and classes of clips: attention by frames, several clips of a video, single images."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    encoded,
    generator,
    make_folder,
    make_mesh,
    random_batch,
    random_params,
    tiny_network,
)

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.config import Data, rules
from gptv_jax.data import pipeline, sources
from gptv_jax.data.clips import Clips, places
from gptv_jax.errors import InputError
from gptv_jax.model.layout import Part, by_frames
from gptv_jax.tokens import GreyCodec
from gptv_jax.train import step

GRID = (3, 2, 2)  # frames, rows, columns
NETWORK = tiny_network(classes=3, grid=GRID)
READING = dataclasses.replace(NETWORK, layout=by_frames(NETWORK.layout.parts[0]))


def test_a_frame_sees_itself_and_the_past(one_device):
    assert by_frames(Part("clip", 5, GRID)).visible == (5,) * 5 + (9,) * 4 + (12,) * 3
    assert by_frames(Part("image", 5, (2, 2))).visible == (4,) * 4
    params = random_params(READING)
    tokens = generator().integers(11, size=(1, 12), dtype=np.int32)
    final = jax.jit(lambda tokens: READING.bind(params)(tokens).final[0])
    for changed in range(11):  # the last token is only a target
        other = tokens.copy()
        other[0, changed] = (other[0, changed] + 1) % 11
        moved = np.abs(np.asarray(final(tokens)) - final(other)).max(axis=-1) > 0
        # Frame f is held by positions 4 f + 1 .. 4 f + 4; the start vector sees the first frame.
        holds = np.maximum(np.arange(-1, 11), 0) // 4
        np.testing.assert_array_equal(moved, holds >= changed // 4)


def test_a_network_that_sees_whole_frames_learns_the_class_alone(one_device):
    params, batch = random_params(READING), random_batch(READING)
    loss = jax.jit(jax.value_and_grad(step.make_loss(READING, 0.0), has_aux=True))
    (value, metrics), gradient = loss(params, None, sharding.global_batch(batch), None)
    assert metrics.keys() == {"class_nats", "accuracy"} and value == metrics["class_nats"]
    assert not np.asarray(gradient["head"]).any() and np.asarray(gradient["blocks"]["qkv"]).any()
    sums = step.make_eval_step(READING)(params, sharding.global_batch(batch))
    assert sums.keys() == {"images", "accuracy", "class_nats"}


@pytest.mark.parametrize("network", [NETWORK, READING], ids=["causal", "frames"])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_the_class_of_a_video_is_that_of_the_mean_probabilities_of_its_clips(network, mesh):
    def weights() -> dict:  # whose classes are clear, so that clips of a video disagree
        params = random_params(network)
        head = params["classifier"]["class_head"]
        return params | {"classifier": params["classifier"] | {"class_head": 30 * head}}

    batch = random_batch(network)
    batch["tokens"] = generator().integers(11, size=(8, 4, 12), dtype=np.int32)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        model = network.bind(weights())
        clips, start = jnp.asarray(batch["tokens"]), jnp.asarray(batch["variant"])
        outputs = [model(clips[:, k], start) for k in range(4)]
    logits = np.stack([np.asarray(each.class_logits, np.float64) for each in outputs])
    likely = (np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)).mean(axis=0)
    right = likely.argmax(axis=-1) == batch["label"]
    nats = -np.log(likely[np.arange(8), batch["label"]])
    wanted = {"images": 7, "accuracy": right @ batch["mask"], "class_nats": nats @ batch["mask"]}
    if network is NETWORK:
        rows = np.log(np.exp(np.stack([each.logits for each in outputs], 1)).sum(axis=-1))
        chosen = np.stack([each.logits for each in outputs], axis=1)
        chosen = np.take_along_axis(chosen, batch["tokens"][..., None], axis=-1)[..., 0]
        by_frame = (rows - chosen).reshape(8, 4, 3, 4).mean(axis=(1, 3))
        wanted["nats_per_token"] = by_frame.mean(axis=1) @ batch["mask"]
        wanted["by_frame"] = batch["mask"] @ by_frame
    with jax.set_mesh(make_mesh(mesh)):
        sums = step.make_eval_step(network)(weights(), sharding.global_batch(batch))
    assert sums.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-4, err_msg=name)


def test_clips_begin_at_even_distances():
    assert places(1) == [0.5] and places(4) == [0.125, 0.375, 0.625, 0.875]
    clips = Clips(frames=3, stride=2)  # of a span of 5 frames
    assert [clips.choose(13, place=place)[0] for place in places(4)] == [1, 3, 5, 7]
    assert clips.choose(13).tolist() == [4, 6, 8]
    assert clips.choose(2, place=0.9).tolist() == [0, 1, 1]


SIZE, LENGTH, FRAMES = 4, 9, 3
TOKENS = config_lib.Tokens(levels=2, patch=(2, 2))
MODEL = config_lib.Model(layers=1, width=16, heads=2, axial_positions=True)


@pytest.fixture
def videos(tmp_path):
    """Labelled videos of 9 frames of 4 x 4 pixels of two levels; and their data set."""
    rng, arrays = generator(), {}
    for split, count in (("train", 24), ("validation", 11), ("test", 21)):
        shape = count, LENGTH, SIZE, SIZE, 1
        arrays[f"{split}_images"] = rng.integers(2, size=shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    np.savez(tmp_path / "videos.npz", **arrays)
    path = str(tmp_path / "videos.npz")
    return arrays, Data(name="arrays", path=path, frames=FRAMES, image_size=SIZE)


def test_evaluation_reads_several_clips_of_every_video(videos):
    arrays, data = videos
    codec = GreyCodec(2, SIZE, TOKENS.patch, FRAMES)
    batches = [*pipeline.Pipeline(data, codec, 0).evaluation("test", 8, clips=2)]
    assert len(batches) == 3 and batches[0]["tokens"].shape == (8, 2, 12)
    found = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    assert found["mask"].sum() == 21 and found["mask"][:21].all()
    np.testing.assert_array_equal(found["index"], np.arange(24))
    np.testing.assert_array_equal(found["label"][:21], arrays["test_labels"])
    for clip, start in enumerate((1, 4)):  # at a quarter and three quarters of 6
        expected = codec.encode(arrays["test_images"][:, start : start + FRAMES])
        np.testing.assert_array_equal(found["tokens"][:21, clip], expected)


def test_a_video_with_a_damaged_clip_does_not_count(tmp_path):
    frame = encoded(np.zeros((SIZE, SIZE, 3), np.uint8))
    files = {f"{video}/{n}.png": frame for video in "abc" for n in range(LENGTH)}
    files["b/6.png"] = frame[:45]  # the last frame of the second clip
    entries = ("decode(channels=1)", "quantize(2)")
    data = Data(
        name="folder",
        path=str(make_folder(tmp_path, files)),
        train_split="train",
        frames=FRAMES,
        image_size=SIZE,
        labels=False,
        eval_transforms=entries,
        max_damaged=1.0,
    )
    read = pipeline.Pipeline(data, GreyCodec(2, SIZE, TOKENS.patch, FRAMES), 0)
    source = sources.open_source(data, "train")
    sound = [not source.name(index).endswith("b") for index in range(3)]
    for clips, counts in ((1, [True] * 3), (2, sound)):
        (batch,) = read.evaluation("train", 4, clips=clips)
        np.testing.assert_array_equal(batch["mask"], [*counts, False])
    assert read.damage_log.count == 1


def training(**changes) -> config_lib.Train:
    return config_lib.Train(steps=4, batch_size=8, eval_every=2, checkpoint_every=4, **changes)


def test_a_run_and_the_python_interface_average_clips(videos, tmp_path):
    arrays, data = videos
    tuned = config_lib.Finetune(
        train=training(optimizer=config_lib.Optimizer(learning_rate=0.1)),
        pooling="frames",
        attention="frames",
        generative_coefficient=0.0,
        clips=3,
        scratch=False,
    )
    whole = config_lib.Config(
        data=data, tokens=TOKENS, model=MODEL, train=training(), finetune=tuned
    )
    settings, stages = config_lib.fields.to_dict(whole), ["pretrain", "finetune"]
    gptv_jax.train(settings, tmp_path / "run", stages=stages)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "finetune/test_nats_per_token" not in summary and summary["finetune/test_images"] == 21
    model = gptv_jax.load(tmp_path / "run")
    clips, labels = arrays["test_images"], arrays["test_labels"]
    likely = model.classify(clips, clips=3)
    right = (likely.argmax(axis=1) == labels).mean()
    np.testing.assert_allclose(summary["finetune/test_accuracy"], right)
    each = [model.classify(clips[:, start : start + FRAMES]) for start in (1, 3, 5)]
    np.testing.assert_allclose(likely, np.mean(each, axis=0), rtol=1e-5)
    model.save(tmp_path / "saved.safetensors")
    again = gptv_jax.load(tmp_path / "saved.safetensors")
    np.testing.assert_allclose(again.classify(clips, clips=3), likely, rtol=1e-5)
    for method in (again.logits, again.log_likelihood):
        given = again.tokenize(each := clips[:, :FRAMES]) if method == again.logits else each
        with pytest.raises(InputError, match="predict no tokens"):
            method(given)
    assert model.sample(2).shape == (2, FRAMES, SIZE, SIZE, 1)  # by the pretrained weights


def still_config(tmp_path, **changes) -> Data:
    """Clips of moving digits, and two images: a dark and a bright one."""
    images = {f"{n}.png": encoded(np.full((20, 20, 3), n, np.uint8)) for n in (0, 255)}
    entries = ("decode(channels=1)", "resize(16)", "quantize(4)")
    given = {"stills": str(make_folder(tmp_path / "images", images)), "still_transforms": entries}
    given |= {"frames": 3, "image_size": 16, "still_share": 0.25, "train_transforms": entries[2:]}
    return Data(**{"name": "moving_digits", "eval_transforms": entries[2:], **given, **changes})


def test_a_share_of_the_clips_are_images(tmp_path, caplog):
    data, codec = still_config(tmp_path), GreyCodec(4, 16, (2, 2), 3)
    mixed, plain = (pipeline.Pipeline(each, codec, 0) for each in (data, still_config(tmp_path)))
    batches = mixed.train(64, stills=True)
    found = [next(batches) for _ in range(4)]
    still = np.concatenate([batch["still"] for batch in found])
    assert 0.15 < still.mean() < 0.35
    tokens = np.concatenate([batch["tokens"] for batch in found])
    assert {*np.unique(tokens[still]).tolist()} == {0, 255}  # of the dark and the bright image
    assert (tokens[still] == tokens[still][:, :1]).all()
    labels = np.concatenate([batch["label"] for batch in found])
    assert (labels[still] == 10).all() and (labels[~still] < 10).all()  # no class
    again = next(plain.train(64, 3, stills=True))
    for name, array in again.items():
        np.testing.assert_array_equal(array, found[3][name])
    assert "still" not in next(mixed.train(64))
    (tmp_path / "images/bad.png").write_bytes(b"no picture")
    sources.open_data_set.cache_clear()
    broken = pipeline.Pipeline(data, codec, 0)
    next(broken.train(64, stills=True))
    assert "bad.png is left out" in caplog.text and broken.damage_log.count == 1
    absent = dataclasses.replace(data, stills=str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"config\.data\.stills=.*absent does not exist"):
        next(pipeline.Pipeline(absent, codec, 0).train(64, stills=True))


def test_damaged_images_are_a_share_of_all_images_and_clips(videos, tmp_path):
    _, data = videos  # 56 videos in all
    image = encoded(np.zeros((SIZE, SIZE, 3), np.uint8))
    files = {f"{n}.png": image[:45] if n < 8 else image for n in range(250)}
    mixed = dataclasses.replace(
        data,
        stills=str(make_folder(tmp_path / "images", files)),
        still_share=1.0,
        still_transforms=("decode(channels=1)",),
    )
    read = pipeline.Pipeline(mixed, GreyCodec(2, SIZE, TOKENS.patch, FRAMES), 0)
    batches = read.train(64, stills=True)
    for _ in range(24):
        next(batches)
    assert read.damage_log.count == 8  # of 250, below config.data.max_damaged


def test_the_loss_of_an_image_among_clips_is_that_of_the_first_frame(one_device):
    clips, images = tiny_network(grid=GRID), tiny_network(grid=GRID[1:])
    params, batch = random_params(clips), random_batch(clips)
    params["frame"] = params["frame"].at[0].set(0.0)  # as where images begin a network of clips
    of_images = {n: params[n] for n in sharding.abstract(images.init)}
    still = np.arange(8) % 4 == 0

    def nats(network, params, batch) -> float:
        loss = jax.jit(step.make_loss(network))
        return float(loss(params, None, sharding.global_batch(batch), None)[0])

    def rows(keep, **changes) -> dict:
        return {name: array[keep] for name, array in (batch | changes).items()}

    alone = nats(images, of_images, rows(still, tokens=batch["tokens"][:, :4]))
    np.testing.assert_allclose(nats(clips, params, rows(still, still=still)), alone, rtol=1e-5)
    both = nats(clips, params, batch | {"still": still})
    rest = nats(clips, params, rows(~still))
    np.testing.assert_allclose(both, 0.25 * alone + 0.75 * rest, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda p, b: step.make_loss(clips)(p, None, b, None)[0]))
    found = gradient(params, sharding.global_batch(rows(still, still=still)))["frame"]
    assert np.asarray(found)[0].any() and not np.asarray(found)[1:].any()


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("train", {"data.frames": 0}, "config.data.frames is 0, but config.data.still_share"),
        ("train", {"data.stills": None}, "name the folder of images"),
        ("train", {"data.still_share": 0.0}, "so no image is read"),
        ("train", {"model.objective": "bert"}, "take autoregressive"),
        ("probe", {"data.frames": 0, "probe.attention": "frames"}, "there are no frames"),
        ("finetune", {"finetune.attention": "frames"}, "so take 0"),
        ("finetune", {"task.name": "segment", "finetune.clips": 2}, "take 1"),
        ("finetune", {"finetune.clips": 2}, "has one clip of every video"),
        ("model", {"model.context_masking": 0.5, "data.frames": 1}, "2 or more frames"),
        ("model", {"data.frames": 10**9}, "as many frames at most"),
        ("finetune", {"task.name": "segment", "finetune.attention": "frames"}, "take causal"),
    ],
)
def test_what_does_not_go_together_is_named(tmp_path, section, changes, words):
    settings = config_lib.fields.to_dict(config_lib.Config(data=still_config(tmp_path)))
    settings.update_from_flattened_dict(changes)
    config = config_lib.fields.from_dict(config_lib.Config, settings, "config")
    with pytest.raises(InputError, match=words) as error:
        rules.SECTIONS.get(section, rules.check)(config)
    assert len(str(error.value)) <= 300
