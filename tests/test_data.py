import collections
import dataclasses
import itertools
import pathlib
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_images import png

from gptv_jax import config as config_lib
from gptv_jax.data import damage, pipeline, sources, trial
from gptv_jax.data.clips import Clips
from gptv_jax.errors import InputError
from gptv_jax.tokens import GreyCodec

CODEC = GreyCodec(levels=17, size=8)
PLAIN = config_lib.Data()
SHIFTED = config_lib.Data(train_transforms=("shift(pixels=1, keep=0.3)",))
SIZES = {"train": 1197, "validation": 200, "test": 400}


def take(count, *, config=PLAIN, batch_size=63, seed=0, position=0, share=(0, 1)):
    """`count` training batches."""
    data = pipeline.Pipeline(config, CODEC, seed, share=share)
    batches = data.train(batch_size, position)
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


# Training batches


def test_every_epoch_is_a_permutation_of_the_source_and_no_two_are_equal():
    batch_size = 64  # does not divide an epoch
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


def test_batches_of_one_are_the_examples_of_larger_ones():
    singles, (batch,) = take(3, batch_size=1, position=2), take(1, batch_size=5)
    assert_same([joined(singles)], [{k: v[2:] for k, v in batch.items()}])


def test_starting_at_a_position_skips_the_batches_before_it():
    batches = take(28, config=SHIFTED)  # an epoch has 19
    for position in (1, 3, 18, 19, 25):
        wanted = batches[position : position + 3]
        assert_same(take(3, config=SHIFTED, position=position), wanted)


def test_the_seed_decides_order_and_augmentation():
    a, again, b = (joined(take(4, config=SHIFTED, seed=seed)) for seed in (1, 1, 2))
    assert_same([a], [again])
    assert (a["label"] != b["label"]).mean() > 0.7
    assert (a["variant"] != b["variant"]).mean() > 0.3


def numbered():
    """Sixteen images, each of one grey level that tells which it is."""
    images = np.broadcast_to(np.arange(1, 17, dtype=np.uint8)[:, None, None, None], (16, 8, 8, 1))
    return sources.Arrays({"train": (images, np.arange(16) % 10)})


def test_augmentation_is_drawn_anew_for_every_example_in_every_epoch(monkeypatch):
    monkeypatch.setitem(sources.SETS, "numbered", lambda config: numbered())
    config = config_lib.Data(name="numbered", train_transforms=("shift(pixels=1)",))
    variants = []
    for batch in take(20, config=config, batch_size=16):
        which = batch["tokens"].reshape(16, 8, 8)[:, 4, 4]
        assert set(which) == set(range(1, 17))
        variants.append(batch["variant"][np.argsort(which)])
    variants = np.stack(variants)  # epoch, example
    assert all(len(set(row)) > 3 for row in (*variants, *variants.T))
    counts = np.bincount(variants.ravel(), minlength=9)
    assert counts.min() > 15  # of 320 draws among 9


