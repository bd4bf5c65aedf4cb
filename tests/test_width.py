"""muP: with `base_width` a step moves activations by the same at every width, and else it does not.

The check of coordinates of Yang et al. 2022 (arXiv:2203.03466, appendix D.1).
"""

import jax
import numpy as np
import pytest
from conftest import SMALL, random_batch, random_params, tiny_network

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.config import fields
from gptv_jax.stages import pretrain, setup
from gptv_jax.train import loop, optimizer, step

pytestmark = pytest.mark.usefixtures("one_device")

WIDTHS = (32, 256)
PARTS = ("token_embedding", "blocks", "head")
STEPS = 4  # of which the first moves the head alone, since that begins at zero
RATES = {"adamw": 3e-3, "muon": 1e-2}


def moved(width: int, name: str, base_width: int | None) -> np.ndarray:
    """How far (RMS) a few steps of the embeddings, of the layer's weights and of the head move what
    goes into the layer, what it adds, and the logits, each of them by itself.
    """
    sizes = {"layers": 1, "width": width, "heads": width // 16, "base_width": base_width}
    network = tiny_network(scan_layers=False, **sizes)
    settings = config_lib.Optimizer(name, RATES[name], schedule="constant")
    update, rate = optimizer.make_optimizer(
        settings, STEPS, relative_width=network.config.relative_width
    )
    take = step.make_train_step(step.make_loss(network), update, rate)
    batch = sharding.global_batch(random_batch(network, size=16))

    @jax.jit
    def activations(params):
        output = network.bind(params)(batch["tokens"], batch["variant"], raw=True, keep=(0, 1))
        before, after = output.kept
        return {"token_embedding": before, "blocks": after - before, "head": output.logits}

    state = jax.jit(step.make_init(network, update))(jax.random.key(0))
    first = jax.device_get(state["params"])
    for _ in range(STEPS):
        state, _ = take(state, batch)
    begun, sizes = activations(first), []
    for part in PARTS:
        after = activations(first | {part: state["params"][part]})
        sizes.append(np.sqrt(np.mean((after[part] - begun[part]) ** 2)))
    return np.array(sizes)


def slopes(name: str, base_width: int | None) -> np.ndarray:
    """By which power of the width these sizes grow."""
    narrow, wide = (moved(width, name, base_width) for width in WIDTHS)
    return np.log(wide / narrow) / np.log(WIDTHS[1] / WIDTHS[0])


@pytest.mark.parametrize("name", RATES)
def test_steps_move_activations_by_the_same_at_every_width_with_a_base_and_more_without(name):
    assert np.abs(slopes(name, base_width=64)).max() < 0.2
    assert slopes(name, base_width=None)[1:].min() > 0.4  # of products with weights


def test_at_its_base_width_nothing_is_changed():
    for name in RATES:
        settings = config_lib.Optimizer(name)
        plain, based = (
            optimizer.make_optimizer(settings, 1, relative_width=model.relative_width)[0]
            for model in (config_lib.Model(), config_lib.Model(base_width=512))
        )
        params = random_params(tiny_network())
        assert jax.tree.structure(plain.init(params)) == jax.tree.structure(based.init(params))
    networks = (tiny_network(), tiny_network(base_width=32))
    plain, based = (jax.jit(network.init)(jax.random.key(0)) for network in networks)
    jax.tree.map(np.testing.assert_array_equal, plain, based)


def test_wider_than_its_base_the_mlp_begins_smaller():
    network = tiny_network(base_width=8)  # a quarter of its width
    blocks, plain = (
        jax.jit(n.init)(jax.random.key(0))["blocks"] for n in (network, tiny_network())
    )
    for name, weight in plain.items():
        factor = 0.5 if name in ("mlp_in", "mlp_out") else 1.0  # others begin by their inputs
        np.testing.assert_allclose(blocks[name], factor * weight, rtol=1e-6, err_msg=name)


class TakenError(Exception):
    pass


def test_pretraining_takes_the_rates_of_its_base_width(tmp_path, monkeypatch):
    changes = {"model.width": 16, "model.base_width": 4, "train.optimizer.name": "adam"}
    changes |= {"train.optimizer.learning_rate": 0.01, "train.optimizer.warmup_steps": 0}
    flat = fields.flatten(config_lib.Config()) | SMALL | changes
    run = setup.open_run(config_lib.resolve(fields.unflatten(flat)), str(tmp_path))

    def one_step(*_, initial, train_step, batches, **__):
        state, _ = train_step(initial(), sharding.global_batch(next(batches(0))))
        raise TakenError(np.abs(state["params"]["head"]).max())

    monkeypatch.setattr(loop, "fit", one_step)
    with jax.set_mesh(run.mesh), pytest.raises(TakenError) as taken:
        pretrain.run_stage(run)
    # The head begins at zero, and Adam's first step is of the rate, whatever the gradient.
    np.testing.assert_allclose(taken.value.args[0], 0.01 / 4, rtol=1e-3)
