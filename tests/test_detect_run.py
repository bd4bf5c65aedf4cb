"""Detection from beginning to end: runs, their files and pictures, caches."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from conftest import scenes_config
from PIL import Image

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import tasks, tokens
from gptv_jax.config import fields
from gptv_jax.data import cache, digit_scenes, pipeline, sources
from gptv_jax.data.damage import DamageLog
from gptv_jax.data.records import to_image, to_original
from gptv_jax.errors import InputError
from gptv_jax.runs import pictures
from gptv_jax.stages.run import run_stages
from gptv_jax.tasks import drawing
from gptv_jax.tasks.average_precision import PRECISIONS, RECALLS
from gptv_jax.tasks.boxes import Detections, intersection
from gptv_jax.tasks.detect import Detect

NAMES = ("cup", "dog", "tree")


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A configuration of detection on a token cache of scenes at half their size."""
    folder = tmp_path_factory.mktemp("cached") / "cache"
    folder.mkdir()
    data = config_lib.Data(
        name="digit_scenes",
        image_size=(20, 28),
        eval_transforms=("resize((20, 28))",),
        train_split="train[:16]",
        validation_split="validation[:4]",
        test_split="test[3:9]",
    )
    kinds = config_lib.Tokens(kind="grey", levels=256)
    codec, splits = tokens.make_codec(kinds, data.image_size), {}
    for split in ("train", "validation", "test"):
        found = pipeline.images(data, split, DamageLog(data, None), annotated=True)
        splits[split] = [row for chunk in pipeline.tokenized(codec, found) for row in chunk]
    for number, record in enumerate(splits["test"]):
        record["image_id"] = ["a/é.jpg", 7][number % 2]
    names = tuple("0123456789")
    header = {"source": {"name": "digit_scenes"}, "tokens": fields.flatten(kinds), "classes": 0}
    header |= {"image_size": [20, 28], "transforms": data.eval_transforms, "object_names": names}
    cache.write(folder, codec, splits, header)
    data = dataclasses.replace(data, name="tokens", path=str(folder), train_transforms=())
    data = dataclasses.replace(
        data, train_split="train", validation_split="validation", test_split="test"
    )
    train = config_lib.Train(steps=2, batch_size=8, eval_every=2, log_every=2)
    settings = config_lib.Detect(objects=2, bins=29, validation_images=3)
    return config_lib.Config(
        data=data,
        tokens=kinds,
        model=config_lib.Model(layers=1, width=16, heads=2),
        task=config_lib.Task(name="detect", detect=settings),
        train=train,
        finetune=config_lib.Finetune(train=train, train_transforms=(), scratch=False),
    )


@pytest.mark.process
def test_detection_is_learned_from_a_token_cache_and_shown_in_its_pictures(
    cached, tmp_path, monkeypatch, command
):
    read = []

    class Watched(Detect):
        """Keeps the validation images whose annotations are read."""

        test_metric = Detect.metric

        def metric(self, network, annotations):
            return super().metric(network, lambda i: read.append(i) or annotations(i))

    monkeypatch.setitem(tasks.TASKS, "detect", Watched)
    found = run_stages(cached, str(tmp_path / "run"), ["pretrain", "finetune"])
    assert set(read) == {0, 1, 2} and found["finetune/validation_images"] == 3  # of 4
    assert (tmp_path / "run/samples/detections.png").exists()
    twelve = {f"finetune/validation_{n}" for n in (*PRECISIONS, *RECALLS)}
    assert twelve | {f"finetune/test_ap_of_{n}" for n in "0123456789"} <= found.keys()
    assert found["finetune/test_ap_of_0"] is None or 0 <= found["finetune/test_ap_of_0"] <= 1
    rows = json.loads((tmp_path / "run/finetune/detections-test.json").read_text())
    assert {row["image_id"] for row in rows} == {"a/é.jpg", 7}
    page = (tmp_path / "run/report.html").read_text()
    # Classes and accuracies are of whole images, which have neither here.
    assert "calibration_error" in page and "classes: none" not in page
    assert "standard error" not in page and "so an accuracy has" not in page
    image = Image.fromarray(
        np.random.default_rng(0).integers(256, size=(40, 70, 3), dtype=np.uint8)
    )
    image.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    model = gptv_jax.load(tmp_path / "run")
    (known,) = model.detect([image])
    arguments = [str(tmp_path / name) for name in ("b.png", "a.png")]
    arguments.append(f"--threshold={known.scores.mean()}")
    ended = command("predict", f"--run={tmp_path / 'run'}", *arguments)
    assert ended.code == 0, ended.errors
    damaged, line = map(json.loads, ended.output.splitlines())
    assert damaged["error"] == "not an image that Pillow can read"
    assert [each["name"] for each in line["objects"]] == [model.objects[known.labels[0]]]
    np.testing.assert_allclose(
        [each["box"] for each in line["objects"]], known.boxes[:1], atol=0.01
    )
    scores = [each["score"] for each in line["objects"]]
    np.testing.assert_allclose(scores, known.scores[:1], rtol=1e-4)


