"""Detection: its grammar, its numbers from rows of a split, and its pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh, random_params
from PIL import Image

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.api import of_tasks
from gptv_jax.config import rules
from gptv_jax.data import transforms
from gptv_jax.errors import InputError
from gptv_jax.tasks import average_precision, rows
from gptv_jax.tasks.boxes import Detections
from gptv_jax.tasks.detect import Detect
from gptv_jax.train import metrics
from gptv_jax.weights.native import WeightsFile

NAMES = ("cup", "dog", "tree")
COMPILED = []  # programs of this process, their seconds
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(seconds) if "backend_compile" in event else None
)
SIZE = (48, 64)


def task_of(**settings) -> Detect:
    config = config_lib.Config()
    fields = {"objects": 6, "bins": 256, **settings}
    detect = dataclasses.replace(config.task.detect, **fields)
    task = dataclasses.replace(config.task, name="detect", detect=detect)
    data = dataclasses.replace(config.data, image_size=SIZE, name="digit_scenes")
    model = dataclasses.replace(config.model, layers=1, width=16, heads=2)
    tokens = dataclasses.replace(config.tokens, kind="none")
    task = dataclasses.replace(task, image_input="pixels", stem=(8, 8, 8))
    config = dataclasses.replace(config, task=task, data=data, model=model, tokens=tokens)
    return Detect(config, object_names=NAMES)


def scenes(count: int, seed: int = 0) -> list[dict]:
    """Records of original images twice as large as the network's; every fourth has no object."""
    rng, records = np.random.default_rng(seed), []
    for number in range(count):
        n = 0 if number % 4 == 3 else rng.integers(1, 5)
        corner = rng.uniform((0, 0), (60, 80), (n, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(12, 32, (n, 2))], axis=1)
        labels = rng.integers(3, size=n).astype(np.int32)
        records.append({"boxes": boxes.astype(np.float32), "box_labels": labels})
    return records


def total_of(task: Detect, records: list[dict], flips=(False,)) -> dict[str, np.ndarray]:
    """What the metric's step gives for perfect detections, in batches' order, with padding."""
    rows, width = [], SIZE[1]
    for flipped in flips:
        for index, record in enumerate([*records, records[0]]):
            boxes, view = record["boxes"] / 2, np.array([0, 0, 96, 128], np.float32)
            if flipped:
                boxes, view = boxes[:, [0, 3, 2, 1]], view[[0, 3, 2, 1]]
                boxes = boxes * [1, -1, 1, -1] + np.float32([0, width, 0, width])
            shown = {"boxes": boxes.astype(np.float32), "box_labels": record["box_labels"]}
            targets = task.example(shown)["targets"]["boxes"]
            row = {"drawn": targets[None], "targets": targets, "view": view, "nats": np.float32(2)}
            row |= {
                "probabilities": np.ones((1, len(targets)), np.float32),
                "index": np.int32(index),
            }
            rows.append(row | {"mask": np.float32(index < len(records))})
    total = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return total | {"images": total["mask"].sum()}


def any_objects(task: Detect) -> np.ndarray:
    """Random tokens among the allowed ones, [64, objects, slots]."""
    length, ids = task.parts()[0].size, task.box_tokens

    @jax.jit
    def draw(key):
        def step(position, tokens):
            mask = task.allowed("boxes", position, tokens)
            logits = jnp.where(jnp.broadcast_to(mask, (64, ids.vocabulary)), 0.0, -jnp.inf)
            drawn = jax.random.categorical(jax.random.fold_in(key, position), logits)
            return tokens.at[:, position].set(drawn.astype(jnp.int32))

        # The tokens that are not drawn yet mean nothing.
        return jax.lax.fori_loop(0, length, step, jnp.full((64, length), ids.noise, jnp.int32))

    return np.asarray(draw(jax.random.key(0))).reshape(64, -1, ids.slots)


