"""Masks of objects as tokens: round trips, what is learned, what is drawn, and mask AP."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import test_detect
from conftest import make_mesh, random_params, scenes_config
from test_detect import SIZE

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.stages.run import run_stages
from gptv_jax.tasks import average_precision, masks, panoptic
from gptv_jax.tasks.boxes import Detections
from gptv_jax.tasks.detect import Detect
from gptv_jax.tokens.label_maps import Cells

# A mask token says of each of 4 x 4 squares of the box whether it is the object's.
CODEC = Cells(2, (8, 8), 2)


def task_of(**settings) -> Detect:
    found = {"objects": 4, "bins": 193, "masks": 16, "mask_size": 8, "mask_levels": (2,)}
    task = test_detect.task_of(**found | {"top_p": 0.0} | settings)
    return dataclasses.replace(task, measured=CODEC.to_bytes())


@functools.cache
def scenes(count: int, seed: int = 0) -> list[dict]:
    """Records at the network's size with 1 to 3 objects, whose masks are of 4 x 4 squares."""
    rng, records = np.random.default_rng(seed), []
    for _ in range(count):
        n = rng.integers(1, 4)
        sides = 4 * rng.integers(2, 6, (n, 2))
        low = rng.integers(0, np.array(SIZE) - sides)
        found = np.zeros((n, *SIZE), bool)
        for mask, (y, x), (height, width) in zip(found, low, sides, strict=True):
            squares = rng.random((4, 4)) < 0.6
            squares[0, rng.integers(4)] = True
            blocks = np.kron(squares, np.ones((height // 4, width // 4), bool))
            mask[y : y + height, x : x + width] = blocks
        boxes = np.concatenate([low, low + sides], axis=1).astype(np.float32)
        labels = rng.integers(3, size=n).astype(np.int32)
        records.append({"boxes": boxes, "box_labels": labels, "masks": found})
    return records


def doubled(record: dict) -> dict:
    """The record of the original image, which is twice as high and wide."""
    pixels = np.kron(record["masks"], np.ones((1, 2, 2), bool))
    return record | {"boxes": 2 * record["boxes"], "masks": pixels}


def mirrored(record: dict) -> dict:
    boxes = record["boxes"][:, [0, 3, 2, 1]] * [1, -1, 1, -1] + [0, SIZE[1], 0, SIZE[1]]
    boxes = boxes.astype(np.float32)
    return record | {"boxes": boxes, "masks": record["masks"][..., ::-1]}


def total_of(task: Detect, records: list[dict], flips=(False,)) -> dict[str, np.ndarray]:
    """What the metric's step gives where exactly the truth is drawn."""
    rows = []
    for flipped in flips:
        for index, record in enumerate(records):
            found = task.example(mirrored(record) if flipped else record)["targets"]["boxes"]
            view = np.float32([0, 128, 96, 0] if flipped else [0, 0, 96, 128])
            row = {"drawn": found[None], "targets": found, "true_boxes": found, "view": view}
            row |= {"probabilities": np.ones((1, len(found)), np.float32), "nats": np.float32(2)}
            rows.append(row | {"index": np.int32(index), "mask": np.float32(1)})
    total = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return total | {"images": np.float32(len(rows))}


def batch_of(task: Detect, records: list[dict]) -> dict:
    rng = np.random.default_rng(0)
    rows = jax.tree.map(lambda *each: np.stack(each), *(task.example(r, rng) for r in records))
    return rows | {
        "image": rng.integers(256, size=(len(records), *SIZE, 1), dtype=np.uint8),
        "view": np.tile(np.float32([0, 0, 96, 128]), (len(records), 1)),
        "index": np.arange(len(records), dtype=np.int32),
        "mask": np.ones(len(records), np.float32),
    }


def test_the_truth_as_tokens_comes_back_pixel_by_pixel_also_from_a_mirrored_view():
    task, records = task_of(votes=("flip(1.0)",)), scenes(12)
    originals = [doubled(record) for record in records]
    total = total_of(task, records, flips=(False, True))
    numbers = task.metric(task.network(), originals.__getitem__).result(total)
    assert numbers["mask_ap"] == pytest.approx(1)
    bounds = task.bounds(total, originals.__getitem__)
    for name in ("ceiling", "voted", "true_boxes"):
        assert bounds[name]["mask_ap"] == pytest.approx(1), name
    assert bounds["wrong_image"]["mask_ap"] < 0.05 and set(bounds["true_boxes"]) == {
        f"mask_{name}" for name in ("ap", "ap50", "ap75")
    }
    for row in (0, len(records)):
        given = total["drawn"][row], total["probabilities"][row], total["view"][row]
        found = task.found(*given, (96, 128))
        order = [found.boxes.tolist().index(box) for box in originals[0]["boxes"].tolist()]
        np.testing.assert_array_equal(np.asarray(found.masks)[order], originals[0]["masks"])
        np.testing.assert_array_equal(found.masks[order[0]], originals[0]["masks"][0])
        assert len(found.take(found.scores > 2).masks) == 0
    # Codes of a mirrored view that are taken for those of an upright one.
    total["view"][len(records) :] = total["view"][0]
    total["drawn"][: len(records)] = total["drawn"][len(records) :]
    assert task.bounds(total, originals.__getitem__)["voted"]["mask_ap"] < 0.9


@pytest.mark.parametrize("noise", [True, False])
def test_codes_stand_after_the_class_and_nowhere_else(noise):
    task = task_of(bins=5, noise=noise)
    rows, ids = test_detect.any_objects(task), task.box_tokens
    assert rows.shape == (64, 4, 21)
    ended = (rows[..., 0] == ids.noise).cumsum(axis=1) > 0
    assert (rows[ended] == ids.noise).all() and ended.any() != noise
    assert (rows[~ended][:, :5] < ids.noise).all() and (rows[~ended][:, 5:] > ids.noise).all()
    assert set(np.unique(rows[~ended][:, 5:])) == {ids.noise + 1, ids.noise + 2}


def test_boxes_and_classes_are_those_of_boxes_alone():
    record = scenes(1)[0]
    both = [task_of(masks=count).example(record, np.random.default_rng(3)) for count in (16, 0)]
    for name in ("targets", "inputs", "weights"):
        with_masks, plain = (each[name]["boxes"].reshape(4, -1) for each in both)
        assert plain.shape == (4, 5) and with_masks.shape == (4, 21)
        np.testing.assert_array_equal(with_masks[:, :5], plain)
    plain = task_of(masks=0)
    (part,) = plain.parts()
    assert part.vocabulary == 2 * 193 + 3 + 1 and part.shape == (4, 5)
    assert plain.measure(lambda count: []) == b""


def test_noise_objects_and_unknown_masks_have_no_gradient_of_codes_and_real_ones_have():
    task, records = task_of(), [dict(record) for record in scenes(4)]
    records[0] = records[0] | {"masks": np.zeros_like(records[0]["masks"])}
    batch, ids = batch_of(task, records), task.box_tokens
    targets = batch["targets"]["boxes"].reshape(4, -1, 21)
    noise = targets[..., 4] == ids.noise
    unknown = ~noise & (np.arange(4) == 0)[:, None]
    assert (batch["inputs"]["boxes"].reshape(targets.shape)[..., 5:] > ids.noise).all()
    moved = {}
    for name, chosen in (("noise", noise), ("unknown", unknown), ("real", ~noise & ~unknown)):
        other = targets.copy()
        other[..., 7][chosen] = 2 * ids.noise + 3 - other[..., 7][chosen]
        moved[name] = batch | {
            "targets": {"boxes": other.clip(0, ids.vocabulary - 1).reshape(4, -1)}
        }
        assert (moved[name]["targets"]["boxes"] != batch["targets"]["boxes"]).any()
    same = test_detect.equal_gradients(task, batch, moved)
    assert same == {"noise": True, "unknown": True, "real": False}


def test_drawn_masks_are_those_of_the_full_pass_in_drawn_and_in_true_boxes():
    task, records = task_of(bins=17, objects=3), scenes(4)
    network, batch = task.network(), batch_of(task, records)
    places = network.layout.slices["boxes"]
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = random_params(network)
        total = task.test_metric(network, records.__getitem__).sums(params, iter([batch]))
        for name in ("drawn", "probabilities"):  # of the only sample
            total[name] = total[name][:, 0]
        pixels, logits = sharding.shard_rows(batch["image"]), {}
        for name in ("drawn", "true_boxes"):
            tokens = np.pad(total[name], ((0, 0), (places.start, 0))).astype(np.int32)
            output = network.bind(params)(sharding.shard_rows(tokens), pixels=pixels)
            logits[name] = np.asarray(output.logits["boxes"])
    likely = np.asarray(jax.nn.softmax(logits["drawn"], axis=-1))
    expected = np.take_along_axis(likely, total["drawn"][..., None], -1)[..., 0]
    np.testing.assert_allclose(total["probabilities"], expected, rtol=2e-4, atol=1e-6)
    codes = np.arange(places.stop - places.start) % 21 > 4
    truth = batch["targets"]["boxes"]
    np.testing.assert_array_equal(total["true_boxes"][:, ~codes], truth[:, ~codes])
    assert (total["drawn"][:, ~codes] != truth[:, ~codes]).any()
    first = task.box_tokens.noise + 1
    for name, each in logits.items():
        best = first + each[:, codes, first:].argmax(axis=-1)
        real = np.repeat(total[name][:, 4::21] != first - 1, 16, axis=1)  # noise objects come last
        np.testing.assert_array_equal(total[name][:, codes][real], best[real])
        assert real.all() == (name == "drawn") and real.any()


def test_mask_ap_counts_the_iou_of_pixels():
    """Masks of three fifths of the object, in perfect boxes, are right at IoUs up to .6."""
    whole = np.zeros((2, 20, 30), bool)
    whole[:, 5:10, 5:15] = True
    record = {"boxes": np.float32([[5, 5, 10, 15]] * 2), "box_labels": np.arange(2), "masks": whole}
    part = whole.copy()
    part[:, 8:] = False
    scores = np.ones(2, np.float32)
    found = Detections(record["boxes"], record["box_labels"], scores, part)
    known = average_precision.without_pixels(record, masks=True)
    numbers = average_precision.score([known], [found], 2, "segm").numbers
    assert numbers["ap"] == pytest.approx(0.3) and numbers["ap75"] == 0
    assert average_precision.score([known], [found], 2).numbers["ap"] == pytest.approx(1)


def test_a_mask_is_cropped_to_its_box_and_put_back_there():
    rng, grid = np.random.default_rng(0), np.zeros((6, 40, 50), bool)
    boxes = np.float32([[0, 0, 40, 50], [3, 4, 12, 20], [8.5, 2.25, 20, 30.5], [5, 5, 5, 9]] * 2)[
        :6
    ]
    for mask, (y, x) in zip(grid, rng.integers(1, 20, (6, 2)), strict=True):
        mask[y : y + 15, x : x + 25] = True
    inside = masks.crop(grid, boxes, 64)
    for mask, box, crop in zip(grid, boxes, inside, strict=True):
        found = np.zeros_like(mask)
        masks.paste(crop > 0, box, found)
        y0, x0, y1, x1 = np.round(box).astype(int)
        expected = np.zeros_like(mask)
        expected[y0:y1, x0:x1] = mask[y0:y1, x0:x1]
        # Of a box between pixels a row and a column differ; of any box corners may be rounded.
        assert (found != expected).sum() <= (2 if (box == np.round(box)).all() else 40)
    beyond = np.zeros((10, 10), bool)
    masks.paste(np.ones((8, 8), bool), np.float32([-4, 6, 4, 14]), beyond)
    assert beyond[:4, 6:].all() and beyond.sum() == 16
    masks.paste(np.ones((8, 8), bool), np.float32([20, 20, 30, 30]), beyond)
    assert beyond.sum() == 16


def test_impossible_mask_tokens_are_refused():
    settings, keys = {"masks": 15, "mask_size": 64}, ("boxes", "masks")
    with pytest.raises(InputError, match=r"detect\.masks is 15, .* it takes 0, 16, 64, 256"):
        masks.check(task_of(**settings).config, keys)
    fine = task_of(mask_size=64).config
    masks.check(fine, keys)
    with pytest.raises(InputError, match="has no masks of objects"):
        masks.check(fine, ("boxes",))
    empty = [{"masks": np.zeros((0, 4, 4), bool), "boxes": np.zeros((0, 4), np.float32)}]
    with pytest.raises(InputError, match="none has an object with a mask"):
        task_of().measure(lambda count: empty)


def test_instances_are_learned_scored_shown_and_found_again(tmp_path):
    masked = {"masks": 16, "mask_size": 32, "mask_steps": 60, "mask_levels": (8, 4)}
    detect = config_lib.Detect(objects=3, bins=49, masks_measured=64, **masked)
    config = scenes_config(
        config_lib.Task("detect", detect=detect), 64, 4, 12, train_transforms=("flip()",)
    )
    found = run_stages(config, str(tmp_path / "run"), ["finetune"])
    for name in ("", "true_boxes_", "ceiling_", "wrong_image_"):
        assert 0 <= found[f"finetune/{name}test_mask_ap"] <= found[f"finetune/{name}test_mask_ap50"]
        names = [f"finetune/{name}test_{each}" for each in panoptic.QUALITY]
        assert all(0 <= found[each] <= 1 for each in names)
    assert found["finetune/ceiling_test_pq"] > 0.5 and found["finetune/test_pq"] < 0.3
    assert found["finetune/ceiling_test_mask_ap50"] > 0.5
    assert found["finetune/ceiling_test_mask_ap"] < found["finetune/ceiling_test_ap"]
    assert (tmp_path / "run/samples/detections.png").exists()
    rows = json.loads((tmp_path / "run/finetune/detections-test.json").read_text())
    assert {"bbox", "segmentation"} <= rows[0].keys()
    assert rows[0]["segmentation"]["size"] == [32, 48]
    model = gptv_jax.load(tmp_path / "run")
    model.save(tmp_path / "instances.safetensors")
    again = gptv_jax.load(tmp_path / "instances.safetensors")
    image = np.random.default_rng(0).integers(256, size=(64, 80, 1), dtype=np.uint8)
    (one,), (two,) = (m.detect([image], votes=["flip(1.0)"]) for m in (model, again))
    pixels = np.asarray(one.masks)
    assert pixels.shape == (len(one.boxes), 64, 80) and pixels.dtype == bool
    np.testing.assert_array_equal(pixels, np.asarray(two.masks))
    low, high = np.floor(one.boxes[0, :2]).astype(int), np.ceil(one.boxes[0, 2:]).astype(int)
    outside = pixels[0].copy()
    outside[low[0] : high[0], low[1] : high[1]] = False
    assert not outside.any()
