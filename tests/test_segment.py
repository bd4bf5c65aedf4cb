"""Segmentation: what it learns, its losses, its numbers, its pictures and its Python call."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh, random_params
from PIL import Image

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.data.records import plane_to_original
from gptv_jax.errors import InputError
from gptv_jax.model.parts import centers
from gptv_jax.tasks import map_pictures
from gptv_jax.tasks.map_passes import classes_read, written
from gptv_jax.tasks.segment import Segment
from gptv_jax.train import objective, optimizer, step
from gptv_jax.weights.native import WeightsFile

NAMES = ("ground", "cup", "tree", "never")
SIZE = (16, 24)


def records(count: int, seed: int = 0, scale: int = 1) -> list[dict]:
    """Blocks of three of the four classes, two of each, as bright as their number says.

    A tenth of the pixels have no class; `scale` enlarges the original label maps.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        coarse = np.kron(rng.permutation(6).reshape(2, 3) % 3, np.ones((8, 8), int))
        segmentation = np.where(rng.random(SIZE) < 0.1, 255, coarse).astype(np.uint8)
        image = (60 * coarse + rng.integers(60, size=SIZE)).astype(np.uint8)[..., None]
        segmentation = np.kron(segmentation, np.ones((scale, scale), np.uint8))
        found.append({"segmentation": segmentation, "image": image})
    return found


@functools.cache
def task_of(**settings) -> Segment:
    """A task that has measured 20 training maps."""
    config = config_lib.Config()
    settings = config_lib.Segment(**{"labels": "cells", "cell": 4, **settings})
    task = config_lib.Task(name="segment", image_input="pixels", stem=(8, 8), segment=settings)
    data = dataclasses.replace(config.data, image_size=SIZE, name="digit_scenes")
    model = dataclasses.replace(config.model, layers=2, width=16, heads=2)
    tokens = dataclasses.replace(config.tokens, kind="none")
    config = dataclasses.replace(config, task=task, data=data, model=model, tokens=tokens)
    made = Segment(config, map_names=NAMES)
    return dataclasses.replace(made, measured=made.measure(lambda count: records(20)))


def batch_of(task: Segment, given: list[dict], first: int = 0, rng=None) -> dict:
    """A batch; the images are shown whole, whatever the size of the original."""
    rows = []
    for record in given:
        scale = len(record["segmentation"]) // SIZE[0]
        shown = record | {"segmentation": record["segmentation"][::scale, ::scale]}
        rows.append(task.example(shown, rng) | {"image": record["image"]})
    rows = jax.tree.map(lambda *each: np.stack(each), *rows)
    view = np.float32([0, 0, *given[0]["segmentation"].shape])
    return rows | {
        "view": np.tile(view, (len(given), 1)),
        "index": np.arange(first, first + len(given), dtype=np.int32),
        "mask": np.ones(len(given), np.float32),
    }


@functools.cache
def trained() -> tuple[Segment, dict]:
    """A task and weights that 200 steps made."""
    task = task_of(samples=3, layers=(0, 2))
    network = task.network()
    settings = config_lib.Optimizer(
        name="muon", learning_rate=0.02, rest_learning_rate=0.01, warmup_steps=5
    )
    update, rate = optimizer.make_optimizer(settings, 200)
    advance = step.make_train_step(task.loss(network), update, rate)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        state = jax.jit(lambda key: step.state_of(network.init(key), update))(jax.random.key(0))
        rng = np.random.default_rng(0)
        batches = [batch_of(task, records(16, seed), rng=rng) for seed in range(1, 31)]
        for number in range(200):
            state, _ = advance(state, sharding.global_batch(batches[number % 30]))
    return task, state["params"]


def sums(task: Segment, params: dict, given: list[dict], sizes: tuple[int, ...]) -> dict:
    """The metric's sums over test images, in batches of these sizes."""
    starts = np.cumsum([0, *sizes])
    batches = [batch_of(task, given[a:b], a) for a, b in itertools.pairwise(starts)]
    metric = task.test_metric(task.network(), given.__getitem__)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        return metric.sums(params, iter(batches))


