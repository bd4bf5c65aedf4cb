"""A training that stops, anywhere, and goes on is bit for bit the one that never stopped."""

import itertools
import json
import logging
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from conftest import MODERN, make_mesh

from gptv_jax import config as config_lib
from gptv_jax import sharding, tokens
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.data import pipeline
from gptv_jax.errors import InputError
from gptv_jax.tasks.network import network_of
from gptv_jax.train import loop, optimizer, step
from gptv_jax.train.metrics import MetricWriter

STEPS, BATCH = 6, 16
# Whatever has a state of its own is on: dropout, shuffled and shifted images, Muon's and Adam's
# moments, a schedule, an average of the weights; and whatever a network can have.
CONFIG = config_lib.Config(
    data=config_lib.Data(train_transforms=("shift(pixels=1, keep=0.3)",)),
    model=config_lib.Model(
        layers=1,
        width=16,
        heads=4,
        dropout=0.2,
        start_per_variant=True,
        scan_layers=False,
        **MODERN,
    ),
)
# Clips with hidden tokens, whose share each clip draws.
QUANTIZE = ("quantize(4)",)
CLIPS = config_lib.Config(
    data=config_lib.Data(
        name="moving_digits",
        image_size=16,
        frames=2,
        train_transforms=QUANTIZE,
        eval_transforms=QUANTIZE,
    ),
    tokens=config_lib.Tokens(levels=4, patch=(2, 2)),
    model=config_lib.Model(
        layers=1,
        width=16,
        heads=4,
        axial_positions=True,
        context_masking=0.9,
    ),
)
MUON = config_lib.Optimizer(name="muon", weight_decay=0.01, clip_norm=1.0, warmup_steps=2)
EMA = 0.8
TIMES = {"time", "tokens_per_second", "data_wait_share", "mfu"}


class StopError(Exception):
    """The simulated end of the process."""


def die() -> None:
    raise StopError


class Result(NamedTuple):
    """All that a training leaves, times left out."""

    state: dict
    evaluations: list[dict]
    events: list[dict]


class Training:
    """Pretraining on a mesh, compiled once and run many times."""

    def __init__(self, mesh: tuple[int, ...], update=None, config=CONFIG):
        rate = optax.constant_schedule(0.0)
        if update is None:
            update, rate = optimizer.make_optimizer(MUON, STEPS)
        self.config, self.network = config, network_of(config)
        self.codec = tokens.codec_of(config)
        self.mesh, self.init = make_mesh(mesh), step.make_init(self.network, update, EMA)
        loss = step.make_loss(self.network)
        self.train_step = step.make_train_step(loss, update, rate, microbatches=2, seed=3, ema=EMA)
        self.metric = step.make_metric(self.network)

    def pipeline(self) -> pipeline.Pipeline:
        return pipeline.Pipeline(self.config.data, self.codec, 5)

    def run(
        self,
        folder: pathlib.Path,
        every: int = 2,
        stop: tuple[str, int] | None = None,
        by: Callable[[], None] = die,
        unevaluated: int = 0,
    ):
        """Trains to the end, saves `every` steps.

        At `stop`, an event of a step, `by` is called, which raises StopError. Of the evaluations,
        the last `unevaluated` are not in the last checkpoint.
        """
        taken = 0

        def reach(event: str, at: int) -> None:
            if stop == (event, at):
                by()

        def watched(batches):
            for batch in batches:
                reach("next batch", taken)
                yield batch

        def batches(position: int):
            nonlocal taken
            taken = position
            return watched(self.pipeline().train(BATCH, position))

        def train_step(state, batch):
            nonlocal taken
            state, metrics = self.train_step(state, batch)
            taken += 1
            reach("step", taken)
            return state, metrics

        def evaluate(params: dict) -> dict:
            reach("evaluation", taken)
            held_out = self.pipeline().evaluation("validation", BATCH)
            return self.metric.measure(params, itertools.islice(held_out, 2))

        config = config_lib.Train(
            steps=STEPS,
            batch_size=BATCH,
            ema=EMA,
            eval_every=2,
            checkpoint_every=every,
            log_every=1,
        )
        with jax.set_mesh(self.mesh), Checkpoints(folder / "pretrain", 2) as checkpoints:
            save = checkpoints.save
            checkpoints.save = lambda at, *rest: (reach("save", at), save(at, *rest))
            abstract = sharding.abstract(self.init)
            fitted = loop.fit(
                "pretrain",
                config,
                length=self.network.length,
                flops=1,
                checkpoints=checkpoints,
                log=MetricWriter(folder),
                initial=lambda: jax.jit(self.init)(jax.random.key(0)),
                abstract=abstract,
                train_step=train_step,
                batches=batches,
                evaluate=evaluate,
            )
            state, info = checkpoints.restore_latest(abstract)
            assert info["position"] == fitted.step == STEPS
            in_time = len(fitted.evaluations) - unevaluated
            assert info["evaluations"] == fitted.evaluations[:in_time]
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        events = [{k: v for k, v in json.loads(e).items() if k not in TIMES} for e in lines]
        return Result(jax.device_get(state), fitted.evaluations, events)

    def stopped(self, folder: pathlib.Path, every: int, stop: tuple[str, int]) -> None:
        with pytest.raises(StopError):
            self.run(folder, every, stop)

    def saved(self, folder: pathlib.Path):
        """State and position of the newest checkpoint."""
        with (
            jax.set_mesh(self.mesh),
            Checkpoints(folder / "pretrain", read_only=True) as checkpoints,
        ):
            state, info = checkpoints.restore_latest(sharding.abstract(self.init))
            return jax.device_get(state), info["position"]


