import collections
import dataclasses
import hashlib
import importlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import encoded, make_folder, random_image
from sklearn import datasets

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.data.folder import ENDINGS
from gptv_jax.errors import InputError

SIZES = {"train": 1197, "validation": 200, "test": 400}


def test_digits_are_split_into_disjoint_parts_of_fixed_sizes():
    splits = {split: sources.digits().open(split) for split in sources.SPLITS}
    assert {split: len(source) for split, source in splits.items()} == SIZES
    found = collections.Counter(
        s[i]["image"].tobytes() for s in splits.values() for i in range(len(s))
    )
    images = datasets.load_digits().images.astype(np.uint8)
    assert found == collections.Counter(image.tobytes() for image in images)


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "0c24422ffc2204d5"),
        ("validation", "a067199b5f0cd289"),
        ("test", "4ed006f4c4f22ed1"),
    ],
)
def test_digits_are_split_the_same_way_for_ever(split, digest):
    source = sources.digits().open(split)
    content = source.images.tobytes() + source.labels.astype(np.int64).tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == digest


@pytest.mark.parametrize("split", SIZES)
def test_every_split_of_the_digits_has_the_classes_in_proportion(split):
    wanted = np.bincount(datasets.load_digits().target) * SIZES[split] / 1797
    source = sources.open_source(config_lib.Data(), split)
    found = np.bincount([source[i]["label"] for i in range(len(source))])
    assert np.abs(found - wanted).max() < 1.5 and source.classes == len(found)


def test_digits_are_the_images_with_the_labels_of_scikit_learn():
    digits, source = datasets.load_digits(), sources.open_source(config_lib.Data(), "test")
    labels = {
        image.tobytes(): label for image, label in zip(digits.images, digits.target, strict=True)
    }
    for i in (0, 17, 399):
        for _ in range(2):
            element = source[i]
            assert element["image"].dtype == np.uint8 and element["image"].shape == (8, 8, 1)
            assert element["label"] == labels[element["image"][..., 0].astype(float).tobytes()]


def test_digits_are_found_where_scikit_learn_keeps_them_elsewhere(monkeypatch, tmp_path):
    wanted = sources.digits().open("train")
    moved = importlib.machinery.ModuleSpec("sklearn", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: moved)
    found = sources.digits().open("train")
    np.testing.assert_array_equal(found.images, wanted.images)
    np.testing.assert_array_equal(found.labels, wanted.labels)


def test_an_unknown_source_is_an_error_with_the_command_that_prepares_it():
    with pytest.raises(InputError, match=r"config.data.name=digit .*digits.*tfds build"):
        sources.open_source(config_lib.Data(name="digit"), "train")


# Split expressions.


def rows(expression: str, **lengths: int) -> list[int]:
    """The first pixel of every image that the expression names, of sets numbered throughout."""
    ends = np.cumsum([0, *lengths.values()])
    splits = {
        name: (np.arange(ends[i], ends[i + 1], dtype=np.uint8)[:, None, None, None], None)
        for i, name in enumerate(lengths)
    }
    source = sources.Selected(sources.Arrays(splits), expression)
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("train", range(50)),
        ("test", range(50, 60)),
        ("train[:90%]", range(45)),
        ("train[90%:]", range(45, 50)),
        ("train[-10%:]", range(45, 50)),
        ("train[5:7]", range(5, 7)),
        ("train[-2:]", range(48, 50)),
        ("train[:99%]", range(50)),  # 49.5, rounded to the even one
        ("train+test", range(60)),
        ("test[:2]+train[48:]", [50, 51, 48, 49]),
    ],
)
def test_a_split_expression_names_examples_in_order(expression, wanted):
    assert rows(expression, train=50, test=10) == list(wanted)


@pytest.mark.parametrize("expression", ["train[5:5]", "train[50:]", "train[7:3]", "train[:0%]"])
def test_a_split_without_an_image_is_an_error(expression):
    with pytest.raises(InputError, match=r"names no image of: train \(50 images\), test \(10"):
        rows(expression, train=50, test=10)


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "",
            "validation",
            "Train",
            "train[",
            "train]",
            "train[a:b]",
            "train[:200%]",
            "train[:-3.5]",
        ),
        *("train[5]", "train[1:2:3]", "train+", "+", "train[:10%", "train/test", "train test", "%"),
        *(
            "train[:10%]+nothing",
            "[:10%]",
            "train[:1e3]",
            "train[::]",
            "\n",
            "train[:10%][:5]",
            "train[:1000]",
        ),
    ],
)
def test_what_names_no_split_is_an_error_with_the_splits_there_are(expression):
    with pytest.raises(InputError, match=r"train \(50 images\), test \(10 images\)") as error:
        rows(expression, train=50, test=10)
    assert repr(expression) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_an_index_out_of_range_is_an_index_error():
    source = sources.open_source(config_lib.Data(), "train[:5]")
    for index in (-1, 5):
        with pytest.raises(IndexError):
            source[index]


