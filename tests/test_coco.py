"""COCO data sets: layouts as people have them, real sets, and what a run says of a set."""

import dataclasses
import json
import re

import numpy as np
import pytest
from coco_sets import BOX, annotation, by_id, coco, opened, picture, settings, write
from conftest import make_folder

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.data.damage import DecodedSource
from gptv_jax.data.images import Decode
from gptv_jax.errors import InputError
from gptv_jax.stages import setup

TWO = {"train": coco(4), "validation": coco(2, first=5)}


def test_a_folder_of_the_images_leads_to_the_folder_of_the_json_file(tmp_path):
    write(tmp_path, {"annotations/instances_train.json": coco(3)}, {"train": range(1, 4)})
    with pytest.raises(InputError, match="train has no COCO JSON file") as error:
        sources.open_data_set(settings(tmp_path / "train"))
    assert f"take {tmp_path}, which has such a file" in str(error.value)


def test_a_folder_of_the_json_files_leads_to_the_folder_of_the_images(tmp_path):
    write(tmp_path, {"annotations/train.json": coco(3)}, {"pictures": range(1, 4)})
    inner = tmp_path / "annotations"
    for path, advice in (
        (inner, f"take config.data.path={tmp_path}, which has the images."),
        (inner / "train.json", "take config.data.images=../pictures."),
    ):
        with pytest.raises(InputError, match=re.escape(advice)):
            sources.open_data_set(settings(path))
    sources.open_data_set(settings(tmp_path))
    sources.open_data_set(settings(inner / "train.json", images="../pictures"))


def test_boxes_as_shares_of_the_image_are_told(tmp_path):
    shares = [annotation(i, i, bbox=[0.1, 0.2, 0.5, 0.4]) for i in (1, 2, 3)]
    data_set, _ = opened(tmp_path, coco() | {"annotations": [*shares, annotation(4, 4)]})
    (note,) = data_set.notes
    assert "bbox takes pixels: 3, the first annotation 1" in note


def test_categories_of_one_name_are_numbered_and_told(tmp_path):
    equal = [{"id": i, "name": name} for i, name in ((3, "cat"), (7, "cat"), (9, "cat (2)"))]
    data_set, source = opened(tmp_path, coco() | {"categories": equal}, maps="semantic")
    assert source.object_names == ("cat", "cat (2)", "cat (2) (2)")
    assert source.map_names == ("background", *source.object_names)
    assert any("classes of one name are numbered: cat (2)" in note for note in data_set.notes)


@pytest.mark.parametrize(
    ("names", "folders", "fields"),
    [
        (
            ("annotations/instances_train2017.json", "annotations/instances_val2017.json"),
            ("train2017", "val2017"),
            {},
        ),
        (("instances_train.json", "instances_val.json"), ("images", "images"), {}),
        (
            ("train/_annotations.coco.json", "valid/_annotations.coco.json"),
            ("train", "valid"),
            {},
        ),
        (("annotations/train.json", "annotations/val.json"), ("images/train", "images/val"), {}),
        (("a/training set.json", "a/dev.json"), (".", "."), {}),
        (
            ("labels/train.json", "labels/val.json"),
            ("deep/train/x", "deep/val/x"),
            {"annotations": "labels/{split}.json", "images": "deep/{split}/x"},
        ),
        (
            ("mine.json", "other.json"),
            ("one", "two"),
            {"annotations": "mine.json, other.json", "images": "one,two"},
        ),
        (("mine.json", "x/y.json"), ("p", "p"), {"annotations": "mine.json,x/y.json"}),
    ],
)
def test_the_usual_layouts_need_no_field_and_others_two(tmp_path, names, folders, fields):
    files = dict(zip(names, TWO.values(), strict=True))
    pictures = {f: [] for f in folders}
    for folder, numbers in zip(folders, (range(1, 5), range(5, 7)), strict=True):
        pictures[folder] += numbers
    write(tmp_path, files, pictures)
    make_folder(tmp_path, {"annotations/captions_train2017.json": b"{}", "thumbs/0001.png": b""})
    config = settings(tmp_path, **fields)
    data_set = sources.open_data_set(config)
    assert data_set.lengths == {"train": 4, "validation": 2} and data_set.notes == []
    own = names[1].rpartition("/")[2].removesuffix(".json").removeprefix("instances_")
    for split, ids in (("train", {1, 2, 3, 4}), ("validation", {5, 6}), (own, {5, 6})):
        source = sources.open_source(config, split)
        assert set(by_id(source)) == ids
        record = DecodedSource(source, Decode())[0]
        np.testing.assert_array_equal(record["image"], picture(*BOX))
        np.testing.assert_array_equal(record["boxes"], [[6, 4, 18, 14]])
    held = len(sources.open_source(config, "train[75%:]+validation"))
    assert held == 3


