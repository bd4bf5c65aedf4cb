"""Plans of the training of a tokenizer."""

import dataclasses

import jax
import pytest
from conftest import make_mesh

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.model import flops
from gptv_jax.planning import compiled, plan, search, table, topology
from gptv_jax.train import autoencoding, optimizer

GPU, CPU = topology.parse("gpu:4xh100"), topology.parse("cpu:4")
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
    return plan.make(config, devices, "tokenizer", **options)


def with_settings(**changes) -> config_lib.Config:
    return dataclasses.replace(CONFIG, tokenizer=dataclasses.replace(SETTINGS, **changes))


def held(tree) -> set[int]:
    """Bytes on each of the four devices."""
    totals = dict.fromkeys(jax.devices()[:4], 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            totals[shard.device] += shard.data.nbytes
    return set(totals.values())


def test_the_real_step_runs_with_the_state_and_the_batch_that_were_planned():
    found = planned(devices=CPU)
    memory, program = found.memory, found.compiled
    assert found.fits and program.arguments == pytest.approx(
        memory.parameters + memory.optimizer + memory.batch, abs=16
    )
    update, _ = optimizer.make_optimizer(TRAIN.optimizer, TRAIN.steps)
    with jax.set_mesh(make_mesh((2, 2, 1))):
        state = jax.jit(autoencoding.make_init(NETWORK, SETTINGS, update))(jax.random.key(0))
    assert held(state["params"]) == {memory.parameters}
    assert held([state[name] for name in ("opt", "ema", "critic")]) == {memory.optimizer}
    assert found.params == sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    assert 0.6 < memory.total / program.total < 1.6
    # What arithmetic says of the gathers is what the compiler made of the sharding.
    both = found, planned(devices=CPU, compiling=False)
    gathers = [
        sum(e.bytes for e in p.traffic if e.kind == "all-gather") for p in (found, arithmetic)
    ]
    assert gathers[0] == pytest.approx(gathers[1], rel=0.05)


def test_flops_are_those_of_the_compiler():
    """With a discriminator and without, on one device, where attention takes its plain form."""
    wide = dataclasses.replace(NETWORK, widths=(64, 128), norm=False)
    config = dataclasses.replace(CONFIG, tokens=config_lib.Tokens("learned", autoencoder=wide))
    for weight in (0.0, 0.5):
        settings = dataclasses.replace(SETTINGS, adversarial=weight, ssim=0.0)
        training = planned(dataclasses.replace(config, tokenizer=settings)).training
        mesh = sharding.make_mesh(config_lib.Mesh(data=1), jax.devices()[:1])
        counted = compiled.program(training, mesh).cost_analysis()["flops"]
        assert training.executed("cpu", {}) == pytest.approx(counted, rel=0.05)


def test_the_losses_networks_cost_what_they_do():
    lean = planned(with_settings(adversarial=0.0))
    critic = planned()
    lpips = planned(with_settings(adversarial=0.0, lpips=1.0, lpips_weights="some.safetensors"))
    assert lean.flops_per_step == critic.flops_per_step == lpips.flops_per_step
    assert lean.flops_per_step <= lean.executed < critic.executed < lpips.executed
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
    shown = table.show(found, search.smallest(CONFIG, GPU, "tokenizer"))
    assert "in the encoder" in shown and "100 steps at least" in shown
    assert found.flags == [f"--config.mesh.{axis}={n}" for axis, n in found.sizes.items()]


def test_the_search_is_over_meshes_alone():
    plans = search.search(CONFIG, GPU, "tokenizer")
    assert sorted((p.sizes["data"], p.sizes["fsdp"]) for p in plans) == [(1, 4), (2, 2), (4, 1)]


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (dict(data=1, fsdp=64), r"config\.tokens\.autoencoder\.widths is 32, which 64 "),
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


def test_it_compiles_for_a_tpu():
    found = planned(devices=topology.parse("v5e:2x2"))
    assert found.compiled and found.fits
    kinds = {(each.kind, each.axes) for each in found.traffic}
    assert ("all-gather", ("fsdp",)) in kinds
    assert any("data" in axes for _, axes in kinds)
