"""What changes pretraining: hidden tokens of images, and the benchmark of all levers."""

import functools
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODERN, random_batch, random_params, tiny_network

from benchmarks import levers
from benchmarks.turns import ROOT
from gptv_jax import config as config_lib
from gptv_jax import files, sharding
from gptv_jax.config import rules, run_file
from gptv_jax.errors import InputError
from gptv_jax.train import objective, step

pytestmark = pytest.mark.usefixtures("one_device")


def value_and_gradient(network, params, batch, key=None):
    loss = step.make_loss(network)
    run = jax.jit(jax.value_and_grad(lambda p: loss(p, None, batch, key), has_aux=True))
    return jax.device_get(run(params))


def batch_of(network, seed=0):
    return sharding.global_batch(random_batch(network, seed=seed))


# Hidden tokens of images.


def test_an_image_hides_a_drawn_share_of_all_its_tokens():
    network = tiny_network(context_masking=0.8, grid=(8, 8))
    hidden = np.asarray(objective.draw_hidden(network, 512, jax.random.key(0)))
    shares = hidden.mean(axis=1)
    assert shares.min() < 0.02 and 0.7 < shares.max() <= 0.95
    np.testing.assert_allclose(shares.mean(), 0.4, atol=0.03)
    np.testing.assert_allclose(hidden.mean(axis=0), 0.4, atol=0.1)  # the last ones as the first
    assert objective.draw_hidden(tiny_network(5, context_masking=0.8), 4, jax.random.key(0)) is None


def test_what_an_image_hides_is_not_read_and_stays_a_target():
    network = tiny_network(context_masking=1.0, layers=1, **MODERN)
    params, batch, key = random_params(network), batch_of(network), jax.random.key(2)
    hidden = step.draw_view(network, batch, key).hidden
    tokens, start = batch["tokens"], batch["variant"]

    @functools.partial(jax.jit, static_argnums=1)
    def nats(tokens, hiding):
        output = network.bind(params)(tokens, start, hidden=hidden if hiding else None)
        return objective.token_nats(network.bind(params), output, batch["tokens"])

    other = jnp.where(hidden, (tokens + 1) % network.vocabulary, tokens)
    np.testing.assert_array_equal(nats(tokens, True), nats(other, True))
    assert np.abs(nats(tokens, False) - nats(other, False)).max() > 1e-3
    (value, _), _ = value_and_gradient(network, params, batch, key)
    assert value == pytest.approx(float(nats(tokens, True).mean()), rel=1e-6)


# The benchmark.


@pytest.mark.parametrize("name", [n for n in {**levers.LEVERS, **levers.READINGS} if n != "base"])
def test_a_lever_of_the_benchmark_is_accepted_and_changes_the_base(name):
    def resolved(changes):
        settings = run_file.load(levers.FILE)
        settings.update_from_flattened_dict(levers.BASE | changes)
        config = config_lib.resolve(settings)
        for section in ("train", "probe"):
            rules.SECTIONS[section](config)
        return config

    assert resolved((levers.LEVERS | levers.READINGS)[name]) != resolved({})


def test_a_lever_takes_as_many_steps_as_the_flops_of_the_base_pay_for():
    steps = {n: levers.settings_of(n, {"train.steps": 900}, "0")["train.steps"] for n in
             ("base", "masked_inputs", "pixels")}  # fmt: skip
    assert steps["base"] == steps["masked_inputs"] == 900
    assert 880 < steps["pixels"] < 900
    # In a deeper network the product with the pixels has a smaller share.
    deep = levers.settings_of("pixels", {"train.steps": 900, "model.layers": 24}, "0")
    assert steps["pixels"] < deep["train.steps"] < 900


def test_a_way_of_reading_is_not_joined_to_a_lever(capsys, monkeypatch):
    command = ["levers", "--data_dir=data", "--only=pixels+quarters"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        levers.main()
    assert "--only has quarters; it takes quarters, whole" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"), [("2", 2), ("(2, 2)", (2, 2)), ("True", True), ("levels", "levels")]
)
def test_a_set_field_has_the_type_that_a_flag_gives_it(text, value):
    assert levers.value_of(text) == value


RUNS = """
import pathlib, sys
from benchmarks import ablations, turns
small = {"model.layers": 1, "model.width": 16, "model.heads": 2, "train.batch_size": 16}
settings = {pathlib.Path(sys.argv[1]): small | {"train.steps": int(sys.argv[2])}}
ablations.run_all(settings, ["0"], f"--config={turns.ROOT}/configs/digits.py")
"""


@pytest.mark.process
def test_a_benchmark_of_runs_ends_them_by_sigterm_and_refuses_another_number_of_steps(tmp_path):
    def run(steps):
        command = [sys.executable, "-c", RUNS, str(tmp_path / "run"), str(steps)]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    log = tmp_path / "run" / "log.txt"
    process = run(100_000)
    while not (log.exists() and "/100000 " in log.read_text()):  # it trains
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=120) == 143
    files.lock(tmp_path / "run", "--workdir", process)()  # no process has the folder any more
    assert "stopped by SIGTERM" in log.read_text()
    again = run(200_000)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 1 and "is of 100000 steps, not 200000" in errors


# What does not go together.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.context_masking": 0.5, "model.random_order": (0.5, 1.0), "model.rotary": True,
          "model.width": 16, "model.heads": 4}, "in raster order"),
        ({"model.context_masking": 0.5, "data.frames": 1}, "2 or more"),
        ({"model.objective": "bert", "model.context_masking": 0.5}, "hides masked_share"),
    ],
)  # fmt: skip
def test_levers_that_do_not_go_together_are_refused(changes, words):
    settings = config_lib.default()
    settings.update_from_flattened_dict(changes)
    config = config_lib.fields.from_dict(config_lib.Config, settings, "config")
    with pytest.raises(InputError, match=words):
        rules.check(config)
        rules.SECTIONS["train"](config)