def test_a_json_file_is_the_split_train_or_that_of_its_name(tmp_path):
    write(tmp_path, {"labels.json": coco(4)}, {"data": range(1, 5)})
    for path in (tmp_path, tmp_path / "labels.json"):
        assert sources.open_data_set(settings(path)).lengths == {"train": 4}
    (tmp_path / "labels.json").rename(tmp_path / "test.json")
    assert sources.open_data_set(settings(tmp_path / "test.json")).lengths == {"test": 4}


@pytest.mark.parametrize(
    ("files", "fields", "words"),
    [
        ({"x.txt": "{}"}, {}, "has no COCO JSON file, .* by --config.data.name=folder"),
        ({"a.json": coco(), "b.json": coco()}, {}, "a.json, b.json of no split.*annotations=TRAIN"),
        ({"train1.json": coco(), "train2.json": coco()}, {}, "of the split train; name the files"),
        ({"a.json": coco()}, {"annotations": "b.json"}, "b.json, which does not exist"),
        ({"a.json": coco()}, {"annotations": "b{split}.json"}, "names no file"),
        ({"a.json": coco()}, {"images": "nowhere"}, "none lies in .*nowhere; .*config.data.images"),
        ({"a.json": coco()}, {"images": "p,q"}, "names 2 folders for 1 splits"),
        ({"a.json": coco(9)}, {"images": "images"}, r"5 of 9 images .* are not in .*max_damaged"),
        ({"a.json": '{"images": [], "anno'}, {}, "cannot be read as JSON .*copy"),
        ({"instances_train.json": ""}, {}, "cannot be read as JSON"),
        ({"instances_train.json": "[1, 2]"}, {}, "holds a list, such as results; a COCO file is"),
        ({"a.json": '{"images": [], "categories": []}'}, {}, "has no list of annotations; a COCO"),
        ({"instances_train.json": '{"a": 1}'}, {}, "no list of images and annotations and categor"),
        ({"a.json": coco() | {"images": [3]}}, {}, "has images that are no objects"),
        (
            {"a.json": coco() | {"images": [{"id": "1"}]}},
            {},
            "an image with id='1' and file_",
        ),
        ({"a.json": coco() | {"images": []}}, {}, "has no image"),
        ({"a.json": coco() | {"annotations": []}}, {}, "no box that could be used.*no annotations"),
        (
            {"a.json": coco() | {"annotations": [annotation(5, "1"), annotation(6, "2")]}},
            {},
            r"no box that .*of no image .*: 2, the first annotation 5 \(image_id='1'\)",
        ),
        ({"a.json": coco()}, {"annotations": "*{split}*"}, "is no pattern.*labels/{split}.json"),
        ({"a.json": coco() | {"categories": []}}, {}, "no box that could be used, of 0 categories"),
        ({"a.json": coco() | {"categories": [{"name": "x"}]}}, {}, "a category whose id, None"),
    ],
)
def test_files_that_cannot_be_used_end_in_a_sentence(tmp_path, files, fields, words):
    tmp_path = tmp_path / "sets" / "mine"  # a folder whose parent holds no other test's files
    write(tmp_path, files, {"images": range(1, 5)})
    with pytest.raises(InputError, match=words) as error:
        sources.open_data_set(settings(tmp_path, **fields))
    assert len(str(error.value)) <= 300 + 2 * len(str(tmp_path))


