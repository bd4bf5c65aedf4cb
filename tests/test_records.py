"""Whatever lies in an image moves with its pixels: in transforms, batches and token caches."""

import dataclasses
import itertools

import numpy as np
import pytest
from conftest import encoded, generator, make_folder

from gptv_jax import config as config_lib
from gptv_jax.data import cache, data_set, pipeline, records, sources, transforms
from gptv_jax.data.damage import DamageLog, DecodedSource
from gptv_jax.data.images import Decode
from gptv_jax.errors import InputError
from gptv_jax.tokens import GreyCodec

HEIGHT, WIDTH = 40, 60


def drawn(seed: int) -> records.Record:
    """A record whose image has a rectangle of its own level, 1 to 6, in each of six cells."""
    rng, image, boxes = generator(seed), np.zeros((HEIGHT, WIDTH, 1), np.uint8), []
    for number in range(6):
        top, left = 20 * (number // 3), 20 * (number % 3)
        (y0, y1), (x0, x1) = np.sort([rng.choice(21, 2, replace=False) for _ in range(2)], axis=1)
        boxes.append((top + y0, left + x0, top + y1, left + x1))
        image[top + y0 : top + y1, left + x0 : left + x1] = number + 1
    levels = np.arange(1, 7, dtype=np.uint8)
    record = {
        "image": image,
        "boxes": np.array(boxes, np.float32),
        "box_labels": levels.astype(np.int32),
        "crowd": levels % 2 > 0,
        "masks": image[..., 0] == levels[:, None, None],
        "segmentation": image[..., 0] + 10,
    }
    return records.with_view(record, HEIGHT, WIDTH)


CHAINS = [
    ("flip(1.0)",),
    ("flip_vertical(1.0)",),
    ("shift(7)",),
    ("resize((33, 71), method='nearest')",),
    ("resize_short(90, method='nearest')", "center_crop((70, 50))"),
    ("random_resize_short(20, 60, method='nearest')",),
    ("center_crop((24, 35))", "flip(1.0)"),
    ("random_crop((30, 20))", "flip_vertical(1.0)"),
    ("random_resized_crop((48, 32), area=(0.1, 0.6), method='nearest')",),
    ("random_scale((0.4, 1.8), method='nearest')", "flip(0.5)"),
    ("flip(1.0)", "random_scale((0.5, 1.5), size=64, method='nearest')", "random_crop((50, 60))"),
]


def apply(chain: tuple[str, ...], record: records.Record, seed: int) -> records.Record:
    rng = generator(seed)
    for entry in chain:
        record = transforms.parse(entry)(record, rng)
    return record


def extent(pixels: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])


@pytest.mark.parametrize("chain", CHAINS, ids="|".join)
def test_boxes_masks_and_label_maps_move_with_the_pixels(chain):
    kept, dropped = 0, 0
    for seed in range(12):
        before = drawn(seed)
        after = apply(chain, before, seed)
        image, rows = after["image"][..., 0], range(len(after["boxes"]))
        assert all(len(after[name]) == len(rows) for name in records.OBJECTS if name in after)
        for row in rows:
            level, box = after["box_labels"][row], after["boxes"][row]
            pixels = image == level
            np.testing.assert_array_equal(after["masks"][row], pixels)
            assert after["crowd"][row] == level % 2
            if pixels.any():
                assert np.abs(box - extent(pixels)).max() <= 1
            else:  # a strip that falls between the middles of pixels
                assert min(box[2:] - box[:2]) < 1
            # Back in the original, the box is the part of it that the image shows.
            view = after["view"]
            low, high = np.minimum(view[:2], view[2:]), np.maximum(view[:2], view[2:])
            wanted = np.clip(before["boxes"][level - 1], np.tile(low, 2), np.tile(high, 2))
            found = records.to_original(box[None], image.shape, view)[0]
            np.testing.assert_allclose(found, wanted, atol=1e-3)
        shown = set(after["box_labels"].tolist())
        assert set(np.unique(image)) <= {0} | shown
        kept, dropped = kept + len(shown), dropped + 6 - len(shown)
        segmentation = after["segmentation"]
        ignored = segmentation == 255  # beyond the original image
        np.testing.assert_array_equal(segmentation[~ignored], image[~ignored] + 10)
        assert (image[ignored] == 0).all()
        outside = min(view.min(), HEIGHT - max(view[[0, 2]]), WIDTH - max(view[[1, 3]])) < -0.1
        assert ignored.any() == outside or "nearest" in chain[0]
    assert kept > 12 and (dropped or not any("crop" in entry for entry in chain))


