"""Segmentation from beginning to end: a run, its numbers, its files and its pictures."""

import json

import numpy as np
import pytest
from conftest import encoded, make_folder, scenes_config

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax.data import digit_scenes
from gptv_jax.stages.run import run_stages


@pytest.mark.process
def test_a_run_writes_numbers_files_and_pictures(tmp_path, command):
    segment = {"cell": 8, "codes": 20, "measured": 30, "samples": 2, "validation_images": 3}
    task = config_lib.Task("segment", segment=config_lib.Segment(**segment))
    config = scenes_config(task, 40, 5, 9)
    folder = tmp_path / "run"
    found = run_stages(config, str(folder))
    assert found["finetune/validation_images"] == 3  # of 5
    names = ["miou", "pixel_accuracy", "mean_class_accuracy", "classes_scored"]
    bounds = ["", "prior_", "wrong_image_", "ceiling_", "written_", "voted_"]
    assert {f"finetune/{b}test_{n}" for b in bounds for n in names} <= found.keys()
    assert {f"finetune/test_iou_of_{n}" for n in ("background", *"0123456789")} <= found.keys()
    assert found["finetune/ceiling_test_miou"] > found["finetune/test_miou"]
    assert "finetune/test_pixel_accuracy_standard_error" not in found
    written = json.loads((folder / "finetune/segmentation.json").read_text())
    assert np.sum(written["confusion"]["read"]) == 9 * 32 * 48
    page = (folder / "report.html").read_text()
    assert "<h2>Segmentation</h2>" in page and "<h2>Class iou</h2>" in page
    assert "11 classes of label maps: background" in page and "classes: none" not in page
    assert "<td>classes_scored</td>" in page
    scene = digit_scenes.scene("test", 0)["image"]
    model = gptv_jax.load(folder)
    assert model.segment(scene[None], by="written").shape == (1, 32, 48)
    out = tmp_path / "kept.jsonl"
    out.write_text("kept")
    ended = command("predict", f"--run={folder}", str(tmp_path), f"--out={out}")
    assert ended.code == 1 and "has config.task.name=segment" in ended.errors
    assert "Traceback" not in ended.errors and out.read_text() == "kept"
    before = (folder / "task.measured").read_bytes()
    assert run_stages(config, str(folder)) == found
    assert (folder / "task.measured").read_bytes() == before


def test_a_run_of_clips_segments_whole_videos(tmp_path):
    rng, contents = np.random.default_rng(0), {}
    for split, videos in (("train", 2), ("validation", 1), ("test", 2)):
        for video in range(videos):
            for frame in range(4 + 7 * (split == "test") * video):
                maps = np.kron(rng.integers(3, size=(2, 4)), np.ones((4, 4), int)).astype(np.uint8)
                maps[:4, :4] = 1  # pixels that keep their class
                for folder, pixels in ((split, 80 * maps), (f"{split}_labels", maps)):
                    contents[f"{folder}/{video}/{frame}.png"] = encoded(pixels[..., None])
    make_folder(tmp_path / "data", contents)
    config = config_lib.default()
    data, model, train = config.data, config.model, config.finetune.train
    data.name, data.path, data.frames, data.image_size = (
        "folder",
        str(tmp_path / "data"),
        2,
        (8, 16),
    )
    data.maps, data.map_names = "{split}_labels", "ground,cup,tree"
    data.train_transforms = data.eval_transforms = ("decode(channels=1)",)
    config.tokens.kind = "none"
    model.layers, model.width, model.heads = 1, 16, 2
    config.task.name, config.task.image_input, config.task.stem = "segment", "pixels", (4, 4)
    config.task.segment.labels = "cells"
    train.steps, train.batch_size, train.eval_every = 2, 8, 2
    folder = tmp_path / "run"
    found = run_stages(config_lib.resolve(config), str(folder))
    for bound in ("", "read_", "alone_", "previous_", "propagated_", "copied_", "prior_"):
        assert 0 <= found[f"finetune/{bound}test_video_miou"] <= 1
        assert 0 <= found[f"finetune/{bound}test_video_consistency_8"] <= 1  # of the longer video
        assert f"finetune/{bound}test_video_consistency_16" not in found
    for bound in ("propagated_", "copied_"):
        assert 0 <= found[f"finetune/{bound}test_video_boundary_f"] <= 1
    assert found["finetune/ceiling_test_miou"] == 1
    about = json.loads((folder / "finetune/video_segmentation.json").read_text())
    assert len(about["propagated"]["miou_by_frame"]) == 10
    page = (folder / "report.html").read_text()
    for name in ("segmentation", "class_iou", "video_segmentation", "video_miou"):
        assert (folder / f"samples/{name}.png").exists()
        assert f"<h2>{name.replace('_', ' ').capitalize()}</h2>" in page
    model = gptv_jax.load(folder)
    assert model.segment_video(np.zeros((3, 8, 16, 1), np.uint8)).shape == (3, 8, 16)