def assert_identical(found, wanted) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.fixture(scope="module")
def muon() -> Training:
    return Training((1, 1, 1))


@pytest.fixture(scope="module")
def uninterrupted(muon, tmp_path_factory) -> Result:
    return muon.run(tmp_path_factory.mktemp("uninterrupted"))


def test_the_reference_trains_logs_and_evaluates(uninterrupted):
    assert int(uninterrupted.state["step"]) == STEPS
    losses = [e["nats_per_token"] for e in uninterrupted.events if "nats_per_token" in e]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    assert [e["step"] for e in uninterrupted.evaluations] == [0, 2, 4, 6]


# Many stops of one run: what a stop spoils stays in the run's folder, and is seen at the end.


@pytest.mark.parametrize("every", [1, 2, 3])
def test_stopping_after_every_step_changes_nothing(muon, uninterrupted, tmp_path, every):
    for taken in range(STEPS):
        muon.stopped(tmp_path, every, ("next batch", taken))
    assert_identical(muon.run(tmp_path, every), uninterrupted)


WITHIN = [("evaluation", 0), ("save", 0), ("step", 1), ("save", 2), ("step", 4)]
WITHIN += [("evaluation", 4), ("step", 6), ("evaluation", 6), ("save", 6)]


def test_stopping_within_a_step_changes_nothing(muon, uninterrupted, tmp_path):
    for stop in WITHIN:
        muon.stopped(tmp_path, 2, stop)
    assert_identical(muon.run(tmp_path, 2), uninterrupted)


def test_a_finished_training_is_left_as_it_is(muon, uninterrupted, tmp_path):
    muon.run(tmp_path)
    assert_identical(muon.run(tmp_path), uninterrupted)


def test_clips_with_hidden_tokens_on_many_devices_are_no_exception(tmp_path):
    clips = Training((1, 2, 2, 2), config=CLIPS)
    wanted = clips.run(tmp_path / "whole")
    for stop in (("next batch", 1), ("step", 4), ("save", 4)):
        clips.stopped(tmp_path / "stopped", 2, stop)
    assert_identical(clips.run(tmp_path / "stopped", 2), wanted)


# Another mesh. Sums over devices round differently, and Adam's quotient or Muon's iteration would
# make more of that; plain momentum keeps it at the size of rounding.