@pytest.mark.parametrize("entry", ["resize((90, 83))", "random_scale((0.5, 1.5), size=(80, 100))"])
def test_boxes_fit_smooth_pixels_too(entry):
    for seed in range(12):
        before = drawn(seed)
        only = seed % 6
        image = before["masks"][only][..., None] * np.uint8(255)
        one = {"image": image, "boxes": before["boxes"][only : only + 1]}
        after = apply((entry,), one, seed)
        bright = after["image"][..., 0] > 127
        if len(after["boxes"]) and bright.any():
            assert np.abs(after["boxes"][0] - extent(bright)).max() <= 1


def test_reflected_pixels_are_of_no_object_and_keep_their_class():
    record = {"image": np.arange(12, dtype=np.uint8).reshape(3, 4, 1)}
    record["segmentation"] = record["image"][..., 0]
    record |= {"boxes": np.float32([[0, 0, 3, 4]]), "masks": np.ones((1, 3, 4), bool)}
    found = records.crop(record, -2, -1, 6, 6, reflect=True)
    np.testing.assert_array_equal(found["segmentation"], found["image"][..., 0])
    np.testing.assert_array_equal(found["boxes"], [[2, 1, 5, 5]])
    assert found["masks"].sum() == 12 and found["masks"][0, 2:5, 1:5].all()


def test_an_object_goes_with_its_last_pixel_or_by_the_share_that_stays():
    record = {
        "image": np.zeros((20, 20, 1), np.uint8),
        "boxes": np.float32([[0, 0, 10, 10], [0, 8, 10, 18], [0, 9, 10, 19], [10, 10, 20, 20]]),
        "box_labels": np.arange(4, dtype=np.int32),
    }
    for keep_area, wanted in ((0.0, [0, 1, 2]), (0.15, [0, 1]), (0.3, [0]), (1.0, [0])):
        found = records.crop(record, 0, 0, 10, 10, keep_area=keep_area)
        assert found["box_labels"].tolist() == wanted
        assert found["boxes"].max() == 10
    step = transforms.parse("random_crop(10, keep_area=0.9)")
    for seed in range(20):
        found = step(record, generator(seed))["boxes"]
        assert (np.prod(found[:, 2:] - found[:, :2], axis=1) >= 90).all()


def test_what_cannot_follow_is_refused():
    for entry in ("rotate()", "random_augment()"):
        assert apply((entry,), {"image": drawn(0)["image"]}, 0)["image"].shape == (40, 60, 1)
        with pytest.raises(
            InputError, match="rotate and random_augment move pixels, but not the boxes"
        ):
            apply((entry,), drawn(0), 0)
        masks = {name: drawn(0)[name] for name in ("image", "masks")}
        with pytest.raises(InputError, match=r"config\.data\.train_transforms"):
            apply((entry,), masks, 0)


def test_flips_of_probability_one_are_not_random_and_take_no_generator():
    transforms.check((), ("flip(1.0)", "flip_vertical(0.0)"))
    record, seen = drawn(0), []
    for entry in ("flip(1.0)", "flip_vertical(1.0)"):
        seen.append(transforms.parse(entry)(record)["view"].tolist())
    assert seen == [[0, 60, 40, 0], [40, 0, 0, 60]]


# Batches.


@dataclasses.dataclass(frozen=True)
class Task:
    """Boxes in whole pixels, six of them, in an order that the generator draws."""

    objects: int = 6

    def example(self, record, rng=None):
        boxes = np.full((self.objects, 4), -1, np.int32)
        order = (
            np.arange(len(record["boxes"]))
            if rng is None
            else rng.permutation(len(record["boxes"]))
        )
        boxes[: len(order)] = record["boxes"][order]
        targets = {"boxes": boxes.ravel(), "labels": np.resize(record["box_labels"], 2)}
        return {"targets": targets, "weights": {"boxes": (boxes.ravel() >= 0).astype(np.float32)}}