def test_a_set_without_test_images_says_which_splits_to_take(tmp_path):
    files = {
        "annotations/instances_train.json": coco(100),
        "annotations/instances_val.json": coco(5),
    }
    write(tmp_path, files, {"images": range(1, 101)})
    with pytest.raises(InputError, match="'test' cannot be read") as error:
        sources.open_splits(settings(tmp_path))
    given = {
        name.removeprefix("--config.data."): value.rstrip(".")
        for word in str(error.value).split()
        if word.startswith("--config.data.")
        for name, value in [word.split("=")]
    }
    found = sources.open_splits(settings(tmp_path, **given))
    assert {split: len(source) for split, source in found.items()} == {
        "train": 95,
        "validation": 5,
        "test": 5,
    }
    assert len(str(error.value)) <= 300


# The rest of a run.


def test_the_run_records_classes_and_boxes(tmp_path, caplog):
    caplog.set_level("INFO")
    crowd = (annotation(11, 1, iscrowd=1, category_id=90),)
    write(tmp_path, {"train.json": coco(20, annotations=crowd)}, {"images": range(1, 21)})
    shares = {"validation_split": "train[-2:-1]", "test_split": "train[-1:]"}
    resize = ("decode(channels=1)", "resize(4)")
    data = dataclasses.replace(
        settings(tmp_path), image_size=4, train_transforms=resize, eval_transforms=resize, **shares
    )
    tokens = dataclasses.replace(config_lib.Config().tokens, levels=256)
    config = dataclasses.replace(config_lib.Config(), data=data, tokens=tokens)
    context = setup.open_run(config, str(tmp_path / "run"), ["pretrain"])
    context.folder.release()
    assert context.task.object_names == ("bee", "cat", "ant") and context.classes == 0
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["objects"] == ["bee", "cat", "ant"] and record["classes"] == 0
    assert record["found"]["objects"]["train"] == {
        "boxes": 21,
        "crowd": 1,
        "empty": 0,
        "by_class": [0, 20, 1],
    }
    assert "boxes: train 21 (1 of crowds, 0 images without), validation 1" in caplog.text
    assert "classes of objects without a training box: bee" in caplog.text


def test_what_records_have_is_known_before_one_is_read(tmp_path):
    _, source = opened(tmp_path, coco())
    assert source.keys == {"boxes", "box_labels", "crowd"} <= set(source.annotations(0))
    scenes = sources.open_source(config_lib.Data(name="digit_scenes"), "test[:5]")
    assert scenes.object_names == tuple("0123456789") and scenes.classes == 0
    assert scenes.keys == set(scenes.annotations(0)) >= {"masks", "segmentation", "boxes"}
    assert sources.open_source(config_lib.Data(), "test").keys == {"label"}
    assert sources.open_source(config_lib.Data(labels=False), "test").keys == set()


# Real data.


@pytest.mark.parametrize(
    ("folder", "counts", "classes"),
    [
        ("bccd", {"train": 205, "validation": 87, "test": 72}, 3),
        ("coco2017_subset", {"train": 288, "validation": 158}, 80),
    ],
)
def test_real_sets_are_as_pycocotools_reads_them(shared_data, folder, counts, classes):
    from pycocotools.coco import COCO

    data_set = sources.open_data_set(settings(shared_data / folder))
    assert data_set.lengths == counts and len(data_set.object_names) == classes
    for split in counts:
        source = sources.open_source(settings(shared_data / folder), split)
        reference = COCO(str(data_set.open(split).file))
        assert {source.image_id(i) for i in range(len(source))} == set(reference.imgs)
        for index in range(len(source)):
            record, number = source.annotations(index), source.image_id(index)
            wanted = reference.loadAnns(reference.getAnnIds([number]))
            image = reference.imgs[number]
            boxes = np.array([each["bbox"] for each in wanted], float).reshape(-1, 4)
            corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
            corners = corners.clip(0, [image["width"], image["height"]] * 2)
            np.testing.assert_allclose(record["boxes"][:, [1, 0, 3, 2]], corners, rtol=1e-6)
            ids = [data_set.object_ids[label] for label in record["box_labels"]]
            assert ids == [each["category_id"] for each in wanted]
            assert record["crowd"].tolist() == [bool(each["iscrowd"]) for each in wanted]
            np.testing.assert_allclose(record["area"], [each["area"] for each in wanted], rtol=1e-6)
        assert DecodedSource(source, Decode())[0]["image"].dtype == np.uint8
