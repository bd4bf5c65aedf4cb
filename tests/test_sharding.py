import dataclasses
import functools

import jax
import numpy as np
import pytest
from conftest import (
    MODERN,
    RECIPES,
    make_mesh,
    parts_network,
    random_batch,
    random_params,
    tiny_network,
)

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.model import autoencoder, layers
from gptv_jax.train import distillation, step
from gptv_jax.train.optimizer import make_optimizer

# Data, fsdp, (sequence,) tensor: igpt is split along every axis, modern along axes that split
# weights or positions; test_meshes splits along "data" and "fsdp" alone.
CLIPS = {"classes": 0, "grid": (4, 2, 2)}
NETWORKS = {
    **{name: {"classes": 5, **recipe} for name, recipe in RECIPES.items()},
    "clips": CLIPS,
    "clips with hidden tokens": {**CLIPS, **MODERN, "context_masking": 0.9},
    "levels": {"vocabulary": 12, "levels": (3, 2, 2)},
}
CASES = [
    ("igpt", (2, 2, 2)),
    ("igpt", (2, 1, 4, 1)),
    ("modern", (1, 2, 4)),
    ("modern", (1, 2, 2, 2)),
    ("clips", (1, 2, 2, 2)),
    ("clips with hidden tokens", (1, 2, 2, 2)),
    ("clips with hidden tokens", (2, 1, 4, 1)),
    ("levels", (1, 2, 2, 2)),
    ("levels", (2, 1, 4, 1)),
]


@functools.cache
def reference(recipe):
    return loss_and_gradients(recipe, (1, 1, 1))


def loss_and_gradients(recipe, shape):
    network = tiny_network(**NETWORKS[recipe])
    with jax.set_mesh(make_mesh(shape)):
        batch = sharding.global_batch(random_batch(network))
        loss = step.make_loss(network, 1.0, 1.0)
        key = jax.random.key(3) if network.config.context_masking else None
        gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, None, batch, key)[0]))
        value, grads = gradient(random_params(network))
        return float(value), jax.device_get(grads)


@pytest.mark.parametrize(("recipe", "shape"), CASES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(recipe, shape):
    wanted, wanted_grads = reference(recipe)
    value, grads = loss_and_gradients(recipe, shape)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for path, wanted in jax.tree.leaves_with_path(wanted_grads):
        found = grads
        for key in path:
            found = found[key.key]
        scale = np.abs(wanted).max() + 1e-30
        np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-5, err_msg=str(path))


def state_on_eight(recipe, optimizer="adam"):
    """The abstract train state, fsdp 2, tensor 4."""
    optimizer, _ = make_optimizer(config_lib.Optimizer(name=optimizer), steps=1)
    with jax.set_mesh(make_mesh((1, 2, 4))):
        return sharding.abstract(step.make_init(tiny_network(classes=5, **recipe), optimizer))


