"""Settings of tasks have the effect that they promise; a test here fails without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_segment
from conftest import make_mesh, random_params
from test_detect import batch_of, scenes, task_of
from test_segment import records

from gptv_jax import sharding
from gptv_jax.config import tasks as settings
from gptv_jax.train import objective
from gptv_jax.train.loop import best_step


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh((1, 1, 1))):
        yield


def boxes_logits(network, params: dict, batch: dict) -> jax.Array:
    tokens = objective.sequence(network.layout, batch)
    return network.bind(params)(tokens, pixels=batch["image"]).logits["boxes"]


def test_coordinates_are_drawn_from_the_nucleus_and_classes_are_the_most_likely():
    drawn = {}
    for top_p in (0.0, 1e-6, 1.0):
        task = task_of(objects=3, bins=8, top_p=top_p)
        network, batch = task.network(), batch_of(task, scenes(8))
        params = random_params(network)
        total = task.metric(network, scenes(8).__getitem__).sums(params, iter([batch]))
        drawn[top_p] = total["drawn"]
    np.testing.assert_array_equal(drawn[1e-6], drawn[0.0])
    wide, is_class = drawn[1.0], np.arange(15) % 5 == 4
    assert (wide != drawn[0.0])[:, ~is_class].mean() > 0.3
    again = batch | {name: {"boxes": wide} for name in ("inputs", "targets")}
    logits = np.asarray(boxes_logits(network, params, sharding.global_batch(again)))
    np.testing.assert_array_equal(logits[:, is_class, 16:19].argmax(-1), wide[:, is_class] - 16)


def test_noise_objects_are_drawn_anew_for_every_example_of_training_alone():
    task, rng = task_of(objects=20, bins=500), np.random.default_rng(0)
    record = scenes(1)[0]
    first, second = (task.example(record, rng)["targets"]["boxes"] for _ in range(2))
    assert (first != second).mean() > 0.3
    evaluated = [task.example(record)["targets"]["boxes"] for _ in range(2)]
    np.testing.assert_array_equal(*evaluated)


def test_the_loss_of_detection_has_soft_targets_and_weights():
    task = task_of(bins=16, soft=0.8, class_weight=3.0)
    network = task.network()
    params, batch = random_params(network), sharding.global_batch(batch_of(task, scenes(8)))
    (part,) = task.parts()
    soft = objective.soft_targets(batch["targets"]["boxes"], part, 0.8)
    nats = -(soft * jax.nn.log_softmax(boxes_logits(network, params, batch))).sum(axis=-1)
    weights = np.asarray(batch["weights"]["boxes"])
    assert (weights[:, 4::5] == 3).all()
    found = task.loss(network)(params, None, batch, None)[0]
    assert float(found) == pytest.approx(float((nats * weights).mean()), rel=1e-5)


def test_corners_share_places_with_the_image_and_an_object_is_read_as_a_sum():
    task = task_of(bins=16)
    (part,), network = task.parts(), task.network()
    params = random_params(network)
    assert part.bins == 16 and part.summed and "place" in params["parts"]["boxes"]
    batch = sharding.global_batch(batch_of(task, scenes(4)))
    expected = boxes_logits(network, params, batch)
    for name, change in (("place", 0.0), ("position", 0.0)):
        weights = params["parts"]["boxes"]
        other = params | {"parts": {"boxes": weights | {name: weights[name] * change}}}
        assert jnp.abs(boxes_logits(network, other, batch) - expected).max() > 1e-3


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
    record, task = records(1)[0], test_segment.task_of(balance=1.0)
    found = task.example(record)["weights"]["labels"].reshape(4, 6)
    for row, column in np.ndindex(4, 6):
        cell = record["segmentation"][4 * row :, 4 * column :][:4, :4]
        held = cell[cell != 255]
        expected = task.class_weights[held].mean() * len(held) / cell.size
        plain = test_segment.task_of().example(record)["weights"]["labels"].reshape(4, 6)
        share = plain[row, column] * task.class_weights[held].mean()
        assert found[row, column] == pytest.approx(share, rel=1e-5), expected


def test_so_many_maps_are_drawn_and_so_many_layers_are_read():
    task = test_segment.task_of(samples=3, layers=(0, 2))
    network, given = task.network(), records(2)
    assert network.reading.layers == (0, 2)
    batch = test_segment.batch_of(task, given)
    params = random_params(network)
    tested = task.test_metric(network, given.__getitem__).sums(params, iter([batch]))
    assert tested["samples"].shape == (2, 3, 24)
    plain = task.metric(network, given.__getitem__).sums(params, iter([batch]))
    assert "samples" not in plain
    assert settings.Segment().samples == 0
