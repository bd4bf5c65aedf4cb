"""Fine-tuning by function matching: views, mixed images, trainings without teachers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import generator
from test_distillation_run import (
    CONFIG,
    MODEL,
    STEPS,
    assert_same_weights,
    distilled,
    matched,
    summary,
    train_with_stops,
    weights_file,
)

import gptv_jax
from gptv_jax import tokens
from gptv_jax.data import mixup
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.planning.finetuning import Finetuning
from gptv_jax.runs.distilled import ORIGINS
from gptv_jax.runs.record import RunFolder
from gptv_jax.stages import comparison
from gptv_jax.train import distillation
from gptv_jax.train.loop import Fitted

BOTH = ["pretrain", "finetune"]
TIMES = {"stage", "time", "tokens_per_second", "data_wait_share", "mfu"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return weights_file(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    return weights_file(path, classes=10)


def test_student_and_teacher_see_one_mixed_view(classifier, tmp_path, monkeypatch):
    seen, make = [], distillation.make_loss

    def watched(*arguments, **more):
        loss = make(*arguments, **more)

        def watch(params, frozen, batch, key, step):
            jax.debug.callback(lambda tokens: seen.append(np.array(tokens)), batch["tokens"])
            return loss(params, frozen, batch, key, step)

        return watch

    monkeypatch.setattr(distillation, "make_loss", watched)
    gptv_jax.train(matched(classifier), tmp_path, BOTH)
    found = summary(tmp_path)
    for name in ("test_kl", "test_agreement", "teacher_test_accuracy", "test_class_nats"):
        assert np.isfinite(found[f"finetune/{name}"])
    jax.effects_barrier()
    codec = tokens.codec_of(CONFIG)
    wanted = Pipeline(CONFIG.data, codec, 0).train(8, mixup=1.0)
    plain = Pipeline(CONFIG.data, codec, 0).train(8)
    assert len(seen) == 4
    for found, mixed, alone in zip(seen, wanted, plain, strict=False):
        np.testing.assert_array_equal(found, mixed["tokens"])
        assert (mixed["tokens"] != alone["tokens"]).any(axis=1).mean() > 0.8
    assert Finetuning(matched(classifier)).teachers[0].classes == 10


def test_function_matching_that_was_stopped_ends_as_if_it_was_not(
    teacher, classifier, tmp_path, monkeypatch, caplog
):
    config = distilled(teacher, config=matched(classifier, compare=True))
    gptv_jax.train(config, tmp_path / "whole", BOTH)
    # The first training is that of pretraining, or where that has finished that of fine-tuning;
    # the second stop is in the training without the teacher.
    stops = [(2, 4), (2, 3)]
    train_with_stops(config, tmp_path / "stopped", BOTH, stops, monkeypatch, caplog)
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole", "finetune")
    found, wanted = summary(tmp_path / "stopped"), summary(tmp_path / "whole")
    for name in ("test_kl", "validation_agreement", "test_class_nats", "equal_steps_test_kl"):
        assert found[f"finetune/{name}"] == wanted[f"finetune/{name}"]
    # This pretraining had a teacher, and no training without one beside it.
    begun = found["finetune/without_teacher_begins_with"]
    assert begun == "distilled pretrain"
    assert ORIGINS[begun] in (tmp_path / "whole" / "report.html").read_text()


# Beside the trainings without teachers


def logged(folder, training: str) -> list[dict]:
    """The numbers of a training's log that are no times."""
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    of_training = (event for event in events if event["stage"] == training)
    return [{k: v for k, v in event.items() if k not in TIMES} for event in of_training]


def test_fine_tuning_without_a_teacher_is_that_of_a_run_without_any_teacher(
    teacher, classifier, tmp_path
):
    # Dropout shows whether the trainings draw from one seed.
    plain = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dropout=0.2))
    config = distilled(teacher, config=matched(classifier, config=plain, compare=True))
    config = dataclasses.replace(config, distill=dataclasses.replace(config.distill, compare=True))
    gptv_jax.train(config, tmp_path / "taught", BOTH)
    gptv_jax.train(plain, tmp_path / "alone", BOTH)
    for stage in BOTH:
        found = logged(tmp_path / "taught", f"{stage}_equal_steps")
        wanted = logged(tmp_path / "alone", stage)
        assert [each["step"] for each in found] == [each["step"] for each in wanted]
        assert found[-1]["step"] == STEPS.steps
        for one, other in zip(found, wanted, strict=True):
            assert one == pytest.approx(other, rel=1e-6)
    assert logged(tmp_path / "taught", "finetune") != wanted
    found, alone = summary(tmp_path / "taught"), summary(tmp_path / "alone")
    assert found["finetune/without_teacher_begins_with"] == comparison.ALONE
    assert found["finetune/equal_steps_test_accuracy"] == alone["finetune/test_accuracy"]
    assert found["finetune/equal_steps_steps"] == found["finetune/steps_taken"] == STEPS.steps
    for name in ("test_class_nats", "teacher_test_class_nats", "equal_time_test_class_nats"):
        assert found[f"finetune/{name}"] > 0
    page = (tmp_path / "taught" / "report.html").read_text()
    assert ORIGINS[comparison.ALONE] in page and "test class nats" in page


