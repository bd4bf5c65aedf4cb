"""Segmentation from beginning to end: a run, its numbers, its files and its pictures."""

import json

import numpy as np
import pytest
from conftest import scenes_config

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