@pytest.mark.parametrize("noise", [True, False])
def test_any_drawing_keeps_to_the_grammar(noise):
    """Random tokens among the allowed ones are boxes that are no smaller than 0, and classes."""
    task = task_of(bins=5, noise=noise)
    tokens, ids = any_objects(task), task.box_tokens
    ended = (tokens[..., 0] == ids.noise).cumsum(axis=1) > 0
    assert (tokens[ended] == ids.noise).all()
    y0, x0, y1, x1, label = tokens[~ended].T
    assert (y0 >= 0).all() and (y0 <= y1).all() and (y1 < 5).all()
    assert (x0 >= 5).all() and (x0 <= x1).all() and (x1 < 10).all()
    assert (label >= 10).all() and (label < 13).all() and len(np.unique(label)) == 3
    assert (y0 == y1).any() and (y0 < y1).any()
    assert ended.any() and not ended.all() if not noise else not ended.any()
    assert task.allowed("image", 3, jnp.zeros((1, 4), jnp.int32)) is None


def test_the_truth_as_tokens_scores_one_in_original_pixels():
    task, records = task_of(bins=1000), scenes(40)
    total = total_of(task, records)
    metric = task.metric(task.network(), records.__getitem__)
    numbers = metric.result(total)
    assert numbers["ap"] > 0.999 and numbers["ap50"] == pytest.approx(1)
    assert numbers["nats_per_token"] == 2 and numbers["calibration_error"] == 0
    assert next(iter(metric.primary)) == "ap"
    bounds = task.bounds(total, records.__getitem__)
    assert bounds["ceiling"]["ap"] == numbers["ap"]
    assert bounds["wrong_image"]["ap"] < 0.02 and "voted" not in bounds
    blind = total | {"drawn": np.full_like(total["drawn"], task.box_tokens.noise)}
    assert task.bounds(blind, records.__getitem__)["ceiling"] == bounds["ceiling"]
    assert metric.result(blind)["ap"] == 0
    coarse = task_of(bins=12)
    total = total_of(coarse, records)
    assert coarse.bounds(total, records.__getitem__)["ceiling"]["ap"] < 0.5


def test_rows_of_damaged_images_do_not_count_and_the_order_of_batches_does_not_matter():
    task, records = task_of(), scenes(12)
    total, expected = total_of(task, records), None
    for order in (np.arange(13), np.random.default_rng(0).permutation(13)):
        mixed = {n: x[order] if np.ndim(x) else x for n, x in total.items()}
        numbers = task.metric(task.network(), records.__getitem__).result(mixed)
        assert expected in (None, numbers)
        expected = numbers
        assert list(rows.by_image(mixed)) == list(range(12))
    total["mask"][5] = 0
    assert 5 not in rows.by_image(total) and len(rows.by_image(total)) == 11


def batch_of(task: Detect, records: list[dict], seed: int = 0) -> dict:
    """A batch of training, with noise for pixels, that evaluation can read as well."""
    rng = np.random.default_rng(seed)
    half = [{"boxes": r["boxes"] / 2, "box_labels": r["box_labels"]} for r in records]
    examples = [task.example(record, rng) for record in half]
    rows = jax.tree.map(lambda *each: np.stack(each), *examples)
    return rows | {
        "image": rng.integers(256, size=(len(records), *SIZE, 1), dtype=np.uint8),
        "view": np.tile(np.float32([0, 0, 96, 128]), (len(records), 1)),
        "index": np.arange(len(records), dtype=np.int32),
        "mask": np.ones(len(records), np.float32),
    }


def equal_gradients(task: Detect, batch: dict, others: dict[str, dict]) -> dict[str, bool]:
    """Whether the loss of each other batch has, to the bit, the gradient of `batch`'s loss."""
    loss = task.loss(task.network())
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = random_params(task.network())
        gradient = jax.jit(jax.grad(lambda p, b: loss(p, None, b, None)[0]))
        expected = gradient(params, sharding.global_batch(batch))
        found = {name: gradient(params, sharding.global_batch(b)) for name, b in others.items()}
        return {
            name: jax.tree.all(jax.tree.map(jnp.array_equal, expected, each))
            for name, each in found.items()
        }


def test_noise_coordinates_have_no_gradient_and_others_have():
    task = task_of(bins=32, soft=0.7)
    batch = batch_of(task, scenes(8))
    targets = batch["targets"]["boxes"].reshape(8, -1, 5)
    noise, moved = targets[..., 4] == task.box_tokens.noise, {}
    for name, chosen in (("noise", noise), ("real", ~noise)):
        other = targets.copy()
        other[..., 0][chosen] = (other[..., 0][chosen] + 7) % 32
        moved[name] = batch | {"targets": {"boxes": other.reshape(8, -1)}}
        assert (other != targets).any()
    classes = np.where(targets == 64, 65, targets).reshape(8, -1)
    moved["class"] = batch | {"targets": {"boxes": classes}}
    same = equal_gradients(task, batch, moved)
    assert same == {"noise": True, "real": False, "class": False}