# Arrays.

IMAGES, LABELS = random_image(6, 4, 4, 3), np.arange(6) % 3


def npz(tmp_path, **arrays) -> config_lib.Data:
    np.savez(tmp_path / "set.npz", **arrays)
    return config_lib.Data(name="arrays", path=str(tmp_path / "set.npz"))


def test_arrays_are_read_from_a_file(tmp_path):
    both = {"train_labels": LABELS, "test_images": IMAGES[:2], "test_labels": LABELS[:2]}
    config = npz(tmp_path, train_images=IMAGES, **both)
    for split, count in (("train", 6), ("test", 2)):
        source = sources.open_source(config, split)
        assert (len(source), source.classes) == (count, 3)
        for i in range(count):
            np.testing.assert_array_equal(source[i]["image"], IMAGES[i])
            assert source[i]["label"] == LABELS[i] and source[i]["label"].dtype == np.int32


def test_arrays_without_labels_are_unlabelled(tmp_path):
    source = sources.open_source(npz(tmp_path, train_images=IMAGES), "train")
    assert source.classes == 0 and source[3].keys() == {"image"}
    again = config_lib.Data(labels=False)
    source = sources.open_source(again, "train")
    assert source.classes == 0 and source[3].keys() == {"image"}


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"images": IMAGES},
        {"train_images": IMAGES[..., 0]},
        {"train_images": IMAGES.astype(np.float32)},
        {"train_images": IMAGES[:0]},
        {"train_images": IMAGES, "train_labels": LABELS[:5]},
        {"train_images": IMAGES, "train_labels": LABELS[:, None]},
        {"train_images": IMAGES, "train_labels": LABELS + 0.5},
        {"train_images": IMAGES, "train_labels": LABELS - 1},
        {"train_images": IMAGES, "test_images": IMAGES, "test_labels": LABELS},
        {"train_images": np.array([None, "object"], dtype=object)},
    ],
    ids=lambda arrays: ",".join(f"{k}{v.dtype}{v.shape}" for k, v in arrays.items()),
)
def test_malformed_arrays_are_an_error(tmp_path, arrays):
    config = npz(tmp_path, **arrays)
    with pytest.raises(InputError) as error:
        sources.open_source(config, "train")
    assert len(str(error.value).splitlines()) == 1


def broken_files() -> dict[str, bytes]:
    """What is found under the name of an .npz file."""
    file = pathlib.Path(datasets.__file__).read_bytes()
    whole = encoded(random_image(8, 8, 3))
    return {"text": file, "empty": b"", "png": whole, "zip": b"PK\x03\x04" + bytes(200)}


@pytest.mark.parametrize("kind", broken_files())
def test_a_file_without_arrays_is_an_error(tmp_path, kind):
    path = tmp_path / "set.npz"
    path.write_bytes(broken_files()[kind])
    with pytest.raises(InputError, match=r"path=.*set.npz is no .npz file"):
        sources.open_source(config_lib.Data(name="arrays", path=str(path)), "train")


@pytest.mark.parametrize("change", ["cut", "flipped", "single", "folder"])
def test_a_damaged_file_of_arrays_is_an_error(tmp_path, change):
    config = npz(tmp_path, train_images=IMAGES)
    path = tmp_path / "set.npz"
    content = path.read_bytes()
    if change == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif change == "flipped":
        path.write_bytes(content[:250] + bytes([content[250] ^ 1]) + content[251:])
    elif change == "single":
        with path.open("wb") as file:
            np.save(file, IMAGES)
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(InputError, match=r"path=.*set.npz is no .npz file"):
        sources.open_source(config, "train")


@pytest.mark.parametrize("name", ["arrays", "folder", "tokens"])
def test_a_data_set_of_files_needs_a_path_that_exists(name):
    with pytest.raises(InputError, match=rf"data.name={name} needs config.data.path"):
        sources.open_source(config_lib.Data(name=name), "train")
    with pytest.raises(InputError, match=r"config.data.path=/nowhere does not exist"):
        sources.open_source(config_lib.Data(name=name, path="/nowhere"), "train")


# Folders of images.

PNG = encoded(random_image(4, 4, 3))


def images(*names: str) -> dict[str, bytes]:
    """Files whose content is their name; nothing is decoded here."""
    return {name: name.encode() for name in names}


def opened(folder: pathlib.Path, split: str = "train", **changes) -> sources.Selected:
    return sources.open_source(config_lib.Data(name="folder", path=str(folder), **changes), split)


def contents(source: sources.Selected) -> list[str]:
    return [source[i]["encoded"].decode() for i in range(len(source))]


