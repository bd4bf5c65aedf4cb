"""`gptv_jax.train`: the stages of a run from Python."""

import logging
import signal

import pytest

import gptv_jax
import gptv_jax.train.loop as by_full_name
from gptv_jax import config as config_lib
from gptv_jax import main, train
from gptv_jax.errors import InputError
from gptv_jax.train import loop, metrics


@pytest.fixture(scope="module")
def settings():
    """What a config file's get_config() returns; a few steps of a tiny network."""
    made = config_lib.default()
    made.model.layers, made.model.width, made.model.heads = 1, 16, 2
    made.train.steps, made.train.batch_size, made.train.log_every = 3, 16, 1
    return made


def test_the_package_of_the_training_loop_is_the_function_as_well():
    assert by_full_name is loop is gptv_jax.train.loop and train is gptv_jax.train
    assert callable(gptv_jax.train)


def test_an_interrupt_saves_and_the_same_call_goes_on(settings, tmp_path, monkeypatch, capfd):
    log, before = logging.getLogger("gptv_jax"), signal.getsignal(signal.SIGINT)
    state, real = (log.level, log.propagate, list(log.handlers)), metrics.MetricWriter.write

    def interrupted(self, stage, step, values):
        real(self, stage, step, values)
        if step == 1 and "grad_norm" in values:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="at step 2"):
        patched.setattr(metrics.MetricWriter, "write", interrupted)
        gptv_jax.train(settings, tmp_path / "run", ["pretrain"])
    assert {p.name for p in (tmp_path / "run/checkpoints/pretrain").iterdir()} == {"0", "2"}
    capfd.readouterr()
    model = gptv_jax.train(settings, tmp_path / "run", ["pretrain"])
    lines = capfd.readouterr().err.splitlines()
    assert (
        len([line for line in lines if line.startswith("pretrain continues from step 2 of 3")]) == 1
    )
    assert not [line for line in lines if "INFO" in line]
    assert model.sample(1).shape == (1, 8, 8, 1)
    assert signal.getsignal(signal.SIGINT) is before
    assert (log.level, log.propagate, log.handlers) == state
    with pytest.raises(
        ValueError, match=r"config\.seed is 1, expected 0"
    ):  # and unlocks the folder
        changed = settings.copy_and_resolve_references()
        changed.seed = 1
        gptv_jax.train(changed, tmp_path / "run", ["pretrain"])
    file = tmp_path / "config.py"
    text = "from gptv_jax import config\n\ndef get_config(steps):\n    made = config.default()\n"
    text += "    made.model.layers, made.model.width, made.model.heads = 1, 16, 2\n"
    text += "    made.train.batch_size, made.train.log_every = 16, 1\n"
    file.write_text(text + "    made.train.steps = int(steps)\n    return made\n")
    again = gptv_jax.train(f"{file}:3", str(tmp_path / "run"), ["pretrain"])
    assert (again.sample(1, seed=4) == model.sample(1, seed=4)).all()


def test_calls_that_cannot_work_say_what_does(settings, tmp_path):
    with pytest.raises(InputError, match="--stages is empty"):
        gptv_jax.train(settings, tmp_path, [])
    with pytest.raises(InputError, match="there is no file"):
        gptv_jax.train("nowhere.py", tmp_path)
    with pytest.raises(InputError, match=r"call gptv_jax\.train\(config, workdir\)"):
        main.main(config_lib.resolve(settings))
