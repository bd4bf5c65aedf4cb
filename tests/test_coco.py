"""COCO data sets: layouts as people have them, and every fault of a file, on real small files."""

import contextlib
import dataclasses
import json
import pickle
import re

import numpy as np
import pytest
from conftest import encoded, make_folder
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax import tasks
from gptv_jax.data import inventory, sources
from gptv_jax.data.coco import Coco
from gptv_jax.data.damage import DamageLog, DecodedSource
from gptv_jax.data.images import DamagedImageError, Decode
from gptv_jax.errors import InputError
from gptv_jax.stages import setup

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "bee"}, {"id": 90, "name": "ant"}]
H, W = 30, 40
BOX = (4, 6, 10, 12)  # x, y, width, height


def picture(x: float, y: float, width: float, height: float, shape=(H, W)) -> np.ndarray:
    """Black pixels with a white rectangle."""
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[y : y + height, x : x + width] = 255
    return pixels


def annotation(number: int, image: int, **changes) -> dict:
    given = {"bbox": list(BOX), "category_id": 7, "iscrowd": 0, "area": 99.5}
    shape = {"segmentation": [[1.5, 2, 3e1, 4], [5, 6]]}
    return {"id": number, "image_id": image, **given, **shape, **changes}


def coco(count: int = 4, first: int = 1, images: tuple = (), annotations: tuple = ()) -> dict:
    """A COCO file of images first, first + 1, ... with one box each, and more entries."""
    numbers = range(first, first + count)
    own = [{"id": i, "file_name": f"{i:04d}.png", "height": H, "width": W} for i in numbers]
    boxes = [annotation(10 * i, i) for i in numbers]
    return {
        "info": {"description": 'a "segmentation": [1'},
        "images": [*own, *images],
        "annotations": [*boxes, *annotations],
        "categories": CATEGORIES,
    }


def write(root, files: dict[str, dict | str], folders: dict[str, range]):
    """JSON files by their paths, and image files 0001.png, ... in folders."""
    png = encoded(picture(*BOX))
    texts = {n: each if isinstance(each, str) else json.dumps(each) for n, each in files.items()}
    pictures = {f"{f}/{i:04d}.png": png for f, numbers in folders.items() for i in numbers}
    return make_folder(root, {n: text.encode() for n, text in texts.items()} | pictures)


def settings(path, **changes) -> config_lib.Data:
    given = {"eval_transforms": ("decode()",), "train_transforms": ("decode()",)}
    return config_lib.Data(name="coco", path=str(path), **given, **changes)


def opened(root, content: dict, count: int = 4, **changes) -> tuple[Coco, sources.Selected]:
    """A data set of one file, train, and `count` images."""
    write(root, {"train.json": content}, {"images": range(1, count + 1)})
    config = settings(root, **changes)
    sources.open_data_set.cache_clear()
    return sources.open_data_set(config), sources.open_source(config, "train")


def by_id(source: sources.Selected) -> dict[int, dict]:
    """The records without their pictures, by the ids of their images."""
    return {source.image_id(i): source.annotations(i) for i in range(len(source))}


# Where the files lie.

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


# What the files say.


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


UNCHANGED = [[6, 4, 18, 14]]
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


# Sizes of pictures.