def classes(count: int, *names: str) -> list[str]:
    return [f"{name}/{i:03d}.png" for name in names for i in range(count)]


def test_a_sub_folder_is_a_class_in_the_order_of_names(tmp_path):
    files = [*classes(5, "b", "c"), *classes(3, "a"), "b/deeper/x.png", "a/README.txt"]
    source = opened(make_folder(tmp_path, images(*files)))
    assert source.classes == 3 and sorted(contents(source)) == sorted(files[:-1])
    for i in range(len(source)):
        name = source[i]["encoded"].decode()
        assert source[i]["label"] == "abc".index(name[0]) and source[i]["label"].dtype == np.int32
        assert source.name(i) == str(tmp_path / name)


@pytest.mark.parametrize("files", [("0.png", "1.png", "2.png"), (*classes(3, "a", "b"), "0.png")])
def test_images_in_no_sub_folder_make_it_unlabelled(tmp_path, files):
    source = opened(make_folder(tmp_path, images(*files)))
    assert source.classes == 0 and source[0].keys() == {"encoded"}
    assert sorted(contents(source)) == sorted(files)


def test_classes_can_be_left_alone(tmp_path):
    source = opened(make_folder(tmp_path, images(*classes(1, "a", "b"))), labels=False)
    assert source.classes == 0 and source[0].keys() == {"encoded"} and len(source) == 2


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_sub_folders_can_be_the_splits(tmp_path, validation):
    files = {split: classes(4, f"{split}/a", f"{split}/b") for split in ("train", validation)}
    files["test"] = classes(2, "test/b")
    make_folder(tmp_path, images(*(name for names in files.values() for name in names)))
    for split, folder in (("train", "train"), ("validation", validation), ("test", "test")):
        source = opened(tmp_path, split)
        assert sorted(contents(source)) == files[folder] and source.classes == 2
        assert {int(source[i]["label"]) for i in range(len(source))} == (
            {1} if split == "test" else {0, 1}
        )


def test_a_slice_has_its_share_of_every_class_in_mixed_order(tmp_path):
    folder = make_folder(tmp_path, images(*classes(60, "a", "b"), *classes(9, "c")))
    for expression, share in (("train[:50%]", 0.5), ("train[90%:]", 0.1), ("train[20%:60%]", 0.4)):
        found = collections.Counter(name[0] for name in contents(opened(folder, expression)))
        for name, count in {"a": 60, "b": 60, "c": 9}.items():
            assert abs(found[name] - share * count) <= 1.5, expression
    order = [name[0] for name in contents(opened(folder))]
    assert max(len(run) for run in "".join(order).replace("c", "").split("ab")) < 12
    within = [name for name in contents(opened(folder)) if name.startswith("a")]
    assert within != sorted(within)
    assert contents(opened(folder, labels=False)) == contents(opened(folder, labels=False))


def test_names_of_files_are_taken_as_they_come(tmp_path):
    taken = [f"a/{i}{ending}" for i, ending in enumerate(ENDINGS)]
    taken += ["a/UPPER.JPG", "a/Mixed.JpEg", "b/größe 日本.png", "ü/é.png", "ü/b.png", "b/a\nb.png"]
    left = [".hidden.png", "a/.x.png", ".git/y.png", "a/Thumbs.db", "a/png", "a/list.png.txt"]
    source = opened(make_folder(tmp_path, images(*taken, *left)))
    assert sorted(contents(source)) == sorted(taken) and source.classes == 3


def test_symbolic_links_are_followed(tmp_path):
    make_folder(tmp_path / "store", images("one.png", "two.png", "deep/three.png"))
    folder = make_folder(tmp_path / "set", images(*classes(2, "a")))
    (folder / "b").symlink_to(tmp_path / "store")
    (folder / "a" / "link.png").symlink_to(tmp_path / "store" / "one.png")
    source = opened(folder)
    assert source.classes == 2 and len(source) == 6


