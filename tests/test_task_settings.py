"""Settings of tasks have the effect that they promise; a test here fails without it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import test_segment
from conftest import make_mesh, random_params
from test_detect import batch_of, scenes, task_of
from test_segment import records

from gptv_jax import sharding
from gptv_jax.model.parts import soft_targets
from gptv_jax.train import objective
from gptv_jax.train.metrics import best_step


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh((1, 1, 1))):
        yield


@functools.partial(jax.jit, static_argnums=0)
def box_logits(network, params: dict, batch: dict) -> jax.Array:
    tokens = objective.sequence(network.layout, batch)
    return network.bind(params)(tokens, pixels=batch["image"]).logits["boxes"]


def test_coordinates_are_drawn_from_the_nucleus_and_classes_are_the_most_likely():
    task = task_of(objects=3, bins=16, top_p=0.6)
    network, batch = task.network(), batch_of(task, scenes(16))
    params = random_params(network)
    drawn = task.metric(network, scenes(16).__getitem__).sums(params, iter([batch]))["drawn"][:, 0]
    again = batch | {name: {"boxes": drawn} for name in ("inputs", "targets")}
    logits = np.asarray(box_logits(network, params, sharding.global_batch(again)))
    np.testing.assert_array_equal(logits[:, 4::5, 32:35].argmax(-1), drawn[:, 4::5] - 32)
    for slot, first in ((0, 0), (1, 16)):  # the corner that nothing restricts
        chances = np.asarray(jax.nn.softmax(logits[:, slot::5, first : first + 16]))
        taken = np.take_along_axis(chances, drawn[:, slot::5, None] - first, -1)
        likelier = np.where(chances > taken, chances, 0).sum(axis=-1)
        assert likelier.max() < 0.6 and (likelier > 0).mean() > 0.1


def test_noise_objects_are_drawn_anew_for_every_example_of_training_alone():
    task, rng = task_of(objects=20, bins=500), np.random.default_rng(0)
    record = scenes(1)[0]
    first, second = (task.example(record, rng)["targets"]["boxes"] for _ in range(2))
    assert (first != second).mean() > 0.3
    evaluated = [task.example(record)["targets"]["boxes"] for _ in range(2)]
    np.testing.assert_array_equal(*evaluated)


def test_the_loss_of_detection_has_soft_targets_and_weights():
    task = task_of(objects=3, bins=16, soft=0.8, class_weight=3.0)
    (part,), network, loss = task.parts(), task.network(), task.loss(task.network())
    params, batch = random_params(network), sharding.global_batch(batch_of(task, scenes(16)))
    soft = soft_targets(batch["targets"]["boxes"], part, 0.8)
    nats = -(soft * jax.nn.log_softmax(box_logits(network, params, batch))).sum(axis=-1)
    weights = np.asarray(batch["weights"]["boxes"])
    assert (weights[:, 4::5] == 3).all()
    found = jax.jit(lambda params, batch: loss(params, None, batch, None)[0])(params, batch)
    assert float(found) == pytest.approx(float((nats * weights).mean()), rel=1e-5)


def test_corners_share_places_with_the_image_and_an_object_is_read_as_a_sum():
    (part,) = task_of(bins=16).parts()
    assert part.bins == 16 and part.has_places and part.summed


@pytest.mark.parametrize(
    ("task", "better", "worse"),
    [(task_of(), {"ap": 0.5}, {"ap": 0.4}), (test_segment.task_of(), {"miou": 2}, {"miou": 1})],
    ids=["detect", "segment"],
)
def test_the_checkpoint_with_the_best_number_is_kept(task, better, worse):
    later = {"step": 2, "nats_per_token": 1.0}
    evaluations = [{"step": 1, "nats_per_token": 2.0} | better, later | worse]
    primary = task.metric(task.network(), records(1).__getitem__).primary
    assert best_step(evaluations, primary) == 1
    assert best_step([evaluations[0] | worse, later | worse], primary) == 2


def test_validation_reads_as_many_images_as_are_set():
    for make in (task_of, test_segment.task_of):
        assert make().validation_images is None and make(validation_images=7).validation_images == 7


def test_training_reads_other_label_tokens_as_often_as_corruption_says():
    record = records(1)[0]
    for share in (0.0, 0.3, 1.0):
        task, rng = test_segment.task_of(corruption=share), np.random.default_rng(0)
        examples = [task.example(record, rng) for _ in range(200)]
        targets = [each["targets"]["labels"] for each in examples]
        inputs = [each.get("inputs", each["targets"])["labels"] for each in examples]
        # A token that is drawn is the right one as often as there are tokens.
        changed = np.not_equal(inputs, targets).mean()
        assert changed == pytest.approx(share * (1 - 1 / len(test_segment.NAMES)), abs=0.03)
    assert "inputs" not in task.example(record)


def test_written_tokens_weigh_as_the_classes_of_their_pixels():
    record, task, measured = records(1)[0], test_segment.task_of(balance=1.0), records(20)
    for each in measured[:15]:
        each["segmentation"][each["segmentation"] == 2] = 0  # so that class 2 is rare
    task = dataclasses.replace(task, measured=task.measure(lambda count: measured))
    found = task.example(record)["weights"]["labels"].reshape(4, 6)
    plain = test_segment.task_of().example(record)["weights"]["labels"].reshape(4, 6)
    for row, column in np.ndindex(4, 6):
        cell = record["segmentation"][4 * row :, 4 * column :][:4, :4]
        expected = plain[row, column] * task.class_weights[cell[cell != 255]].mean()
        assert found[row, column] == pytest.approx(expected, rel=1e-5)
    assert np.ptp(found / plain) > 0.1