def test_one_network_learns_to_read_and_to_write_maps():
    task, params = trained()
    given = records(12, seed=99)
    total, known = sums(task, params, given, (12,)), given.__getitem__
    numbers = task.metric(task.network(), known).result(total)
    bounds, details = task.bounds(total, known), task.details(total, known)
    assert task.network().reading.layers == (0, 2) and total["samples"].shape == (12, 3, 24)
    assert numbers["miou"] > 0.9 and bounds["written"]["miou"] > 0.9
    assert numbers["written_miou"] == bounds["written"]["miou"]
    assert bounds["voted"]["miou"] > 0.8 and 0.8 < details["agreement"] <= 1
    assert max(bounds["wrong_image"]["miou"], bounds["prior"]["miou"]) < 0.5
    assert bounds["ceiling"] == dict.fromkeys(bounds["ceiling"], 1) | {"classes_scored": 3}
    assert numbers["classes_scored"] == bounds["written"]["classes_scored"] == 3
    cup = task.files(total, known)["segmentation.json"]["classes"][1]
    matrix = task.maps.counts(total, known, ["written"])["written"]
    assert cup["written_accuracy"] == matrix[1, 1] / matrix[1].sum() and cup["read_accuracy"] > 0.9
    assert details["iou_of_cup"] > 0.9 and details["iou_of_never"] is None
    assert 0 < numbers["nats_per_token"] < 0.3 and numbers["nats_per_pixel"] < 0.3
    tokens = numbers["nats_per_map"] / numbers["nats_per_token"]
    assert tokens == pytest.approx(24, rel=0.01)


def test_every_number_is_that_of_a_count_of_pixels_in_the_original():
    task = task_of()
    given = records(5, seed=3, scale=3)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = random_params(task.network())
    total, known = sums(task, params, given, (5,)), given.__getitem__
    numbers = task.metric(task.network(), known).result(total)
    right = union = np.zeros(4)
    for record, found in zip(given, total["read"], strict=True):
        truth, found = record["segmentation"], np.kron(found, np.ones((3, 3), int))
        right = right + [np.sum((truth == c) & (found == c)) for c in range(4)]
        union = union + [np.sum((truth != 255) & ((truth == c) | (found == c))) for c in range(4)]
    pixels = sum((record["segmentation"] != 255).sum() for record in given)
    assert numbers["miou"] == pytest.approx((right / np.maximum(union, 1))[union > 0].mean())
    assert numbers["pixel_accuracy"] == pytest.approx(right.sum() / pixels)
    assert "never" not in {NAMES[c] for c in np.unique(total["read"])}
    assert "never" not in {NAMES[c] for c in np.unique(total["written"])}


def test_the_size_and_the_order_of_batches_change_nothing():
    task, params = trained()
    given = records(6, seed=5)
    one, two = (sums(task, params, given, sizes) for sizes in ((6,), (2, 1, 3)))
    for name in ("read", "written", "samples", "targets"):
        np.testing.assert_array_equal(one[name], two[name])
    numbers = [task.bounds(total, given.__getitem__) for total in (one, two)]
    assert numbers[0] == numbers[1] and len(np.unique(one["samples"], axis=1)) > 1
    twice = {n: np.concatenate([x, x]) if np.ndim(x) else x for n, x in one.items()}
    twice["mask"][6:] = 0  # padding
    assert task.bounds(twice, given.__getitem__) == numbers[0]


def test_losses_are_those_of_pixels_and_tokens_with_a_class():
    task = task_of(balance=0.5, read_weight=2.0, write_weight=3.0)
    network, given = task.network(), records(4, seed=7)
    given[0]["segmentation"][:4, :4] = 255
    batch = batch_of(task, given)
    assert batch["weights"]["labels"][0, 0] == 0 and batch["weights"]["labels"].max() > 0
    metric = task.metric(network, given.__getitem__)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params, on_mesh = random_params(network), sharding.global_batch(batch)
        found = jax.jit(lambda p, b: task.loss(network)(p, None, b, None)[1])(params, on_mesh)
        model, tokens = network.bind(params), objective.sequence(network.layout, on_mesh)
        output = model(tokens, pixels=on_mesh["image"])
        read, write = jax.nn.log_softmax(model.read(output)), output.logits["labels"]
        read, write = np.asarray(read), np.asarray(jax.nn.log_softmax(write))
        total = metric.sums(params, iter([batch]))
    truth, weights = batch["segmentation"], task.class_weights
    frequency = task.facts.frequencies
    assert weights[:3] @ frequency[:3] == pytest.approx(1)
    np.testing.assert_allclose(weights[1] / weights[0], (frequency[0] / frequency[1]) ** 0.5, 1e-5)
    where = np.nonzero(truth != 255)
    labels = truth[where]
    nats = -read[(*where, labels)] * weights[labels]
    assert found["read_loss"] == pytest.approx(2 * nats.sum() / truth.size, rel=1e-4)
    targets = batch["targets"]["labels"]
    nats = -np.take_along_axis(write, targets[..., None], -1)[..., 0]
    loss = (nats * batch["weights"]["labels"]).mean()
    assert found["write_loss"] == pytest.approx(3 * loss, rel=1e-4)
    for row, known in enumerate(batch["weights"]["labels"] > 0):
        assert total["nats_per_map"][row] == pytest.approx(nats[row, known].sum(), rel=1e-4)
        assert total["nats_per_token"][row] == pytest.approx(nats[row, known].mean(), rel=1e-4)
        y, x = np.nonzero(truth[row] != 255)
        mean = -read[row, y, x, truth[row, y, x]].mean()
        assert total["nats_per_pixel"][row] == pytest.approx(mean, rel=1e-4)


