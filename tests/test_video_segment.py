"""Video segmentation: what a label token sees, whole videos in windows, and the Python call."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import make_mesh, random_params
from test_segment import as_model

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.decode.generation import UNKNOWN
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.planning.finetuning import Finetuning
from gptv_jax.tasks import map_passes, rows, video_maps
from gptv_jax.tasks.segment import Segment
from gptv_jax.train import optimizer, step

NAMES = ("ground", "cup", "tree", "never")  # as in test_segment.as_model
SIZE, CELL = (8, 16), 4
TOKENS = 8  # of a frame's map


def video(frames: int, seed: int = 0) -> dict:
    """Blocks that are bright where one of two classes lies; nothing but the map says which one.

    A tenth of the pixels have no class.
    """
    rng = np.random.default_rng(seed)
    lies = np.kron(rng.random((frames, 2, 4)) < 0.5, np.ones((CELL, CELL), bool))
    image = (150 * lies + rng.integers(60, size=lies.shape)).astype(np.uint8)[..., None]
    maps = (lies * rng.integers(1, 3)).astype(np.uint8)
    return {"image": image, "segmentation": np.where(rng.random(maps.shape) < 0.1, 255, maps)}


@functools.cache
def task_of(frames: int = 3, **settings) -> Segment:
    config = config_lib.Config()
    settings = {"labels": "cells", "cell": CELL, "corruption": 0.0, **settings}
    task = config_lib.Task("segment", "pixels", (8, 8), segment=config_lib.Segment(**settings))
    data = dataclasses.replace(config.data, image_size=SIZE, frames=frames)
    model = dataclasses.replace(config.model, layers=2, width=32, heads=2)
    tokens = dataclasses.replace(config.tokens, kind="none")
    config = dataclasses.replace(config, task=task, data=data, model=model, tokens=tokens)
    made = Segment(config, map_names=NAMES)
    maps = [video(frames, seed) for seed in range(20)]
    return dataclasses.replace(made, measured=made.measure(lambda count: maps))


def batch_of(task: Segment, given: list[dict], first: int = 0) -> dict:
    made = [task.example(record) | {"image": record["image"]} for record in given]
    return jax.tree.map(lambda *each: np.stack(each), *made) | {
        "view": np.tile(np.float32([0, 0, *SIZE]), (len(given), 1)),
        "index": np.arange(first, first + len(given), dtype=np.int32),
        "mask": np.ones(len(given), np.float32),
    }


@functools.cache
def trained() -> tuple[Segment, Network, dict]:
    task = task_of(2)
    network = task.network()
    settings = config_lib.Optimizer(
        name="muon", learning_rate=0.02, rest_learning_rate=0.01, warmup_steps=5
    )
    update, rate = optimizer.make_optimizer(settings, 150)
    advance = step.make_train_step(task.loss(network), update, rate)
    batches = [batch_of(task, [video(2, 16 * n + i) for i in range(16)]) for n in range(1, 40)]
    with jax.set_mesh(make_mesh((1, 1, 1))):
        state = jax.jit(lambda key: step.state_of(network.init(key), update))(jax.random.key(0))
        for number in range(150):
            state, _ = advance(state, sharding.global_batch(batches[number % len(batches)]))
    return task, network, state["params"]


def random_task() -> tuple[Segment, Network, dict]:
    task = task_of(3)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        return task, task.network(), random_params(task.network())


def placed(given: dict) -> dict:
    """The batch of one clip on the mesh."""
    return sharding.global_batch(batch_of(task_of(3), [given]))


@pytest.mark.usefixtures("one_device")
def test_a_label_token_sees_every_frame_and_the_label_tokens_before_it_alone():
    _, network, params = random_task()
    batch = placed(video(3))
    places = network.layout.slices[map_passes.NAME]
    assert places == slice(3 * TOKENS, 6 * TOKENS)

    @jax.jit
    def logits(tokens, pixels):
        changed = batch | {"targets": {map_passes.NAME: tokens}, "image": pixels}
        return map_passes.forward(network.bind(params), changed).logits[map_passes.NAME][0]

    tokens, pixels = np.array(batch["targets"][map_passes.NAME]), np.array(batch["image"])
    before = np.asarray(logits(*map(sharding.shard_rows, (tokens, pixels))))
    for at in (0, TOKENS - 1, TOKENS, 2 * TOKENS + 3):
        other = tokens.copy()
        other[0, at] = (tokens[0, at] + 1) % 3
        after = np.asarray(logits(*map(sharding.shard_rows, (other, pixels))))
        changed = (after != before).any(axis=1)
        np.testing.assert_array_equal(changed, np.arange(3 * TOKENS) > at)
    for frame in range(3):
        other = pixels.copy()
        other[0, frame, 5, 5] = 255
        after = np.asarray(logits(*map(sharding.shard_rows, (tokens, other))))
        assert (after != before).any(axis=1).all()


@pytest.mark.usefixtures("one_device")
def test_maps_written_after_given_ones_are_those_of_the_whole_pass():
    task, network, params = random_task()
    batch = placed(video(3))
    true = np.asarray(batch["targets"][map_passes.NAME])
    given = task, network, params, None, batch["image"], jax.random.key(1), batch["index"]
    for count in (1, 2):
        known = np.where(np.arange(3 * TOKENS) < count * TOKENS, true, UNKNOWN)
        found = []
        for read in (0, count * TOKENS):  # token by token, or at once with the image
            drawn, likely = map_passes.written(*given, 1.0, 1, sharding.shard_rows(known), read)
            found.append((np.asarray(drawn), np.asarray(likely)))
        np.testing.assert_array_equal(found[0][0], found[1][0])
        np.testing.assert_array_equal(drawn[:, : count * TOKENS], true[:, : count * TOKENS])
        whole = batch | {"targets": {map_passes.NAME: drawn}}
        logits = map_passes.forward(network.bind(params), whole).logits[map_passes.NAME]
        wanted = np.take_along_axis(jax.nn.softmax(logits), np.asarray(drawn)[..., None], axis=2)
        for _, likely in found:
            after = slice(count * TOKENS, None)
            np.testing.assert_allclose(likely[:, after], wanted[:, after, 0], rtol=2e-3)


@pytest.mark.usefixtures("one_device")
def test_pixels_without_a_class_change_nothing():
    task, network, params = random_task()
    loss = jax.jit(lambda batch: task.loss(network)(params, None, batch, None)[0])
    given, found = video(3), []
    for value in (255, 200):  # both are the number of no class
        maps = given["segmentation"].copy()
        maps[:, :, :CELL] = value
        maps[maps == 255] = value
        found.append(float(loss(placed(given | {"segmentation": maps}))))
    assert found[0] == found[1] != float(loss(placed(given)))


def test_a_class_that_only_the_first_map_tells_is_carried_through_the_video():
    task, network, params = trained()
    records = [video(n, 1000 + n) for n in (7, 4, 6, 5)]
    with jax.set_mesh(make_mesh((1, 1, 1))):
        videos = video_maps.Videos(task, network, params, None, [r["image"] for r in records])
        true = [task.facts.encode(record["segmentation"])[0] for record in records]
        first = np.stack([tokens[0] for tokens in true])
        found = {"carried": videos.carried(first), "given": videos.given(true)}
        found |= {"alone": videos.alone(), "own": videos.carried()}
        read = videos.read()
    right = {way: [np.mean(x == y) for x, y in zip(found[way], true, strict=True)] for way in found}
    assert min(right["carried"]) > 0.95
    assert min(np.mean(x[1:] == y[1:]) for x, y in zip(found["given"], true, strict=True)) > 0.95
    assert np.mean(right["alone"]) < 0.9  # half of the bright blocks are guessed
    for rows_of, before, tokens in zip(found["own"], found["alone"], true, strict=True):
        assert len(np.unique(rows_of[rows_of > 0])) == 1  # one class in the whole video
        assert ((rows_of > 0) == (tokens > 0)).mean() > 0.95
        assert len(rows_of) == len(before)
    for maps, record in zip(read, records, strict=True):
        known = record["segmentation"] < 3
        assert ((maps > 0) == (record["segmentation"] > 0))[known].mean() > 0.9
    # Each video by itself gives the same, whatever lies beside it.
    with jax.set_mesh(make_mesh((1, 1, 1))):
        one = video_maps.Videos(task, network, params, None, [records[2]["image"]])
        np.testing.assert_array_equal(one.carried(first[2:3])[0], found["carried"][2])
        np.testing.assert_array_equal(one.alone()[0], found["alone"][2])


def test_each_window_is_what_the_definition_says():
    """Of 5 frames in windows of 3: frame 4 is written after frames 2 and 3 and their maps."""
    task, network, params = random_task()
    record = video(5)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        videos = video_maps.Videos(task, network, params, None, [record["image"]])
        [found] = videos.carried()
        for frame in range(5):
            start = max(frame - 2, 0)
            batch = sharding.global_batch({"image": record["image"][None, start : start + 3]})
            known = np.full((1, 3 * TOKENS), UNKNOWN, np.int32)
            known[0, : (frame - start) * TOKENS] = found[start:frame].ravel()
            given = task, network, params, None, batch["image"], jax.random.key(0), None
            drawn, _ = map_passes.written(*given, 0.0, 1, sharding.shard_rows(known))
            wanted = np.asarray(drawn).reshape(3, TOKENS)[frame - start]
            np.testing.assert_array_equal(found[frame], wanted)


def test_the_metric_of_clips_counts_all_frames():
    task, network, params = random_task()
    given = [video(3, seed) for seed in range(4)]
    metric = task.test_metric(network, given.__getitem__)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        total = metric.sums(params, iter([batch_of(task, given[:2]), batch_of(task, given[2:], 2)]))
    found = metric.result(total)
    maps = np.stack([task.maps.map_of(total, row, "read") for row in rows.plain(total).values()])
    true = np.stack([record["segmentation"] for record in given])
    assert maps.shape == true.shape == (4, 3, *SIZE)
    known = true != 255
    assert found["pixel_accuracy"] == pytest.approx((maps == true)[known].mean())
    assert task.bounds(total, given.__getitem__)["ceiling"]["pixel_accuracy"] > 0.99
    pictures = task.facts.prior  # of one frame
    assert pictures.shape == SIZE


def test_the_planner_knows_the_batches_of_clips():
    task = task_of(3)
    planned = Finetuning(task.config, given=task).batch(2)
    for name, array in batch_of(task, [video(3), video(3, 1)]).items():
        both = array, planned.get(name, array)
        real, plan = (jax.tree.map(lambda x: (x.shape[:-1], x.dtype), each) for each in both)
        assert real == plan, name  # channels apart


def test_model_segment_video(tmp_path):
    task, _, params = trained()
    as_model(task, params, frames=2).save(tmp_path / "clips.safetensors")
    model = gptv_jax.load(tmp_path / "clips.safetensors")
    record = video(5, 77)
    frames, first = record["image"], record["segmentation"][0]
    found = model.segment_video(frames, first)
    assert found.shape == (5, *SIZE) and found.dtype == np.int32
    np.testing.assert_array_equal(found[0], first)  # also where it has no class
    known = record["segmentation"] != 255
    assert (found == record["segmentation"])[known].mean() > 0.95
    large = model.segment_video([np.kron(x, np.ones((2, 3, 1), np.uint8)) for x in frames])
    assert large.shape == (5, 16, 48)
    read = model.segment_video(frames, by="read")
    assert ((read > 0) == (record["segmentation"] > 0))[known].mean() > 0.9
    assert model.segment_video(frames[:1], carry=False).shape == (1, *SIZE)
    for given, words in (
        ((frames[:0],), "no frame"),
        ((frames, first[:4]), r"\[4, 16\]; its image is \[8, 16\]"),
        (([frames[0], frames[1, :4]],), "one size"),
        ((frames, first / 2), "takes whole numbers"),
        ((frames, np.full_like(first, 255)), "first_map has no class"),
    ):
        with pytest.raises(InputError, match=words):
            model.segment_video(*given)
    for options in ({"by": "read"}, {"carry": False}):
        with pytest.raises(InputError, match="first_map is for maps that are carried"):
            model.segment_video(frames, first, **options)
    with pytest.raises(InputError, match="clips of 2 frames, and segment takes images"):
        model.segment(frames)
