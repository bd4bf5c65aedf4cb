"""Cached draws teach as the teacher does: the loss and its gradient are unbiased."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import generator, make_mesh, random_batch, random_params, tiny_network

from benchmarks import cached_teacher
from benchmarks.sizes import QUICK
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.data.teacher_draws import Draws
from gptv_jax.decode import teacher_sampling
from gptv_jax.train import cached_distillation, distillation, objective

SAMPLES, TIMES, WIDTH = 4, 2000, 11


def random_logits(rows: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of student and teacher, float32 [rows, V]."""
    drawn = generator(seed).normal(0, 2, (2, rows, WIDTH)).astype(np.float32)
    return drawn[0], drawn[1]


def padded(ids: np.ndarray, width: int = SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Ids [P, N] in ascending order as ids and counts [P, K]."""
    return Draws.of(np.asarray(ids)).padded(width)


def gradients(student, ids, counts, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy against each row of the draws, and its gradient by the student's logits."""

    def one(student, ids, counts):
        return cached_distillation.cross_entropy_of_draws(student, ids, counts, temperature)

    take = jax.jit(jax.vmap(jax.value_and_grad(one), (None, 0, 0)))
    return jax.device_get(take(student, ids, counts))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_mean_gradient_over_draws_is_that_of_the_whole_distribution(temperature):
    (student,), (teacher,) = random_logits()
    likely = jax.nn.softmax(teacher / temperature)

    def whole(student):
        their = distillation.mean_log_probabilities([jnp.asarray(teacher)], temperature)
        return distillation.divergence(student, their, temperature)

    value, wanted = jax.value_and_grad(whole)(jnp.asarray(student))
    entropy = -(likely * jnp.log(likely)).sum()
    offset = jax.random.uniform(jax.random.key(0), (TIMES,))
    ids = teacher_sampling.systematic(jnp.broadcast_to(likely, (TIMES, WIDTH)), offset, SAMPLES)
    values, found = gradients(student, *padded(ids), temperature)
    for each, exact in ((values, value + entropy), (found, wanted)):
        error = 5 * each.std(axis=0) / np.sqrt(TIMES) + 1e-5
        assert (np.abs(each.mean(axis=0) - exact) < error).all()

    # The most likely ids with their probabilities do not pass.
    top = np.argsort(-likely)[None, :SAMPLES]
    _, (biased,) = gradients(student, top, np.asarray(likely)[top], temperature)
    assert (np.abs(biased - wanted) > error).any()


def test_draws_of_every_id_are_the_whole_distribution():
    """Shares without an error: the gradient is that of KL, and 0 where the student is right."""
    (student,), _ = random_logits()
    counts = np.arange(1, WIDTH + 1, dtype=np.uint8)[None]
    teacher = np.log(counts[0] / counts.sum()).astype(np.float32)
    ids = np.arange(WIDTH, dtype=np.uint8)[None]
    for own in (student, teacher):
        _, (found,) = gradients(own, ids, counts, 1.0)
        wanted = jax.grad(distillation.divergence)(jnp.asarray(own), jnp.asarray(teacher))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found, 0, rtol=0, atol=1e-6)


def cached_batch(network, size: int = 8) -> dict:
    """A random batch with random draws of a teacher."""
    drawn = np.sort(generator(1).integers(network.vocabulary, size=(size, network.length, SAMPLES)))
    pairs = [padded(each) for each in drawn]
    ids, counts = (np.stack(each) for each in zip(*pairs, strict=True))
    counts = counts.astype(np.uint8)
    return random_batch(network, size) | {
        "teacher_ids": ids.astype(np.uint8),
        "teacher_counts": counts,
    }


def test_the_loss_weighs_both_sums_and_is_equal_in_chunks_and_on_a_mesh(monkeypatch):
    network, key = tiny_network(), jax.random.key(0)
    settings = config_lib.Distill(cached=True, weight=0.7, data_weight=0.2, temperature=2.0)
    loss, found = cached_distillation.make_loss(network, settings), []
    for shape, limit in (((1, 1, 1), 2**27), ((1, 1, 1), 2**9), ((2, 2, 2), 2**7)):
        monkeypatch.setattr(objective, "LOGITS_BYTES", limit)
        with jax.set_mesh(make_mesh(shape)):
            batch = sharding.global_batch(cached_batch(network))
            params = random_params(network)
            take = jax.jit(jax.value_and_grad(loss, has_aux=True))
            (value, metrics), gradient = take(params, None, batch, key)
            found.append(jax.device_get((value, metrics, gradient)))
    value, metrics, _ = found[0]
    total = 0.7 * 2.0**2 * metrics["teacher_cross_entropy"] + 0.2 * metrics["nats_per_token"]
    np.testing.assert_allclose(value, total, rtol=1e-6)
    assert metrics["loss"] == value
    for other in found[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other, found[0]
        )


# The benchmark.


@pytest.fixture(scope="module")
def images():
    """Random tokens and distributions, some of them sharp, as of a teacher that knows a little."""
    rng = generator(2)
    likely = jax.nn.softmax(3 * rng.normal(size=(40, 16, WIDTH)).astype(np.float32))
    tokens = rng.integers(WIDTH, size=(40, 16), dtype=np.int32)
    return cached_teacher.Images(tokens, np.asarray(likely))


def test_the_benchmark_tells_biased_targets_from_unbiased_ones(images):
    rows = {row["contender"]: row for row in cached_teacher.compared("targets", images)}
    top, drawn, independent = (rows[f"{kind} 4"] for kind in ("top", "drawn", "independent"))
    assert top["bias"] > 10 * max(drawn["bias"], independent["bias"])
    assert top["gradient"] > 4 * drawn["gradient"] and top["missing"] > 0
    assert drawn["noise"] < independent["noise"]
    assert top["overconfidence"] > rows["teacher"]["overconfidence"] + 1
    assert abs(drawn["overconfidence"] - rows["teacher"]["overconfidence"]) < 1


def test_the_benchmark_trains_students_of_every_kind_of_targets(images, one_device):
    sets = {"train": images, "test": images}
    rows = cached_teacher.trained(tiny_network(layers=1), sets, count=2, seeds=1)
    names = [row["contender"] for row in rows]
    assert names[:2] == ["data alone", "teacher in memory"]
    assert {f"{kind} {n}" for kind in ("top", "drawn") for n in (4, 8)} <= {*names}
    assert all(float(row["nats"]) > 0 and float(row["kl"]) > 0 for row in rows)


@pytest.mark.process
def test_the_benchmark_takes_the_train_steps():
    arguments = argparse.Namespace(rounds=1, seconds=0.0, warm_up=0.0, only="")
    rows = cached_teacher.steps(QUICK, arguments)
    assert rows[0]["contender"] == "no teacher" and len(rows) == 4
    assert all(row["median"] > 0 and not row.get("failed") for row in rows)