@pytest.mark.parametrize(
    ("distilled", "plain", "asked"),
    [
        ((8, 20.0), (8, 5.0), 32),  # (steps, seconds) of trainings of at most 8 steps
        ((6, 12.0), (8, 4.0), 24),  # both times are of the steps that were taken
        ((8, 16.0), (4, 1.0), 64),
        ((6, 12.0), (8, 32.0), 6),  # never fewer steps than with the teacher
        ((8, None), (8, None), 8),  # nothing was timed
    ],
)
def test_equal_time_is_that_of_the_steps_that_were_taken(distilled, plain, asked, tmp_path):
    given = {"test_accuracy": 0.5, "teacher_test_accuracy": 0.9}
    begun = {}

    def fitted(steps, seconds):
        return Fitted({}, 2, [], None, {}, steps, seconds)

    def train(name, steps):
        begun[name] = steps
        # The one at equal time stops early as well.
        return fitted(*(plain if name.endswith("steps") else (5, 3.0)))

    found = comparison.without_teachers(
        RunFolder(CONFIG, str(tmp_path)), "finetune", fitted(*distilled), given, 8,
        "test_accuracy", lambda params: given, train,
    )  # fmt: skip
    assert begun == {"finetune_equal_steps": 8, "finetune_equal_time": asked}
    told = ("steps_taken", "equal_steps_steps", "equal_time_steps")
    assert [found[name] for name in told] == [distilled[0], plain[0], 5]
    told = ("training_seconds", "equal_steps_seconds", "equal_time_seconds")
    assert [found[name] for name in told] == [distilled[1], plain[1], 3.0]


# Mixed images


def test_mixed_images_are_means_with_shares_that_a_generator_draws():
    one, other = (np.full((4, 4, 1), value, np.uint8) for value in (0, 200))
    record = {"image": one, "label": np.int32(3)}
    drawn = [mixup.mixed(record, {"image": other}, 1.0, generator(i)) for i in range(200)]
    values = np.array([each["image"][0, 0, 0] for each in drawn])
    assert all(each["label"] == 3 and np.ptp(each["image"]) == 0 for each in drawn)
    assert values.max() <= 100  # the share of the other image is half at most, and uniform
    assert np.mean(values) == pytest.approx(50, abs=6) and np.std(values) > 20
    again = mixup.mixed(record, {"image": other}, 1.0, generator(7))
    np.testing.assert_array_equal(again["image"], drawn[7]["image"])


def test_every_epoch_draws_another_partner_and_another_share_for_an_image():
    data = dataclasses.replace(CONFIG.data, train_transforms=())
    count, epochs = 64, 4  # images of the training split

    def read(mixup: float) -> np.ndarray:
        batches = Pipeline(data, None, 0).train(count, mixup=mixup)
        shown = [next(batches)["image"] for _ in range(epochs)]
        return np.reshape(shown, (epochs, count, -1)).astype(np.float64)

    alone, mixed = read(0.0), read(1.0)
    images = np.unique(alone[0], axis=0)
    assert len(images) == count
    drawn = {}  # by image, the partner and the partner's share of every epoch
    for own, blend in zip(alone.reshape(-1, 64), mixed.reshape(-1, 64), strict=True):
        away = images - own
        shares = (away @ (blend - own)) / np.maximum((away**2).sum(axis=1), 1e-9)
        errors = np.abs(shares[:, None] * away + own - blend).max(axis=1)
        partner = int(np.argmin(errors))
        if shares[partner] > 0.1:  # of smaller shares rounding leaves too little
            assert errors[partner] < 0.75 and shares[partner] < 0.55
            drawn.setdefault(own.tobytes(), []).append((partner, shares[partner]))
    pairs = [each for each in drawn.values() if len(each) > 1]
    assert len(pairs) > count / 2
    partners = [{partner for partner, _ in each} for each in pairs]
    assert np.mean([len(found) > 1 for found in partners]) > 0.9
    assert np.mean([np.ptp([share for _, share in each]) > 0.02 for each in pairs]) > 0.9
    assert len(set.union(*partners)) > count / 2
