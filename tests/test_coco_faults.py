"""What COCO files say: categories, boxes, and every fault of a file, on small files."""

import contextlib
import dataclasses
import json
import pickle

import numpy as np
import pytest
from coco_sets import CATEGORIES, UNCHANGED, H, W, annotation, by_id, coco, opened, settings, write

from gptv_jax import config as config_lib
from gptv_jax import tasks
from gptv_jax.data import coco_files, inventory, sources
from gptv_jax.errors import InputError


def test_categories_are_numbered_in_the_order_of_their_ids_with_a_way_back(tmp_path):
    more = [annotation(1, 1, category_id=i) for i in (3, 7, 90)]
    data_set, source = opened(tmp_path, coco(0, images=coco(1)["images"], annotations=tuple(more)))
    assert data_set.object_names == source.object_names == ("bee", "cat", "ant")
    record = source.annotations(0)
    assert record["box_labels"].tolist() == [0, 1, 2]
    assert [source.object_ids[each] for each in record["box_labels"]] == [3, 7, 90]
    assert (source.classes, source.class_names) == (0, ())


def test_categories_that_differ_between_splits_are_named(tmp_path):
    other = coco(2) | {"categories": [*CATEGORIES[:2], {"id": 5, "name": "dog"}]}
    write(tmp_path, {"train.json": coco(), "val.json": other}, {"images": range(1, 5)})
    data_set = sources.open_data_set(settings(tmp_path))
    assert data_set.object_names == ("bee", "dog", "cat", "ant")
    first, second = data_set.notes
    assert "train.json has no category dog," in first and "val.json has no category ant," in second
    other["categories"][0] = {"id": 7, "name": "lion"}
    write(tmp_path, {"val.json": other}, {})
    sources.open_data_set.cache_clear()
    with pytest.raises(InputError, match=r"category 7 is cat and lion .*val.json"):
        sources.open_data_set(settings(tmp_path))