def test_every_mesh_finds_the_same_objects():
    """The most likely tokens, since drawn ones would depend on the rounding of logits."""
    task, records = task_of(bins=16, top_p=0.0), scenes(8)
    network, batch, found = task.network(), batch_of(task, records), []
    for shape in ((1, 1, 1), (4, 1, 2)):
        with jax.set_mesh(make_mesh(shape)):
            metric = task.metric(network, records.__getitem__)
            sums = metric.sums(random_params(network), iter([batch, batch]))
            found.append(sums)
            assert metric.result(sums)["ap"] >= 0
    one, two = found
    assert one["images"] == 16 and one["drawn"].shape == (16, 1, 30)
    for name in ("drawn", "targets", "index", "mask", "view"):
        np.testing.assert_array_equal(one[name], two[name])
    for name in ("probabilities", "nats"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4)
    # The best of three classes has a third of their probability; "noise" has a share as well.
    assert one["probabilities"][..., 4::5].min() < 1 / 3
    rows = one["drawn"].reshape(16, -1, 5)
    assert (rows[..., :2] <= rows[..., 2:4]).all() and (rows[..., 4] < task.box_tokens.noise).all()


def test_objects_are_found_in_images_of_any_size_in_their_own_pixels(tmp_path):
    task = task_of(bins=16, top_p=0.0, most=4)
    config = task.config
    parts = (config.model, config.tokens, config.data.image_size)
    described = WeightsFile(*parts, {}, task=config.task, object_names=NAMES)
    mesh = make_mesh((1, 1, 1))
    with jax.set_mesh(mesh):
        model = gptv_jax.Model(described, random_params(task.network()), mesh)
    model.save(tmp_path / "detector.safetensors")
    model = gptv_jax.load(tmp_path / "detector.safetensors")
    assert model.objects == NAMES
    plain = np.full((*SIZE, 3), 90, np.uint8)
    large, grey = np.full((96, 192, 3), 90, np.uint8), Image.new("L", (64, 48), 90)
    found = model.detect([plain, large, grey])
    assert [type(each) for each in found] == [Detections] * 3
    for each in found:
        assert len(each.boxes) == 4 and (np.diff(each.scores) <= 0).all()
        assert each.boxes.dtype == each.scores.dtype == np.float32
        np.testing.assert_array_equal(each.labels, found[0].labels)
    np.testing.assert_allclose(found[1].boxes, found[0].boxes * [2, 3, 2, 3], rtol=1e-5)
    np.testing.assert_allclose(found[2].boxes, found[0].boxes, rtol=1e-5)
    middle = float(found[0].scores[1])
    (likely,) = model.detect(plain[None], threshold=middle)
    np.testing.assert_array_equal(likely.scores, found[0].scores[:2])
    (voted,) = model.detect([plain], votes=["flip_vertical(1.0)", "flip(1.0)"])
    assert len(voted.boxes) == 4 and voted.boxes.min() >= 0
    assert not np.array_equal(voted.boxes, found[0].boxes)
    for wrong, words in (
        (plain[..., :2], "uint8"),
        (plain / 255, "float64"),
        (plain[:0], r"uint8 \[0, 64, 3\].* from 1 on"),
    ):
        with pytest.raises(InputError, match=words):
            model.detect([wrong])
    for votes, words in ((["flip(0.5)"], "random"), ("flip(1.0)", "takes a list of texts")):
        with pytest.raises(InputError, match=words):
            model.detect([plain], votes=votes)
    for threshold in (-0.1, 50.0, float("nan")):
        with pytest.raises(InputError, match=r"threshold is .*; it takes a number from 0 to 1"):
            model.detect([plain], threshold)
    calls = [model.complete, model.outpaint, model.surprise, model.log_likelihood, model.features]
    given = [*((call, plain[None]) for call in (*calls, model.tokenize)), (model.sample, 1)]
    given += [(call, np.zeros((1, 48), np.int32)) for call in (model.detokenize, model.logits)]
    for call, argument in given:
        with pytest.raises(InputError, match=r"it takes model\.detect\(images\) alone"):
            call(argument)
    with pytest.raises(InputError, match=r"takes a list of images, as in detect\(\[image\]\)"):
        model.detect(plain)
    pixels = np.random.default_rng(0).integers(256, size=(40, 60, 3)).astype(np.uint8)
    turned = Image.fromarray(np.rot90(pixels))  # the camera lay on its side
    turned.getexif()[0x0112] = 6
    upright, found = model.detect([pixels, turned])
    np.testing.assert_array_equal(found.boxes, upright.boxes)