def test_another_mesh_goes_on_with_the_same_data_to_rounding(tmp_path):
    meshes = [(8, 1, 1), (1, 2, 4)]
    before, after = (Training(mesh, optax.sgd(0.1, momentum=0.9)) for mesh in meshes)
    wanted = before.run(tmp_path / "one")
    for folder in ("same", "other"):
        before.stopped(tmp_path / folder, 1, ("next batch", 3))
    assert_identical(before.run(tmp_path / "same", 1), wanted)  # many devices are no exception

    assert_identical(after.saved(tmp_path / "other"), before.saved(tmp_path / "other"))
    found = after.run(tmp_path / "other", 1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max()),
        found.state,
        wanted.state,
    )
    for event, other in zip(found.events, wanted.events, strict=True):
        assert event.pop("stage") == other.pop("stage")
        assert event == pytest.approx(other, rel=1e-5)


# A loss that is no longer finite.


@pytest.mark.parametrize(("bad", "every", "good"), [(1, 1, 0), (4, 1, 3), (4, 2, 2)])
def test_a_training_that_diverges_names_the_step_and_keeps_what_was_good(
    tmp_path, bad, every, good
):
    rate = lambda taken: jax.numpy.where(taken == bad - 1, 1e30, 0.1)  # noqa: E731
    training = Training((1, 1, 1), optax.sgd(rate))
    with pytest.raises(InputError) as caught:
        training.run(tmp_path, every)
    assert f"step {bad}:" in str(caught.value)
    assert f"step {good}" in str(caught.value) and str(tmp_path) in str(caught.value)
    state, position = training.saved(tmp_path)
    assert position == state["step"] == good
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    steps = [e["step"] for e in MetricWriter(tmp_path).read() if "nats_per_token" in e]
    assert max(steps, default=0) == bad - 1


# Damaged checkpoints.


def cut(checkpoint: pathlib.Path) -> None:
    """Halves every file."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change_a_byte(checkpoint: pathlib.Path) -> None:
    """In the middle of the arrays."""
    # Beside them lie files of names and shardings, which may be larger.
    arrays = checkpoint.glob("state/ocdbt.process_0/d/*")
    file = max(arrays, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose(part: str):
    def damage(checkpoint: pathlib.Path) -> None:
        files = [f for f in checkpoint.glob(part) if f.is_file()]
        files += [f for f in checkpoint.glob(f"{part}/**/*") if f.is_file()]
        assert files
        for file in files:
            file.unlink()

    return damage


DAMAGES = {"cut": cut, "changed byte": change_a_byte, "lost position": lose("info")}
DAMAGES |= {"lost arrays": lose("state"), "lost metadata": lose("state/_METADATA")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    muon, uninterrupted, tmp_path, caplog, damage
):
    muon.stopped(tmp_path, 2, ("next batch", 5))
    DAMAGES[damage](tmp_path / "pretrain" / "4")
    with caplog.at_level(logging.WARNING, "gptv_jax"):
        found = muon.run(tmp_path, 2)
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("gptv_jax")]
    [message] = [m for m in messages if "is damaged" in m]
    assert f"{tmp_path / 'pretrain' / '4'} is damaged" in message and "step 2" in message
    assert_identical(found, uninterrupted)


def test_nothing_is_started_anew_where_every_checkpoint_is_damaged(muon, tmp_path):
    muon.stopped(tmp_path, 2, ("next batch", 5))
    for step_folder in ("2", "4"):
        cut(tmp_path / "pretrain" / step_folder)
    with pytest.raises(InputError, match=r"no checkpoint in .*pretrain can be read"):
        muon.run(tmp_path, 2)
    assert {"2", "4"} <= {path.name for path in (tmp_path / "pretrain").iterdir()}


def test_a_log_line_cut_by_a_kill_is_written_anew(muon, uninterrupted, tmp_path):
    muon.stopped(tmp_path, 3, ("evaluation", 4))  # step 4 is logged, step 3 saved
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text()[:-20])
    assert_identical(muon.run(tmp_path, 3), uninterrupted)
