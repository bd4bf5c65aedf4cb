"""Segmentation: its losses, its numbers from rows of a split, its pictures and its Python call."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh, random_params

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.data.records import plane_to_original
from gptv_jax.decode import answers
from gptv_jax.tasks.segment import NAME, Segment
from gptv_jax.tasks.task import Grammar
from gptv_jax.train import objective

NAMES = ("ground", "cup", "tree", "never")
SIZE = (16, 24)


def records(count: int, seed: int = 0) -> list[dict]:
    """Label maps of blocks of three of the four classes, some pixels without a class; noise."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        coarse = rng.integers(3, size=(4, 6))
        segmentation = np.kron(coarse, np.ones((4, 4), int)).astype(np.uint8)
        segmentation[rng.random(SIZE) < 0.1] = 255
        image = rng.integers(256, size=(*SIZE, 1), dtype=np.uint8)
        found.append({"segmentation": segmentation, "image": image})
    return found


@functools.cache
def task_of(measured: bool = True, **settings) -> Segment:
    config = config_lib.Config()
    fields = {"labels": "cells", "cell": 4, **settings}
    task = config_lib.Task(
        name="segment",
        image_input="pixels",
        stem=(8, 8),
        segment=config_lib.tasks.Segment(**fields),
    )
    data = dataclasses.replace(config.data, image_size=SIZE, name="digit_scenes")
    model = dataclasses.replace(config.model, layers=2, width=16, heads=2)
    tokens = dataclasses.replace(config.tokens, kind="none")
    config = dataclasses.replace(config, task=task, data=data, model=model, tokens=tokens)
    made = Segment(config, map_names=NAMES)
    return (
        dataclasses.replace(made, measured=made.measure(lambda n: records(8))) if measured else made
    )


def batch_of(task: Segment, given: list[dict]) -> dict:
    """A batch of evaluation."""
    rows = [task.example(record) | {"image": record["image"]} for record in given]
    rows = jax.tree.map(lambda *each: np.stack(each), *rows)
    return rows | {
        "view": np.tile(np.float32([0, 0, *SIZE]), (len(given), 1)),
        "index": np.arange(len(given), dtype=np.int32),
        "mask": np.ones(len(given), np.float32),
    }


def known(given: list[dict]):
    return given.__getitem__


def test_try():
    task, given = task_of(samples=3), records(6)
    network = task.network()
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = random_params(network)
        metric = task.test_metric(network, known(given))
        total = metric.sums(params, iter([batch_of(task, given)]))
        print(
            metric.result(total),
            task.details(total, known(given)),
            task.bounds(total, known(given)),
        )
        loss = task.loss(network)(params, None, sharding.global_batch(batch_of(task, given)), None)
        print(loss)