def test_a_run_whose_test_images_turn_out_to_have_no_object_ends_well(tmp_path, monkeypatch):
    scene, plot, curves = digit_scenes.scene, pictures.plot, []

    def without(split, index, seed):
        record = scene(split, index, seed)
        keys = ("boxes", "box_labels", "crowd", "area", "masks") if split == "test" else ()
        return record | {name: record[name][:0] for name in keys}

    monkeypatch.setattr(digit_scenes, "scene", without)
    monkeypatch.setattr(digit_scenes.DigitScenes, "object_names", ("car/van", *"123456788"))
    watched = lambda *given, **more: curves.append(given[2]) or plot(*given, **more)  # noqa: E731
    monkeypatch.setattr(pictures, "plot", watched)
    settings = config_lib.Detect(objects=2, bins=29)
    config = scenes_config(config_lib.Task(name="detect", detect=settings), 16, 4, 4)
    found = run_stages(config, str(tmp_path), ["finetune"])
    assert found["finetune/test_ap"] is found["finetune/ceiling_test_ap"] is None
    assert found["finetune/validation_ap"] >= 0
    # Every class has a number, whatever the classes are called.
    names = ("car/van", *"12345678", "8 (2)")
    of_classes = {name for name in found if "_of_" in name}
    assert of_classes == {f"finetune/test_ap_of_{name}" for name in names}
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["found"]["notes"] == ["classes of one name are numbered: 8 (2)"]
    assert [curve[2] for curve in curves[-1]] == ["from random weights", "from scratch"]
    assert "unknown" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "samples/average_precision.png").exists()


def test_boxes_and_detections_of_a_cache_lie_in_one_frame(cached):
    source = sources.open_source(cached.data, "test")
    record, known = source[0], source.annotations(0)
    record["image"] = np.zeros((20, 28, 3), np.uint8)
    assert not np.allclose(record["boxes"], known["boxes"])
    found = Detections(
        known["boxes"], known["box_labels"], np.ones(len(known["boxes"]), np.float32)
    )
    shown = drawing.as_shown(found, record)
    np.testing.assert_allclose(shown.boxes, record["boxes"], atol=1e-3)
    view = record["view"][[0, 3, 2, 1]]
    there = to_original(record["boxes"], (20, 28), view)
    np.testing.assert_allclose(to_image(there, (20, 28), view), record["boxes"], atol=1e-3)


def test_votes_that_a_cache_cannot_give_are_refused(cached, monkeypatch):
    def check(vote):
        settings = dataclasses.replace(cached.task.detect, votes=(vote,))
        chosen = dataclasses.replace(cached.task, detect=settings)
        tasks.make(dataclasses.replace(cached, task=chosen)).check()

    check("flip(1.0)")
    with pytest.raises(InputError, match=r"votes has flip\(\), which is random"):
        check("flip()")
    learned = dataclasses.replace(cached.tokens, kind="learned")
    monkeypatch.setattr(sources.open_data_set(cached.data), "tokens", learned)
    with pytest.raises(InputError, match=r"votes has flip\(1\.0\), which needs pixels") as refused:
        check("flip(1.0)")
    assert len(str(refused.value)) <= 300


def test_a_missing_pycocotools_is_told_before_any_work(cached, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(InputError, match="pip install"):
        run_stages(cached, str(tmp_path / "run"), ["pretrain", "finetune"])
    assert not (tmp_path / "run/checkpoints").exists()


def test_boxes_are_drawn_where_the_objects_are_and_small_images_are_enlarged():
    box = np.array([[10, 20, 30, 50]], np.float32)
    image = np.zeros((40, 60, 1), np.uint8)
    record = {"image": image, "boxes": box, "box_labels": np.array([1])}
    nothing = Detections(box[:0], np.zeros(0, np.int32), np.zeros(0, np.float32))
    likely = Detections(box, np.array([1], np.int32), np.array([0.9], np.float32))
    empty = drawing.draw(image, box[:0], nothing.labels, [])
    assert empty.size == (300, 200) and np.asarray(empty).max() == 0
    drawn = np.asarray(drawing.draw(image, box, likely.labels, ["dog"])).any(axis=-1)
    assert drawn[100, 100] and drawn[149, 249] and not drawn[80:145, 110:240][25:].any()
    sheet = drawing.detections([(record, likely), (record, nothing)], NAMES)
    assert sheet.shape == (18 + 208, 4 * 308, 3)
    unlikely = Detections(box, likely.labels, np.array([0.1], np.float32))
    hidden = drawing.detections([(record, unlikely)], NAMES)
    assert hidden[18:218, 308:608].max() == 0


def test_labels_lie_at_their_boxes_and_cover_no_other_label_where_there_is_room():
    rng, canvas = np.random.default_rng(0), (240, 320)
    for count in (1, 4, 9):
        corners = rng.uniform((0, 0), (180, 240), (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(20, 60, (count, 2))], axis=1)
        for given in (boxes, np.repeat(boxes[:1], min(count, 4), axis=0)):  # also in one place
            places = drawing.label_places(given, [(16, 50)] * len(given), canvas)
            assert (places[:, :2] >= 0).all() and (places[:, 2:] <= canvas).all()
            assert (places[:, 2:] - places[:, :2] == (16, 50)).all()
            assert not (intersection(places, places) - np.eye(len(given)) * 16 * 50).any()
            near = np.add(given, [-1, -1, 1, 1])  # rounded to pixels
            assert (np.diag(intersection(near, places)) > 0).all()
    crowd = np.repeat(boxes[:1], 30, axis=0)  # without room every label is in the picture
    places = drawing.label_places(crowd, [(16, 50)] * 30, canvas)
    assert (places[:, :2] >= 0).all() and (places[:, 2:] <= canvas).all()
