"""The moving average of the weights: its values, and that everything but training uses it."""

import jax
import numpy as np
import optax
import pytest
from conftest import AS_USERS_COMPILE, SMALL, make_mesh, random_batch, random_params, tiny_network

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.config import fields
from gptv_jax.data import pipeline
from gptv_jax.runs.context import Context
from gptv_jax.stages import finetune, pretrain, pretrained, setup
from gptv_jax.train import step

DECAY = 0.28  # between 3/12 and 4/13: the first three steps use less, 1/10, 2/11 and 3/12


def trained(ema: float | None) -> list[dict]:
    """NumPy copies of the states before and after every step of SGD."""
    network, sgd = tiny_network(scan_layers=False), optax.sgd(0.5)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        batch, loss = sharding.global_batch(random_batch(network)), step.make_loss(network)
        take = step.make_train_step(loss, sgd, lambda _: 0.5, ema=ema)
        start = jax.jit(lambda params: step.state_of(params, sgd, ema))
        state = start(random_params(network))
        # To the last bit two programs agree as users compile them, not as conftest has it.
        take = take.lower(state, batch).compile(compiler_options=AS_USERS_COMPILE)
        specs = {name: leaf.sharding.spec for name, leaf in sharding.by_name(state).items()}
        found = [jax.device_get(state)]
        for _ in range(5):
            state, _ = take(state, batch)
            found.append(jax.device_get(state))
    for name, spec in specs.items():
        if name.startswith("ema."):
            assert spec == specs[name.replace("ema.", "params.")], name
    return found


def test_the_average_follows_the_weights_and_does_not_change_them():
    states, plain = trained(DECAY), trained(None)
    wanted = states[0]["params"]
    for state, without, decay in zip(
        states, plain, (1.0, 1 / 10, 2 / 11, 3 / 12, DECAY, DECAY), strict=True
    ):
        assert "ema" not in without
        jax.tree.map(np.testing.assert_array_equal, state["params"], without["params"])
        wanted = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, wanted, state["params"])
        jax.tree.map(
            lambda a, w: np.testing.assert_allclose(a, w, rtol=1e-5, atol=1e-7),
            state["ema"],
            wanted,
        )
    assert (states[-1]["ema"]["head"] != states[-1]["params"]["head"]).any()


def saved(run: Context, training: str, at: int) -> dict:
    """The weights and their average from a checkpoint."""
    abstract = sharding.abstract(
        (run.network() if training == "pretrain" else run.task.network()).init
    )
    with Checkpoints(run.folder.checkpoints(training), read_only=True) as checkpoints:
        return checkpoints.restore(at, {"params": abstract, "ema": abstract})[0]


def test_evaluations_later_stages_and_users_read_the_average(tmp_path):
    changes = {"train.ema": 0.9, "train.steps": 10, "train.eval_every": 0}
    changes |= {"finetune.train.ema": 0.9, "finetune.train.eval_every": 0}
    changes |= {"train.optimizer.learning_rate": 0.03, "data.test_split": "test[:48]"}
    flat = fields.flatten(config_lib.Config()) | SMALL | changes
    run = setup.open_run(config_lib.resolve(fields.unflatten(flat)), str(tmp_path))
    with jax.set_mesh(run.mesh):
        run.finish("pretrain", pretrain.run_stage(run))
        run.finish("finetune", finetune.run_stage(run))
        summary = run.folder.summary()
        found = {s: saved(run, s, summary[f"{s}/steps"]) for s in ("pretrain", "finetune")}
        taken = pretrained.load(run).params
        jax.tree.map(np.testing.assert_array_equal, taken, found["pretrain"]["ema"])
    models = {stage: gptv_jax.load(tmp_path, stage) for stage in found}
    for stage, state in found.items():
        params = models[stage].weights_file().params
        for name, leaf in sharding.by_name(state["ema"]).items():
            np.testing.assert_array_equal(params[name], leaf, err_msg=name)
        differ = np.abs(state["params"]["head"] - params["head"]).max()
        assert differ > 1e-3  # otherwise the test shows nothing

    for split in ("validation", "test"):
        elements = list(pipeline.images(run.config.data, split, run.data.damage_log))
        images = np.stack([element["image"] for element in elements])
        nats = -models["pretrain"].log_likelihood(images).mean() / 64
        assert summary[f"pretrain/{split}_nats_per_token"] == pytest.approx(nats, rel=1e-5)
    chosen = models["finetune"].classify(images).argmax(axis=1)
    accuracy = np.mean(chosen == [element["label"] for element in elements])
    assert summary["finetune/test_accuracy"] == pytest.approx(accuracy)
