"""Filters of training data: what is left out, why, and what is said of it."""

import dataclasses
import io
import json
import logging
import time

import numpy as np
import pytest
from conftest import encoded, make_folder, random_image
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax.data import duplicates, pipeline, sources, transforms
from gptv_jax.data.arrays import Arrays
from gptv_jax.data.clips import Clips
from gptv_jax.data.damage import DROPPED, DamageLog, DecodedSource
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


def hashes(codes: np.ndarray, copies: np.ndarray) -> duplicates.Hashes:
    rows = np.arange(len(codes))
    return duplicates.Hashes(rows, codes, copies, 0 * rows)


def test_candidates_are_all_pairs_within_the_distance():
    rng = np.random.default_rng(0)
    codes = rng.integers(2**63, size=60, dtype=np.uint64)
    changed = codes.copy()
    for place in range(60):  # up to 7 bits
        for bit in rng.choice(64, size=place % 8, replace=False):
            changed[place] ^= np.uint64(1) << np.uint64(bit)
    one, other = (hashes(each, np.ones((60, 1), np.float32)) for each in (codes, changed))
    every = hashes(np.concatenate([codes, changed, codes[:3]]), np.ones((123, 1), np.float32))
    for distance in (0, 1, 4, 7):
        near = lambda a, b, most=distance: int(a ^ b).bit_count() <= most  # noqa: E731
        wanted = {(i, j) for i, a in enumerate(codes) for j, b in enumerate(changed) if near(a, b)}
        found = duplicates.between(one, other, distance)
        assert {(i, j) for i, rows in found for j in rows.tolist()} == wanted
        gone, stays = duplicates.to_one_before(every, distance), []
        for j, code in enumerate(every.codes):
            before = [i for i in stays if near(every.codes[i], code)]
            assert gone.get(j) == (before[0] if before else None)
            stays += [] if before else [j]


def test_equal_hashes_of_different_images_are_no_duplicates():
    copies = np.eye(3, dtype=np.float32)  # no two correlate
    copies[2] = 0  # of one colour
    assert duplicates.to_one_before(hashes(np.zeros(3, np.uint64), copies), 4) == {}


def test_an_image_that_other_steps_of_the_list_refuse_is_no_reason_to_leave_its_copy_out(tmp_path):
    """One that is too small, has too many pixels for `decode()`, or is a copy of a test image."""
    files = {f"test/{i}.png": file_of(photo(100 + i)) for i in range(2)}
    for i in range(6):  # of each photo one copy is small, and one large
        for name, side in (("small", 12), ("usual", 32), ("huge", 64)):
            files[f"train/{i}_{name}.png"] = file_of(photo(i, side))
    steps = ("decode(channels=1,max_pixels=2000)", "drop_small(16)", "drop_duplicates()")
    config = settings(make_folder(tmp_path, files), validation_split="test", max_damaged=1.0,
                      damaged="skip", train_transforms=(*steps, "resize(8)"))  # fmt: skip
    data = pipeline.Pipeline(config, GreyCodec(256, 8), 0)
    next(data.train(18))
    small, huge = ([f"{i}_{name}.png" for i in range(6)] for name in ("small", "huge"))
    assert [name.rpartition("/")[2] for name in data.damage_log.dropped] == small
    assert [name.rpartition("/")[2] for name in data.damage_log.names] == huge


def test_images_are_compared_as_the_list_decodes_them(tmp_path, caplog):
    """Where `decode` needs to be told what is white, and where an image cannot be read at all."""
    deep = [np.asarray(photo(i).convert("L"), np.float32) * 16 for i in range(6)]
    files = {f"train/{i}.tif": file_of(Image.fromarray(deep[i]), "TIFF") for i in range(6)}
    files |= {f"test/{i}.tif": files[f"train/{i}.tif"] for i in (2, 4)} | {"test/9.tif": b"no"}
    decode = "decode(channels=1,maximum=4095)"
    config = settings(make_folder(tmp_path, files), validation_split="test",
                      train_transforms=(decode, "drop_duplicates()", "resize(8)"))  # fmt: skip
    assert set(left_out(config)) == {"2.tif", "4.tif"}
    assert "2 of 3 test images stand in training" in caplog.text
    assert "1 of 3 images of the split test cannot be read, and are not compared" in caplog.text


def test_a_copy_with_another_label_is_told(tmp_path, caplog):
    files = {f"train/{name}/{i}.png": file_of(photo(10 * ord(name) + i))
             for name in "ab" for i in range(3)}  # fmt: skip
    files |= {f"test/{name}/0.png": file_of(photo(ord(name))) for name in "ab"}
    files["train/b/same_as_a.png"] = files["train/a/1.png"]
    config = settings(make_folder(tmp_path, files), "drop_duplicates()", labels=True,
                      validation_split="test")  # fmt: skip
    (reason,) = left_out(config).values()
    assert reason.endswith("of the split train, which has another label")
    assert "1 images of the split train have another label than" in caplog.text


def test_many_equal_images_take_no_more_time_than_others():
    """Images of one colour each, which another copy makes no different."""
    flat = [Image.fromarray(np.full((24, 24), i, np.uint8)) for i in range(200)]
    found = [duplicates.perceptual_hash(each) for each in flat] * 40
    codes, copies = (np.array(each) for each in zip(*found, strict=True))
    many = hashes(codes, copies)
    start = time.process_time()
    gone = duplicates.to_one_before(many, 6)
    first, group = duplicates.distinct(many)
    assert time.process_time() - start < 10  # it takes 0.3 s; comparing all pairs takes minutes
    assert gone == dict.fromkeys(range(1, 8000), 0)
    assert first.tolist() == [0] and not group.any()


@pytest.mark.parametrize("value", [30, 200, 255])
def test_a_large_image_of_one_colour_is_blank(value):
    step = transforms.parse("drop_blank()")
    blank = np.full((2100, 2100, 3), value, np.uint8)
    assert step.reason(0, {"image": blank}, None) is not None
    assert step.reason(0, {"image": random_image(2100, 210, 3)}, None) is None
    image = random_image(40, 30, 3) // 20
    assert f"deviate by {image.std(axis=(0, 1)).max():.2g}," in step.reason(
        0, {"image": image}, None
    )


def test_a_clip_that_is_left_out_is_not_damaged_though_it_is_not_found_again(caplog):
    """Clips begin anywhere in training; reading again meets only some of them."""
    caplog.set_level(logging.INFO)
    videos = random_image(4, 10, 8, 8, 1)
    videos[:, 4:8] = 7  # the clip at 4; clips that are read again begin at 0, 3 and 6
    data_set = Arrays({"train": (videos, None)}, clips=Clips(4))
    source = DecodedSource(
        sources.Selected(data_set, "train"), None, (transforms.parse("drop_blank()"),)
    )
    damaged = {int(source.read(0, np.random.default_rng(seed))["damaged"]) for seed in range(40)}
    assert damaged == {-1, DROPPED}
    log = DamageLog(config_lib.Data(damaged="fail", max_damaged=0.0), None)
    log.record("train", source, np.array([DROPPED + 0, DROPPED + 2]), 1)
    assert log.dropped == ["train[0]", "train[2]"] and log.names == []
    assert "train[2] is left out: a filter leaves out one of its clips." in caplog.messages


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
    data_set = Arrays({"train": (videos, None)}, clips=Clips(2))
    source = sources.Selected(data_set, "train")
    (step,) = map(transforms.parse, config.train_transforms)
    kept = [step.reason(i, source[i], source) is None for i in range(4)]
    assert kept == [True, False, True, True]