def test_symbolic_links_in_a_circle_are_followed_once(tmp_path):
    folder = make_folder(tmp_path / "set", images(*classes(2, "a")))
    (folder / "a" / "link").symlink_to(folder)
    assert len(opened(folder, labels=False)) < 10


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ([], "train", r"holds no image \(no file ending in .jpg, "),
        (["readme.txt", "a/.png"], "train", "holds no image"),
        (["train/a/0.png", "train/a/1.png", "val/list.txt"], "train", "val holds no image"),
        ([*classes(3, "a", "b"), "c/0.png"], "train", "only one image of class c"),
        (classes(1, *"abcdefg"), "train", "only one image of class a, b, c and 4 more"),
        (
            [*classes(3, "train/a", "train/b"), *classes(3, "test/a", "test/other")],
            "test",
            r"test has classes that no training image has: other",
        ),
        (classes(3, "a", "b"), "validation", r"'validation' cannot .*: train \(6 images\)"),
        (classes(3, "a", "b"), "test[:5]", r"'test\[:5\]' cannot .*: train \(6 images\)"),
        (classes(3, "a", "b"), "train[5:5]", "names no image"),
    ],
)
def test_a_folder_that_cannot_be_used_is_an_error(tmp_path, files, split, message):
    with pytest.raises(InputError, match=message) as error:
        opened(make_folder(tmp_path, images(*files)), split)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_is_no_folder_of_images(tmp_path):
    make_folder(tmp_path, images("a.png"))
    with pytest.raises(InputError, match=r"path=.*a.png is not a folder"):
        opened(tmp_path / "a.png")


def test_real_photographs_are_found(shared_data):
    source = opened(shared_data / "imagenet_sample_128", "train[:10%]")
    assert len(source) == 100 and source.classes == 0
    assert source[7]["encoded"][:2] == b"\xff\xd8"  # as JPEG begins


# TFDS.


@pytest.fixture
def prepared(shared_data) -> pathlib.Path:
    return shared_data / "tfds"


@pytest.mark.parametrize("below", ["", "cifar10/3.0.2"])
def test_a_prepared_set_is_found_by_its_folder_or_by_that_of_all(prepared, below):
    config = config_lib.Data(name="cifar10", dir=str(prepared / below))
    assert sources.open_data_set(config).lengths == {"train": 50_000, "test": 10_000}
    source = sources.open_source(config, "train[:45000]")
    assert (len(source), source.classes) == (45_000, 10)
    assert source.name(3) == "cifar10/train[3]"
    labels = [int(source[i]["label"]) for i in range(8)]
    assert labels == [7, 8, 4, 4, 6, 5, 2, 9]
    assert all(source[i]["encoded"].startswith(b"\x89PNG") for i in range(8))
    unlabelled = config_lib.Data(name="cifar10", dir=str(prepared), labels=False)
    source = sources.open_source(unlabelled, "train")
    assert source.classes == 0 and source[0].keys() == {"encoded"}


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "train[:96%]",
            "train[33%:34%]",
            "test[-3:]",
            "train[49998:]+test[:2]",
            "train[7:-49990]",
        ),
        *("test[:1%]", "train[-1%:]"),
    ],
)
def test_split_expressions_mean_what_they_mean_to_tfds(prepared, expression):
    import tensorflow_datasets as tfds

    found = sources.open_source(config_lib.Data(name="cifar10", dir=str(prepared)), expression)
    builder = tfds.builder("cifar10", data_dir=prepared)
    decoders = {"image": tfds.decode.SkipDecoding()}
    wanted = [
        (data, i)
        for part in expression.split("+")  # of several, it gives each alone
        for data in [builder.as_data_source(split=part, decoders=decoders)]
        for i in range(len(data))
    ]
    assert len(found) == len(wanted)
    for index in {0, 1, len(found) // 2, len(found) - 1}:
        data, i = wanted[index]
        assert found[index] == {"encoded": data[i]["image"], "label": data[i]["label"]}


def test_tensorflow_and_pyav_are_not_imported(prepared):
    program = f"""
import sys
from gptv_jax import config
from gptv_jax.data import sources
assert "tensorflow_datasets" not in sys.modules
sources.open_source(config.Data(name="cifar10", dir="{prepared}"), "test[:5]")[0]
print(set(sys.modules).intersection(("tensorflow", "av")))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "set()\n", ended.stderr


@pytest.mark.parametrize("name", ["cifar10", "cifar11", "no such/set"])
def test_a_set_that_is_not_prepared_is_an_error_with_the_command(tmp_path, name):
    command = rf"pip install .*prepare.*tfds build {name} .*array_record --data_dir={tmp_path}$"
    with pytest.raises(InputError, match=command) as error:
        sources.open_source(config_lib.Data(name=name, dir=str(tmp_path)), "train")
    assert len(str(error.value).splitlines()) == 1


def test_the_examples_of_each_class_are_counted_by_split_expression(tmp_path):
    images, labels = np.zeros((6, 2, 2, 1), np.uint8), np.array([2, 0, 2, 2, 0, 1])
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels)
    config = config_lib.Data(name="arrays", path=str(tmp_path / "a.npz"))
    counted = {e: sources.open_source(config, e).label_counts() for e in ("train", "train[:3]")}
    np.testing.assert_array_equal(counted["train"], [2, 1, 3])
    np.testing.assert_array_equal(counted["train[:3]"], [1, 0, 2])
    unlabelled = dataclasses.replace(config, labels=False)
    assert sources.open_source(unlabelled, "train").label_counts() is None
