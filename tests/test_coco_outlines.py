"""Polygons and run lengths of COCO files."""

import pickle

import numpy as np
import pytest
from coco_sets import BOX, H, W, annotation, coco, opened, picture, settings, write

from gptv_jax.data import sources
from gptv_jax.data.damage import DecodedSource
from gptv_jax.data.images import Decode
from gptv_jax.errors import InputError


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
        ({"size": [H, W], "counts": "o" * 100_000}, "longer than any image"),  # one endless number
        ([[300, 10, -300, 10] * 5000], "too long for the image"),  # 600,000 pixels
        ([[1, 2, 3, float("nan"), 5, 9]], "far outside"),
        ([[1, 2, 3, 1e12, 5, 9]], "far outside"),
        ("text", "'text' is no list"),
        (1, "1 is no list"),
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


@pytest.mark.parametrize("number", [0, 1, 2, 5, True, "0"])
def test_a_number_is_no_outline_of_another_object(tmp_path, number):
    """Numbers stand for lists while a file is read; the number of a file is not taken for one."""
    source = outlined(tmp_path, number)
    decoded = DecodedSource(source, Decode())
    if number:
        assert f"{number!r} is no list" in decoded.reason(0)
    else:
        record = source[0]
        assert not record["masks"][0].any()
        np.testing.assert_array_equal(record["masks"][1], picture(*BOX)[..., 0] > 0)