def test_views_vote_in_the_original_image():
    task, records = task_of(votes=("flip(1.0)",)), scenes(12)
    assert task.views() == ((), ("flip(1.0)",))
    total = total_of(task, records, flips=(False, True))
    assert rows.by_image(total)[0] == [0, 13]
    voted = task.bounds(total, records.__getitem__)["voted"]
    assert voted["ap"] > 0.97
    total["view"][13:] = total["view"][0]  # as if the second view were not mirrored
    assert task.bounds(total, records.__getitem__)["voted"]["ap"] == pytest.approx(0.7, abs=0.15)
    assert task.metric(task.network(), records.__getitem__).result(total)["ap"] > 0.97


def test_samples_vote_and_one_finds_what_another_has_missed():
    records = scenes(12)
    task, total = task_of(samples=2), total_of(task_of(), records)
    objects = np.repeat(total["drawn"], 2, axis=1).reshape(len(total["index"]), 2, -1, 5)
    objects[:, 0, 0], objects[:, 1, 1] = objects[:, 0, 2], objects[:, 1, 2]  # each misses another
    drawn = objects.reshape(*objects.shape[:2], -1)
    total["probabilities"] = np.ones(drawn.shape, np.float32)

    def ap(kept: slice) -> float:
        sampled = {"drawn": drawn[:, kept], "probabilities": total["probabilities"][:, kept]}
        found = total | sampled
        return task.metric(task.network(), records.__getitem__).result(found)["ap"]

    assert ap(slice(0, 2)) > max(ap(slice(0, 1)), ap(slice(1, 2))) + 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"samples": 2, "top_p": 0.0},
            r"samples above 1 takes config\.task\.detect\.top_p above 0",
        ),
        (
            {"noise": False, "noise_among": 0.5},
            r"noise_among is 0\.5, but .*noise=False makes no noise",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        rules.SECTIONS["finetune"](task_of(**settings).config)


def test_views_that_cannot_be_read_are_refused_with_the_name_of_the_field():
    with pytest.raises(InputError, match=r"config\.task\.detect\.votes: .*'flop\(1\.0\)'"):
        task_of(votes=("flip(1.0)|flop(1.0)",)).check()


def test_crowds_are_no_targets():
    record = scenes(1)[0] | {"crowd": np.array([True])}
    record = {name: array[:1] for name, array in record.items()}
    task = task_of()
    assert (task.example(record)["targets"]["boxes"][4::5] == task.box_tokens.noise).all()


def test_at_most_so_many_detections_count():
    task, records = task_of(most=1), scenes(8)
    total = total_of(task, records)
    numbers = task.metric(task.network(), records.__getitem__).result(total)
    assert numbers["ar100"] == numbers["ar1"] < 0.9


def test_the_class_aps_are_of_the_view_that_ap_is_of():
    task, records = task_of(votes=("flip(1.0)",)), scenes(12)
    total = total_of(task, records, flips=(False, True))
    total["drawn"][:6] = task.box_tokens.noise  # the plain view misses what its flip finds
    numbers = task.metric(task.network(), records.__getitem__).result(total)
    voted = task.bounds(total, records.__getitem__)["voted"]
    for found, of_classes in (
        (numbers, task.details(total, records.__getitem__)),
        (voted, {name: voted[name] for name in voted if "_of_" in name}),
    ):
        assert of_classes.keys() == {f"ap_of_{name}" for name in NAMES}
        assert np.mean([*of_classes.values()]) == pytest.approx(found["ap"])
    assert voted["ap"] > numbers["ap"] + 0.1


def test_a_split_without_an_object_has_no_ap_and_any_ap_is_better():
    task, records = task_of(), [scenes(4)[3]] * 2
    numbers = task.metric(task.network(), records.__getitem__).result(total_of(task, records))
    assert numbers["ap"] is numbers["ap50"] is None and numbers["nats_per_token"] == 2
    evaluations = [{"step": 1, **numbers}, {"step": 2, **numbers, "nats_per_token": 1.0}]
    assert metrics.best_step(evaluations, task.primary) == 2
    assert metrics.best_step([*evaluations, {"step": 3, **numbers, "ap": 0.0}], task.primary) == 3
    metrics.Progress("finetune", 2).evaluated(evaluations, task.primary)


def test_draws_do_not_depend_on_the_batch():
    task, records = task_of(bins=16, samples=2), scenes(8)
    network, batch = task.network(), batch_of(task, records)
    halves = [{k: jax.tree.map(lambda x, h=h: x[h], v) for k, v in batch.items()}
              for h in (slice(4), slice(4, 8))]  # fmt: skip
    with jax.set_mesh(make_mesh((1, 1, 1))):
        metric, params = task.metric(network, records.__getitem__), random_params(network)
        one, two = metric.sums(params, iter([batch])), metric.sums(params, iter(halves))
    np.testing.assert_array_equal(one["drawn"], two["drawn"])
    assert len(np.unique(one["drawn"].reshape(16, -1), axis=0)) == 16


def test_classes_are_the_most_likely_real_ones_and_coordinates_are_drawn():
    task, records = task_of(bins=16, samples=2), scenes(8)
    network, batch, ids = task.network(), batch_of(task, records), task.box_tokens
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = random_params(network)
        total = task.metric(network, records.__getitem__).sums(params, iter([batch]))
        tokens = total["drawn"].reshape(16, -1)
        whole = np.pad(tokens, ((0, 0), (network.layout.parts[0].size, 0)))
        rows = sharding.shard_rows(whole), sharding.shard_rows(np.repeat(batch["image"], 2, axis=0))
        read = jax.jit(lambda params, tokens, pixels: network.bind(params)(tokens, pixels=pixels))
        logits = np.asarray(read(params, *rows).logits["boxes"]).reshape(16, 6, 5, -1)
    tokens, found = tokens.reshape(16, 6, 5), total["probabilities"].reshape(16, 6, 5)[..., 4]
    real = logits[..., 4, 2 * ids.bins : ids.noise]
    best = real.argmax(axis=-1) + 2 * ids.bins
    assert len(np.unique(best)) == 3 and (logits[..., 4, ids.noise] > real.max(axis=-1)).any()
    np.testing.assert_array_equal(tokens[..., 4], best)
    chances = np.asarray(jax.nn.softmax(logits[..., 4, :]))
    np.testing.assert_allclose(
        found, np.take_along_axis(chances, best[..., None], axis=-1)[..., 0], rtol=1e-3
    )
    assert (tokens[..., 0] != logits[..., 0, : ids.bins].argmax(axis=-1)).any()


def model_of(task: Detect) -> gptv_jax.Model:
    config, mesh = task.config, make_mesh((1, 1, 1))
    parts = (config.model, config.tokens, config.data.image_size)
    facts = {"object_names": NAMES, "eval_transforms": config.data.eval_transforms}
    facts["limits"] = config.data.limits
    described = WeightsFile(*parts, {}, task=config.task, **facts)
    with jax.set_mesh(mesh):
        return gptv_jax.Model(described, random_params(task.network()), mesh)


def test_pictures_are_read_as_training_and_predict_read_their_files(tmp_path, monkeypatch):
    """Of 12 bits, transparent and grey ones; `draw` shows what the network is given."""
    rng, seen = np.random.default_rng(0), []
    deep = Image.fromarray(rng.integers(4096, size=SIZE, dtype=np.uint16))
    clear = Image.fromarray(rng.integers(256, size=(*SIZE, 4), dtype=np.uint8))
    grey = Image.fromarray(rng.integers(256, size=(96, 70), dtype=np.uint8))
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, image in zip(paths, (deep, clear, grey), strict=True):
        image.save(path)

    def watched(*given):
        seen[-1].append(np.asarray(given[4]))
        return draw(*given)

    draw = of_tasks.draw
    monkeypatch.setattr(of_tasks, "draw", watched)
    for entry in ("decode(channels=1, maximum=4095, background=0)", "decode(maximum=100)"):
        task = task_of(bins=16)
        data = dataclasses.replace(task.config.data, eval_transforms=(entry, f"resize({SIZE})"))
        task = dataclasses.replace(task, config=dataclasses.replace(task.config, data=data))
        steps, model = transforms.with_decode(data.eval_transforms, 3), model_of(task)
        readable = paths[1:] if "100" in entry else paths
        expected = []
        for path in readable:
            record = {"encoded": path.read_bytes()}
            for step in steps:
                record = step(record)
            expected.append(record["image"])
        seen.append([])
        boxes = [each.boxes for each in model.detect([Image.open(path) for path in readable])]
        np.testing.assert_array_equal(seen[-1][0][: len(readable)], expected)
        for path, shown, each in zip(readable, expected, boxes, strict=True):
            seen.append([])  # the command `predict` gives records of decoded files
            (found,) = model.detect([steps[0]({"encoded": path.read_bytes()})])
            np.testing.assert_array_equal(seen[-1][0][0], shown)
            np.testing.assert_array_equal(found.boxes, each)
    colours = np.array(clear)[..., :3]
    seen.append([])
    model.detect([colours])
    np.testing.assert_array_equal(seen[-1][0][0], steps[0].pixels(colours))


def test_an_image_that_cannot_be_decoded_is_refused():
    image = Image.fromarray(np.full(SIZE, -5, np.int32))
    with pytest.raises(InputError, match=r"detect cannot read an image \(.*maximum"):
        model_of(task_of(bins=16)).detect([image])


def test_an_open_file_is_held_to_the_limits_of_the_run_before_it_is_decoded(tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    task = task_of(bins=16)
    data = dataclasses.replace(task.config.data, limits=config_lib.Limits(max_pixels=1599))
    model = model_of(dataclasses.replace(task, config=dataclasses.replace(task.config, data=data)))
    with Image.open(tmp_path / "a.png") as image:
        with pytest.raises(InputError, match="40 x 40 pixels are more than max_pixels=1599"):
            model.detect([image])
        assert image.tile  # the pixels are not decoded


def test_equal_images_have_equal_boxes_wherever_they_stand():
    model, rng = model_of(task_of(bins=64, top_p=0.9, samples=2)), np.random.default_rng(0)
    images = rng.integers(256, size=(2, *SIZE, 3), dtype=np.uint8)
    found = model.detect([images[0], images[1], images[0]])
    found += [*model.detect(images[:1]), *model.detect([images[1], images[0]])]
    for i, j in ((0, 2), (0, 3), (1, 4), (0, 5)):
        np.testing.assert_array_equal(found[i].boxes, found[j].boxes)
        np.testing.assert_allclose(found[i].scores, found[j].scores, rtol=1e-5)
    assert len(found[0].boxes) != len(found[1].boxes) or (found[0].boxes != found[1].boxes).any()


def test_a_second_call_compiles_nothing():
    model = model_of(task_of(bins=16))
    images = np.random.default_rng(0).integers(256, size=(4, *SIZE, 1), dtype=np.uint8)
    first, compiled = model.detect(images), COMPILED.copy()
    again = model.detect(images[:3])
    assert compiled and compiled == COMPILED
    for a, b in zip(first, again, strict=False):
        np.testing.assert_array_equal(a.boxes, b.boxes)


def test_one_image_has_no_floor_of_another_image():
    task, records = task_of(), scenes(1)
    bounds = task.bounds(total_of(task, records), records.__getitem__)
    assert set(bounds["wrong_image"].values()) == {None} and bounds["ceiling"]["ap"] > 0


def test_each_kind_of_score_is_computed_once(monkeypatch):
    task, records = task_of(bins=16, votes=("flip(1.0)",)), scenes(4)
    calls, score = [], average_precision.score
    counted = lambda *given: calls.append(1) or score(*given)  # noqa: E731
    monkeypatch.setattr(average_precision, "score", counted)
    batch = batch_of(task, records)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        metric = task.metric(task.network(), records.__getitem__)
        total = metric.sums(random_params(task.network()), iter([batch, batch]))
    metric.result(total)
    task.bounds(total, records.__getitem__)
    task.details(total, records.__getitem__)
    task.details(total, records.__getitem__)
    assert len(calls) == 4  # plain, ceiling, wrong_image, voted