# The shape that each of eight devices holds, for fsdp=2 and tensor=4, written by hand without the
# table of shardings. Sizes of `tiny_network`: 11 token values, 3 start vectors, 16 tokens,
# 2 layers, width 32, 4 heads of size 8, MLP width 128, 5 classes.
EVERY_GPT = {
    "token_embedding": (11, 16),
    "start": (3, 16),
    "row": (4, 16),
    "column": (4, 16),
    "blocks.norm_1": (2, 32),
    "blocks.qkv": (2, 16, 3, 1, 8),
    "blocks.attention_out": (2, 1, 8, 16),
    "blocks.norm_2": (2, 32),
    "final_norm": (32,),
    "head": (11, 16),
    "classifier.class_head": (5, 16),
    "classifier.class_center": (32,),
    "classifier.class_scale": (32,),
}
IGPT = EVERY_GPT | {"blocks.mlp_in": (2, 16, 32), "blocks.mlp_out": (2, 32, 16)}
GPT_SHARDS = {
    "igpt": ({}, IGPT | {"position": (16, 16)}),
    "targets": (
        {"target_positions": True},
        IGPT | {"position": (17, 16), "target_position": (16, 16)},
    ),
    "clips": (
        {"grid": (4, 2, 2)},
        IGPT | {"position": (4, 16), "row": (2, 16), "column": (2, 16), "frame": (4, 16)},
    ),
    "levels": (
        {"vocabulary": 12, "levels": (3, 2, 2)},
        {name: shape for name, shape in IGPT.items() if name != "head"}
        | {"token_embedding": (12, 16), "position": (16, 16)}
        | {"head.level_rows": (7, 16), "head.prefix_scale": (9, 16)},
    ),
    "pixels": (
        {"image_input": "pixels", "patch": (2, 3, 3)},
        {name: shape for name, shape in IGPT.items() if name != "token_embedding"}
        | {"patch_embedding": (18, 16), "position": (16, 16)},
    ),
    "modern": (  # MLP width 64
        RECIPES["modern"],
        EVERY_GPT
        | {"blocks.mlp_gate_up": (2, 16, 2, 16), "blocks.mlp_out": (2, 16, 16)}
        | {"blocks.q_norm": (2, 8), "blocks.k_norm": (2, 8)},
    ),
}
# 16 positions of the image, a stem of 8 and 8 channels, 16 positions of objects with 19 tokens.
STEM = {"convolution.bias": (8,)}
PARTS_SHARDS = {
    **{name: IGPT[name] for name in IGPT if name.startswith(("token", "blocks", "final"))},
    "start": (1, 16),
    "position": (16, 16),
    "parts.objects.embedding": (19, 16),
    "parts.objects.position": (16, 16),
    "parts.objects.head": (19, 16),
    "parts.objects.place": (32,),
    "parts.objects.place_head": (32,),
    "stem.from_stem": (8, 16),
    "stem.layers.0.convolution.stem_conv": (3, 3, 3, 4),
    "stem.layers.1.convolution.stem_conv": (3, 3, 8, 4),
    **{f"stem.layers.{i}.{name}": shape for i in range(2) for name, shape in STEM.items()},
}
# Patches of 2 x 2 pixels in RGB, widths 8 and 16, codes of 4 numbers.
AUTOENCODER_SHARDS = {
    "quantizer.codebook": (24, 4),
    "encoder.stem.from_pixels": (3, 3, 12, 4),
    "encoder.stem.bias": (8,),
    "encoder.stages.0.0.gain": (8,),
    "encoder.stages.0.0.wide.conv": (3, 3, 8, 4),
    "encoder.stages.0.0.wide.bias": (8,),
    "encoder.stages.0.0.out.conv": (1, 1, 8, 4),
    "encoder.stages.0.0.out.bias": (8,),
    "encoder.stages.1.0.conv": (3, 3, 32, 8),
    "encoder.stages.1.0.bias": (16,),
    "encoder.stages.1.1.gain": (16,),
    "encoder.stages.1.1.wide.conv": (3, 3, 16, 8),
    "encoder.stages.1.1.wide.bias": (16,),
    "encoder.stages.1.1.out.conv": (1, 1, 16, 8),
    "encoder.stages.1.1.out.bias": (16,),
    "encoder.stages.1.2.gain": (16,),
    "encoder.stages.1.2.qkv.conv": (1, 1, 16, 24),
    "encoder.stages.1.2.qkv.bias": (48,),
    "encoder.stages.1.2.out.conv": (1, 1, 16, 8),
    "encoder.stages.1.2.out.bias": (16,),
    "encoder.to_code.to_code": (1, 1, 8, 4),
    "encoder.to_code.bias": (4,),
    "decoder.from_code.from_code": (3, 3, 4, 8),
    "decoder.from_code.bias": (16,),
    "decoder.stages.0.0.gain": (16,),
    "decoder.stages.0.0.qkv.conv": (1, 1, 16, 24),
    "decoder.stages.0.0.qkv.bias": (48,),
    "decoder.stages.0.0.out.conv": (1, 1, 16, 8),
    "decoder.stages.0.0.out.bias": (16,),
    "decoder.stages.0.1.gain": (16,),
    "decoder.stages.0.1.wide.conv": (3, 3, 16, 8),
    "decoder.stages.0.1.wide.bias": (16,),
    "decoder.stages.0.1.out.conv": (1, 1, 16, 8),
    "decoder.stages.0.1.out.bias": (16,),
    "decoder.stages.0.2.conv": (3, 3, 16, 16),
    "decoder.stages.0.2.bias": (32,),
    "decoder.stages.1.0.gain": (8,),
    "decoder.stages.1.0.wide.conv": (3, 3, 8, 4),
    "decoder.stages.1.0.wide.bias": (8,),
    "decoder.stages.1.0.out.conv": (1, 1, 8, 4),
    "decoder.stages.1.0.out.bias": (8,),
    "decoder.to_pixels.to_pixels": (3, 3, 4, 12),
    "decoder.to_pixels.bias": (12,),
}
DISCRIMINATOR_SHARDS = {
    "layers.0.conv": (3, 3, 12, 4),
    "layers.0.bias": (8,),
    "layers.1.conv": (3, 3, 32, 8),
    "layers.1.bias": (16,),
    "score.score": (3, 3, 8, 1),
    "score.bias": (1,),
}
# From the student's width, 32, to the teacher's, 64.
MAP_SHARDS = {"feature_maps.0.feature_map": (32, 32)}