PATCHES = {"read": False, "labels": "patches", "codes": 3}
LEARNED = {"read": False, "labels": "learned", "levels": (4, 4), "widths": (8,), "steps": 2}


@pytest.mark.parametrize("settings", [{}, PATCHES, LEARNED])
def test_a_cell_without_a_class_is_read_as_the_usual_map_there(settings):
    task = task_of(**settings)
    codec, record = task.facts.codec, records(1, seed=4)[0]
    usual = codec.encode(task.facts.prior[None])[0][0]
    blind = {"segmentation": np.full(SIZE, 255, np.uint8)}
    assert len(np.unique(usual)) > 1 and (task.example(blind)["targets"]["labels"] == usual).all()
    record["segmentation"][4:12, 8:16] = 255
    found, empty = task.example(record), np.zeros((4, 6), bool)
    empty[1:3, 2:4] = True
    np.testing.assert_array_equal(found["weights"]["labels"] == 0, empty.ravel())
    np.testing.assert_array_equal(found["targets"]["labels"][empty.ravel()], usual[empty.ravel()])
    known = codec.encode(record["segmentation"][None])[0][0][~empty.ravel()]
    np.testing.assert_array_equal(found["targets"]["labels"][~empty.ravel()], known)


def test_among_equally_frequent_classes_the_written_map_decides_then_the_first_drawn():
    task = task_of()
    drawn = np.zeros((1, 4, 24), np.int32)
    drawn[0, :2, :12] = 1  # two maps for class 1, two for class 0
    drawn[0, 2:, 12:] = 1
    drawn[0, 1:, 0] = 0  # three for class 0
    total = {"samples": drawn, "written": np.ones((1, 24), np.int32)}
    found = task.maps.map_of(total, 0, "voted")[::4, ::4].ravel()
    np.testing.assert_array_equal(found, [0] + [1] * 23)
    total["written"][:] = 2  # no drawn map's class
    found = task.maps.map_of(total, 0, "voted")[::4, ::4].ravel()
    np.testing.assert_array_equal(found, [0] + [1] * 11 + [0] * 12)
    agreement = task.maps.agreement(total, 0)[::4, ::4].ravel()
    np.testing.assert_array_equal(agreement, [0.75] + [0.5] * 23)


def test_a_written_map_is_as_likely_as_the_loss_says():
    """The cache against the whole pass; the likelihood of a map is the product of its tokens'."""
    task, params = trained()
    network, given = task.network(), records(4, seed=11)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        batch = batch_of(task, given)
        pixels, numbers = map(sharding.shard_rows, (batch["image"], batch["index"]))
        inputs = (task, network, params, None, pixels, jax.random.key(3), numbers)
        for temperature in (0.0, 1.0):
            drawn, likely = map(np.asarray, written(*inputs, temperature))
            again = batch | {"targets": {"labels": drawn}, "weights": {"labels": drawn * 0 + 1.0}}
            metric = task.metric(network, given.__getitem__)
            total = metric.sums(params, iter([again]))
            np.testing.assert_allclose(np.log(likely).sum(1), -total["nats_per_map"], rtol=1e-3)
            assert (drawn != 3).all()
            if temperature == 0:
                np.testing.assert_array_equal(drawn, total["written"])
        alone = classes_read(task, network, params, None, pixels)
        np.testing.assert_array_equal(np.asarray(alone), total["read"])


def test_every_mesh_reads_and_writes_the_same():
    task, given, found = task_of(), records(8), []
    batch = batch_of(task, given)
    for shape in ((1, 1, 1), (4, 1, 2)):
        with jax.set_mesh(make_mesh(shape)):
            metric = task.metric(task.network(), given.__getitem__)
            found.append(metric.sums(random_params(task.network()), iter([batch])))
    for name in ("read", "written"):
        np.testing.assert_array_equal(found[0][name], found[1][name])
    np.testing.assert_allclose(found[0]["nats_per_map"], found[1]["nats_per_map"], rtol=1e-4)


