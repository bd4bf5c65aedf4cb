"""Runs with teachers: what is refused before any work, what they leave, and that they resume."""

import dataclasses
import itertools
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from conftest import generator, random_params

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.errors import InputError
from gptv_jax.planning.training import Pretraining
from gptv_jax.stages import STAGES, comparison, setup
from gptv_jax.tokens import palette
from gptv_jax.weights import native
from gptv_jax.weights.native import WeightsFile

STEPS = config_lib.Train(
    steps=4, batch_size=8, eval_every=0, checkpoint_every=2, log_every=2, keep_checkpoints=9
)
MODEL = config_lib.Model(layers=1, width=16, heads=2)
CONFIG = config_lib.Config(
    data=config_lib.Data(
        name="digits",
        image_size=8,
        train_split="train[:64]",
        validation_split="validation[:16]",
        test_split="test[:16]",
        train_transforms=("shift(pixels=1, keep=0.3)",),
    ),
    tokens=config_lib.Tokens(levels=17),
    model=MODEL,
    train=STEPS,
    finetune=config_lib.Finetune(train=STEPS, scratch=False),
)


def weights_file(path, levels=17, image_size=8, classes=0, names=(), seed=0, starts=1, **model):
    """The path of a file of random weights."""
    shape = config_lib.Model(**{"layers": 2, "width": 32, "heads": 2} | model)
    grey = config_lib.Tokens(kind="grey", levels=levels)
    facts = {"classes": classes, "class_names": names, "starts": starts}
    file = WeightsFile(shape, grey, image_size, {}, **facts)
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh())):
        params = sharding.by_name(random_params(file.network, seed))
    arrays = {name: np.asarray(value) for name, value in params.items()}
    native.write(dataclasses.replace(file, params=arrays), path)
    return str(path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return weights_file(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


def distilled(*names: str, config=CONFIG, **fields) -> config_lib.Config:
    return dataclasses.replace(config, distill=config_lib.Distill(teacher=names, **fields))


def matched(*names: str, config=CONFIG, **fields) -> config_lib.Config:
    settings = config_lib.Matching(teacher=names, **fields)
    return dataclasses.replace(
        config, finetune=dataclasses.replace(config.finetune, distill=settings)
    )


def summary(folder: pathlib.Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


# What is refused


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"levels": 16}, "vocabulary 16, not 17"),
        ({"image_size": 6}, r"grid \(6, 6\), not \(8, 8\)"),
        ({"objective": "bert"}, "objective bert, not autoregressive"),
    ],
    ids=["vocabulary", "grid", "objective"],
)
def test_a_teacher_of_other_tokens_is_refused_before_any_work(given, told, tmp_path):
    name = weights_file(tmp_path / "other.safetensors", **given)
    with pytest.raises(InputError, match=rf"config\.distill\.teacher={name} has .*{told}"):
        gptv_jax.train(distilled(name), tmp_path / "run", ["pretrain"])
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_palette_is_refused_and_a_students_palette_is_the_teachers(tmp_path):
    colors = generator().integers(256, size=(2, 16, 3), dtype=np.uint8).astype(np.float32)
    made = [palette.Palette(np.unique(each / 127.5 - 1, axis=0), {}) for each in colors]
    settings = config_lib.Tokens(kind="palette", colors=16)
    file = WeightsFile(MODEL, settings, 8, {}, definition=made[0])
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh())):
        params = sharding.by_name(random_params(file.network))
    name = str(tmp_path / "teacher.safetensors")
    arrays = {n: np.asarray(value) for n, value in params.items()}
    native.write(dataclasses.replace(file, params=arrays), pathlib.Path(name))
    config = distilled(name, config=dataclasses.replace(CONFIG, tokens=settings))
    found = setup.find_codec(config)
    assert found.definition.equivalent(made[0])
    made[1].save(tmp_path / "other.npz")
    other = dataclasses.replace(settings, palette=str(tmp_path / "other.npz"))
    with pytest.raises(InputError, match=r"is another one than that of .*distill\.teacher="):
        setup.find_codec(dataclasses.replace(config, tokens=other))


