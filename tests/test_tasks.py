"""Any task through the stage `finetune`: a toy one, and what a run refuses."""

import dataclasses
import functools
import logging
from typing import ClassVar

import jax
import numpy as np
import pytest
from conftest import made_once, make_mesh, random_params

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import files, sharding, tasks
from gptv_jax.data import sources
from gptv_jax.decode import answers
from gptv_jax.decode.restriction import Restriction
from gptv_jax.errors import InputError
from gptv_jax.model.layout import Part
from gptv_jax.stages.run import run_stages
from gptv_jax.tasks.task import Task
from gptv_jax.train import objective
from gptv_jax.train.step import Metric

LEVELS = 6


@functools.cache
def eval_step(network):
    @jax.jit
    def step(params, batch):
        tokens, wanted = objective.sequence(network.layout, batch), batch["targets"]["level"][:, 0]
        found = network.bind(params)(tokens).logits["level"][:, 0].argmax(axis=-1)
        nats = objective.parts_nats(network, params, batch)
        rows = {"accuracy": found == wanted, "nats_per_token": nats, "images": batch["mask"]}
        sums = {name: (values * batch["mask"]).sum() for name, values in rows.items()}
        return sums | {"counts": (jax.nn.one_hot(wanted, LEVELS) * batch["mask"][:, None]).sum(0)}

    return step


def means(sums) -> dict:
    return {n: float(sums[n]) / float(sums["images"]) for n in ("accuracy", "nats_per_token")}


@dataclasses.dataclass(frozen=True)
class Level(Task):
    """The image's mean level as one token."""

    primary: ClassVar = {"accuracy": 1, "nats_per_token": -1}
    pictures: ClassVar = {"grey": "Test images."}

    def parts(self):
        return (Part("level", LEVELS, (1,)),)

    def example(self, record, rng=None):
        level = np.clip(2 * record["image"].mean() - 7, 0, LEVELS - 1)
        return {"targets": {"level": level.astype(np.int32)[None]}}

    def metric(self, network, annotations):
        return Metric(eval_step(network), means, primary=self.primary)

    def bounds(self, total, annotations):
        return {"majority": {"accuracy": float(total["counts"].max() / total["images"])}}

    def files(self, total, annotations):
        return {"level.json": {"first label": int(annotations(0)["label"])}}

    def show(self, records, total):
        return {"grey": np.repeat(records(0)["image"] * 15, 3, axis=-1)}


TRAIN = config_lib.Train(
    steps=60,
    batch_size=32,
    eval_every=0,
    log_every=30,
    optimizer=config_lib.Optimizer(
        name="muon", learning_rate=0.02, rest_learning_rate=0.003, warmup_steps=5
    ),
)
CONFIG = config_lib.Config(
    model=config_lib.Model(layers=2, width=32, heads=2, axial_positions=True),
    task=config_lib.Task(name="level"),
    train=TRAIN,
    finetune=config_lib.Finetune(train=dataclasses.replace(TRAIN, steps=200), patience=0),
)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "level", Level)


@pytest.fixture
def run(tmp_path_factory, toy):
    """The folder of a run that was pretrained and then learned the level, and its log."""

    def make(folder):
        lines, handler = [], logging.Handler()
        handler.emit = lambda entry: lines.append(entry.getMessage())
        log = logging.getLogger("gptv_jax")
        level = log.level
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        run_stages(CONFIG, str(folder), ["pretrain", "finetune"])
        log.setLevel(level)
        log.removeHandler(handler)
        return lines

    return made_once(tmp_path_factory, "level_run", make)


def test_a_task_of_one_file_is_trained_measured_and_reported(run):
    folder, lines = run
    found = files.read_json(folder / "summary.json", {})
    scores = {n: found[f"finetune/{n}test_accuracy"] for n in ("", "scratch_", "majority_")}
    assert scores[""] > scores["majority_"] + 0.2 and scores["scratch_"] < 1, scores
    assert found["finetune/test_images"] == 400 and found["finetune/steps"] > 0
    error = found["finetune/test_accuracy_standard_error"]
    assert error == pytest.approx((scores[""] * (1 - scores[""]) / 400) ** 0.5)
    assert 0 < found["finetune/test_nats_per_token"] < found["finetune/scratch_seconds_up"]
    [line] = [line for line in lines if line.startswith("finetune takes blocks")]
    assert "begins anew: parts.level" in line and line.endswith("leaves out: head.")
    page = (folder / "report.html").read_text()
    assert "<h2>Grey</h2>" in page and "validation accuracy" not in page  # a plot has that
    assert "Fine-tuning, test accuracy" in page and (folder / "samples/grey.png").exists()
    first = sources.open_source(CONFIG.data, "test")[0]["label"]
    assert files.read_json(folder / "finetune/level.json", {}) == {"first label": int(first)}