def shard_shapes(init):
    """By flat name, the shape that one device holds of every parameter that `init(key)` makes."""
    with jax.set_mesh(make_mesh((1, 2, 4))):
        leaves = sharding.by_name(sharding.abstract(init))
    return {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in leaves.items()}


@pytest.mark.parametrize(("changes", "wanted"), GPT_SHARDS.values(), ids=GPT_SHARDS)
def test_a_device_holds_this_shard_of_every_parameter_of_a_gpt(changes, wanted):
    assert shard_shapes(tiny_network(classes=5, **changes).init) == wanted


def test_a_device_holds_this_shard_of_every_parameter_of_a_network_with_parts():
    assert shard_shapes(parts_network().init) == PARTS_SHARDS


def test_a_device_holds_this_shard_of_every_parameter_of_a_tokenizer():
    network = config_lib.Autoencoder(
        quantizer="vq",
        norm=True,
        attention=True,
        downsample=4,
        widths=(8, 16),
        encoder_blocks=1,
        decoder_blocks=1,
        codes=24,
        code_size=4,
    )
    settings = config_lib.Tokenizer(discriminator_width=8, discriminator_layers=2)
    assert shard_shapes(functools.partial(autoencoder.init, network)) == AUTOENCODER_SHARDS
    critic = functools.partial(layers.init, autoencoder.Discriminator, network, settings)
    found = shard_shapes(lambda key: critic(key=key))
    assert found == DISCRIMINATOR_SHARDS


def test_a_device_holds_this_shard_of_the_map_between_features_of_student_and_teacher():
    settings = config_lib.Distill(teacher="teacher", features=1.0)
    networks = tiny_network(), (tiny_network(width=64),)
    found = shard_shapes(functools.partial(distillation.init_maps, *networks, settings))
    assert found == MAP_SHARDS


def test_the_shards_above_cover_the_whole_table_of_shardings():
    tables = [*(wanted for _, wanted in GPT_SHARDS.values()), AUTOENCODER_SHARDS, PARTS_SHARDS]
    tables += [DISCRIMINATOR_SHARDS, MAP_SHARDS]
    names = {name.split(".")[-1] for table in tables for name in table}
    assert names == set(sharding.PARAMETERS)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_moments_are_sharded_as_their_parameters(recipe, optimizer):
    state = state_on_eight(recipe, optimizer)
    params = jax.tree.leaves_with_path(state["params"])
    specs = {tuple(k.key for k in path): leaf.sharding.spec for path, leaf in params}
    found = set()
    for path, leaf in jax.tree.leaves_with_path(state["opt"]):
        name = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        name = name[-2:] if name[-2:] in specs else name[-1:]
        if name in specs and leaf.ndim:
            assert leaf.sharding.spec == specs[name], path
            found.add(name)
    assert found == set(specs)  # every parameter has a moment, and all were looked at