@pytest.fixture
def config():
    return config_lib.Data(
        name="digit_scenes",
        image_size=(32, 48),
        train_transforms=("random_scale((0.8, 1.1))", "flip()", "brightness()"),
        train_split="train[:40]",
        test_split="test[:10]",
    )


CODEC = GreyCodec(256, (32, 48))


def flat(batches) -> list[dict[str, np.ndarray]]:
    """Nested dicts with the path of a key as key."""
    return [
        {
            f"{name}/{part}": array
            for name, value in batch.items()
            for part, array in (value.items() if isinstance(value, dict) else [("", value)])
        }
        for batch in batches
    ]


def assert_equal(found, wanted):
    for f, w in zip(flat(found), flat(wanted), strict=True):
        assert f.keys() == w.keys()
        for name in w:
            assert f[name].dtype == w[name].dtype
            np.testing.assert_array_equal(f[name], w[name], err_msg=name)


def train(config, count=5, position=0, **options):
    data = pipeline.Pipeline(config, CODEC, seed=1).train(
        9, position, example=Task().example, **options
    )
    return list(itertools.islice(data, count))


def test_a_batch_has_what_a_task_makes_of_the_moved_record(config):
    wanted = train(config, pixels=True)
    kinds = {name: (array.dtype.name, array.shape) for name, array in flat(wanted)[0].items()}
    assert kinds == {
        "tokens/": ("int32", (9, 1536)),
        "image/": ("uint8", (9, 32, 48, 1)),
        "variant/": ("int32", (9,)),
        "targets/boxes": ("int32", (9, 24)),
        "targets/labels": ("int32", (9, 2)),
        "weights/boxes": ("float32", (9, 24)),
    }
    with_workers = dataclasses.replace(config, workers=2)
    assert_equal(train(with_workers, pixels=True), wanted)
    assert_equal(train(config, 2, position=3, pixels=True), wanted[3:])
    shares = [pipeline.Pipeline(config, CODEC, 1, share=(i, 3)) for i in range(3)]
    (first, *_), parts = wanted, [next(s.train(9, example=Task().example)) for s in shares]
    for name in flat(parts)[0]:
        joined = np.concatenate([flat([part])[0][name] for part in parts])
        np.testing.assert_array_equal(joined, flat([first])[0][name])


def test_without_a_task_boxes_are_left_out_and_change_no_pixel(config):
    data = pipeline.Pipeline(config, CODEC, seed=1)
    for found, wanted in zip(itertools.islice(data.train(9), 3), train(config, 3), strict=True):
        assert found.keys() == {"tokens", "variant"}
        np.testing.assert_array_equal(found["tokens"], wanted["tokens"])
    next(data.train(9, 0, ("random_augment()",)))  # no box hinders
    alone = next(pipeline.Pipeline(config, None, seed=1).train(9))
    assert alone.keys() == {"image", "variant"}


def test_views_of_a_test_image_agree_in_the_original(config):
    data = pipeline.Pipeline(config, CODEC, seed=1)
    truth = sources.open_source(config, "test")
    for extra in ((), ("flip(1.0)",), ("center_crop((24, 42))", "resize((32, 48))")):
        rows = []
        for batch in data.evaluation("test", 4, example=Task().example, extra=extra):
            assert batch["view"].dtype == np.float32 and batch["view"].shape == (4, 4)
            boxes = batch["targets"]["boxes"].reshape(4, 6, 4).astype(np.float32)
            rows += zip(batch["index"], batch["mask"], boxes, batch["view"], strict=True)
        assert [index for index, mask, *_ in rows if mask] == list(range(10))
        shown = {0: [0, 0, 32, 48], 1: [0, 48, 32, 0], 2: [4, 3, 28, 45]}[len(extra)]
        for index, _, boxes, view in rows[:10]:
            np.testing.assert_array_equal(view, shown)
            boxes = boxes[boxes[:, 0] >= 0]
            known = truth.annotations(int(index))
            assert "image" not in known
            found = records.to_original(boxes, (32, 48), view)
            inside = np.sort(view.reshape(2, 2), axis=0).ravel()
            wanted = np.clip(known["boxes"], np.tile(inside[:2], 2), np.tile(inside[2:], 2))
            wanted = wanted[np.prod(wanted[:, 2:] - wanted[:, :2], axis=1) > 0]
            np.testing.assert_allclose(found, wanted, atol=1)


