"""Clips of a camera that moves over images: where the window goes, and what is drawn when."""

import numpy as np
import pytest
from conftest import encoded, generator, make_folder

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.data.camera_motions import MOTIONS, SPEEDS
from gptv_jax.data.damage import DecodedSource
from gptv_jax.data.images import Decode
from gptv_jax.errors import InputError

HEIGHT, WIDTH = 96, 128
NAMES = tuple(MOTIONS)


@pytest.fixture
def folder(tmp_path):
    """Images whose red is the row and whose green is the column of a pixel."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.uint8)
    image = encoded(np.stack([y, x, y * 0], axis=-1))
    splits = {"train": 5, "val": 2}
    return make_folder(
        tmp_path,
        {f"{s}/{k}/{i}.png": image for s, n in splits.items() for k in "ab" for i in range(n)},
    )


def opened(folder, split="train", **changes) -> sources.Selected:
    changes = {"frames": 8, "image_size": 16} | changes
    sources.open_data_set.cache_clear()
    data = config_lib.Data(name="camera_motions", path=str(folder), **changes)
    return sources.open_source(data, split)


def test_every_image_has_a_clip_of_each_motion_in_the_splits_of_the_folder(folder):
    for split, images in (("train", 10), ("validation", 4)):
        source = opened(folder, split)
        assert len(source) == 6 * images and source.class_names == NAMES
        assert source.label_counts().tolist() == [images] * 6
        assert [int(source[i]["label"]) for i in range(12)] == [*range(6)] * 2
        assert source.name(0) == source.name(5) != source.name(6)
    with pytest.raises(InputError, match="has videos"):
        opened(folder, frames=0)


@pytest.mark.parametrize(("size", "frames", "stride"), [(16, 8, 1), ((12, 20), 5, 3), (16, 1, 1)])
def test_the_window_moves_by_one_to_two_pixels_a_frame_and_stays_inside(
    folder, size, frames, stride
):
    source = opened(folder, image_size=size, frames=frames, frame_stride=stride)
    rows, columns = (size, size) if isinstance(size, int) else size
    for seed in range(60):
        record = source.read(seed % len(source), generator(seed))
        boxes, label = record["encoded"].boxes(HEIGHT, WIDTH), NAMES[record["label"]]
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (HEIGHT, WIDTH)).all()
        sides = boxes[:, 2:] - boxes[:, :2]
        np.testing.assert_allclose(sides[:, 0] / sides[:, 1], rows / columns, rtol=1e-6)
        steps = np.diff((boxes[:, :2] + boxes[:, 2:]) / 2, axis=0) / stride
        steps = steps / (sides[:1] / (rows, columns))  # in pixels of the first frame
        growth = (sides[1:, 0] / sides[:-1, 0]) ** (1 / stride)
        if label.startswith("pan"):
            np.testing.assert_allclose(growth, 1, rtol=1e-6)
            axis = 0 if label in ("pan_up", "pan_down") else 1
            sign = 1 if label in ("pan_down", "pan_right") else -1
            speed = sign * steps[:, axis]
            np.testing.assert_allclose(steps[:, 1 - axis], 0, atol=1e-6)
        else:
            np.testing.assert_allclose(steps, 0, atol=1e-6)
            speed = ((growth if label == "zoom_out" else 1 / growth) - 1) * min(rows, columns)
        assert (speed > SPEEDS[0] - 1e-6).all() and (speed < SPEEDS[1] + 1e-6).all()


def test_frames_show_what_lies_under_the_window(folder):
    source = opened(folder)
    decoded = DecodedSource(source, Decode())
    for index in range(6):
        boxes = source[index]["encoded"].boxes(HEIGHT, WIDTH)
        clip = decoded[index]["image"].astype(float)
        assert clip.shape == (8, 16, 16, 3)
        centres = (boxes[:, :2] + boxes[:, 2:] - 1) / 2  # of pixels, which are at whole numbers
        np.testing.assert_allclose(clip[..., :2].mean(axis=(1, 2)), centres, atol=0.7)
        assert (clip[:, -1, -1, :2] > clip[:, 0, 0, :2]).all()  # nothing is mirrored


def test_motions_are_drawn_anew_in_training_and_fixed_in_evaluation(folder):
    source = DecodedSource(opened(folder), Decode())
    again = DecodedSource(opened(folder), Decode())
    for index in (0, 7, 58):
        np.testing.assert_array_equal(source[index]["image"], again[index]["image"])
        drawn = [source.read(index, generator(seed)) for seed in range(3)]
        assert {int(record["label"]) for record in drawn} == {index % 6}
        assert not np.array_equal(drawn[0]["image"], drawn[1]["image"])
        first = source.read(index, generator(0))["image"]
        np.testing.assert_array_equal(drawn[0]["image"], first)


def test_a_damaged_image_is_replaced_and_named(folder):
    (folder / "train/a/bad.png").write_bytes(b"no picture")
    source = opened(folder)
    decoded = DecodedSource(source, Decode())
    bad = [i for i in range(len(source)) if "bad" in source.name(i)]
    assert len(bad) == 6
    assert [int(decoded[i]["damaged"]) for i in bad] == bad
    assert "not an image" in decoded.reason(bad[0])


def test_real_photographs(shared_data):
    source = opened(shared_data / "imagenet_sample_128", "train[:2%]")
    decoded = DecodedSource(source, Decode(channels=1))
    clips = [decoded[i] for i in range(18)]
    assert {record["image"].shape for record in clips} == {(8, 16, 16, 1)}
    # Neighbouring frames are alike, and no clip stands still.
    change = [np.abs(np.diff(r["image"].astype(float), axis=0)).mean() for r in clips]
    assert 0.5 < np.median(change) < 40 and min(change) > 0
