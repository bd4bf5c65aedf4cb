import collections
import hashlib
import itertools

import numpy as np
import pytest
from sklearn import datasets

from gptv_jax import config as config_lib
from gptv_jax.data import pipeline, sources, transforms
from gptv_jax.tokens.grey import GreyLevels

CODEC = GreyLevels(levels=17, size=8)
PLAIN = config_lib.Data()
SHIFTED = config_lib.Data(augmentation=("shift(pixels=1, keep=0.3)",))
SIZES = {"train": 1197, "validation": 200, "test": 400}


def take(count, *, config=PLAIN, batch_size=63, seed=0, position=0):
    """`count` training batches."""
    batches = pipeline.train_batches(config, CODEC, batch_size, seed, position)
    return list(itertools.islice(batches, count))


def joined(batches):
    """One batch of all rows, in order."""
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for f, w in zip(found, wanted, strict=True):
        assert f.keys() == w.keys()
        for name in w:
            assert f[name].dtype == w[name].dtype
            np.testing.assert_array_equal(f[name], w[name], err_msg=name)


def examples(batch):
    """Every row as a hashable (tokens, label), counted."""
    rows = zip(batch["tokens"], batch["label"], strict=True)
    return collections.Counter((tokens.tobytes(), int(label)) for tokens, label in rows)


def split_examples(split):
    source = sources.open_source(PLAIN, split)
    images = [source[i]["image"] for i in range(len(source))]
    labels = [source[i]["label"] for i in range(len(source))]
    return {"tokens": CODEC.encode(np.stack(images)), "label": np.stack(labels)}


# Sources