def test_a_teacher_of_other_classes_is_refused_by_name(teacher, tmp_path):
    names = tuple(f"kind {i}" for i in range(10))
    files = {
        "few": weights_file(tmp_path / "few.safetensors", classes=3, names=names[:3]),
        "named": weights_file(tmp_path / "named.safetensors", classes=10, names=names),
    }
    for name, told in (
        (files["few"], r"knows 3 classes \(kind 0, kind 1, kind 2\), and the data have 10 \(0, 1"),
        (files["named"], r"knows 10 classes \(kind 0, .*, and the data have 10 \(0, 1"),
        (teacher, "has no class head"),
        (str(tmp_path / "nowhere"), "nowhere does not exist"),
    ):
        with pytest.raises(InputError, match=rf"finetune\.distill\.teacher={name}.*|.*{told}") as e:
            gptv_jax.train(matched(name), tmp_path / "run", ["pretrain", "finetune"])
        assert re.search(told, str(e.value))
    assert not (tmp_path / "run").exists()


def test_settings_that_teach_nothing_or_cannot_be_are_refused():
    cached = dataclasses.replace(CONFIG.data, name="tokens")
    detect = dataclasses.replace(CONFIG, task=config_lib.Task(name="detect"))
    for config, told in (
        (distilled("a", weight=0.0), r"distill\.weight is 0\.0, but .*features is 0"),
        (distilled("a", student_layer=2), r"student_layer is 2, but .*layers = 1"),
        (matched("a", config=detect), r"finetune\.distill\.teacher is .*task\.name is detect"),
        (
            matched("a", config=dataclasses.replace(CONFIG, data=cached)),
            r"mixup is 1\.0, but .*token cache",
        ),
    ):
        with pytest.raises(InputError, match=told):
            for name in ("pretrain", "finetune"):
                STAGES[name].check(config)


def test_a_deeper_layer_than_the_teacher_has_and_orders_it_has_not_read_are_refused(
    teacher, tmp_path
):
    orders = dataclasses.replace(MODEL, rotary=True, random_order=(0.5, 1.0))
    for config, told in (
        (distilled(teacher, teacher_layer=3), "teacher_layer is 3, but .* has 2 layers"),
        (
            distilled(teacher, config=dataclasses.replace(CONFIG, model=orders)),
            "read images in raster order alone",
        ),
    ):
        with pytest.raises(InputError, match=told):
            gptv_jax.train(config, tmp_path / "run", ["pretrain"])
    assert not (tmp_path / "run").exists()


# Pretraining


class StopError(Exception):
    """The simulated end of the process."""


def train_with_stops(config, folder, stages, stops, monkeypatch, caplog) -> list[str]:
    """The log's messages of a run that ends at batches of its trainings, and goes on.

    A stop is the number of a training, among those that the process begins, and of its batch.
    """
    read = Pipeline.train
    for stop in [*stops, None]:
        begun = itertools.count(1)

        def batches(*arguments, stop=stop, begun=begun, **more):
            number = next(begun)
            for at, batch in enumerate(read(*arguments, **more), start=1):
                if stop == (number, at):
                    raise StopError
                yield batch

        monkeypatch.setattr(Pipeline, "train", batches)
        with caplog.at_level("INFO", logger="gptv_jax"):
            if stop:
                with pytest.raises(StopError):
                    gptv_jax.train(config, folder, stages)
            else:
                gptv_jax.train(config, folder, stages)
    return [record.getMessage() for record in caplog.records]


