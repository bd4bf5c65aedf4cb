"""Corruptions of test images: what they change, how much, and what decides it."""

import colorsys
import dataclasses

import numpy as np
import pytest
from conftest import generator, random_image, transformed

from gptv_jax import config as config_lib
from gptv_jax.config.stages import CORRUPTIONS
from gptv_jax.data import corruptions, sources, transforms
from gptv_jax.data.corruptions import PUBLISHED, SHARES, Corrupt, amount
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.tokens import GreyCodec

STRENGTHS = range(1, corruptions.STRENGTHS + 1)


def smooth(side: int, count: int = 8) -> np.ndarray:
    """Images of soft blobs and an edge, uint8 [count, side, side + 4, 3], as photographs have."""
    rng, (y, x) = generator(1), np.mgrid[:side, : side + 4] / side
    made = []
    for _ in range(count):
        waves = rng.uniform(1, 6, (3, 2)) @ np.stack([y.ravel(), x.ravel()])
        picture = 0.5 + 0.3 * np.sin(waves + rng.uniform(0, 6, (3, 1)))
        picture = picture.reshape(3, *y.shape) + 0.2 * (x > rng.uniform(0.3, 0.7))
        made.append(np.clip(255 * picture, 0, 255).transpose(1, 2, 0).astype(np.uint8))
    return np.stack(made)


def digits() -> np.ndarray:
    source = sources.open_source(config_lib.Data(), "test")
    return np.stack([source[i]["image"] for i in range(60)])


def corrupted(images: np.ndarray, kind: str, strength: int, levels=256, seed=0) -> np.ndarray:
    step = Corrupt(kind, strength, levels, seed)
    return np.stack([transformed(step, x, step.generator(i)) for i, x in enumerate(images)])


def distance(images: np.ndarray, kind: str, strength: int, levels: int) -> float:
    """Mean over the images of the root mean square change, as a share of the range of values."""
    change = corrupted(images, kind, strength, levels).astype(float) - images
    return np.sqrt(np.square(change).mean(axis=(1, 2, 3))).mean() / (levels - 1)


def test_there_is_a_corruption_of_every_name_that_a_configuration_takes():
    assert {*PUBLISHED, *SHARES} == {*CORRUPTIONS}


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize(
    ("make", "levels"), [(digits, 17), (lambda: smooth(32), 256), (lambda: smooth(96, 3), 256)]
)
def test_a_higher_strength_moves_images_further_away(kind, make, levels):
    images = make()
    found = [distance(images, kind, strength, levels) for strength in STRENGTHS]
    assert found[0] > 0 and found == sorted(found)
    assert found[-1] > 1.2 * found[0]


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize(
    ("shape", "levels"), [((8, 8, 1), 17), ((12, 20, 3), 256), ((3, 10, 8, 1), 256)]
)
def test_shape_type_and_range_stay(kind, shape, levels):
    image = (random_image(*shape).astype(int) % levels).astype(np.uint8)
    found = corrupted(image[None], kind, 5, levels)[0]
    assert found.shape == shape and found.dtype == np.uint8 and found.max() < levels
    assert (found != image).any()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_seed_and_number_decide_and_nothing_else(kind):
    images = smooth(16)
    images[1:] = images[0]
    first = corrupted(images, kind, 4)
    np.testing.assert_array_equal(first, corrupted(images, kind, 4))
    drawn = kind in ("noise", "shift", "occlusion")
    assert (first != first[:1]).any() == drawn
    assert (first != corrupted(images, kind, 4, seed=1)).any() == drawn


def test_strengths_of_published_sizes_are_the_published_ones_and_lie_between_elsewhere():
    for kind, columns in PUBLISHED.items():
        for side, column in zip(corruptions.SIDES, columns, strict=True):
            given = [amount(kind, s, (side, 2 * side, 3)) for s in STRENGTHS]
            np.testing.assert_allclose(given, column)
        for strength in STRENGTHS:
            ends = sorted(column[strength - 1] for column in columns)
            between = [amount(kind, strength, (side, side, 1)) for side in (48, 96, 160)]
            assert ends[0] < min(between) and max(between) < ends[1]
            assert between in (sorted(between), sorted(between)[::-1])
        assert amount(kind, 2, (8, 8, 1)) == columns[0][1]
        assert amount(kind, 2, (999, 512, 3)) == columns[1][1]


def test_brightness_raises_the_value_alone_of_hue_saturation_and_value():
    image = smooth(32, 1)
    image[0, 0] = 0
    found = corrupted(image, "brightness", 3)[0] / 255
    for before, after in zip((image[0] / 255).reshape(-1, 3), found.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        wanted = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.15, 1))
        np.testing.assert_allclose(after, wanted, atol=0.51 / 255)


def test_contrast_shrinks_the_distance_from_the_mean_of_each_channel():
    image = smooth(32, 1)[0] / 255
    mean = image.mean(axis=(0, 1))
    found = corrupted(smooth(32, 1), "contrast", 2)[0] / 255
    np.testing.assert_allclose(found, mean + 0.5 * (image - mean), atol=0.51 / 255)


def test_noise_has_its_standard_deviation_and_no_mean():
    image = np.full((1, 224, 224, 3), 128, np.uint8)
    change = corrupted(image, "noise", 1)[0] / 255 - 128 / 255
    assert abs(change.mean()) < 0.002 and change.std() == pytest.approx(0.08, rel=0.02)


