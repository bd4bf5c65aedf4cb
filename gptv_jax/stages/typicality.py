"""Typicality: what is usual for the trained weights, and what is gained by rejecting the unusual.

Training images say how the nats of the network and the bits of a coder spread together, validation
images how far from the training images usual images lie (`decode/typicality.py`), and test images
whether this holds for images that neither has seen. The run folder keeps it for each stage's
weights, so `Model.typicality` knows it. Of a network with a class head, the test images also say
how accurate the classes are where the least usual, or the least confident, images are rejected.

The stage runs where --stages names it, and then every time.
"""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from gptv_jax import files, hosts, sharding
from gptv_jax.api.forward import network_output
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.data import pipeline, sources
from gptv_jax.decode.sampler import Sampler
from gptv_jax.decode.typicality import FILE, STATISTICS, Calibration, statistics
from gptv_jax.model.gpt import Network
from gptv_jax.runs import pictures, record, rejection
from gptv_jax.runs.context import Context
from gptv_jax.stages import pretrained
from gptv_jax.tasks.classify import Classify
from gptv_jax.train.metrics import Progress

LOG = logging.getLogger(__name__)
AT_ONCE, REPORT_EVERY = 64, 16  # images in a forward pass; passes between two lines of the log
IMAGES = {"train": 2_000, "validation": 5_000, "test": 5_000}  # of each split, at most
SHOWN = 32  # test images in the picture of the least usual ones
THRESHOLDS = (0.01, 0.05)  # of typicality, whose shares of rejected test images are reported


class Weights(NamedTuple):
    """Weights of a finished stage, or those that the run was given."""

    stage: str
    network: Network
    params: dict
    step: int | None  # None: the run was given the weights


class Read(NamedTuple):
    """What a split's N images tell."""

    statistics: Float[np.ndarray, "N S"]
    tokens: Int[np.ndarray, "N T"]
    labels: Int[np.ndarray, " M"]  # N, or none without a class head
    probabilities: Float[np.ndarray, "M C"]


def run_stage(context: Context) -> dict:
    """Writes typicality/ and the picture of unusual images; returns the summary's numbers."""
    folder, kept, numbers = context.folder.path, {}, {}
    for weights in _weights(context):
        LOG.info("typicality reads images with the weights of the stage %s.", weights.stage)
        splits = {split: _read(context, weights, split) for split in IMAGES}
        train, validation, test = splits.values()
        calibration = Calibration.fit(train.statistics, validation.statistics, weights.step)
        kept[weights.stage] = calibration.to_json()
        distance = calibration.distance(test.statistics)
        share = calibration.typicality(test.statistics)
        before = "" if weights.stage == "pretrain" else f"{weights.stage}_"
        for name, values in zip(STATISTICS, test.statistics.T, strict=True):
            numbers[f"{before}test_{name}"] = float(values.mean())
        for threshold in THRESHOLDS:
            rejected = float((share < threshold).mean())
            numbers[f"{before}test_rejected_below_{threshold:g}"] = rejected
        if len(test.probabilities):
            found = rejection.curves(test.probabilities, test.labels, -distance)
            files.write_json(folder / rejection.FILE, found)
            numbers |= rejection.numbers(found)
        numbers |= {f"{split}_images": len(each.tokens) for split, each in splits.items()}
        unusual = test.tokens[np.argsort(-distance, kind="stable")[:SHOWN]]
    shown = context.codec.picture(context.codec.decode(unusual))
    pictures.save_grid(shown, folder / "samples" / "unusual.png")
    files.write_json(folder / FILE, kept)
    return numbers


def _weights(context: Context) -> Iterator[Weights]:
    """The weights of the run that give likelihoods, stage by stage."""
    config, summary = context.config, hosts.from_first(context.folder.summary)
    found = pretrained.load(context)
    last = summary.get("pretrain/steps")
    step = found.numbers.get("pretrain_steps", last)
    yield Weights("pretrain", context.network(), found.params, step)
    if not (isinstance(context.task, Classify) and record.has_finished(summary, "finetune")):
        return
    network, step = context.task.network(), summary["finetune/steps"]
    if not network.predicts_images:
        LOG.info("the fine-tuned weights predict no tokens (config.finetune.attention).")
        return
    part = record.trained_part(config, "finetune")
    with Checkpoints(context.folder.checkpoints("finetune"), read_only=True) as saved:
        state, _ = saved.restore(step, {part: sharding.abstract(network.init)})
    yield Weights("finetune", network, state[part], step)


def _read(context: Context, weights: Weights, split: str) -> Read:
    """Statistics, labels and class probabilities of the split's images, whole on every process."""
    codec, data = context.codec, context.config.data
    sampler = Sampler(weights.network, weights.params)
    count, seed = IMAGES[split], context.config.seed
    elements = pipeline.images(data, split, context.data.damage_log, count, seed)
    total = min(count, len(sources.open_source(data, split)))
    progress = Progress(f"typicality of {split}", total, unit="image")
    found, labels, probabilities, tokens = [], [], [], []
    for records in pipeline.tokenized(codec, elements, AT_ONCE):
        rows = np.stack([each["tokens"] for each in records])
        whole = np.pad(rows, ((0, AT_ONCE - len(rows)), (0, 0)), mode="edge")  # one program
        nats = sampler.nats(whole)[: len(rows)]
        found.append(statistics(nats, codec.decode(whole)[: len(rows)]))
        tokens.append(rows)
        progress.advance(len(rows))
        if len(tokens) % REPORT_EVERY == 0:
            progress.report(len(tokens) * AT_ONCE, {})
        if weights.network.classes:
            labels += [each["label"] for each in records]
            batch = {"tokens": sharding.shard_rows(whole)}
            classes = network_output(weights.network, weights.params, batch, None, "classes")
            classes = multihost_utils.process_allgather(classes, tiled=True)
            probabilities.append(classes[: len(rows)])
    progress.close()
    classes = np.concatenate([np.zeros((0, weights.network.classes), np.float32), *probabilities])
    return Read(*map(np.concatenate, (found, tokens)), np.array(labels, np.int32), classes)