def test_a_model_keeps_its_task_and_draws_with_the_pretrained_weights(run, tmp_path):
    folder, _ = run
    model, pretrained = gptv_jax.load(folder), gptv_jax.load(folder, "pretrain")
    assert "task level" in repr(model) and model.classes == ()
    images = np.stack([sources.open_source(CONFIG.data, "test")[i]["image"] for i in range(2)])
    np.testing.assert_array_equal(model.complete(images), pretrained.complete(images))
    calls = [model.log_likelihood, model.surprise, lambda x: model.features(x, 1), model.classify]
    for call in [*calls, lambda x: model.logits(model.tokenize(x))]:
        with pytest.raises(InputError, match=r"level|class head"):
            call(images)
    model.save(tmp_path / "level.safetensors")
    again = gptv_jax.load(tmp_path / "level.safetensors")
    assert again.network == model.network and repr(again) == repr(model)
    for a, b in zip(*map(jax.tree.leaves, (again.params, model.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match=r"fine-tuned for .*level"):
        again.weights_file().headless()


class Halves(Level):
    """The levels of both halves, two tokens: the second is drawn with the first in the cache."""

    def parts(self):
        return (Part("level", LEVELS, (2,)),)


def test_the_cached_decoder_answers_what_the_whole_pass_says():
    network, rng = Halves(CONFIG).network(), np.random.default_rng(0)
    tokens = rng.integers(network.vocabulary, size=(8, 64), dtype=np.int32)
    settings = Restriction(np.float32(1), np.int32(LEVELS), np.float32(1))
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params, given = random_params(network), sharding.shard_rows(tokens)
        drawn, likely = answers.answer(network, params, given, None, jax.random.key(0), settings)
        whole = jax.nn.softmax(network.bind(params)(drawn).logits["level"], axis=-1)
    levels = np.asarray(drawn)[:, -2:]
    np.testing.assert_array_equal(drawn[:, :-2], tokens)
    found = np.take_along_axis(np.asarray(whole), levels[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(likely[:, -2:], found, rtol=1e-4)
    assert found.std(axis=0).min() > 1e-3 and len(np.unique(levels)) > 2


ROTATED = {
    "data": {
        "name": "digit_scenes",
        "image_size": (32, 48),
        "train_transforms": ("flip()", "rotate()"),
    },
    "tokens": {"kind": "none"},
    "task": {"name": "detect", "image_input": "pixels", "stem": (8, 8, 8)},
}


@pytest.mark.parametrize(
    ("changes", "stages", "words"),
    [
        ({"task": {"name": "dance"}}, None, r"config\.task\.name is 'dance'; .* classify"),
        ({"data": {"labels": False}, "task": {}}, ["finetune"], "no labels, .*config.task.name="),
        ({"task": {"image_input": "pixels", "stem": ()}}, None, "classify reads tokens alone"),
        ({"task": {"name": "level"}, "model": {"objective": "bert"}}, None, "for images alone"),
        ({"tokens": {"kind": "none"}}, None, r"tokens\.kind is 'none'"),
        (ROTATED, ["finetune"], r"not the boxes, .*config\.data\.train_transforms"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(changes, stages, words, tmp_path):
    settings = config_lib.default()
    settings.model.update({"layers": 1, "width": 16, "heads": 2})
    for section, values in changes.items():
        settings[section].update(values)
    with pytest.raises(InputError, match=words) as refused:
        run_stages(config_lib.resolve(settings), str(tmp_path / "run"), stages)
    assert len(str(refused.value)) <= 300 and not (tmp_path / "run").exists()