def test_digits_are_split_into_disjoint_parts_of_fixed_sizes():
    splits = {split: sources.Digits(split) for split in sources.SPLITS}
    assert {split: len(source) for split, source in splits.items()} == SIZES
    indices = np.concatenate([source.indices for source in splits.values()])
    np.testing.assert_array_equal(np.sort(indices), np.arange(1797))


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "d96f55a258e314ed"),
        ("validation", "4e02649ac123b678"),
        ("test", "cbcfbd4ab3b5ff42"),
    ],
)
def test_digits_are_split_the_same_way_for_ever(split, digest):
    indices = sources.Digits(split).indices.astype(np.int64)
    assert hashlib.sha256(indices.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("split", SIZES)
def test_every_split_of_the_digits_has_the_classes_in_proportion(split):
    wanted = np.bincount(datasets.load_digits().target) * SIZES[split] / 1797
    source = sources.Digits(split)
    found = np.bincount([source[i]["label"] for i in range(len(source))])
    assert np.abs(found - wanted).max() < 1.5 and source.classes == len(found)


def test_digits_are_the_images_and_labels_of_scikit_learn():
    digits, source = datasets.load_digits(), sources.Digits("test")
    for i in (0, 17, 399):
        for _ in range(2):
            element = source[i]
            assert element["image"].dtype == np.uint8 and element["image"].shape == (8, 8, 1)
            at = source.indices[i]
            np.testing.assert_array_equal(element["image"][..., 0], digits.images[at])
            assert element["label"] == digits.target[at]


def test_an_unknown_source_and_a_wrong_image_size_are_errors_that_name_them():
    with pytest.raises(config_lib.InputError, match=r"config.data.name is 'digit'.*digits"):
        sources.open_source(config_lib.Data(name="digit"), "train")
    with pytest.raises(config_lib.InputError, match=r"config.data.image_size is 32.*8 pixels"):
        sources.open_source(config_lib.Data(image_size=32), "train")


# Transforms


def element(side=8):
    image = np.random.default_rng(0).integers(1, 17, (side, side, 1), dtype=np.uint8)
    return {"image": image, "label": np.int32(3), "variant": np.int32(0)}


def moved(image, down, right):
    """The image moved, with zeros where nothing came from."""
    out = np.zeros_like(image)
    for y, x in np.ndindex(image.shape[:2]):
        if 0 <= y + down < len(image) and 0 <= x + right < image.shape[1]:
            out[y + down, x + right] = image[y, x]
    return out


@pytest.mark.parametrize("pixels", [1, 2])
def test_every_variant_is_its_own_shift_filled_with_zeros(pixels):
    shift, given = transforms.Shift(pixels), element()
    side = 2 * pixels + 1
    assert shift.variants == side**2
    rng, shifts = np.random.default_rng(0), {}
    for _ in range(400):
        found = shift(given, rng)
        variant = int(found["variant"])
        # Raster order of the square of shifts, counted from its middle and round its end.
        down, right = np.array(divmod((variant + side**2 // 2) % side**2, side)) - pixels
        np.testing.assert_array_equal(found["image"], moved(given["image"], down, right))
        assert found["variant"].dtype == np.int32 and found["label"] == 3
        shifts[variant] = (int(down), int(right))
    square = set(itertools.product(range(-pixels, pixels + 1), repeat=2))
    assert set(shifts) == set(range(side**2)) and set(shifts.values()) == square
    assert shifts[0] == (0, 0)
    assert given["variant"] == 0 and given["image"].min() > 0  # the input is left as it was


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_shift_keeps_its_share_and_draws_the_rest_evenly(keep):
    shift, rng, count = transforms.Shift(1, keep), np.random.default_rng(0), 3000
    variants = np.bincount([shift(element(), rng)["variant"] for _ in range(count)], minlength=9)
    wanted = np.full(9, (1 - keep) / 9)
    wanted[0] += keep
    np.testing.assert_allclose(variants / count, wanted, atol=0.02 if keep < 1 else 0)


def test_entries_are_calls_with_literal_arguments():
    assert transforms.parse("shift(pixels=2, keep=0.3)") == transforms.Shift(2, 0.3)
    assert transforms.parse("shift(2)") == transforms.Shift(2)
    assert transforms.parse("shift()") == transforms.parse("shift") == transforms.Shift()
    assert transforms.variants(()) == 1
    assert transforms.variants(("shift(pixels=2)",)) == 25


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "shift(",
        "flip()",
        "flip",
        "1 + 1",
        "shift; shift",
        "os.system('true')",
        "shift(pixels=0)",
        "shift(pixels='1')",
        "shift(keep=1.5)",
        "shift(keep=-0.1)",
        "shift(keep=print())",
        "shift(amount=1)",
        "shift(1, 0.5, 3)",
        "shift(1, pixels=1)",
        "shift(*[1])",
        "shift(**{'pixels': 1})",
    ],
)
def test_what_is_no_entry_is_an_error_that_names_it_and_the_accepted_ones(entry):
    with pytest.raises(config_lib.InputError) as error:
        transforms.parse(entry)
    assert f"config.data.augmentation has {entry!r}" in str(error.value)
    assert "shift(pixels=1, keep=0.0)" in str(error.value)


def test_two_entries_with_variants_are_an_error():
    with pytest.raises(config_lib.InputError, match="only one of its entries may have variants"):
        transforms.variants(("shift(pixels=1)", "shift(pixels=2)"))


# Training batches


@pytest.mark.parametrize("batch_size", [63, 64])  # the one divides an epoch, the other does not
def test_every_epoch_is_a_permutation_of_the_source_and_no_two_are_the_same(batch_size):
    rows = joined(take(-(-3 * 1197 // batch_size), batch_size=batch_size))
    assert all(len(v) >= 3 * 1197 for v in rows.values())
    epochs = [{k: v[i * 1197 : (i + 1) * 1197] for k, v in rows.items()} for i in range(3)]
    source = split_examples("train")
    for epoch in epochs:
        assert examples(epoch) == examples(source)
    for a, b in itertools.combinations([*epochs, source], 2):
        assert (a["tokens"] != b["tokens"]).any(axis=1).mean() > 0.9


def test_batches_have_the_promised_types():
    (batch,) = take(1, config=SHIFTED)
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "tokens": ((63, 64), "int32"),
        "label": ((63,), "int32"),
        "variant": ((63,), "int32"),
    }


@pytest.mark.parametrize("position", [1, 3, 18, 19, 25])  # an epoch has 19 batches
def test_starting_at_a_position_skips_the_batches_before_it(position):
    wanted = take(position + 3, config=SHIFTED)[position:]
    assert_same(take(3, config=SHIFTED, position=position), wanted)


def test_worker_processes_change_nothing():
    wanted = take(5, config=SHIFTED, position=2)
    workers = config_lib.Data(augmentation=SHIFTED.augmentation, workers=2)
    assert_same(take(5, config=workers, position=2), wanted)


def test_the_seed_decides_order_and_augmentation():
    a, again, b = (joined(take(4, config=SHIFTED, seed=seed)) for seed in (1, 1, 2))
    assert_same([a], [again])
    assert (a["label"] != b["label"]).mean() > 0.7
    assert (a["variant"] != b["variant"]).mean() > 0.3


class Numbered:
    """Sixteen images, each of one grey level that tells which it is."""

    classes, image_size = 10, 8

    def __init__(self, split):
        pass

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"image": np.full((8, 8, 1), 1 + index, np.uint8), "label": np.int32(index % 10)}


def test_augmentation_is_drawn_anew_for_every_example_in_every_epoch(monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "numbered", Numbered)
    config = config_lib.Data(name="numbered", augmentation=("shift(pixels=1)",))
    variants = []
    for batch in take(20, config=config, batch_size=16):
        which = batch["tokens"].reshape(16, 8, 8)[:, 4, 4]
        assert set(which) == set(range(1, 17))
        variants.append(batch["variant"][np.argsort(which)])
    variants = np.stack(variants)  # epoch, example
    assert all(len(set(row)) > 3 for row in (*variants, *variants.T))
    counts = np.bincount(variants.ravel(), minlength=9)
    assert counts.min() > 15  # of 320 draws among 9


# Hosts


def as_host(monkeypatch, index, count):
    monkeypatch.setattr(pipeline.jax, "process_index", lambda: index)
    monkeypatch.setattr(pipeline.jax, "process_count", lambda: count)


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_shares_make_up_the_batch_of_a_single_host(hosts, monkeypatch):
    arguments = {"config": SHIFTED, "batch_size": 64, "position": 17}  # and over an epoch's end
    wanted = take(4, **arguments)
    shares = []
    for host in range(hosts):
        as_host(monkeypatch, host, hosts)
        shares.append(take(4, **arguments))
    assert all(len(share[0]["label"]) == 64 // hosts for share in shares)
    assert_same([joined(parts) for parts in zip(*shares, strict=True)], wanted)


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [40, 64, 400, 1000])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_counts_every_example_once(split, batch_size, hosts, monkeypatch):
    shares = []
    for host in range(hosts):
        as_host(monkeypatch, host, hosts)
        shares.append(list(pipeline.evaluation_batches(SHIFTED, CODEC, split, batch_size)))
    assert {len(share) for share in shares} == {-(-SIZES[split] // batch_size)}
    batches = [joined(parts) for parts in zip(*shares, strict=True)]
    assert all(len(v) == batch_size for batch in batches for v in batch.values())
    rows = joined(batches)
    assert rows["mask"].dtype == np.float32 and set(rows["mask"]) <= {0, 1}
    assert rows["mask"].sum() == SIZES[split]
    real = {k: v[rows["mask"] > 0] for k, v in rows.items()}
    wanted = split_examples(split)
    np.testing.assert_array_equal(real["tokens"], wanted["tokens"])  # in order, not augmented
    np.testing.assert_array_equal(real["label"], wanted["label"])
    assert (rows["variant"] == 0).all()