def test_label_positions_have_the_features_of_the_image_there():
    task = task_of()
    network = task.network()
    with jax.set_mesh(make_mesh((1, 1, 1))):
        part = network.bind(random_params(network)).parts["labels"]
        shared = part.positions("float32") - part.position[...]
        expected = part.place[...][None] * jnp.array(centers((4, 6), 16))
    np.testing.assert_allclose(shared, expected, atol=1e-6)
    alone = task_of(write=False).network()
    assert alone.layout.length == 4 * 6 + 1 and not alone.layout.predicted.any()
    assert task_of(read=False).network().reading is None


def test_reading_alone_and_writing_alone_have_their_numbers():
    given = records(3)
    for settings in ({"write": False, "read_cell": 2}, PATCHES, LEARNED):
        task = task_of(**settings)
        with jax.set_mesh(make_mesh((1, 1, 1))):
            params = random_params(task.network())
        total = sums(task, params, given, (3,))
        numbers = task.metric(task.network(), given.__getitem__).result(total)
        assert {"miou", "nats_per_token"} <= numbers.keys() and "written_miou" not in numbers
        bounds = task.bounds(total, given.__getitem__)
        assert "written" not in bounds and ("ceiling" in bounds) == task.settings.write


def test_maps_are_moved_into_the_original_by_the_nearest_pixel():
    plane = np.arange(6).reshape(2, 3)
    view = np.float32([0, 0, 4, 6])
    np.testing.assert_array_equal(
        plane_to_original(plane, view, (4, 6)), np.kron(plane, np.ones((2, 2), int))
    )
    mirrored = plane_to_original(plane, view[[0, 3, 2, 1]], (4, 6))
    np.testing.assert_array_equal(mirrored[::2, ::2], plane[:, ::-1])
    middle = plane_to_original(plane, np.float32([1, 2, 3, 5]), (4, 7))
    np.testing.assert_array_equal(middle[1:3, 2:5], plane)
    np.testing.assert_array_equal(middle[0], middle[1])


def test_what_cannot_be_segmented_is_refused(caplog):
    caplog.set_level("INFO")
    blind = records(2)
    for record in blind:
        record["segmentation"][:] = 255
    with pytest.raises(InputError, match=r"^no pixel of 2 training label maps has a class"):
        task_of().measure(lambda count: blind)
    assert "of up to 2000 training label maps and makes their tokens (cells)." in caplog.text
    cure = r"take config.task.segment.codes=\d+ or less, or config.task.segment.labels=cells\.$"
    with pytest.raises(InputError, match=r"^the label maps have \d+ different patches .*" + cure):
        task_of(labels="patches", codes=9999)
    for settings, words in (
        ({"read": False, "write": False}, "nothing is learned"),
        ({"read_cell": 3}, "read_cell is 3"),
        ({"layers": (7,)}, r"layers is \(7,\)"),
    ):
        task = dataclasses.replace(task_of().config.task.segment, **settings)
        config = dataclasses.replace(
            task_of().config, task=dataclasses.replace(task_of().config.task, segment=task)
        )
        with pytest.raises(InputError, match=words) as refused:
            Segment(config, map_names=NAMES).check()
        assert len(str(refused.value)) <= 300


def as_model(task: Segment, params: dict, frames: int = 0) -> gptv_jax.Model:
    config = task.config
    described = WeightsFile(
        *(config.model, config.tokens, config.data.image_size, {}),
        task=config.task,
        map_names=NAMES,
        measured=task.measured,
        frames=frames,
    )
    return gptv_jax.Model(described, params, make_mesh((1, 1, 1)))


