"""Filters of training data: what is left out, why, and what is said of it."""

import dataclasses
import io
import json
import logging

import numpy as np
import pytest
from conftest import encoded, make_folder, random_image
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax.data import duplicates, pipeline, sources
from gptv_jax.data.arrays import Arrays
from gptv_jax.data.damage import DamageLog
from gptv_jax.errors import InputError
from gptv_jax.tokens import GreyCodec


def photo(seed: int, side: int = 24) -> Image.Image:
    """An image with large shapes; another seed gives other shapes."""
    return Image.fromarray(random_image(6, 6, 3, seed=seed)).resize((side, side))


def file_of(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    with io.BytesIO() as file:
        picture.save(file, form, **options)
        return file.getvalue()


def settings(folder, *filters: str, **changes) -> config_lib.Data:
    given = {"name": "folder", "path": str(folder), "labels": False, "image_size": 8}
    given |= {f"{s}_split": s for s in sources.SPLITS} | {"max_damaged": 0.0, "damaged": "fail"}
    given |= {"train_transforms": ("decode(channels=1)", *filters, "resize(8)")}
    given |= {"eval_transforms": ("decode(channels=1)", "resize(8)")}
    return config_lib.Data(**given | changes)


def left_out(config: config_lib.Data, run=None) -> dict[str, str]:
    """The reasons of the training images that are left out, by the names of their files."""
    data = pipeline.Pipeline(config, GreyCodec(256, 8), 0, run)
    source = pipeline.open_examples(config, "train", config.train_transforms).source
    batch = next(data.train(len(source)))
    assert len(batch["tokens"]) == len(source)
    names = data.damage_log.dropped
    reasons = {source.name(i): source.reason(i) for i in range(len(source))}
    assert data.damage_log.count == 0 and data.damage_log.names == []
    return {name.rpartition("/")[2]: reasons[name] for name in names}


def test_small_and_blank_images_are_left_out_named_and_counted_but_stop_no_run(tmp_path, caplog):
    """Also where a damaged image would end the run."""
    caplog.set_level(logging.INFO)
    flat = np.full((24, 24, 3), (90, 120, 30), np.uint8)
    files = {f"train/{i}.png": file_of(photo(i)) for i in range(6)}
    files |= {"train/small.png": file_of(photo(9, 15)), "train/blank.png": encoded(flat)}
    folder = make_folder(tmp_path / "data", files | {"test/0.png": file_of(photo(20, 9))})
    config = settings(folder, "drop_small(16)", "drop_blank()", validation_split="test")
    run = tmp_path / "run"
    run.mkdir()
    assert left_out(config, run) == {
        "small.png": "15 x 15 pixels are less than drop_small(side=16)",
        "blank.png": "its values deviate by 0, below drop_blank(4)",
    }
    lines = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert all(line["dropped"] for line in lines) and len(lines) == 2
    for line in lines:
        assert f"{line['name']} is left out: {line['reason']}." in caplog.messages
    again = DamageLog(config, run)  # of a run that is continued
    assert again.count == 0 and sorted(line["name"] for line in lines) == again.dropped
    evaluated = pipeline.Pipeline(config, GreyCodec(256, 8), 0).evaluation("test", 1)
    assert sum(batch["mask"].sum() for batch in evaluated) == 1  # the small test image counts


def test_what_stands_in_is_an_image_that_the_filters_keep(tmp_path):
    files = {f"train/{i}.png": file_of(photo(i, 24 if i % 2 else 9)) for i in range(8)}
    config = settings(make_folder(tmp_path, files), "drop_small(16)")
    kept = pipeline.images(dataclasses.replace(config, eval_transforms=config.train_transforms),
                           "train", log := DamageLog(config, None))  # fmt: skip
    assert len(list(kept)) == 4 == len(log.dropped)
    batch = next(pipeline.Pipeline(config, GreyCodec(256, 8), 0).train(8))
    assert len(np.unique(batch["tokens"], axis=0)) == 4


def test_where_the_filters_keep_nothing_one_sentence_says_so(tmp_path):
    config = settings(make_folder(tmp_path, {"train/0.png": file_of(photo(0))}), "drop_small(99)")
    with pytest.raises(InputError, match="none of 1 images"):
        next(pipeline.Pipeline(config, GreyCodec(256, 8), 0).train(1))


def test_images_of_training_that_are_nearly_those_of_test_are_found(tmp_path, caplog):
    """Whatever the format, the size and the brightness; a different image is none."""
    files = {f"train/{i}.png": file_of(photo(i)) for i in range(20)}
    files |= {f"test/{i}.png": file_of(photo(100 + i)) for i in range(5)}
    brighter = photo(101).point(lambda value: 0.8 * value + 30)
    files["train/as_jpeg.jpg"] = file_of(photo(100), "JPEG", quality=85)
    files["train/brighter.png"] = file_of(brighter)
    files["train/larger.png"] = file_of(photo(102, 24).resize((60, 60), Image.Resampling.BICUBIC))
    files["train/twice.png"] = files["train/3.png"]
    config = settings(make_folder(tmp_path, files), "drop_duplicates()", validation_split="test")
    found = left_out(config)
    assert {"as_jpeg.jpg", "brighter.png", "larger.png"} < set(found) and len(found) == 4
    assert {"twice.png", "3.png"} & set(found)  # the first of the order of the split stays
    assert all("is nearly equal to" in reason for reason in found.values())
    assert "of the split test" in found["larger.png"]
    assert any("3 of 5 test images stand in training" in line for line in caplog.messages)


def test_splits_that_share_images_do_not_make_these_duplicates(tmp_path):
    files = {f"train/{i}.png": file_of(photo(i)) for i in range(6)}
    whole = {f"{split}_split": "train" for split in sources.SPLITS}
    config = settings(make_folder(tmp_path, files), "drop_duplicates()", **whole)
    assert left_out(config) == {}


def test_candidates_are_all_pairs_within_the_distance():
    """The search by equal parts of two hashes finds what a comparison of all pairs finds."""
    rng = np.random.default_rng(0)
    codes = rng.integers(2**63, size=60, dtype=np.uint64)
    changed = codes.copy()
    for place in range(60):  # up to 7 bits
        for bit in rng.choice(64, size=place % 8, replace=False):
            changed[place] ^= np.uint64(1) << np.uint64(bit)
    codes = np.concatenate([codes, changed, codes[:3]])
    copies = np.ones((len(codes), 1), np.float32)
    for distance in (0, 1, 4, 7):
        wanted = {
            (i, j)
            for j in range(len(codes))
            for i in range(j)
            if np.bitwise_count(codes[i] ^ codes[j]) <= distance
        }
        found = list(duplicates.near(codes, copies, distance))
        assert set(found) == wanted and len(found) == len(wanted)
        assert [j for _, j in found] == sorted(j for _, j in found)


def test_equal_hashes_of_different_images_are_no_duplicates():
    copies = np.eye(3, dtype=np.float32)  # no two correlate
    copies[2] = 0  # of one colour
    assert list(duplicates.near(np.zeros(3, np.uint64), copies, 4)) == []


def test_images_whose_label_is_no_class_are_left_out(monkeypatch):
    images = random_image(12, 8, 8, 1)
    labels = np.array([0, 1] * 5 + [-1, 7], np.int32)
    data_set = Arrays({"train": (images, np.array([0, 1] * 6))})
    data_set.splits["train"].labels = labels
    monkeypatch.setitem(sources.SETS, "small", lambda config: data_set)
    lists = {f"{s}_split": "train" for s in sources.SPLITS}
    plain = config_lib.Data(name="small", image_size=8, **lists)
    opened = {"train": sources.open_source(plain, "train")}
    with pytest.raises(InputError, match="drop_unlabelled"):
        sources.check_labels(plain, opened)
    filters = ("drop_unlabelled()",)
    config = dataclasses.replace(plain, train_transforms=filters, eval_transforms=filters)
    sources.check_labels(config, opened, [filters, filters])
    with pytest.raises(InputError, match="drop_unlabelled"):
        sources.check_labels(config, opened, [filters, ("flip()",)])
    data = pipeline.Pipeline(config, GreyCodec(256, 8), 0)
    assert {*next(data.train(12))["label"].tolist()} == {0, 1}
    assert data.damage_log.dropped == ["train[10]", "train[11]"]
    assert sum(batch["mask"].sum() for batch in data.evaluation("train", 4)) == 10


def test_a_filter_stands_before_all_others(tmp_path):
    folder = make_folder(tmp_path, {"train/0.png": file_of(photo(0))})
    config = settings(folder, "flip()", "drop_small(4)")
    with pytest.raises(InputError, match="stand before all others"):
        pipeline.open_examples(config, "train", config.train_transforms)


def test_frames_of_a_clip_are_judged_together():
    videos = random_image(4, 3, 8, 8, 1)
    videos[1] = 7
    config = config_lib.Data(frames=2, image_size=8, train_transforms=("drop_blank()",))
    from gptv_jax.data.clips import Clips

    data_set = Arrays({"train": (videos, None)}, clips=Clips(2))
    source = sources.Selected(data_set, "train")
    from gptv_jax.data import transforms

    (step,) = map(transforms.parse, config.train_transforms)
    kept = [step.reason(i, source[i], source) is None for i in range(4)]
    assert kept == [True, False, True, True]
