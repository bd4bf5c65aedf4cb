"""Plans of the training of a tokenizer."""

import dataclasses
import math

import jax
import pytest
from conftest import make_mesh

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.model import flops
from gptv_jax.planning import plan, search, table, topology
from gptv_jax.planning.tokenizing import TokenizerTraining
from gptv_jax.train import autoencoding, optimizer

GPU = topology.parse("gpu:4xh100")
NETWORK = config_lib.Autoencoder(
    widths=(32, 64), encoder_blocks=1, decoder_blocks=1, norm=True, attention=True
)
TRAIN = config_lib.Train(steps=100, batch_size=16, ema=0.9)
SETTINGS = config_lib.Tokenizer(
    train=TRAIN, ssim=0.1, adversarial=0.5, discriminator_width=16, discriminator_layers=2
)
CONFIG = config_lib.Config(
    tokens=config_lib.Tokens(kind="learned", autoencoder=NETWORK),
    tokenizer=SETTINGS,
    data=config_lib.Data(image_size=32),
    mesh=config_lib.Mesh(data=2, fsdp=2),
)


def planned(config=CONFIG, devices=GPU, **options) -> plan.Plan:
    return plan.make(TokenizerTraining(config), devices, **options)


def with_settings(**changes) -> config_lib.Config:
    return dataclasses.replace(CONFIG, tokenizer=dataclasses.replace(SETTINGS, **changes))


def test_state_is_what_real_arrays_hold_and_collectives_those_of_the_sharding():
    found = planned()
    update, _ = optimizer.make_optimizer(TRAIN.optimizer, TRAIN.steps)
    with jax.set_mesh(make_mesh((2, 2, 1))):
        state = sharding.abstract(autoencoding.make_init(NETWORK, SETTINGS, update))
    beside = [state[name] for name in ("opt", "ema", "critic")]
    assert of_device(state["params"]) == found.memory.parameters == found.memory.gradients
    assert of_device(beside) == found.memory.optimizer
    assert found.memory.batch == 16 // 4 * 32 * 32 * 3
    assert found.params == sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    gathers, sums = found.traffic if found.traffic[0].kind == "all-gather" else found.traffic[::-1]
    assert (gathers.axes, sums.axes) == (("fsdp",), ("data", "fsdp"))
    # Whatever is not whole on a device is gathered, once.
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(state["params"]))
    assert gathers.bytes == 2 * (whole - found.memory.parameters) and sums.bytes == whole


def of_device(tree) -> int:
    """Bytes that a device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def test_the_losses_networks_cost_what_they_do():
    lean = planned(with_settings(adversarial=0.0))
    critic = planned()
    lpips = planned(with_settings(adversarial=0.0, lpips=1.0, lpips_weights="some.safetensors"))
    assert lean.flops_per_step == critic.flops_per_step == lpips.flops_per_step
    assert lean.executed < critic.executed < lpips.executed
    # Every product three times, but that nobody needs the gradient of the pixels: the first layer
    # has 16 x 16 positions, kernels of 3 x 3, 12 inputs and 32 outputs.
    assert lean.executed == lean.flops_per_step - 16 * 2 * 16 * 16 * 9 * 12 * 32
    assert "masked half" not in table.show(lean, None)
    # VGG-16 without its last layers has 14,714,688 weights, and LPIPS 1,472 of its own.
    assert lpips.memory.optimizer - lean.memory.optimizer == 4 * (14_714_688 + 1_472)
    assert lpips.memory.activations > 2 * lean.memory.activations


def test_an_image_costs_its_encoder_and_its_decoder():
    found = planned()
    numbers = found.numbers()
    assert numbers["flops_per_image"] == 3 * flops.of_autoencoder(NETWORK, 32).total
    assert (
        numbers["flops_per_image_encoder"] + numbers["flops_per_image_decoder"]
        == (numbers["flops_per_image"])
    )
    assert numbers["flops_per_step"] == 16 * numbers["flops_per_image"]
    assert numbers["days"] == pytest.approx(100 * found.step_seconds / 86_400)
    shown = table.show(found, search.smallest(TokenizerTraining(CONFIG), GPU))
    assert "in the encoder" in shown and "100 steps at least" in shown
    assert found.flags == [f"--config.mesh.{axis}={n}" for axis, n in found.sizes.items()]


def test_the_search_is_over_meshes_alone():
    plans = search.search(TokenizerTraining(CONFIG), GPU)
    assert sorted((p.sizes["data"], p.sizes["fsdp"]) for p in plans) == [(1, 4), (2, 2), (4, 1)]


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (dict(data=1, fsdp=64), r"config\.tokens\.autoencoder\.widths\[0\] is 32, which 64 "),
        (dict(data=32, fsdp=2), r"config\.tokenizer\.train\.batch_size is 16, which 64 "),
    ],
    ids=["widths", "batch"],
)
def test_a_mesh_that_does_not_divide_is_refused(mesh, words):
    config = dataclasses.replace(CONFIG, mesh=config_lib.Mesh(**mesh))
    with pytest.raises(InputError, match=words):
        planned(config, topology.parse("gpu:64xh100"))


def test_tokens_that_are_not_learned_have_no_training():
    with pytest.raises(InputError, match=r"--stage=tokenizer, but config\.tokens\.kind is grey"):
        planned(config_lib.Config())


def test_the_real_step_compiles_for_a_tpu():
    network = dataclasses.replace(NETWORK, widths=(64,), norm=False, attention=False)
    settings = dataclasses.replace(SETTINGS, adversarial=0.0, ssim=0.0)
    tokens = config_lib.Tokens("learned", autoencoder=network)
    found = planned(
        dataclasses.replace(CONFIG, tokens=tokens, tokenizer=settings),
        topology.parse("v5e:2x2"),
    )
    state = found.memory.parameters + found.memory.optimizer
    assert found.fits and found.compiled.arguments == pytest.approx(state, rel=0.1)
    (gathers,) = (each for each in found.traffic if each.kind == "all-gather")
    assert gathers.axes == ("fsdp",)
    summed = {each.axes for each in found.traffic if each.kind == "all-reduce"}
    assert any("data" in axes for axes in summed)