def test_arrays_on_the_devices_have_the_shards_that_the_types_promise():
    network = tiny_network()
    optimizer, rate = make_optimizer(config_lib.Optimizer(name="adam"), steps=1)
    with jax.set_mesh(make_mesh((1, 2, 4))):
        init = step.make_init(network, optimizer)
        state = jax.jit(init)(jax.random.key(0))
        train_step = step.make_train_step(step.make_loss(network), optimizer, rate)
        state, _ = train_step(state, sharding.global_batch(random_batch(network)))
        for wanted, found in zip(
            jax.tree.leaves(sharding.abstract(init)), jax.tree.leaves(state), strict=True
        ):
            shard = found.addressable_shards[0].data
            assert shard.shape == wanted.sharding.shard_shape(wanted.shape)
        moment = state["opt"][0].mu["blocks"]["mlp_in"]
        assert moment.addressable_shards[0].data.size * 8 == moment.size


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1, 1), (8, 1, 1, 1)), ((2, -1, 1, 2), (2, 2, 1, 2)), ((1, 2, 4, 1), (1, 2, 4, 1))],
)
def test_one_axis_fills_what_is_left(sizes, shape):
    mesh = sharding.make_mesh(config_lib.Mesh(*sizes))
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == sharding.AXES


@pytest.mark.parametrize(
    "sizes", [(3, 1, 1, 1), (-1, 3, 1, 1), (2, 2, 1, 1), (4, 4, 1, 1), (1, 1, 3, 1)]
)
def test_mesh_that_does_not_divide_the_devices_is_refused(sizes):
    with pytest.raises(InputError, match=r"config\.mesh\.data=.*there are 8"):
        sharding.make_mesh(config_lib.Mesh(*sizes))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model.width", {"model": config_lib.Model(width=36, heads=6)}),
        ("model.heads", {"model": config_lib.Model(width=32, heads=1)}),
        ("train.batch_size", {"train": config_lib.Train(batch_size=12, microbatches=4)}),
        (
            "model.width and config.model.mlp_ratio,",
            {"model": config_lib.Model(width=16, mlp_ratio=1, heads=2, mlp="swiglu")},  # 11
        ),
        ("probe.batch_size", {"probe": config_lib.Probe(batch_size=3)}),
        (
            "probe.sgd.batch_size",
            {"probe": config_lib.Probe("sgd", sgd=config_lib.ProbeSgd(batch_size=6))},
        ),
    ],
)
def test_what_the_mesh_does_not_divide_is_named(field, changes):
    config = dataclasses.replace(config_lib.Config(), **changes)
    mesh = make_mesh((1, 4, 2)) if field != "model.width" else make_mesh((1, 8, 1))
    with pytest.raises(InputError, match=rf"config\.{field} is "):
        sharding.check(config, mesh, ("model", "train", "probe", "finetune"))


def test_the_axis_sequence_must_divide_the_positions_of_the_network_that_is_trained():
    mesh = make_mesh((1, 1, 2, 1))
    data = config_lib.Data(image_size=(5, 7))  # 35 tokens of an image
    config = dataclasses.replace(config_lib.Config(), data=data)
    sharding.check(config, mesh, ["model", "finetune"], length=50)
    with pytest.raises(InputError, match=r"of an image, from config\.data\.image_size, is 35"):
        sharding.check(config, mesh, ["model", "train"])
    with pytest.raises(
        InputError, match=r"of a sequence, from .* is 63, which 2 \(config\.mesh\.seq"
    ):
        sharding.check(config, mesh, ["model", "finetune"], length=63)


def test_what_the_mesh_does_not_divide_of_a_tokenizer_is_named():
    mesh, tokens = make_mesh((2, 4, 1)), config_lib.Tokens("learned")
    config = dataclasses.replace(config_lib.Config(), tokens=tokens)
    sharding.check(config, mesh, ["tokenizer"])
    odd = dataclasses.replace(tokens, autoencoder=config_lib.Autoencoder(widths=(8, 6)))
    settings = config_lib.Tokenizer(adversarial=0.1, discriminator_width=10)
    for changes, words in (
        ({"tokens": odd}, r"tokens\.autoencoder\.widths\[1\] is 6, which 4 \(config\.mesh\.fsdp\)"),
        ({"tokenizer": settings}, r"tokenizer\.discriminator_width is 10, which 4"),
        (
            {"tokenizer": config_lib.Tokenizer(train=config_lib.Train(batch_size=12))},
            r"tokenizer\.train\.batch_size is 12, which 8",
        ),
    ):
        with pytest.raises(InputError, match=rf"config\.{words}"):
            sharding.check(dataclasses.replace(config, **changes), mesh, ["tokenizer"])


def test_rows_that_every_process_holds_are_split_over_the_batch_axes():
    rows = np.arange(16).reshape(8, 2)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        array = sharding.shard_rows(rows)
    assert array.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(np.asarray(array), rows)