def test_images_of_any_size_are_segmented_at_their_own_size(tmp_path):
    task, params = trained()
    model = as_model(task, params)
    model.save(tmp_path / "segment.safetensors")
    model = gptv_jax.load(tmp_path / "segment.safetensors")
    assert model.map_classes == NAMES
    given = records(3, seed=21)
    images = np.stack([record["image"] for record in given])
    for way in (None, "read", "written"):
        found = model.segment(images, by=way)
        assert found.shape == (3, *SIZE) and found.dtype == np.int32
        known = np.stack([record["segmentation"] for record in given])
        assert (found == known)[known != 255].mean() > 0.9
    hot = {"samples": 3, "temperature": 5.0}  # at 1 the trained network is too sure to differ
    drawn = model.segment(images, seed=5, **hot)
    assert drawn.shape == (3, 3, *SIZE) and drawn.dtype == np.int32
    np.testing.assert_array_equal(drawn, model.segment(list(images), seed=5, **hot))
    assert (drawn != model.segment(images, seed=6, **hot)).any()
    assert model.segment(images[:0], samples=3).shape == (0, 3, *SIZE)
    (cold,) = model.segment([Image.fromarray(images[0, ..., 0])], samples=2, temperature=0)
    np.testing.assert_array_equal(cold, [model.segment(images, by="written")[0]] * 2)
    large = np.kron(images[0], np.ones((2, 3, 1), np.uint8))
    one, two = model.segment([large, Image.fromarray(images[1, ..., 0])])
    assert one.shape == (32, 72) and two.shape == SIZE
    np.testing.assert_array_equal(one, np.kron(one[::2, ::3], np.ones((2, 3), int)))
    assert (one[::2, ::3] == model.segment(images)[0]).mean() > 0.9
    for wrong, words in (
        (images[0], "takes a list"),
        (images / 255, "float64"),
        ([images[0, 0, 0]], "an image is"),
    ):
        with pytest.raises(InputError, match=words):
            model.segment(wrong)
    with pytest.raises(InputError, match="takes read or written"):
        model.segment(images, by="voted")
    with pytest.raises(InputError, match="by='read' gives one map"):
        model.segment(images, by="read", samples=2)
    for maps, words in (
        (drawn[:2, 0], "3 images, but 2 label maps"),
        (drawn[:, 0, :5], r"\[5, 24\]; its image is \[16, 24\]"),
        (drawn[:, 0] / 2, "float64; it takes whole numbers"),
    ):
        with pytest.raises(InputError, match=words):
            model.map_log_likelihood(images, maps)
    with pytest.raises(InputError, match="does not detect"):
        model.detect(images)


def test_the_likelihood_of_a_map_is_the_product_of_its_tokens():
    task, params = trained()
    model = as_model(task, params)
    images = np.stack([record["image"] for record in records(3, seed=31)])
    with jax.set_mesh(model.mesh):
        inputs = map(sharding.shard_rows, (images, np.arange(3)))
        pixels, numbers = inputs
        key = jax.random.key(0)
        drawn = written(task, model.network, params, None, pixels, key, numbers, 1.0)
        tokens, likely = map(np.asarray, drawn)
    maps = task.facts.codec.decode(tokens)
    found = model.map_log_likelihood(images, maps)
    assert found.shape == (3,) and found.dtype == np.float32
    np.testing.assert_allclose(found, np.log(likely).sum(axis=1), rtol=1e-3)
    maps[:, -4:, -4:] = -1  # the last cell
    found = model.map_log_likelihood(list(images), maps.astype(np.uint8))
    np.testing.assert_allclose(found, np.log(likely)[:, :-1].sum(axis=1), rtol=1e-3)
    large = [np.kron(array, np.ones((2, 2), array.dtype)) for array in (images[0, ..., 0], maps[0])]
    (found_large,) = model.map_log_likelihood([large[0]], [large[1]])
    assert found_large == pytest.approx(found[0], rel=0.05)


def test_pictures_show_maps_in_the_colours_of_the_legend():
    table, record = map_pictures.colors(4), records(1)[0]
    found = record["segmentation"].copy()
    found[record["segmentation"] == 255] = 1
    painted = map_pictures.paint(record["segmentation"], table)
    assert (painted[record["segmentation"] == 255] == 255).all()
    planes = {"read": found, "written": found, "uncertain": np.zeros(SIZE)}
    sheet = map_pictures.maps([(record, planes)] * 2, NAMES)
    side = 240 // SIZE[1] * SIZE[1] + 8
    assert sheet.shape[1] == 5 * side
    corner = sheet[25, 2 * side + 5]
    np.testing.assert_array_equal(corner, table[found[0, 0]])
    known = record | {"segmentation": found.astype(np.uint8)}
    named = map_pictures.maps([(known, planes)] * 2, NAMES)
    assert (named[-20:] != sheet[-20:]).any()  # the legend has no white
    bars = [{"name": "a$b", "share": 0.5, "read_iou": 0.5, "written_iou": None}] * 2
    picture, none = map_pictures.class_iou(bars), [row | {"written_iou": 0.0} for row in bars]
    assert picture.ndim == 3 and (picture != map_pictures.class_iou(none)).any()
