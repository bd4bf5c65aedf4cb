"""Networks whose positions read the pixels of tokens: what is read, causality, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODERN, generator, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.config import rules
from gptv_jax.decode.sampler import Sampler
from gptv_jax.errors import InputError
from gptv_jax.model import flops
from gptv_jax.planning.training import Pretraining
from gptv_jax.probe import sgd
from gptv_jax.stages import select
from gptv_jax.tasks import token_attack
from gptv_jax.train import objective, step

pytestmark = pytest.mark.usefixtures("one_device")

RECIPES = {"igpt": {}, "modern": MODERN}
PATCH = (2, 3, 3)  # height, width and channels


def pixel_network(recipe="modern", classes=0, **changes):
    return tiny_network(classes, patch=PATCH, image_input="pixels", **RECIPES[recipe], **changes)


def images(seed=0, count=8):
    return generator(seed).integers(256, size=(count, 8, 12, 3), dtype=np.uint8)


def batch_of(network, seed=0):
    return sharding.global_batch(random_batch(network, seed=seed) | {"image": images(seed)})


def cells(x):
    """[B, 16, 18]: the pixels of each token, by hand."""
    return np.stack(
        [x[:, r : r + 2, c : c + 3].reshape(len(x), -1) for r in range(0, 8, 2)
         for c in range(0, 12, 3)], axis=1,
    )  # fmt: skip


def test_a_token_is_read_as_a_linear_map_of_its_own_pixels():
    network = pixel_network(axial_positions=False)
    params, batch = random_params(network), batch_of(network)
    assert "token_embedding" not in params
    found = network.bind(params).contents(batch["tokens"], batch["image"])
    wanted = (cells(images()) / 127.5 - 1) @ np.asarray(params["patch_embedding"])
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    start = jax.jit(lambda b: network.bind(params).embed(
        b["tokens"][:, :-1], b["variant"], pixels=b["image"]))(batch)  # fmt: skip
    np.testing.assert_allclose(start[:, 1:], wanted[:, :-1], atol=1e-4)
    rows = np.asarray(params["start"])[np.asarray(batch["variant"])]
    np.testing.assert_allclose(start[:, 0], rows, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_pixels_change_the_logits_of_later_tokens_and_of_no_other(recipe):
    network = pixel_network(recipe)
    params, batch = random_params(network), jax.tree.map(lambda x: x[:1], batch_of(network))

    @jax.jit
    def logits(image):
        return network.bind(params)(batch["tokens"], pixels=image).logits[0]

    before, image = logits(batch["image"]), np.asarray(batch["image"])
    for place in range(16):
        other, (row, column) = image.copy(), divmod(place, 4)
        other[0, 2 * row + 1, 3 * column + 2, 1] ^= 128  # one value of one pixel
        moved = np.abs(logits(jnp.asarray(other)) - before).max(axis=-1) > 0
        np.testing.assert_array_equal(moved, np.arange(16) > place)
    # Tokens are targets alone.
    again = jax.jit(lambda t: network.bind(params)(t, pixels=batch["image"]).logits[0])
    np.testing.assert_array_equal(again((batch["tokens"] + 1) % 11), again(batch["tokens"]))


def losses(network, mesh, draws=False):
    with jax.set_mesh(make_mesh(mesh)):
        key = jax.random.key(1) if draws else None
        loss, batch = step.make_loss(network), batch_of(network)
        params = random_params(network)
        run = jax.jit(jax.value_and_grad(lambda p: loss(p, None, batch, key), has_aux=True))
        return jax.device_get(run(params))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 2, 2)])
def test_hidden_inputs_give_one_loss_on_every_mesh(shape):
    network = pixel_network(context_masking=0.5)
    wanted, found = losses(network, (1, 1, 1), draws=True), losses(network, shape, draws=True)
    for f, w in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(f, w, rtol=1e-4, atol=1e-5 * max(np.abs(w).max(), 1e-3))


def test_a_class_head_and_a_probe_read_the_pixels():
    network = pixel_network(classes=5)
    params, batch = random_params(network), batch_of(network)
    (_, metrics), _ = losses(network, (1, 1, 1))
    output, _ = objective.evaluate_batch(network, params, batch)
    nats = objective.cross_entropy(output.class_logits, batch["label"]).mean()
    assert metrics["class_nats"] == pytest.approx(float(nats), rel=1e-5)
    dark = objective.evaluate_batch(network, params, batch | {"image": 0 * batch["image"]})[0]
    assert jnp.abs(dark.pooled - output.pooled).max(axis=(1, 2)).min() > 1e-3


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_the_probe_by_sgd_reads_the_pixels(pooling):
    network = pixel_network()
    params, batch = random_params(network), batch_of(network)
    heads = sgd.Heads(network, config_lib.Probe(pooling=pooling), 5, ((1,),))
    of_heads = jax.tree.map(jnp.ones_like, jax.jit(heads.init)())
    gradient = jax.jit(jax.grad(lambda p, b: sgd.make_loss(heads)(p, params, b, None, 0)[0]))
    light, dark = (
        gradient(of_heads, batch | {"image": image})["layers_1"]["weight"]
        for image in (batch["image"], 0 * batch["image"])
    )
    assert jnp.abs(light - dark).max() > 1e-3


CONFIG = {
    "tokens.kind": "palette",
    "tokens.colors": 11,
    "data.image_size": 8,
    "model.image_input": "pixels",
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
}


def config_of(**changes) -> config_lib.Config:
    settings = config_lib.default()
    named = {name.replace("__", "."): value for name, value in changes.items()}
    settings.update_from_flattened_dict(CONFIG | named)
    return config_lib.fields.from_dict(config_lib.Config, settings, "config")


def test_the_plan_has_the_images_of_a_batch_and_the_flops_of_the_map():
    training = Pretraining(config_of(), ())
    planned = training.batch(4)
    assert (planned["image"].shape, planned["image"].dtype) == ((4, 8, 8, 3), jnp.uint8)
    plain = Pretraining(config_of(model__image_input="tokens"), ())
    assert "image" not in plain.batch(4)
    added = flops.training(training.network).total - flops.training(plain.network).total
    assert added == 6 * 3 * 16
    assert plain.draws and not training.draws  # a drawn token has no pixels


def test_stages_that_draw_or_score_tokens_are_left_out():
    held = ("image", "label")
    assert select.choose_stages(config_of(), held) == ["pretrain", "probe", "finetune"]
    for stage in ("sample", "generate", "typicality"):
        with pytest.raises(InputError, match=f"has {stage}, but config.model.image_input=pixels"):
            select.choose_stages(config_of(), held, [stage])
    network = pixel_network()
    with pytest.raises(InputError, match="neither draws images nor scores tokens"):
        Sampler(network, {})
    assert "pixels" in token_attack.check(pixel_network(classes=5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens__kind": "grey"}, "take palette or learned"),
        ({"data__name": "tokens", "data__dir": "cache"}, "take tokens, or data with images"),
        ({"data__frames": 2}, "take palette or learned, and images"),
        ({"model__objective": "bert"}, "objective=autoregressive"),
        ({"model__random_order": (0.5, 1.0), "model__rotary": True}, "random_order="),
        ({"distill__teacher": ("runs/teacher",)}, "teachers read tokens"),
        ({"finetune__distill__teacher": ("runs/teacher",)}, "teachers read tokens"),
    ],
)
def test_what_does_not_go_with_pixels_is_refused(changes, words):
    with pytest.raises(InputError, match=rf"config\.model\.image_input is 'pixels'.*{words}"):
        rules.check(config_of(**changes))


def test_a_task_with_parts_after_the_image_reads_tokens():
    with pytest.raises(InputError, match=r"config\.model\.image_input is 'pixels'"):
        dataclasses.replace(tiny_network(image_input="pixels"), stem=(8, 8))