def test_blur_keeps_a_constant_and_the_frames_of_a_clip_apart():
    clip = np.zeros((3, 9, 9, 1), np.uint8)
    clip[1, 4, 4], clip[2] = 200, 100
    found = corrupted(clip[None], "blur", 5)[0]
    assert not found[0].any() and (found[2] == 100).all()
    assert 0 < found[1, 4, 4] < 200 and found[1, 4, 3] == found[1, 3, 4] == found[1, 5, 4] > 0


def test_a_larger_occlusion_covers_every_smaller_one_and_nothing_else_changes():
    images = np.zeros((20, 30, 40, 3), np.uint8)
    before = np.zeros(images.shape[:-1], bool)
    for strength in STRENGTHS:
        found = corrupted(images, "occlusion", strength)
        covered = (found == 128).all(axis=-1)
        assert (covered | (found == 0).all(axis=-1)).all()
        assert covered[before].all()
        share = covered.mean(axis=(1, 2))
        np.testing.assert_allclose(share, SHARES["occlusion"][strength - 1], atol=0.04)
        assert len({tuple(map(tuple, np.argwhere(each)[:1])) for each in covered}) > 5
        before = covered


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_shift_moves_boxes_label_maps_and_the_view_with_the_pixels(strength):
    step, seen = Corrupt("shift", strength), set()
    for number in range(24):
        image, plane = np.zeros((32, 48, 3), np.uint8), np.zeros((32, 48), np.uint8)
        image[12:20, 20:30], plane[12:20, 20:30] = 255, 7
        record = {"image": image, "segmentation": plane}
        record["boxes"] = np.array([[12, 20, 20, 30], [0, 0, 1, 1]], np.float32)
        record["box_labels"] = np.array([3, 4], np.int32)
        record["view"] = np.array([0, 0, 32, 48], np.float32)
        found = step(record, step.generator(number))
        rows, columns = np.nonzero(found["image"][..., 0])
        down, right = rows.min() - 12, columns.min() - 20
        assert max(abs(down) / 32, abs(right) / 48) == pytest.approx(strength / 16)
        np.testing.assert_array_equal(found["segmentation"] == 7, found["image"][..., 0] == 255)
        moved = np.array([12 + down, 20 + right, 20 + down, 30 + right])
        np.testing.assert_array_equal(found["boxes"][0], moved)
        # The corner object stays where the image does not move up or to the left.
        assert found["box_labels"].tolist() == [3] + [4] * int(min(down, right) >= 0)
        np.testing.assert_array_equal(found["view"], [-down, -right, 32 - down, 48 - right])
        outside = np.ones((32, 48), bool)
        outside[max(down, 0) : 32 + min(down, 0), max(right, 0) : 48 + min(right, 0)] = False
        assert (found["segmentation"][outside] == 255).all() and not found["image"][outside].any()
        seen.add((np.sign(down), np.sign(right)))
    assert len(seen) == 8  # every direction


def test_other_corruptions_leave_boxes_and_maps_as_they_are():
    record = {"image": random_image(16, 16, 3), "boxes": np.ones((1, 4), np.float32)}
    record["segmentation"] = np.zeros((16, 16), np.uint8)
    for kind in set(CORRUPTIONS) - {"shift"}:
        found = Corrupt(kind, 5)(record)
        assert found.keys() == record.keys()
        assert found["boxes"] is record["boxes"]
        assert found["segmentation"] is record["segmentation"]


def test_images_are_corrupted_before_they_become_grey_levels():
    place = transforms.corrupted
    entries = ("decode(channels=1)", "resize(8)", "quantize(17)")
    (*before, entry, last) = place(entries, "noise", 2, 17, 5)
    assert (tuple(before), last) == (entries[:2], entries[2])
    assert transforms.parse(entry) == Corrupt("noise", 2, 256, 5)
    (entry,) = place((), "shift", 1, 17, 0)
    assert transforms.parse(entry) == Corrupt("shift", 1, 17)
    assert place(entries[:2], "jpeg", 3, 256, 0)[:2] == entries[:2]


def test_the_pipeline_corrupts_an_example_by_its_number_in_the_split():
    data = config_lib.Data(test_split="test[10:40]")
    entries = transforms.corrupted((), "noise", 3, 17, 4)
    codec = GreyCodec(17, 8)
    whole = Pipeline(data, codec, 0)
    (batch,) = whole.evaluation("test", 30, entries=entries)
    source = sources.open_source(data, "test")
    images = np.stack([source[i]["image"] for i in range(30)])
    wanted = corrupted(images, "noise", 3, 17, 4)
    np.testing.assert_array_equal(batch["tokens"], codec.encode(wanted))
    # Neither the batch size, nor the share of a process, nor workers matter.
    parts = [
        dataclasses.replace(whole, share=(i, 2)).evaluation("test", 10, entries=entries)
        for i in range(2)
    ]
    rows = {
        int(i): t
        for part in parts
        for b in part
        for i, t in zip(b["index"], b["tokens"], strict=True)
    }
    np.testing.assert_array_equal(np.stack([rows[i] for i in range(30)]), batch["tokens"])
    (plain,) = whole.evaluation("test", 30)
    np.testing.assert_array_equal(plain["tokens"], codec.encode(images))


@pytest.mark.parametrize(
    "entry", ["corrupt('fog')", "corrupt('noise', 0)", "corrupt('noise', 6)", "corrupt()"]
)
def test_a_wrong_corruption_is_refused(entry):
    with pytest.raises(ValueError, match="it takes corrupt"):
        transforms.parse(entry)
