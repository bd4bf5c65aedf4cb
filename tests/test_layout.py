"""Sequences of parts: who sees whom, what each part reads, predicts and costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import generator, make_mesh, parts_batch, parts_network, random_params
from flax import nnx

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.model import flops, parts
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import Layout, Part, causal, of_images, prefixed
from gptv_jax.model.parts import Stem
from gptv_jax.train import objective, step

IMAGE = Part("image", 11, (3, 4))
OBJECTS = Part("objects", 19, (2, 4), bins=6, summed=True)
CLIP = Part("clip", 11, (3, 2, 2), predicted=False)
LAYOUTS = {
    "causal": causal(IMAGE, OBJECTS),
    "prefix": prefixed(IMAGE, OBJECTS, Part("label", 5, (1,))),
    # The start vector counts as the first position of the first frame.
    "frames": Layout((CLIP, OBJECTS), (4,) * 4 + (8,) * 4 + (13,) * 5 + tuple(range(14, 21))),
    "everything": prefixed(IMAGE, Part("label", 5, (1,))),
}
MODEL = config_lib.Model(layers=2, width=32, heads=4)


def on_mesh(batch: dict) -> dict:
    leaves, tree = jax.tree.flatten(batch)
    return tree.unflatten(sharding.global_batch(dict(enumerate(leaves))).values())


# Who sees whom


@pytest.fixture(params=LAYOUTS)
def seen(request, one_device):
    """A network, its weights, tokens, and [T, T]: whether position t sees position s."""
    layout = LAYOUTS[request.param]
    network, rng = Network(MODEL, layout), np.random.default_rng(0)
    rows = [rng.integers(part.vocabulary, size=(1, part.size)) for part in layout.parts]
    tokens = np.concatenate(rows, axis=1).astype(np.int32)
    visible = np.array(layout.visible)
    return network, random_params(network), tokens, np.arange(len(visible)) < visible[:, None]


def test_changing_a_token_changes_what_sees_the_token_and_nothing_else(seen):
    network, params, tokens, sees = seen
    final = jax.jit(lambda tokens: network.bind(params)(tokens).final[0])
    base = np.asarray(final(tokens))
    for j in range(network.length - 1):  # the last token is only a target
        changed = tokens.copy()
        changed[0, j] = (changed[0, j] + 1) % 5
        moved = np.abs(np.asarray(final(changed)) - base).max(axis=-1)
        assert (moved[~sees[:, j + 1]] == 0).all()  # position j + 1 holds token j
        assert (moved[sees[:, j + 1]] > 1e-6).all()


def test_the_gradient_of_a_position_reaches_what_it_sees_and_nothing_else(seen):
    network, params, tokens, sees = seen
    later = {name: part["position"] for name, part in params["parts"].items()}

    @jax.jit
    @jax.grad
    def gradient(tables, direction):
        of_parts = {
            name: part | {"position": tables[name]} for name, part in params["parts"].items()
        }
        changed = params | {"position": tables["first"], "parts": of_parts}
        return (network.bind(changed)(jnp.asarray(tokens)).final * direction).sum()

    first, *others = network.layout.parts
    names = [part.name for part in others]
    weights = np.random.default_rng(1).normal(size=32).astype(np.float32)
    for t in range(network.length):
        direction = np.zeros((1, network.length, 32), np.float32)
        direction[0, t] = weights
        found = gradient({"first": params["position"], **later}, direction)
        rows = np.concatenate([found["first"], *(found[name] for name in names)])
        size = np.abs(rows).max(axis=-1)
        # The frames of a clip share the table of positions.
        shared = sees[t][: first.size].reshape(first.axes[0], -1).any(axis=0)
        known = np.concatenate([shared, sees[t][first.size :]])
        assert (size[~known] == 0).all() and (size[known] > 1e-9).all()


@pytest.mark.parametrize(
    ("shift", "visible", "reason"),
    [
        (1, (2, 3, 4, 4), "predicts token 0 and would see it: visible"),
        (1, (4, 4, 4, 4), "position 0"),
        (2, (3, 3, 4, 4), "position 0"),
        (1, (1, 2, 4, 3), "never fall"),
        (1, (1, 2, 2, 4), r"visible\[2\] is 2"),
        (1, (1, 2, 3), "4 positions, but 3 masks"),
    ],
)
def test_a_layout_refuses_leaks_and_masks_that_are_none(shift, visible, reason):
    with pytest.raises(ValueError, match=reason):
        Layout((Part("image", 7, (2, 2)),), visible, shift)


def test_layouts_of_equal_parts_are_equal_and_causal():
    assert hash(LAYOUTS["prefix"]) == hash(prefixed(IMAGE, OBJECTS, Part("label", 5, (1,))))
    assert of_images(11, (3, 4)).visible == tuple(range(1, 13))


@pytest.mark.parametrize("field", [{"objective": "bert"}, {"random_order": (0.2, 0.5)}], ids=str)
def test_what_is_for_images_alone_is_refused_by_name(field):
    with pytest.raises(InputError, match=f"config.model.{next(iter(field))} is .*take"):
        parts_network(**field)


@pytest.mark.parametrize("objective", ["bert", "autoregressive"])
def test_a_network_refuses_a_shift_that_it_does_not_compute(objective):
    config, length = dataclasses.replace(MODEL, objective=objective), IMAGE.size
    for shift in {0, 1, 2} - {int(objective != "bert")}:
        layout = Layout((IMAGE,), tuple(range(1, length + 1)), shift)
        with pytest.raises(InputError, match=f"shift is {shift}, .*objective={objective} takes"):
            Network(config, layout)


@pytest.mark.parametrize("field", [{"objective": "bert"}, {"random_order": (0.2, 0.5)}], ids=str)
def test_a_stem_does_not_go_with_masked_tokens_and_random_orders(field):
    config = dataclasses.replace(MODEL, **field)
    layout = of_images(11, (3, 4), config.objective)
    with pytest.raises(InputError, match=f"{next(iter(field))} is .*has a stem; take"):
        Network(config, layout, stem=(8,))


def test_the_loss_of_several_parts_refuses_what_it_does_not_use():
    network = parts_network()
    for given, coefficients in (
        (network, (1.0, 0.5)),
        (dataclasses.replace(network, classes=3), ()),
    ):
        with pytest.raises(ValueError, match="no class head and no coefficients"):
            step.make_loss(given, *coefficients)


# What a part reads


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("vocabulary", [11, 0], ids=["tokens", "pixels"])
def test_an_input_is_the_sum_of_the_objects_tokens_so_far_with_the_features_of_places(vocabulary):
    network = parts_network(vocabulary)
    params, batch = random_params(network), parts_batch(network)
    model, (image, objects) = network.bind(params), network.layout.parts
    if not vocabulary:
        del batch["tokens"]
    batch = on_mesh(batch)
    tokens = objective.sequence(network.layout, batch)
    x = np.asarray(jax.jit(model.embed)(tokens[:, :-1], pixels=batch["image"]))
    of = jax.device_get(params["parts"]["objects"])
    table, place = of["embedding"].copy(), of["place"]
    named = place * parts.coordinates(6, 32)
    assert (named[:6, 16:] == 0).all() and (named[6:, :16] == 0).all()  # heights, then widths
    table[:12] += named
    ids = np.asarray(batch["inputs"]["objects"])
    sums = table[ids].reshape(8, 4, 4, 32).cumsum(axis=2).reshape(8, 16, 32)
    np.testing.assert_allclose(x[:, 17:], sums[:, :-1] + of["position"][1:], atol=1e-5)
    pixels = jax.jit(lambda pixels: model.stem(pixels, "float32"))(batch["image"])
    held = np.asarray(pixels) + place * parts.centers((4, 4), 32)
    if vocabulary:
        held += np.asarray(params["token_embedding"])[np.asarray(batch["tokens"])]
    positions = np.concatenate([params["position"], of["position"]])
    np.testing.assert_allclose(x[:, 1:17], held + positions[1:17], atol=1e-5)
    one = jax.jit(model.embed_one, static_argnums=2)
    for position in range(17 if not vocabulary else 18, 32):
        part = objects if position > 16 else image
        np.testing.assert_allclose(one(tokens, position, part)[:, 0], x[:, position], atol=1e-5)


@pytest.mark.usefixtures("one_device")
def test_the_head_scores_a_place_by_its_features_and_by_weights_of_its_own():
    network = parts_network(11)
    params, objects = random_params(network), network.layout.parts[1]
    final = generator().normal(size=(2, 3, 32)).astype(np.float32)
    of = jax.device_get(params["parts"]["objects"])
    head = of["head"].copy()
    head[:12] += of["place_head"] * parts.coordinates(6, 32)
    logits = network.bind(params).token_logits(jnp.asarray(final), objects)
    np.testing.assert_allclose(logits, final @ head.T, atol=1e-4)


def test_a_corner_has_the_features_of_the_nearest_cell():
    at, cells = parts.coordinates(9, 32), parts.centers((4, 4), 32).reshape(4, 4, 32)
    for k in range(1, 8, 2):  # bin k of 9 lies in the middle of cell k // 2 of 4
        np.testing.assert_allclose(at[k, :16], cells[k // 2, 0, :16], atol=1e-6)
        np.testing.assert_allclose(at[9 + k, 16:], cells[0, k // 2, 16:], atol=1e-6)
    clip = parts.centers((2, 4, 4), 48)  # a third of the channels each for time, heights and widths
    np.testing.assert_allclose(clip[:16, 16:], cells.reshape(16, 32), atol=1e-6)
    np.testing.assert_array_equal(clip[:16, 16:], clip[16:, 16:])
    assert np.abs(clip[:16, :16] - clip[16:, :16]).min(axis=0).max() > 0.5
    np.testing.assert_array_equal(parts.centers((1, 4, 4), 32), cells.reshape(16, 32))


@pytest.mark.usefixtures("one_device")
def test_a_fresh_network_predicts_uniformly_and_reads_pixels_alone_where_there_are_no_tokens():
    for vocabulary, moved in ((11, False), (0, True)):
        network = parts_network(vocabulary)
        params = jax.jit(network.init)(jax.random.key(0))
        batch = on_mesh(parts_batch(network))
        loss, metrics = jax.jit(objective.make_parts_loss(network))(params, None, batch, None)
        weights = np.asarray(batch["weights"]["objects"])
        assert float(loss) == pytest.approx(np.log(19) * weights.mean(), rel=1e-5)
        assert float(metrics["loss"]) == float(loss)
        model, tokens = network.bind(params), objective.sequence(network.layout, batch)
        final = [model(tokens, pixels=batch["image"] + jnp.uint8(k)).final for k in (0, 9)]
        assert bool(jnp.abs(final[0] - final[1]).max() > 1e-4) == moved


# What a part predicts


@pytest.mark.usefixtures("one_device")
def test_a_parts_loss_is_the_mean_over_positions_of_weighted_nats(monkeypatch):
    network = parts_network()
    params, batch = random_params(network), on_mesh(parts_batch(network))
    output = jax.jit(network.bind(params))(
        objective.sequence(network.layout, batch), pixels=batch["image"]
    )
    assert output.logits.keys() == {"objects"}  # the image is not predicted
    nats = optax.softmax_cross_entropy_with_integer_labels(
        output.logits["objects"], batch["targets"]["objects"]
    )
    wanted = (nats * batch["weights"]["objects"]).sum(axis=1) / 16
    loss, metrics = jax.jit(step.make_loss(network))(params, None, batch, None)
    assert float(loss) == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert metrics.keys() == {"loss"}  # weighted, so no nats
    weights = np.array(batch["weights"]["objects"])
    weights[:, :3], weights[6] = 0, 0
    batch |= on_mesh({"weights": {"objects": weights}})
    measured = step.make_metric(network).step(params, batch)
    counted = np.asarray(nats)[:6, 3:].mean(axis=1).sum()  # row 6 counts 0, row 7 is padding
    assert float(measured["nats_per_token"]) == pytest.approx(counted, rel=1e-5)
    assert float(measured["images"]) == 7
    batch |= on_mesh({"weights": {"objects": np.ones_like(weights)}})
    loss, _ = jax.jit(step.make_loss(network))(params, None, batch, None)
    monkeypatch.setattr(objective, "LOGITS_BYTES", 4 * 19 * 8 * 4)  # 4 positions of 8 images
    assert objective.loss_chunks(network, 8, {}, network.layout.parts[1]) == 4
    chunked, _ = jax.jit(step.make_loss(network))(params, None, batch, None)
    assert float(chunked) == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.usefixtures("one_device")
def test_what_weighs_nothing_has_no_gradient():
    network = parts_network()
    params, batch = random_params(network), parts_batch(network)
    noise = np.random.default_rng(3).random((8, 16)) < 0.5
    batch["weights"]["objects"][noise] = 0
    other = np.where(noise, (batch["targets"]["objects"] + 1) % 19, batch["targets"]["objects"])
    gradient = jax.jit(jax.grad(lambda p, b: step.make_loss(network)(p, None, b, None)[0]))
    found = jax.device_get(gradient(params, on_mesh(batch)))
    again = gradient(params, on_mesh(batch | {"targets": {"objects": other}}))
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(again))
    shifted = {"objects": (batch["targets"]["objects"] + 1) % 19}
    moved = gradient(params, on_mesh(batch | {"targets": shifted}))
    heads = (each["parts"]["objects"]["head"] for each in (moved, found))
    assert np.abs(np.subtract(*heads)).max() > 1e-3


def test_soft_targets_are_gaussians_over_the_bins_of_their_own_axis():
    found = np.asarray(parts.soft_targets(jnp.array([[2, 6, 12, 18]]), OBJECTS, 0.7))[0]
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-6)
    near = np.exp(-0.5 * (np.arange(6) / 0.7) ** 2)
    np.testing.assert_allclose(found[0, :6] / found[0, 2], near[[2, 1, 0, 1, 2, 3]], rtol=1e-5)
    np.testing.assert_allclose(found[1, 6:12] / found[1, 6], near, rtol=1e-5)
    assert (found[0, 6:] == 0).all() and (found[1, :6] == 0).all() and (found[1, 12:] == 0).all()
    np.testing.assert_array_equal(found[2:], np.eye(19)[[12, 18]])


@pytest.mark.usefixtures("one_device")
def test_a_soft_loss_is_the_cross_entropy_with_soft_targets():
    network = parts_network()
    params, batch = random_params(network), on_mesh(parts_batch(network))
    tokens = objective.sequence(network.layout, batch)
    logits = network.bind(params)(tokens, pixels=batch["image"]).logits["objects"]
    soft = parts.soft_targets(batch["targets"]["objects"], OBJECTS, 0.7)
    nats = -(soft * jax.nn.log_softmax(logits)).sum(axis=-1) * batch["weights"]["objects"]
    loss = objective.make_parts_loss(network, soft={"objects": 0.7})(params, None, batch, None)[0]
    assert float(loss) == pytest.approx(float(nats.mean()), rel=1e-5)


# Meshes


def loss_and_gradient(shape, microbatches=1, **changes):
    network = parts_network(**changes)
    with jax.set_mesh(make_mesh(shape)):
        params, batch = random_params(network), on_mesh(parts_batch(network))
        loss = objective.make_parts_loss(network, soft={"objects": 0.7})  # the image has none
        if microbatches == 1:
            found = jax.jit(jax.value_and_grad(lambda p: loss(p, None, batch, None)[0]))(params)
        else:
            sgd = optax.sgd(1e4)  # so that the change is exact beside the weights
            take = step.make_train_step(loss, sgd, lambda _: 0.0, microbatches=microbatches)
            before = jax.tree.map(jnp.copy, params)
            state, metrics = take(step.state_of(params, sgd), batch)
            change = jax.tree.map(lambda b, a: (b - a) / 1e4, before, state["params"])
            found = metrics["loss"], change
        return jax.device_get(found)


@functools.cache
def wanted(vocabulary):
    return loss_and_gradient((1, 1, 1, 1), vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("shape", "microbatches", "vocabulary"),
    [
        ((2, 2, 1, 2), 1, 11),
        ((1, 2, 2, 2), 1, 0),
        ((1, 1, 8, 1), 1, 11),
        ((1, 2, 2, 1), 2, 11),
        ((1, 1, 1, 1), 4, 0),
    ],
    ids=str,
)
def test_meshes_and_microbatches_give_one_loss_and_gradient(shape, microbatches, vocabulary):
    loss, gradient = loss_and_gradient(shape, microbatches, vocabulary=vocabulary)
    assert float(loss) == pytest.approx(float(wanted(vocabulary)[0]), rel=1e-5)
    for (path, f), w in zip(
        jax.tree.leaves_with_path(gradient), jax.tree.leaves(wanted(vocabulary)[1]), strict=True
    ):
        scale = np.abs(w).max() + 1e-30
        np.testing.assert_allclose(f / scale, w / scale, atol=2e-5, rtol=0, err_msg=str(path))


# FLOPs


def test_no_shift_of_a_convolution_hides_the_pixels_from_the_stem():
    """A plain relu passes nothing on once training has moved its biases far below zero."""
    pixels = np.random.default_rng(0).integers(256, size=(2, 16, 24, 3)).astype(np.uint8)
    with jax.set_mesh(make_mesh((1, 1, 1, 1))):
        model = Stem((8, 8, 8), 16, tokens=False, rngs=nnx.Rngs(0))
        for layer in model.layers:
            layer.convolution.bias[...] -= 10
        first, second = np.asarray(model(jnp.array(pixels), "float32"))
    assert np.abs(first - second).max() > 0.1


@pytest.mark.usefixtures("one_device")
def test_flops_of_heads_and_stem_are_shared_out_over_the_sequence():
    network = parts_network()
    alone = dataclasses.replace(network, layout=of_images(11, (4, 8)), stem=())
    params = jax.eval_shape(network.init, jax.random.key(0))
    pixels = jax.ShapeDtypeStruct((1, 16, 16, 1), jnp.uint8)
    stem = lambda p, x: network.bind(p).stem(x, "float32")  # noqa: E731
    counted = flops.forward(network)
    assert counted["stem"] * 32 == flops.of_program(stem, params, pixels)
    heads = 2 * 32 * 19 // 2 - 2 * 32 * 11  # 16 of 32 positions have a head, of 19 tokens
    assert counted["matmul"] == flops.forward(alone)["matmul"] + heads
    assert counted["attention"] == flops.forward(alone)["attention"]