# Values from 0 to 4080 in 40 images, and what is left of 16 bits and of 17 levels.
DEEP = np.arange(40 * 64).reshape(40, 8, 8, 1) * 97 % 4081
STRIPED_CLIPS = np.broadcast_to(DEEP[:1, :1] % 256, (40, 3, 8, 8, 1))
ONE_OF_MANY = np.where(np.arange(40)[:, None, None, None] == 7, DEEP // 16, 200)


@pytest.mark.parametrize(
    ("images", "entries", "words"),
    [
        (np.full((40, 8, 8, 1), 200), (), ["nearly one value each", "200 to 200 of 255"]),
        (200 + DEEP % 2, (), ["nearly one value each", "200 to 201 of 255", "by 0.5 at most"]),
        (np.broadcast_to([250, 10, 90], (40, 8, 8, 3)), (), ["nearly one value", "10 to 250"]),
        (DEEP // 257, (), ["all dark", "values 0 to 15", "normalize()"]),
        (DEEP % 17, (), ["all dark", "values 0 to 16", "normalize()"]),
        (DEEP % 17, ("normalize()",), []),
        (DEEP % 17, ("decode(channels=1, maximum=16)",), []),
        (DEEP // 16, (), []),
        (ONE_OF_MANY, (), []),
        (STRIPED_CLIPS, (), []),
    ],
)
def test_images_that_all_look_blank_or_dark_are_warned_of_once(
    images, entries, words, monkeypatch, caplog, tmp_path
):
    frames = images.shape[1] * (images.ndim == 5)
    arrays = sources.Arrays({"train": (images.astype(np.uint8), None)}, clips=Clips(frames))
    monkeypatch.setitem(sources.SETS, "given", lambda config: arrays)
    given = {"name": "given", "path": str(tmp_path), "frames": frames}
    config = config_lib.Data(**given, eval_transforms=entries)
    shape = images.shape[1:]
    for transforms in ((*entries, "flip()"), entries):
        trial.try_out(config, None, shape, transforms)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == bool(words)
    for line in warned:
        assert f"images of {tmp_path} (32 looked at)" in line and len(line) <= 300 + len(
            str(tmp_path)
        )
        assert all(word in line for word in words)
        assert "maximum" not in line  # files of 8 bits have none


# Files of more than 8 bits


def write_deep(
    folder: pathlib.Path, images: dict[str, list[float]], **tags: int
) -> list[np.ndarray]:
    """TIFFs of a kind of number, with values from 0 to each number; in the data set's order."""
    written = []
    for kind, mosts in images.items():
        for most in mosts:
            values = np.linspace(0, most, 256).reshape(16, 16).astype(kind)
            tiffinfo = {281: tags["max"]} if tags else {}  # MaxSampleValue
            Image.fromarray(values).save(folder / f"{len(written):02}.tif", tiffinfo=tiffinfo)
            written.append(values)
    return written


def try_folder(folder: pathlib.Path, entry: str) -> list[float]:
    """Tries the folder out, and gives its images' means after the transforms of evaluation."""
    entries = (entry, "resize(8)")
    config = config_lib.Data(name="folder", path=str(folder), image_size=8, labels=False)
    config = dataclasses.replace(config, train_transforms=entries, eval_transforms=entries)
    config = dataclasses.replace(config, train_split="train", validation_split="train")
    for each in (entries, (*entries, "flip()")):
        trial.try_out(config, None, (8, 8, 1), each)
    found = pipeline.images(config, "train", damage.DamageLog(config, None))
    return sorted(each["image"].mean() for each in found)


@pytest.mark.parametrize(
    ("images", "white", "refused"),
    [
        ({"u2": [4080, 900, 4001]}, 4095, False),
        ({"u2": [1023, 30, 700]}, 1023, False),
        ({"u2": [255, 30, 199]}, 255, False),
        ({"u2": [16383, 30, 9000]}, 16383, False),
        ({"f4": [16000, 9000]}, 16383, False),
        ({"f4": [60000, 200, 0.5, 40000]}, 65535, True),
        ({"i4": [60000, 200, 255, 40000]}, 65535, True),
        ({"f4": [*[200] * 20, 0.5]}, 255, True),
        ({"f4": [4000, 200, 3000, 100]}, 4095, True),
        ({"f4": [0.9, 1.02, 1.0, 1.1]}, 1, True),
        ({"i4": [4095, 4000, 3000]}, 4095, True),
        ({"i4": [2**31 - 1, 2**30]}, 2**31 - 1, True),
    ],
)
def test_the_white_that_a_message_names_makes_the_values_right(
    images, white, refused, tmp_path, caplog
):
    written = write_deep(tmp_path, images)
    if refused:
        with pytest.raises(InputError) as error:
            try_folder(tmp_path, "decode(channels=1)")
        lines = [str(error.value)]
    else:
        try_folder(tmp_path, "decode(channels=1)")
        lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and len(lines[0]) <= 300 + len(str(tmp_path))
    (entry,) = re.findall(r"decode\(.*?\)", lines[0])
    assert entry == f"decode(channels=1, maximum={white})"
    caplog.clear()
    found = try_folder(tmp_path, entry)
    assert not caplog.records
    means = sorted((values.clip(0, white) / white * 255).mean() for values in written)
    np.testing.assert_allclose(found, means, atol=1)


@pytest.mark.parametrize(
    "images",
    [
        *({"u2": [65535, 30, 200]}, {"f4": [1, 0.2, 0, 0.9]}, {"f4": [255, 20, 0]}),
        *({"i4": [255, 3, 0, 100]}, {"u2": [65535], "u1": [255, 9], "f4": [1.0, 0.3]}),
    ],
)
def test_a_set_of_one_white_gets_no_advice(images, tmp_path, caplog):
    written = write_deep(tmp_path, images)
    found = try_folder(tmp_path, "decode(channels=1)")
    assert not caplog.records
    whites = {"u2": 65535, "f4": images.get("f4", [0])[0]}
    means = sorted(v.mean() * 255 / whites.get(v.dtype.str[1:], 255) for v in written)
    np.testing.assert_allclose(found, means, atol=1)


def test_a_maximum_that_the_files_say_is_heeded_where_all_say_it(tmp_path, caplog):
    written = write_deep(tmp_path, {"u2": [4000, 1000]}, max=4000)
    found = try_folder(tmp_path, "decode(channels=1)")
    assert not caplog.records
    np.testing.assert_allclose(found, sorted(v.mean() / 4000 * 255 for v in written), atol=1)
    # Each image's own maximum would brighten the images differently.
    picture = Image.open(tmp_path / "01.tif")
    picture.save(tmp_path / "01.tif", tiffinfo={281: 1000})
    sources.open_data_set.cache_clear()
    with pytest.raises(InputError, match=r"1 as 0..4000, 1 as 0..1000.*maximum=4095\)"):
        try_folder(tmp_path, "decode(channels=1)")


def test_advice_about_deep_colours_and_negative_numbers_names_no_maximum(tmp_path, caplog):
    write_deep(tmp_path, {"u2": [4000, 3000]})
    dark = (np.arange(6 * 10 * 3) * 16).astype(">u2").tobytes()
    (tmp_path / "colours.png").write_bytes(png(10, 6, bits=16, color=2, rows=dark))
    try_folder(tmp_path, "decode(channels=1)")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and all("Save all images with 8 bits" in line for line in lines)
    assert "maximum" not in "".join(lines)
    folder = tmp_path / "negative"
    folder.mkdir()
    for number in range(6):  # numbers that are not finite are damaged, and nothing is said here
        first = np.nan if number < 2 else -1
        Image.fromarray(np.float32([[first, 1], [0, 1]])).save(folder / f"{number}.tif")
    with pytest.raises(InputError, match=r"4 in no usual range.* numbers from 0 to 1\.$"):
        try_folder(folder, "decode(channels=1)")


def test_levels_that_a_codec_shows_brightly_are_not_called_dark(caplog):
    trial.try_out(PLAIN, CODEC, CODEC.image_shape, ())  # the digits, 0 to 16
    assert not caplog.records


# Hosts


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_shares_make_up_the_batch_of_a_single_host(hosts):
    arguments = {"config": SHIFTED, "batch_size": 64, "position": 17}  # and over an epoch's end
    wanted = take(4, **arguments)
    shares = []
    for host in range(hosts):
        shares.append(take(4, **arguments, share=(host, hosts)))
    assert all(len(share[0]["label"]) == 64 // hosts for share in shares)
    assert_same([joined(parts) for parts in zip(*shares, strict=True)], wanted)


def written_by(hosts: int, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The batches of so many real processes, concatenated."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script, files = pathlib.Path(__file__).with_name("hosts.py"), []
    started = []
    for index in range(hosts):
        files.append(folder / f"{index}-of-{hosts}.npz")
        command = [sys.executable, script, port, str(index), str(hosts), files[-1]]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
    shares = [np.load(file) for file in files]
    return {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}


@pytest.mark.process
def test_three_processes_read_the_global_batches_of_one(tmp_path):
    config = config_lib.Data(train_transforms=("shift(pixels=1, keep=0.3)", "flip()"))
    data = pipeline.Pipeline(config, CODEC, seed=3)
    batches = {
        "train": itertools.islice(data.train(60, position=18), 4),  # and over an epoch's end
        "test": data.evaluation("test", 60),
    }
    wanted = {
        f"{split} {number} {name}": array
        for split, found in batches.items()
        for number, batch in enumerate(found)
        for name, array in batch.items()
    }
    assert sum(mask.sum() for name, mask in wanted.items() if name.endswith("mask")) == 400
    found = written_by(3, tmp_path)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("split", "batch_size", "hosts"),
    [("test", 40, 1), ("test", 64, 4), ("test", 400, 2), ("test", 1000, 4), ("validation", 64, 2)],
)
def test_evaluation_counts_every_example_once(split, batch_size, hosts):
    shares = []
    for host in range(hosts):
        data = pipeline.Pipeline(SHIFTED, CODEC, 0, share=(host, hosts))
        shares.append(list(data.evaluation(split, batch_size)))
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
