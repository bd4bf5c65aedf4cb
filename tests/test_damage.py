"""Damaged images in real folders: training and evaluation go on without them, by the rules."""

import dataclasses
import itertools
import json
import logging

import jax
import numpy as np
import pytest
from conftest import encoded, make_folder, random_image

from gptv_jax import config as config_lib
from gptv_jax.data import pipeline
from gptv_jax.data.damage import DamageLog
from gptv_jax.errors import InputError
from gptv_jax.tokens import GreyCodec

CODEC = GreyCodec(levels=256, size=4)
PHOTO = encoded(random_image(32, 32, 3), "JPEG")
BAD = {
    "cut.jpg": PHOTO[: len(PHOTO) // 2],
    "empty.png": b"",
    "text.png": b"this is text",
    "small.png": encoded(random_image(1, 1, 1)),
}
SOUND = 106  # with the bad ones and a broken symlink 111: 4.5%


def numbered(count: int, folder: str = "") -> dict[str, bytes]:
    """Images of one grey level each, which tells them apart."""
    return {f"{folder}{i:03d}.png": encoded(np.full((4, 4, 1), i, np.uint8)) for i in range(count)}


def settings(path, **changes) -> config_lib.Data:
    given = {
        "name": "folder",
        "path": str(path),
        "train_split": "train",
        "train_transforms": ("decode(channels=1)", "flip()"),
        "eval_transforms": ("decode(channels=1)",),
        **changes,
    }
    return config_lib.Data(image_size=4, **given)


@pytest.fixture
def config(tmp_path):
    """Of a folder with damaged images."""
    folder = make_folder(tmp_path / "images", numbered(SOUND) | BAD)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    return settings(folder, validation_split="train", test_split="train")


@pytest.fixture
def run(tmp_path):
    """A run folder."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def data(config, run=None, share=(0, 1)) -> pipeline.Pipeline:
    return pipeline.Pipeline(config, CODEC, seed=0, folder=run, share=share)


def batches(config, count, *, position=0, run=None, batch_size=37):
    """`count` training batches; three make an epoch."""
    found = data(config, run).train(batch_size, position)
    return [{k: v.tolist() for k, v in batch.items()} for batch in itertools.islice(found, count)]


def skipped(run) -> list[dict]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]


def warned(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_training_goes_on_and_names_each_once(config, run, caplog):
    found = batches(config, 9, run=run)
    assert all(batch.keys() == {"tokens", "variant"} for batch in found)
    for epoch in range(3):
        rows = [row for batch in found[3 * epoch : 3 * epoch + 3] for row in batch["tokens"]]
        assert len(rows) == SOUND + 5 and {row[0] for row in rows} == set(range(SOUND))
    lines = skipped(run)
    wanted = {f"{config.path}/{name}" for name in (*BAD, "gone.png")}
    assert len(lines) == 5 and {line["name"] for line in lines} == wanted
    reasons = {line["name"].split("/")[-1]: line["reason"] for line in lines}
    for name, words in {"empty": "empty", "text": "not an image", "small": "1 x 1"}.items():
        assert words in reasons[f"{name}.png"]
    assert "truncated" in reasons["cut.jpg"] and "No such file" in reasons["gone.png"]
    messages = warned(caplog)
    assert len(messages) == 5
    for line in lines:  # in the log as in the file
        assert sum(line["name"] in m and line["reason"] in m for m in messages) == 1
    caplog.clear()
    batches(config, 3, position=9, run=run)  # a restart
    list(data(config, run).evaluation("test", 37))
    assert skipped(run) == lines and not warned(caplog)


def test_a_half_written_record_does_no_harm(config, run):
    """A run that was killed as it wrote the file goes on, as often as it takes."""
    (run / "skipped.jsonl").write_text('{"name": "a.png", "rea')
    for _ in range(3):
        batches(config, 3, run=run)
    whole = [
        line for line in (run / "skipped.jsonl").read_text().splitlines() if line.endswith("}")
    ]
    assert len({json.loads(line)["name"] for line in whole}) == len(whole) == 5


def test_what_stands_in_is_the_same_every_time_and_after_a_restart(config):
    wanted = batches(config, 7)
    assert batches(config, 7) == wanted  # in another order of the threads, too
    assert batches(config, 3, position=4) == wanted[4:]


def test_worker_processes_change_no_batch(config):
    wanted = batches(config, 5, position=2)
    assert batches(dataclasses.replace(config, workers=2), 5, position=2) == wanted


@pytest.mark.parametrize("batch_size", [10, 64, 200])
def test_evaluation_counts_every_sound_image_exactly_once(config, batch_size, run):
    found = list(data(config, run).evaluation("test", batch_size))
    assert all(b.keys() == {"tokens", "variant", "mask", "index"} for b in found)
    assert all(len(b["mask"]) == batch_size for b in found)
    rows = [row[0] for b in found for row, mask in zip(b["tokens"], b["mask"], strict=True) if mask]
    assert sorted(rows) == list(range(SOUND)) and len(skipped(run)) == 5


def test_of_several_processes_each_has_a_file_and_all_are_counted(config, run, monkeypatch):
    for host in (0, 1, 2):  # one after the other, so that the last knows all
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        shared = data(config, run, share=(host, 3))
        for batch in shared.evaluation("test", 111):
            assert len(batch["mask"]) == 37
    files = [run / name for name in ("skipped.jsonl", "skipped-1.jsonl", "skipped-2.jsonl")]
    met = [
        {json.loads(line)["name"] for line in f.read_text().splitlines()}
        for f in files
        if f.exists()
    ]
    assert len(met) > 1 and sum(map(len, met)) == len(set().union(*met)) == 5
    assert shared.damage_log.count < 5
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    assert DamageLog(config, run).names == sorted(set().union(*met))  # on fewer processes, later


def test_images_are_given_without_the_damaged_ones(config, run):
    damage_log = DamageLog(config, run)
    found = [e["image"] for e in pipeline.images(config, "train", damage_log)]
    assert sorted(image[0, 0, 0] for image in found) == list(range(SOUND))
    assert damage_log.count == 5
    drawn = [e["image"][0, 0, 0] for e in pipeline.images(config, "train", damage_log, count=50)]
    again = [e["image"][0, 0, 0] for e in pipeline.images(config, "train", damage_log, count=50)]
    assert drawn == again and len(set(drawn)) == len(drawn) and 45 <= len(drawn) <= 50


def test_labels_come_from_the_image_that_stands_in(tmp_path, caplog):
    files = numbered(30, "dark/") | {
        f"light/{i}.png": encoded(np.full((4, 4, 1), 200 + i, np.uint8)) for i in range(30)
    }
    files |= {"dark/bad.png": b"", "light/bad.png": b"no image"}
    config = settings(make_folder(tmp_path / "images", files))
    rows = [
        (tokens[0], label)
        for batch in batches(config, 4, batch_size=31)
        for tokens, label in zip(batch["tokens"], batch["label"], strict=True)
    ]
    assert len(warned(caplog)) == 2
    assert {label == (value >= 200) for value, label in rows} == {True}


@pytest.mark.parametrize("use", ["train", "evaluation", "images"])
def test_the_policy_fail_ends_the_run_at_the_first(config, use, run):
    failing = dataclasses.replace(config, damaged="fail")
    with pytest.raises(InputError, match=r"\.(png|jpg) cannot be read: .*damaged=skip") as error:
        consume(use, failing, run)
    assert len(str(error.value).splitlines()) == 1 and not (run / "skipped.jsonl").exists()


def consume(use, config, run=None):
    """All of a data set, in one of the ways that it is read."""
    if use == "train":
        batches(config, 4, run=run)
    elif use == "evaluation":
        list(data(config, run).evaluation("test", 37))
    else:
        list(pipeline.images(config, "train", DamageLog(config, run)))


@pytest.mark.parametrize("use", ["train", "evaluation", "images"])
def test_too_large_a_share_stops_the_run(config, use, run):
    consume(use, config)  # 5 of 111 are below 5%
    consume(use, dataclasses.replace(config, max_damaged=5 / 111))
    with pytest.raises(InputError, match=r"5 of 111 images .*max_damaged=0.045") as error:
        consume(use, dataclasses.replace(config, max_damaged=0.045), run)
    assert len(str(error.value).splitlines()) == 1 and len(skipped(run)) == 5
    with pytest.raises(InputError, match=r"1 of 111 images"):
        consume(use, dataclasses.replace(config, max_damaged=0.0))


def test_a_restart_does_not_judge_what_was_met_before_by_the_little_seen_since(tmp_path, run):
    """17 of 400, 4.2%: never more than 5%, whatever is read first."""
    files = numbered(182, "train/a") | numbered(182, "train/b")
    files |= {f"train/bad{i}.png": b"" for i in range(16)}
    files |= numbered(19, "test/") | {"test/bad.png": b""}
    config = settings(make_folder(tmp_path / "images", files), test_split="test")
    early = dataclasses.replace(
        config, max_damaged=1.0
    )  # so that an early cluster does not stop it
    list(data(early, run).evaluation("train", 100))
    assert len(skipped(run)) == 16
    list(data(config, run).evaluation("test", 20))
    assert len(skipped(run)) == 17


@pytest.mark.parametrize(("use", "workers"), [("train", 0), ("train", 1), ("evaluation", 0)])
def test_where_all_images_are_damaged_one_sentence_says_so(tmp_path, use, workers):
    folder = make_folder(tmp_path / "images", {f"{i}.png": b"no image" for i in range(40)})
    config = settings(folder, test_split="train", workers=workers, max_damaged=1.0)
    with pytest.raises(
        InputError, match=r"none of 40 images can be read; .*\.png: not an"
    ) as error:
        consume(use, config)
    assert len(str(error.value).splitlines()) == 1