def test_the_image_that_takes_a_damaged_ones_place_brings_its_own_boxes(tmp_path):
    files = {f"{i}.png": encoded(drawn(i)["image"]) for i in range(4)} | {"1.png": b"cut"}
    folder = make_folder(tmp_path / "images", files)

    class Files(data_set.Source):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            content = (folder / f"{index}.png").read_bytes()
            return {"encoded": content, "boxes": drawn(index)["boxes"]}

    source = DecodedSource(Files(), Decode(channels=1))
    assert source[1]["damaged"] == 1 and source[2]["damaged"] == -1
    for index, shown in ((0, 0), (1, 2), (2, 2)):
        np.testing.assert_array_equal(source[index]["boxes"], drawn(shown)["boxes"])
        np.testing.assert_array_equal(source[index]["image"], drawn(shown)["image"])
        assert source[index].keys() == {"image", "boxes", "damaged"}


# Token caches.


def cached(config, folder) -> config_lib.Data:
    """The test scenes as a token cache, with the transforms of evaluation."""
    images = pipeline.images(config, "test", DamageLog(config, None), annotated=True)
    rows = itertools.chain.from_iterable(pipeline.tokenized(CODEC, images))
    header = {
        "source": {"name": "digit_scenes", "dir": None, "path": None},
        "tokens": dataclasses.asdict(config_lib.Tokens("grey", levels=256)),
        "image_size": (32, 48),
        "transforms": config.eval_transforms,
        "classes": 0,
        "object_names": tuple("0123456789"),
    }
    cache.claim(folder)
    cache.write(folder, CODEC, {"test": rows}, header)
    return dataclasses.replace(
        config, name="tokens", path=str(folder), train_split="test", test_split="test"
    )


def test_a_token_cache_gives_back_what_lies_in_the_images(config, tmp_path):
    config = dataclasses.replace(
        config, eval_transforms=("center_crop((28, 42))", "flip(1.0)", "resize((32, 48))")
    )
    stored = cached(config, tmp_path / "cache")
    data_set, source = sources.open_data_set(stored), sources.open_source(stored, "test")
    assert data_set.object_names == tuple("0123456789") and data_set.keys == ("segmentation",)
    images = list(pipeline.images(config, "test", DamageLog(config, None), annotated=True))
    truth = sources.open_source(config, "test")
    empty = 0
    for index, wanted in enumerate(images):
        found = source[index]
        names = {"boxes", "box_labels", "crowd", "area", "segmentation", "view"}
        assert found.keys() == names | {"tokens"}
        for name in names:
            assert found[name].dtype == wanted[name].dtype
            np.testing.assert_array_equal(found[name], wanted[name])
        np.testing.assert_array_equal(found["tokens"], wanted["image"][..., 0])
        known = source.annotations(index)
        assert known.keys() == {"boxes", "box_labels", "crowd", "area", "segmentation"}
        kept = np.isin(known["box_labels"], truth.annotations(index)["box_labels"])
        assert kept.all()
        part = np.clip(truth.annotations(index)["boxes"], (2, 3, 2, 3), (30, 45, 30, 45))
        part = part[np.prod(part[:, 2:] - part[:, :2], axis=1) > 0]
        np.testing.assert_allclose(known["boxes"], part, atol=1e-4)
        empty += not len(known["boxes"])
    batches = [
        list(pipeline.Pipeline(c, CODEC, 1).evaluation("test", 5, example=Task().example))
        for c in (stored, config)
    ]
    assert_equal(*batches)


def test_tokens_of_a_cache_move_with_their_boxes(config, tmp_path):
    stored = cached(config, tmp_path / "cache")
    entries = ("random_crop((32, 48), padding=3)", "flip()", "shift(2)")
    batches = []
    for each in (stored, dataclasses.replace(config, train_split="test[:10]")):
        data = pipeline.Pipeline(each, CODEC, 1)
        batches.append(list(itertools.islice(data.train(5, 0, entries, Task().example), 4)))
    assert_equal(*batches)


def test_pixels_of_a_token_cache_are_refused(config, tmp_path):
    stored = cached(config, tmp_path / "cache")
    with pytest.raises(InputError, match=r"is a token cache, which has no pixels"):
        next(pipeline.Pipeline(stored, CODEC, 1).train(5, pixels=True))
