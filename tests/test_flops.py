"""Analytic FLOPs against those that the compiler counts in the real train step."""

import dataclasses

import jax
import pytest
from conftest import MODERN

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import flops
from gptv_jax.planning import compiled, plan, topology
from gptv_jax.planning.training import Pretraining
from gptv_jax.tasks.network import network_of

# Attention in its plain form (T < 128), layers unrolled, because the compiler counts a loop's body
# once. Wide and with few heads, so that what the formula leaves out is small: norms and activation
# functions grow with the width, but products with its square; the softmax with the heads, but
# attention's products with the width.
CONFIG = config_lib.Config(
    model=config_lib.Model(layers=3, width=512, heads=2, scan_layers=False),
    train=config_lib.Train(batch_size=16),
    data=config_lib.Data(image_size=11),
    mesh=config_lib.Mesh(data=1),
)


@pytest.mark.parametrize(
    ("remat", "recipe"),
    [("none", {}), ("dots", {}), ("full", {}), ("full", MODERN)],
    ids=["none", "dots", "full", "modern full"],
)
def test_flops_of_a_step_are_those_of_the_compiler(remat, recipe):
    model = dataclasses.replace(CONFIG.model, remat=remat, **recipe)
    config = dataclasses.replace(CONFIG, model=model)
    network = network_of(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    counted = compiled.program(Pretraining(config), mesh).cost_analysis()["flops"]
    needed = flops.executed(network, "cpu").total
    assert needed * 16 * 121 == pytest.approx(counted, rel=0.03)
    # The parts that are told apart are each larger than that.
    assert flops.training(network)["attention"] > 0.035 * flops.training(network).total
    again = flops.executed(network, "cpu").total - flops.training(network).total
    assert remat == "none" or again * 16 * 121 > 0.01 * counted


def test_matrices_and_attention_are_counted_apart():
    network = network_of(CONFIG)
    weights = 3 * 12 * 512**2 + 17 * 512
    assert flops.training(network) == {
        "matmul": 6 * weights,
        "attention": 12 * 3 * 121 * 512,
    }
    assert flops.forward(network).total * 3 == flops.training(network).total


def test_logits_in_parts_are_computed_twice():
    def executed(batch_size):
        train = dataclasses.replace(CONFIG.train, batch_size=batch_size)
        training = Pretraining(dataclasses.replace(CONFIG, train=train))
        return plan.make(training, topology.parse("gpu:1xh200"), compiling=False).executed

    whole, parts = executed(2**13), executed(2**14)  # of 121 tokens, 17 float32 logits each
    assert parts == 2 * whole + 2**14 * 121 * 2 * 17 * 512


def test_a_form_that_skips_masked_tiles_does_less_and_again_what_it_does_not_keep():
    config = dataclasses.replace(CONFIG, data=config_lib.Data(image_size=32))
    network = network_of(config)
    model = flops.training(network)
    for platform, products in (("gpu", 6), ("cpu", 7 * 5 / 8), ("tpu", 9 * 3 / 4)):
        done = flops.executed(network, platform)
        attention = int(model["attention"] * products / 6)
        assert done == {"matmul": model["matmul"], "attention": attention}, platform
    assert flops.executed(network, "cpu", split=4) == flops.executed(network, "gpu")