def turned(orientation: int, shape: tuple[int, int]) -> bytes:
    """A picture of `shape` as stored, with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(*BOX, shape=shape), "PNG", exif=exif)


def bounds(image: np.ndarray) -> list[int]:
    """The box around bright pixels."""
    rows, columns = (np.flatnonzero((image[..., 0] > 128).any(axis=axis)) for axis in (1, 0))
    return [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_boxes_fit_the_pixels_whichever_way_the_exif_orientation_turns(tmp_path, orientation):
    opened(tmp_path, coco(1))
    (tmp_path / "images/0001.png").write_bytes(content := turned(orientation, (H, W)))
    # The file is annotated as stored: its height and width are those before the turn.
    source = sources.open_source(settings(tmp_path), "train")
    record = DecodedSource(source, Decode())[0]
    assert record["image"].shape == (H, W, 3)
    np.testing.assert_array_equal(record["boxes"], [bounds(record["image"])])
    # The file is annotated as shown.
    (tmp_path / "0001.png").write_bytes(content)
    shown = np.asarray(Image.open(tmp_path / "0001.png"))
    shown = {1: shown, 6: np.rot90(shown, -1), 8: np.rot90(shown)}[orientation]
    y0, x0, y1, x1 = map(int, bounds(shown))
    own = coco(1)
    own["images"][0] |= {"height": shown.shape[0], "width": shown.shape[1]}
    own["annotations"][0]["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    write(tmp_path, {"train.json": own}, {})
    sources.open_data_set.cache_clear()
    record = DecodedSource(sources.open_source(settings(tmp_path), "train"), Decode())[0]
    np.testing.assert_array_equal(record["image"], shown)
    np.testing.assert_array_equal(record["boxes"], [[y0, x0, y1, x1]])


def test_a_picture_of_another_size_than_its_boxes_is_damaged(tmp_path, caplog):
    _, source = opened(tmp_path, coco())
    number = next(i for i in range(4) if source.image_id(i) == 3)
    (tmp_path / "images/0003.png").write_bytes(encoded(picture(*BOX, shape=(H + 9, W))))
    with pytest.raises(
        DamagedImageError, match=f"{W} x {H + 9} pixels, but train.json says {W} x {H}"
    ):
        source[number]
    decoded = DecodedSource(source, Decode())
    record = decoded[number]
    assert record["damaged"] == number  # another image is in its place
    log = DamageLog(settings(tmp_path, max_damaged=0.5), None)
    log.record("train", decoded, record["damaged"], 1)
    assert log.names == [str(tmp_path / "images/0003.png")]
    assert "so that its boxes would not fit" in caplog.text


def test_sizes_that_the_file_leaves_out_are_those_of_the_pictures(tmp_path):
    content = coco(2, annotations=(annotation(11, 1, bbox=[30, 20, 50, 50]),))
    for entry in content["images"]:
        entry["width"] = entry.pop("height") and None
    _, source = opened(tmp_path, content)
    np.testing.assert_array_equal(by_id(source)[1]["boxes"], [*UNCHANGED, [20, 30, H, W]])
    assert {len(source[i]["boxes"]) for i in range(2)} == {1, 2}


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


# TFDS sets with boxes.


def prepare(folder, features, examples: list[dict]) -> config_lib.Data:
    """Writes a TFDS set `boxes` of one split, train, as its builders do but without TensorFlow."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder.mkdir()
    features.save_config(folder)
    place = {"name": "train", "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
    info = {"name": "boxes", "version": "1.0.0", "fileFormat": "array_record"}
    splits = [place | {"numBytes": "1", "shardLengths": [str(len(examples))]}]
    (folder / "dataset_info.json").write_text(json.dumps(info | {"splits": splits}))
    path = folder / "boxes-train.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for example in examples:
        record = tf_example_pb2.Example()
        for name, values in example.items():
            feature = record.features.feature[name]
            if isinstance(values, bytes):
                feature.bytes_list.value.append(values)
            elif np.asarray(values).dtype.kind == "f":
                feature.float_list.value.extend(np.ravel(values))
            else:
                feature.int64_list.value.extend(np.ravel(values))
        writer.write(record.SerializeToString())
    writer.close()
    sources.open_data_set.cache_clear()
    return config_lib.Data(name="boxes", dir=str(folder))


def test_boxes_of_tfds_sets_are_in_pixels_of_the_decoded_image(tmp_path):
    import tensorflow_datasets as tfds

    label = tfds.features.ClassLabel(names=["cat", "bee"])
    flags = {
        "is_crowd": np.bool_,
        "area": np.int64,
        "label": label,
        "bbox": tfds.features.BBoxFeature(),
    }
    features = {"image": tfds.features.Image(), "objects": tfds.features.Sequence(flags)}
    features = tfds.features.FeaturesDict({**features, "image/id": np.int64})
    exif = Image.Exif()
    exif[0x0112] = 6
    boxes = [[6 / H, 4 / W, 18 / H, 14 / W], [0.5, 0.5, 0.5, 0.9], [0.5, 0.9, 1.5, 1.2]]
    parts = {"bbox": np.array(boxes, float), "label": [1, 0, 0], "is_crowd": [0, 0, 1]}
    parts |= {"area": [99, 1, 0]}
    examples = [
        {"image": encoded(picture(*BOX)), "image/id": 77},
        {"image": encoded(np.rot90(picture(*BOX)), exif=exif), "image/id": 3},
        {"image": b"no picture", "image/id": 4},
        {"image": encoded(picture(*BOX)), "image/id": 5},
    ]
    for example in examples[:3]:
        example |= {f"objects/{name}": values for name, values in parts.items()}
    none = {"bbox": np.zeros((0, 4)), "label": [], "is_crowd": [], "area": []}
    examples[3] |= {
        f"objects/{n}": np.array(each, np.float32 if n == "bbox" else int)
        for n, each in none.items()
    }
    config = prepare(tmp_path / "boxes", features, examples)
    source = sources.open_source(config, "train")
    assert source.object_names == ("cat", "bee") and "boxes" in source.keys
    assert [source.image_id(i) for i in range(4)] == [77, 3, 4, 5]
    decoded = DecodedSource(source, Decode())
    for index in (0, 1):
        record = decoded[index]
        np.testing.assert_allclose(record["boxes"], [[6, 4, 18, 14], [15, 36, H, W]], rtol=1e-6)
        np.testing.assert_array_equal(record["boxes"][0].round(), bounds(record["image"]))
        assert record["box_labels"].tolist() == [1, 0] and record["crowd"].tolist() == [False, True]
        np.testing.assert_allclose(record["area"], [99, 15 * 4], rtol=1e-5)
        assert record["boxes"].dtype == record["area"].dtype == np.float32
        again = source.annotations(index)
        np.testing.assert_array_equal(again["boxes"], record["boxes"])
        assert "encoded" not in again
    assert decoded[2]["damaged"] == 2  # and the last image is in its place
    assert decoded[3]["boxes"].shape == (0, 4) and decoded[3]["box_labels"].dtype == np.int32
    assert source.object_counts() is None


def test_boxes_of_tfds_without_labels_are_of_one_class_and_other_sequences_no_boxes(tmp_path):
    import tensorflow_datasets as tfds

    faces = tfds.features.Sequence({"bbox": tfds.features.BBoxFeature(), "blur": np.int64})
    words = {"words": tfds.features.Sequence(np.int64), "image": tfds.features.Image()}
    image = {"image": encoded(picture(*BOX)), "words": [1, 2]}
    own = {"faces/bbox": np.array([0, 0, 0.5, 1]), "faces/blur": [2]}
    with_faces = tfds.features.FeaturesDict(words | {"faces": faces})
    source = sources.open_source(prepare(tmp_path / "a", with_faces, [image | own]), "train")
    assert source.object_names == ("faces",)
    record = source.annotations(0)
    np.testing.assert_array_equal(record["boxes"], [[0, 0, H / 2, W]])
    assert record["box_labels"].tolist() == [0] and record["area"].tolist() == [H / 2 * W]
    assert source.image_id(0) == 0
    without = tfds.features.FeaturesDict(words | {"image/id": tfds.features.Text()})
    named = image | {"image/id": "a/é.jpg".encode()}
    source = sources.open_source(prepare(tmp_path / "b", without, [named]), "train")
    assert source.image_id(0) == "a/é.jpg"
    assert source.object_names == () and set(source[0]) == {"encoded"}


def test_label_maps_of_tfds_sets_are_a_feature_that_the_config_names(tmp_path):
    import tensorflow_datasets as tfds

    values = np.arange(H * W, dtype=np.uint8).reshape(H, W) % 5
    pairs = np.stack([values, values * 0 + 9, values * 0], -1)  # ADE20K: classes, then objects
    kinds = tfds.features
    features = {
        "image_left": kinds.Image(),  # as Cityscapes calls it
        "annotation": kinds.Image(encoding_format="png"),
        "segmentation_mask": kinds.Image(shape=(None, None, 1), use_colormap=True),
        "named": kinds.LabeledImage(labels=["car", "bus", "bee"], encoding_format="png"),
    }
    grey = encoded(values[..., None])
    maps = {"annotation": encoded(pairs), "segmentation_mask": grey, "named": grey}
    examples = [{"image_left": encoded(picture(*BOX)), **maps} for _ in range(2)]
    examples.append(examples[0] | {"named": b"torn"})
    config = prepare(tmp_path / "a", kinds.FeaturesDict(features), examples)
    (tmp_path / "a/named.labels.txt").write_text("car\nbus\nbee\n")
    for feature, fields, names, wanted in (
        ("named", {}, ("car", "bus", "bee"), np.where(values < 3, values, 255)),
        ("segmentation_mask", {"map_names": "1 pet,2 not,3 edge"}, ("pet", "not", "edge"),
         np.where((values > 0) & (values < 4), values - 1, 255).astype(np.uint8)),
        ("annotation", {"map_names": "a,b,c,d", "map_channel": 0, "map_ignore": (0,)}, (*"abcd",),
         np.where(values > 0, values - 1, 255)),
    ):  # fmt: skip
        source = sources.open_source(dataclasses.replace(config, maps=feature, **fields), "train")
        assert source.map_names == names and source.keys == {"segmentation"}
        record = DecodedSource(source, Decode())[1]
        np.testing.assert_array_equal(record["segmentation"], wanted)
        np.testing.assert_array_equal(record["image"], picture(*BOX))
        if feature == "named":
            assert "its label map cannot be read" in DecodedSource(source, Decode()).reason(2)
            assert source.map_counts()["maps"] == 2
    assert set(sources.open_source(config, "train")[2]) == {"encoded"}  # unless asked for
    with pytest.raises(
        InputError, match=r"maps=boxes is no .* annotation, named, segmentation_mask"
    ):
        sources.open_source(dataclasses.replace(config, maps="boxes"), "train")
    with pytest.raises(InputError, match="needs the names of the classes"):
        sources.open_source(dataclasses.replace(config, maps="annotation"), "train")


# Polygons and run lengths.


def test_masks_and_label_maps_are_what_pycocotools_makes_of_real_outlines(shared_data):
    from pycocotools.coco import COCO

    config = settings(shared_data / "coco2017_subset", maps="semantic,masks")
    plain = sources.open_source(settings(shared_data / "coco2017_subset"), "train")
    source, seen = sources.open_source(config, "train"), 0
    assert source.map_names == ("background", *source.object_names)
    assert source.keys == plain.keys | {"masks", "segmentation"}
    reference = COCO(str(sources.open_data_set(config).open("train").file))
    assert sources.open_data_set(config).notes == []
    for index in range(0, len(source), 2):
        record, number = source.annotations(index), source.image_id(index)
        wanted = reference.loadAnns(reference.getAnnIds([number]))
        assert len(record["masks"]) == len(wanted)
        found = np.zeros(record["segmentation"].shape, int)
        for each in sorted(wanted, key=lambda each: -int(reference.annToMask(each).sum())):
            found[reference.annToMask(each) > 0] = 1 + reference.getCatIds().index(
                each["category_id"]
            )
        for mask, each in zip(record["masks"], wanted, strict=True):
            np.testing.assert_array_equal(mask, reference.annToMask(each))
            seen += 1 + 1000 * each["iscrowd"]
        np.testing.assert_array_equal(record["segmentation"], found)
        assert record["segmentation"].dtype == np.uint8 and record["masks"].dtype == bool
        for key, value in plain.annotations(index).items():
            np.testing.assert_array_equal(record[key], value)
    assert seen > 5000  # polygons, and crowds by run lengths
    image = DecodedSource(source, Decode())[0]
    assert image["image"].shape[:2] == image["segmentation"].shape == image["masks"].shape[1:]


def outlined(tmp_path, outline, **changes) -> sources.Selected:
    """One image with an annotation of this outline, and one with a rectangle around `BOX`."""
    x, y, width, height = BOX
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    square = annotation(11, 1, segmentation=[corners], category_id=90)
    first = annotation(10, 1, segmentation=outline, bbox=[0, 0, 20, 20], **changes)
    content = coco(1) | {"annotations": [first, square, square]}  # the last one is a copy
    return opened(tmp_path, content, 1, maps="semantic,masks", max_damaged=1.0)[1]


def column(count: int) -> np.ndarray:
    """The first `count` columns, in COCO's order: rows first."""
    return np.asfortranarray(np.arange(W) < count, np.uint8)[None].repeat(H, 0)


@pytest.mark.parametrize("kind", ["compressed", "uncompressed"])
def test_run_lengths_cover_what_lies_behind_smaller_objects(tmp_path, kind):
    from pycocotools import mask

    runs = {"size": [H, W], "counts": [0, 20 * H, (W - 20) * H]}
    if kind == "compressed":
        runs = mask.encode(np.asfortranarray(column(20)))
        runs["counts"] = runs["counts"].decode()
    source = outlined(tmp_path, runs)
    record = source[0]
    np.testing.assert_array_equal(record["masks"][0], column(20))
    np.testing.assert_array_equal(record["masks"][1], picture(*BOX)[..., 0] > 0)
    wanted = np.where(record["masks"][1], 3, 2 * column(20))  # ant over cat; bee is 1
    np.testing.assert_array_equal(record["segmentation"], wanted)
    assert len(record["boxes"]) == 2
    copy = pickle.loads(pickle.dumps(sources.open_data_set(settings(
        tmp_path, maps="semantic,masks", max_damaged=1.0)).open("train")))  # fmt: skip
    np.testing.assert_array_equal(copy[0]["masks"], record["masks"])  # in worker processes


@pytest.mark.parametrize("share", [0.5, 0.004, 0.0])
def test_compressed_run_lengths_of_any_mask_are_read(tmp_path, share):
    from pycocotools import mask

    wanted = np.random.default_rng(0).random((H, W)) < share
    runs = mask.encode(np.asfortranarray(wanted, np.uint8))
    source = outlined(tmp_path, {**runs, "counts": runs["counts"].decode()})
    np.testing.assert_array_equal(source[0]["masks"][0], wanted)


@pytest.mark.parametrize("outline", [[], [[]], None, [[1, 2, 3, 4]]])
def test_the_box_of_an_object_without_an_outline_has_no_class(tmp_path, outline):
    source = outlined(tmp_path, outline)
    notes = sources.open_data_set(settings(tmp_path, maps="semantic,masks", max_damaged=1.0)).notes
    assert any(
        "annotations without polygons and run lengths: 1, the first" in each for each in notes
    )
    record = source[0]
    assert not record["masks"][0].any()
    np.testing.assert_array_equal(
        record["segmentation"][:20, :20] == 255, ~record["masks"][1][:20, :20]
    )
    assert (record["segmentation"][20:] == 0).all() and (record["segmentation"] == 3).sum() == 120


@pytest.mark.parametrize(
    ("outline", "reason"),
    [
        ({"size": [H, W + 1], "counts": [H * (W + 1)]}, f"run lengths are of [{H}, {W + 1}]"),
        ({"size": [H, W], "counts": [5, 5]}, "not of all pixels"),
        ({"size": [H, W], "counts": "55"}, "not of all pixels"),  # 5, 5
        ({"counts": [H * W]}, "size"),
        ({"size": [H, W], "counts": "!~!"}, "cannot be read"),
        ([[1, 2, 3, float("nan"), 5, 9]], "far outside"),
        ([[1, 2, 3, 1e12, 5, 9]], "far outside"),
        ("text", "cannot be read"),
    ],
)
def test_an_outline_that_cannot_be_read_makes_its_image_a_damaged_one(tmp_path, outline, reason):
    decoded = DecodedSource(outlined(tmp_path, outline), Decode())
    assert "an outline of its objects in train.json cannot be read: " in decoded.reason(0)
    assert reason in decoded.reason(0)


def test_kinds_of_outlines_that_are_unknown_are_refused(tmp_path):
    write(tmp_path, {"train.json": coco()}, {"images": range(1, 5)})
    with pytest.raises(InputError, match="maps=panoptic is unknown for COCO files"):
        sources.open_data_set(settings(tmp_path, maps="panoptic"))
    masks = sources.open_source(settings(tmp_path, maps="masks"), "train")
    assert masks.map_names == () and masks.keys == {"boxes", "box_labels", "crowd", "masks"}