FAULTS = {
    "crowd": ({"iscrowd": 1}, None, [*UNCHANGED, UNCHANGED[0]]),
    "no area": (
        {"bbox": [1, 1, 0, 5]},
        "boxes have no area .*: 1, the first annotation 11",
        UNCHANGED,
    ),
    "negative": ({"bbox": [9, 9, -3, 5]}, "boxes have a negative .*: 1, .* 11", UNCHANGED),
    "not finite": (
        {"bbox": [1, float("nan"), 3, 4]},
        "annotations have no box of four finite numbers .*: 1, .* annotation 11",
        UNCHANGED,
    ),
    "infinite": ({"bbox": [1, 1, float("inf"), 4]}, "no box of four finite numbers", UNCHANGED),
    "three numbers": ({"bbox": [1, 2, 3]}, "no box of four finite numbers", UNCHANGED),
    "no box": ({"bbox": None}, "no box of four finite numbers", UNCHANGED),
    "text": ({"bbox": ["a", 1, 2, 3]}, "no box of four finite numbers", UNCHANGED),
    "outside": ({"bbox": [W, 3, 5, 5]}, "boxes lie outside .*: 1, .* annotation 11", UNCHANGED),
    "above": ({"bbox": [2, -9, 5, 5]}, "boxes lie outside .*: 1, .* annotation 11", UNCHANGED),
    "partly outside": (
        {"bbox": [-3, 20, 10, 2 * H]},
        "boxes reach out of their image and are clipped: 1, the first annotation 11",
        [*UNCHANGED, [20, 0, H, 7]],
    ),
    "rounded": ({"bbox": [-0.01, 20, 7.01, H - 19.99]}, None, [*UNCHANGED, [20, 0, H, 7]]),
    "unknown category": ({"category_id": 8}, "annotations of no category .*: 1, .* 11", UNCHANGED),
    "category as text": (
        {"category_id": "7"},
        "annotations of no category .*: 1, .* 11",
        UNCHANGED,
    ),
    "category as list": (
        {"category_id": [7]},
        "annotations of no category .*: 1, .* 11",
        UNCHANGED,
    ),
    "unknown image": ({"image_id": 77}, "annotations of no image .*: 1, .* 11", UNCHANGED),
    "repeated": ({"id": 10}, "annotations repeat one before, id and all.*: 1,", UNCHANGED),
    "id of another": (
        {"id": 10, "bbox": [0, 0, 5, 5]},
        None,
        [*UNCHANGED, [0, 0, 5, 5]],
    ),
    "no id": ({"id": None}, None, [*UNCHANGED, UNCHANGED[0]]),
    "no id, no area": ({"id": None, "bbox": [1, 1, 5, 0]}, "annotation None", UNCHANGED),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_annotations_are_kept_clipped_or_left_out_and_counted(tmp_path, fault):
    changes, note, boxes = FAULTS[fault]
    data_set, source = opened(tmp_path, coco(annotations=(annotation(11, 1, **changes),)))
    found = by_id(source)
    np.testing.assert_array_equal(found[1]["boxes"], boxes)
    assert found[1]["crowd"].tolist() == [False, fault == "crowd"][: len(boxes)]
    assert found[1]["boxes"].dtype == np.float32 and found[1]["box_labels"].dtype == np.int32
    for number in (2, 3, 4):
        np.testing.assert_array_equal(found[number]["boxes"], UNCHANGED)
    assert len(data_set.notes) == (note is not None)
    if note:
        with pytest.raises(AssertionError, match=note):
            raise AssertionError(data_set.notes[0])
        assert data_set.notes == inventory.describe(data_set, {"train": source})["notes"]


def test_an_area_is_the_annotations_own_or_that_of_the_clipped_box(tmp_path):
    more = (annotation(11, 1, area=None, bbox=[-5, 0, 10, 4]), annotation(12, 1, area=-1))
    _, source = opened(tmp_path, coco(annotations=more))
    np.testing.assert_allclose(by_id(source)[1]["area"], [99.5, 5 * 4, 10 * 12])


def test_images_without_boxes_are_kept(tmp_path):
    content = coco()
    content["annotations"] = content["annotations"][1:]
    data_set, source = opened(tmp_path, content)
    record = by_id(source)[1]
    shapes = {key: array.shape for key, array in record.items()}
    assert shapes == {"boxes": (0, 4), "box_labels": (0,), "crowd": (0,), "area": (0,)}
    counts = source.object_counts()
    assert counts == {"boxes": 3, "crowd": 0, "empty": 1, "by_class": [0, 3, 0]}
    assert data_set.notes == []


def test_counts_follow_the_split_expression(tmp_path):
    crowds = tuple(annotation(10 * i + 1, i, iscrowd=1, category_id=90) for i in range(1, 5))
    opened(tmp_path, coco(annotations=crowds))
    for expression, images in (("train[:3]", 3), ("train[1:2]+train[3:]", 2)):
        counts = sources.open_source(settings(tmp_path), expression).object_counts()
        wanted = {"boxes": 2 * images, "crowd": images, "empty": 0, "by_class": [0, images, images]}
        assert counts == wanted


def test_training_images_with_more_objects_than_a_sequence_holds_are_told(tmp_path, caplog):
    more = [annotation(501 + i, 1) for i in range(3)] + [annotation(510, 2)]
    more.append(annotation(511, 3, iscrowd=1))  # no object of a sequence
    write(tmp_path, {"train.json": coco(20, annotations=tuple(more))}, {"images": range(1, 21)})
    shares = {"train_split": "train", "validation_split": "train", "test_split": "train"}
    data = dataclasses.replace(settings(tmp_path), **shares)
    assert sorted(sources.open_source(data, "train").objects_by_image())[-3:] == [1, 2, 4]
    for objects, words in ((1, "2 of 20"), (3, "1 of 20"), (4, None)):
        caplog.clear()
        detect = config_lib.Detect(objects=objects)
        task = config_lib.Task(name="detect", detect=detect)
        tasks.make(config_lib.Config(data=data, task=task)).check()
        found = [record.getMessage() for record in caplog.records]
        assert len(found) == bool(words)
        assert all(f"{words} training images have more objects" in line for line in found)


def test_splits_without_an_object_are_refused_by_name_before_any_work(tmp_path):
    empty, mixed = coco(2, first=25), coco(4, first=21)
    empty["annotations"] = [annotation(9, 25, iscrowd=1)]  # a crowd is no object
    files = {"train.json": coco(20), "val.json": mixed, "test.json": empty}
    write(tmp_path, files, {"images": range(1, 27)})
    data = settings(tmp_path, train_split="train", validation_split="validation")
    first = sources.open_source(data, "validation").image_id(0)
    mixed["annotations"] = [each for each in mixed["annotations"] if each["image_id"] != first]
    write(tmp_path, {"val.json": mixed}, {})
    for split, validated, words in (
        ("validation", 0, None),
        (
            "validation",
            1,
            r"the first 1 images of config\.data\.validation_split=validation have no",
        ),
        ("test", 0, r"the images of config\.data\.test_split=test have no object"),
    ):
        sources.open_data_set.cache_clear()
        detect = config_lib.Detect(validation_images=validated)
        task = config_lib.Task(name="detect", detect=detect)
        config = config_lib.Config(data=dataclasses.replace(data, test_split=split), task=task)
        with pytest.raises(InputError, match=words) if words else contextlib.nullcontext():
            tasks.make(config).check()


def test_images_whose_ids_repeat_are_left_out_and_named(tmp_path):
    twice = {"id": 2, "file_name": "other.png", "height": H, "width": W}
    data_set, source = opened(tmp_path, coco(images=(twice,)))
    assert sorted(by_id(source)) == [1, 2, 3, 4]
    (note,) = data_set.notes
    assert "images whose id an image before has are left out: 1, the first 2 (other.png)" in note


def test_images_without_a_file_are_left_out_with_their_boxes(tmp_path):
    content = coco(40)
    data_set, source = opened(tmp_path, content, count=39)
    assert sorted(by_id(source)) == list(range(1, 40))
    (note,) = data_set.notes
    assert "images are not in" in note and note.endswith(": 1, the first 40 (0040.png)")
    np.testing.assert_array_equal(by_id(source)[39]["boxes"], UNCHANGED)
    for fields in ({"max_damaged": 0.02}, {"damaged": "fail"}):
        with pytest.raises(InputError, match=r"1 of 40 images .* such as 0040.png; .*max_damaged"):
            sources.open_data_set(settings(tmp_path, **fields))


def test_images_in_sub_folders_are_found_as_windows_writes_them(tmp_path):
    content = coco(2)
    for entry in content["images"]:
        entry["file_name"] = f"a\\b\\{entry['file_name']}"
    write(tmp_path, {"train.json": content}, {"pictures/a/b": range(1, 3)})
    source = sources.open_source(settings(tmp_path), "train")
    assert {source.name(i) for i in range(2)} == {
        str(tmp_path / f"pictures/a/b/{i:04d}.png") for i in (1, 2)
    }


def test_annotations_read_no_file_and_workers_get_arrays(tmp_path):
    _, source = opened(tmp_path, coco())
    before = by_id(source)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    again = pickle.loads(pickle.dumps(source))
    for number, record in by_id(again).items():
        np.testing.assert_array_equal(record["boxes"], before[number]["boxes"])
    before[1]["boxes"][:] = 0  # a transform may write into a record
    np.testing.assert_array_equal(by_id(source)[1]["boxes"], UNCHANGED)


VALID = [
    b"[]",
    b"[[]]",
    b"[1.5, -2,3e1]",
    b"[[1,2.0,0] ,\n[3,4e-5]]",
    b'["a", [null]]',
    b"{}",
    b"7",
]
INVALID = [
    b"[1,]",
    b"[[1,2]",
    b"[1]]",
    b"[1 2]",
    b"[[1][2]]",
    b"[01]",
    b"[.5]",
    b"[1.]",
    b"[--1]",
    b"][",
]


@pytest.mark.parametrize("key", [b"segmentation", b"counts", b"keypoints"])
def test_a_file_is_read_just_where_json_reads_it(tmp_path, key):
    """Though lists of numbers are cut out of the text before."""
    path = tmp_path / "a.json"
    for value in (*VALID, *INVALID):
        content = b'{"images": [], "categories": [], "annotations": [{"%b" : %b}]}' % (key, value)
        path.write_bytes(content)
        for outlines in (True, False):
            if value in VALID:
                coco_files.read(path, outlines)
                continue
            with pytest.raises(json.JSONDecodeError):
                json.loads(content)
            with pytest.raises(InputError, match="cannot be read as JSON"):
                coco_files.read(path, outlines)


@pytest.mark.parametrize(
    "name", ["x\0/a.png", "\ud800/a.png", f"{'x' * 5000}/a.png", "a\x0bb/c.png"]
)
def test_file_names_that_no_system_takes_are_images_without_a_file(tmp_path, name):
    strange = {"id": 50, "file_name": name, "height": H, "width": W}
    data_set, source = opened(tmp_path / "a", coco(40, images=(strange,)), 40)
    assert len(source) == 40
    (note,) = data_set.notes
    assert "images are not in" in note and len(note.splitlines()) == 1
    for image, words in ((strange, "none lies in"), ({**strange, "id": 10**30}, "of 64 bits")):
        with pytest.raises(InputError, match=words) as error:
            opened(tmp_path / "b", coco(0, images=(image,)), 1)
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 600