def assert_same_weights(one, other, stage):
    found, wanted = (jax.device_get(gptv_jax.load(f, stage).params) for f in (one, other))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_run_learns_from_its_teacher_resumes_and_drops_the_map(
    teacher, tmp_path, monkeypatch, caplog
):
    config = distilled(teacher, features=1.0, compare=True)
    before = pathlib.Path(teacher).read_bytes()
    gptv_jax.train(config, tmp_path / "whole", ["pretrain"])
    # The third training of a process is that at equal time, the first ones have finished.
    stops = [(1, 4), (3, 3)]
    run = tmp_path / "stopped"
    said = train_with_stops(config, run, ["pretrain"], stops, monkeypatch, caplog)
    monkeypatch.undo()
    found, wanted = summary(run), summary(tmp_path / "whole")
    assert_same_weights(run, tmp_path / "whole", "pretrain")
    for name in ("test_kl", "validation_agreement", "equal_steps_test_kl"):
        assert found[f"pretrain/{name}"] == wanted[f"pretrain/{name}"]
    times = [line for line in said if line.startswith("pretrain_equal_time trains the same")]
    assert len(times) == 2 and times[0] == times[1]  # by times that the checkpoints hold
    steps = found["pretrain/equal_time_steps"]
    assert f"{steps} steps" in times[0] and steps >= found["pretrain/equal_steps_steps"] == 4
    nats = "test_nats_per_token"
    scores = (found[f"pretrain/{n}{nats}"] for n in ("equal_steps_", "", "teacher_"))
    closed = comparison.gap_closed(nats, *scores)
    assert found["pretrain/gap_closed_at_equal_steps"] == closed
    assert before == pathlib.Path(teacher).read_bytes()
    # The map is in the saved state alone, the teacher nowhere.
    assert not [name for name in sharding.by_name(gptv_jax.load(run).params) if "map" in name]
    listed = json.loads((run / "checkpoints/pretrain/4/state/_METADATA").read_text())
    names = {each["key_metadata"][0]["key"] for each in listed["tree_metadata"].values()}
    assert {name.split(".")[0] for name in names} == {"step", "params", "opt", "beside"}
    assert [name for name in names if name.startswith("beside")] == [
        "beside.feature_maps.0.feature_map"
    ]
    assert not [name for name in names if "teacher" in name]
    page = (run / "report.html").read_text()
    assert "without the teacher" in page and "gap" in page


@pytest.mark.parametrize(
    ("score", "without", "taught", "teacher", "closed"),
    [
        ("test_nats_per_token", 1.1, 1.05, 1.0, 0.5),
        ("test_nats_per_token", 1.1, 1.15, 1.0, -0.5),
        ("test_nats_per_token", 0.95, 1.05, 1.0, None),  # the teacher is no better
        ("test_accuracy", 0.6, 0.65, 0.7, 0.5),
        ("test_accuracy", 0.8, 0.65, 0.7, None),
    ],
)
def test_a_gap_is_closed_where_the_teacher_is_better(score, without, taught, teacher, closed):
    found = comparison.gap_closed(score, without, taught, teacher)
    assert found == (None if closed is None else pytest.approx(closed))


def test_the_student_without_a_teacher_is_the_run_without_one(teacher, tmp_path):
    gptv_jax.train(distilled(teacher, compare=True), tmp_path / "taught", ["pretrain"])
    gptv_jax.train(CONFIG, tmp_path / "alone", ["pretrain"])
    numbers = summary(tmp_path / "taught"), summary(tmp_path / "alone")
    name = "test_nats_per_token"
    assert numbers[0][f"pretrain/equal_steps_{name}"] == pytest.approx(
        numbers[1][f"pretrain/{name}"], rel=1e-6
    )
    assert numbers[0][f"pretrain/{name}"] != numbers[1][f"pretrain/{name}"]
    # A run folder teaches as its export does, and both together.
    names = str(tmp_path / "alone"), teacher
    gptv_jax.train(distilled(*names), tmp_path / "two", ["pretrain"])
    assert 0 <= summary(tmp_path / "two")["pretrain/test_agreement"] <= 1
    planned = Pretraining(distilled(*names)).teachers
    assert [network.config.layers for network in planned] == [1, 2]
