"""Tables of image files: Parquet, as on the Hugging Face Hub, and Arrow, as `datasets` saves it."""

import json
import pathlib
import pickle

import numpy as np
import pyarrow
import pytest
from conftest import encoded, random_image
from pyarrow import ipc, parquet

from gptv_jax import config as config_lib
from gptv_jax.data import parquet as tables
from gptv_jax.data import shards, sources
from gptv_jax.data.damage import DecodedSource
from gptv_jax.data.images import Decode
from gptv_jax.errors import InputError

IMAGES = [encoded(random_image(6, 5, 3, seed=i)) for i in range(12)]
CLASSES = {"label": {"names": ["owl", "cat", "dog"], "_type": "ClassLabel"}}


def table(labels=None, images=IMAGES, features=None, column="image") -> pyarrow.Table:
    """A table of the images as `datasets` writes it: {"bytes", "path"}, and labels."""
    columns = {column: [{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(images)]}
    if labels is not None:
        columns["label"] = list(labels)
    found = pyarrow.table(columns)
    if features:
        stored = json.dumps({"info": {"features": features}})
        found = found.replace_schema_metadata({"huggingface": stored})
    return found


def write(path: pathlib.Path, content: pyarrow.Table, **options) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(content, path, **options)
    return path


def open_set(path, split="train", **changes) -> sources.Selected:
    return sources.open_source(config_lib.Data(name="parquet", path=str(path), **changes), split)


def test_a_folder_of_the_hub_has_splits_and_named_classes(tmp_path, monkeypatch):
    labels = np.arange(12) * 5 % 3
    for part in range(2):
        rows = slice(6 * part, 6 * part + 6)
        content = table(labels[rows], IMAGES[rows], CLASSES)
        write(tmp_path / f"data/train-0000{part}-of-00002.parquet", content, row_group_size=4)
    write(tmp_path / "data/val-00000-of-00001.parquet", table([2], IMAGES[:1], CLASSES))
    (tmp_path / "README.md").write_text("# A data set")
    monkeypatch.setattr(tables, "KEPT_BYTES", 500)  # a few images: row groups are read again
    source = open_set(tmp_path)
    assert source.classes == 3 and source.class_names == ("owl", "cat", "dog")
    again = pickle.loads(pickle.dumps(source))  # as a worker process gets it
    for each in (source, again):
        for i in np.random.default_rng(0).permutation(12).tolist():
            assert each[i]["encoded"] == IMAGES[i] and each[i]["label"] == labels[i]
    assert source.name(11) == f"{tmp_path}/data/train-00001-of-00002.parquet[5]"
    assert len(open_set(tmp_path, "validation")) == 1
    assert [open_set(tmp_path, "train[50%:]")[i]["encoded"] for i in range(6)] == IMAGES[6:]


def save_to_disk(folder: pathlib.Path, content: pyarrow.Table, split: str) -> None:
    """The folder that `datasets.Dataset.save_to_disk` writes: an Arrow stream and its state."""
    folder.mkdir(parents=True)
    with ipc.new_stream(folder / "data-00000-of-00001.arrow", content.schema) as stream:
        stream.write_table(content, max_chunksize=5)
    name = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": name, "_split": split}))


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    labels = np.arange(12) % 3
    for split, rows in (("train", slice(0, 12)), ("test", slice(3, 5))):
        content = table(labels[rows], IMAGES[rows], CLASSES)
        save_to_disk(tmp_path / "all" / split, content, split)
    (tmp_path / "all/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    source = open_set(tmp_path / "all")
    assert [source[i]["encoded"] for i in range(12)] == IMAGES and source.class_names[2] == "dog"
    assert [source[i]["label"] for i in range(12)] == labels.tolist()
    test = pickle.loads(pickle.dumps(open_set(tmp_path / "all", "test")))
    assert [test[i]["encoded"] for i in range(len(test))] == IMAGES[3:5]
    alone = open_set(tmp_path / "all/test", "test")  # the folder of one split knows its name
    assert alone[1]["encoded"] == IMAGES[4]
    (tmp_path / "all/train/data-00000-of-00001.arrow").unlink()
    with pytest.raises(InputError, match=r"incomplete: .*data-00000-of-00001.arrow does not exist"):
        open_set(tmp_path / "all", labels=False)


def test_texts_are_classes_and_bytes_alone_are_images(tmp_path):
    content = pyarrow.table(
        {"picture": IMAGES, "label": ["dog", "cat", "cat"] * 4, "id": range(12)}
    )
    source = open_set(write(tmp_path / "mine.parquet", content))
    assert source.class_names == ("cat", "dog") and source[0] == {"encoded": IMAGES[0], "label": 1}
    source = open_set(tmp_path / "mine.parquet", labels=False)
    assert source.classes == 0 and source[4] == {"encoded": IMAGES[4]}


@pytest.mark.parametrize("mark", [255, -1])
@pytest.mark.parametrize("features", [None, CLASSES])
def test_images_with_the_label_to_ignore_are_left_out(tmp_path, mark, features):
    labels = [0, 1, 2, mark] * 3
    path = write(tmp_path / "x.parquet", table(labels, features=features))
    with pytest.raises(InputError, match=f"config.data.ignore_label={mark}"):
        open_set(path)
    source = open_set(path, ignore_label=mark)
    assert source.classes == 3 and len(source) == 9
    for i in range(9):
        assert source[i] == {"encoded": IMAGES[i // 3 * 4 + i % 3], "label": i % 3}
    assert source.name(3) == f"{path}[4]"


def test_floats_that_are_whole_are_labels_and_a_single_class_is_none(tmp_path):
    source = open_set(write(tmp_path / "x.parquet", table([0.0, 1.0] * 6)))
    assert source.classes == 2 and source[1]["label"] == 1
    for features in (None, CLASSES):
        path = write(tmp_path / f"{bool(features)}.parquet", table([1] * 12, features=features))
        assert open_set(path).classes == 0


def test_named_classes_of_which_few_have_images_stay(tmp_path):
    features = {"label": {"names": [f"class {i}" for i in range(1000)], "_type": "ClassLabel"}}
    source = open_set(write(tmp_path / "x.parquet", table([0, 1, 999] * 4, features=features)))
    assert source.classes == 1000 and [source[i]["label"] for i in range(3)] == [0, 1, 999]


def test_a_split_has_the_name_of_its_file_too(tmp_path):
    write(tmp_path / "train-00000-of-00001.parquet", table(LABELS))
    write(tmp_path / "valid_data-00000-of-00001.parquet", table(LABELS, IMAGES[::-1]))
    for split in ("valid", "validation"):
        assert open_set(tmp_path, f"{split}[:2]")[0]["encoded"] == IMAGES[-1]
    with pytest.raises(InputError, match="split 'val' cannot be read"):
        open_set(tmp_path, "val")


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_file_that_has_changed_is_read_anew(tmp_path, ending):
    for images in (IMAGES, IMAGES[4:8]):
        sources.open_data_set.cache_clear()  # as a new run does
        content = table([0, 1] * (len(images) // 2), images)
        if ending == "parquet":
            path = write(tmp_path / "x.parquet", content)
        else:
            path = tmp_path / "x.arrow"
            path.unlink(missing_ok=True)
            with ipc.new_stream(path, content.schema) as stream:
                stream.write_table(content)
        source = open_set(path)
        assert [source[i]["encoded"] for i in range(len(source))] == images


def test_numbers_that_do_not_count_from_0_become_names(tmp_path):
    source = open_set(write(tmp_path / "x.parquet", table([3, 1, 2] * 4)))
    assert source.class_names == ("1", "2", "3") and source.classes == 3
    assert [source[i]["label"] for i in range(3)] == [2, 0, 1]
    data_set = sources.open_data_set(config_lib.Data("parquet", path=str(tmp_path / "x.parquet")))
    assert "numbered" in data_set.notes[0]


def test_rows_that_are_sorted_by_class_are_mixed(tmp_path):
    source = open_set(write(tmp_path / "x.parquet", table(np.repeat([0, 1, 2], 4))), "train[:50%]")
    found = [source[i] for i in range(6)]
    assert sorted(each["label"] for each in found) == [0, 0, 1, 1, 2, 2]
    assert all(IMAGES.index(each["encoded"]) // 4 == each["label"] for each in found)


def test_images_that_are_missing_or_damaged_are_named(tmp_path):
    rows = [IMAGES[0], None, b"text", b"", *IMAGES[4:]]
    path = write(tmp_path / "train.parquet", table(np.arange(12) % 3, rows))
    source = DecodedSource(open_set(path), Decode())
    damaged = {i: source.reason(i) for i in range(12) if source[i]["damaged"] >= 0}
    assert list(damaged) == [1, 2, 3] and source.name(1) == f"{path}[1]"
    assert "holds no bytes" in damaged[1] and "not an image" in damaged[2] and "empty" in damaged[3]


def test_a_damaged_row_group_is_named_and_a_damaged_file_is_refused(tmp_path):
    path = write(tmp_path / "train.parquet", table(np.arange(12) % 3), row_group_size=6)
    content = bytearray(path.read_bytes())
    begin = parquet.read_metadata(path).row_group(0).column(0).dictionary_page_offset
    content[begin : begin + 40] = bytes(40)
    path.write_bytes(content)
    source = DecodedSource(open_set(path), Decode())
    assert source[2]["damaged"] == 2 and source[7]["damaged"] == -1
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(content[:-9])
    with pytest.raises(InputError, match=r"cut.parquet is damaged, or no Parquet"):
        open_set(cut)


def test_a_split_without_labels_is_left_out(tmp_path):
    write(tmp_path / "train.parquet", table(np.arange(12) % 3))
    write(tmp_path / "test.parquet", table([-1] * 12))
    data_set = sources.open_data_set(config_lib.Data("parquet", path=str(tmp_path)))
    assert data_set.classes == 3 and "the split test is left out" in data_set.notes[0]
    with pytest.raises(InputError, match=r"'test' cannot be read; .* train \(12 images\)"):
        open_set(tmp_path, "test")
    assert len(open_set(tmp_path, "test", labels=False)) == 12


LABELS = [0, 1, 2] * 4


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({}, "has no Parquet or Arrow file"),
        ({"x": table([0, None] * 6)}, "no label .* in 6 of 12 rows of split train"),
        ({"x": table([0.5] * 12)}, "some of which are not whole; labels are whole numbers"),
        (
            {"x": table([0, 3] * 6, features=CLASSES)},
            "labels reach from 0 to 3, but the 3 names .* 0 to 2",
        ),
        ({"x": table([0, -2] * 6)}, "labels reach from -2 to 0, but count from 0"),
        ({"x": pyarrow.table({"text": ["a"]})}, r"needs one column of image files.*text \(string"),
        ({"x": pyarrow.table({"a": IMAGES, "b": IMAGES})}, "needs one column of image files"),
        ({"x": table(LABELS).append_column("labels", [LABELS])}, "2 columns of labels"),
        (
            {"train": table(LABELS), "test": table(["a", "b"] * 6)},
            "no column label of the type int",
        ),
        ({"train": table(LABELS), "more": table(LABELS)}, "more.parquet, which names none"),
        ({"a/train": table(LABELS), "b/train": table(LABELS)}, "train in 2 folders, a and b"),
        ({"x": table(LABELS).slice(0, 0)}, "has no row"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value[:25],
)
def test_tables_that_are_no_data_set_are_an_error(tmp_path, contents, words):
    for name, content in contents.items():
        write(tmp_path / f"{name}.parquet", content)
    with pytest.raises(InputError, match=words) as error:
        open_set(tmp_path)
    assert len(str(error.value)) <= 300 + len(str(tmp_path))


def test_a_row_group_that_is_too_large_is_refused_with_the_cure(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", table(LABELS))
    monkeypatch.setattr(tables, "LARGEST_GROUP", 1000)
    with pytest.raises(InputError, match="row_group_size=100"):
        open_set(path)


@pytest.mark.parametrize(
    "wanted",
    [
        {"train": "a.x b.x"},
        {"train": "train-00000-of-00002.x train-00001-of-00002.x", "test": "test-00000-of-00001.x"},
        {"train": "imagenet-train-000.x", "validation": "imagenet-val-000.x"},
        {"train": "Train/0000.x", "validation": "VALIDATION/0000.x"},
        {"train": "data/cifar_train.x", "test": "data/cifar_test.x"},
        {"train": "train.x", "unlabeled": "unlabeled-00000-of-00001.x"},
    ],
    ids=lambda wanted: wanted["train"],
)
def test_the_name_of_a_file_or_its_folder_says_the_split(tmp_path, wanted):
    for name in " ".join([*wanted.values(), ".hidden.x train/.y.x __MACOSX/train/a.x"]).split():
        write(tmp_path / name, table())
    found = shards.find(tmp_path, (".x",), "X")
    names = {s: " ".join(str(f.relative_to(tmp_path)) for f in fs) for s, fs in found.items()}
    assert names == wanted and list(names) == list(wanted)


def test_a_pattern_names_files(tmp_path):
    for number in range(12):
        write(tmp_path / "train" / f"s-{number:03}.x", table())
    found = shards.find(tmp_path / "train" / "s-{008..010}.x", (".x",), "X")
    assert [path.name for path in found["train"]] == ["s-008.x", "s-009.x", "s-010.x"]
    assert len(shards.find(tmp_path / "train" / "s-00*.x", (".x",), "X")["train"]) == 10
    with pytest.raises(InputError, match=r"s-012.x does not exist"):
        shards.find(tmp_path / "train" / "s-{008..012}.x", (".x",), "X")
