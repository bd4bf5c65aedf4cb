"""Data that other settings would read: the sentence names these settings."""

import numpy as np
import pyarrow
import pytest
from conftest import encoded, make_folder, random_image
from pyarrow import parquet

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.errors import InputError

PNG = encoded(random_image(4, 4, 3))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with data of every kind."""
    root = tmp_path_factory.mktemp("data")
    make_folder(root, {f"photos/{i}.png": PNG for i in range(3)} | {"mine.tar": b"", "x.zip": b""})
    make_folder(root, {"shards/a.tar": b"", "tfds/features.json": b"{}", "saved/state.json": b"{}"})
    annotated = b'{"images": [], "annotations": []}'
    make_folder(
        root / "coco", {"train2017/1.png": PNG, "annotations/instances_train.json": annotated}
    )
    make_folder(root / "lone", {"a.png": PNG, "labels.json": annotated})
    (root / "hub/data").mkdir(parents=True)
    parquet.write_table(pyarrow.table({"image": [PNG] * 3}), root / "hub/data/train.parquet")
    np.savez(root / "set.npz", train_images=random_image(3, 4, 4, 3))
    return root


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("hub", "--config.data.name=parquet --config.data.path=ROOT/hub"),
        (
            "hub/data/train.parquet",
            "--config.data.name=parquet --config.data.path=ROOT/hub/data/train",
        ),
        ("saved", "--config.data.name=parquet"),
        ("mine.tar", "--config.data.name=webdataset --config.data.path=ROOT/mine.tar"),
        ("shards", "--config.data.name=webdataset"),
        ("set.npz", "--config.data.name=arrays"),
        ("photos", "--config.data.name=folder"),
        ("coco/annotations/instances_train.json", "--config.data.name=coco"),
        ("x.zip", "is packed; unpack it"),
        ("tfds", "--config.data.dir=ROOT/tfds"),
    ],
)
def test_a_path_where_a_name_belongs_leads_to_the_fields_that_read_it(places, place, words):
    words = words.replace("ROOT", str(places))
    own = [name for name in sources.SETS if f"name={name} " not in words + " "]
    if place == "photos":
        own.remove("camera_motions")  # which reads them, as clips
    for settings in (
        {"name": str(places / place)},
        *({"name": name, "path": str(places / place)} for name in own if "digit" not in name),
    ):
        with pytest.raises(InputError) as error:
            sources.open_data_set(config_lib.Data(**settings))
        assert words in str(error.value) and str(places / place) in str(error.value)
        assert len(str(error.value)) <= 300 + 2 * len(str(places))


@pytest.mark.parametrize(
    "name",
    [
        "hf://ylecun/mnist",
        "hf://datasets/ylecun/mnist/data",
        "https://huggingface.co/datasets/ylecun/mnist",
        "ylecun/mnist",
    ],
)
def test_a_name_of_the_hub_leads_to_the_command_that_downloads(name):
    command = "hf download ylecun/mnist --repo-type=dataset --local-dir=FOLDER"
    with pytest.raises(InputError, match=command) as error:
        sources.open_data_set(config_lib.Data(name=name))
    assert "--config.data.name=parquet --config.data.path=FOLDER" in str(error.value)


def test_what_fits_keeps_its_own_error(places):
    for name, path, words in (
        ("parquet", "photos", "name=folder"),
        ("webdataset", "mine.tar", "no tar file"),
        ("folder", "nowhere", "does not exist"),
    ):
        with pytest.raises(InputError, match=words):
            sources.open_data_set(config_lib.Data(name=name, path=str(places / path)))


@pytest.mark.parametrize("stray", ["stats.npz", "raw.tar"])
def test_a_stray_file_does_not_hide_what_is_wrong(tmp_path, stray):
    deep = [f"set/{split}/{name}/0.png" for split in ("train", "test") for name in "ab"]
    make_folder(tmp_path / "deep", {name: PNG for name in deep} | {stray: b""})
    beside = {f"{name}/{i}.png": PNG for name in ("test", "cat") for i in range(3)}
    make_folder(tmp_path / "beside", beside | {stray: b""})
    for folder, words in (("deep", "set config.data.path="), ("beside", "beside images in cat")):
        with pytest.raises(InputError, match=words):
            sources.open_data_set(config_lib.Data(name="folder", path=str(tmp_path / folder)))


def test_a_name_that_does_not_exist_leads_to_the_one_that_reads_the_path(places):
    with pytest.raises(InputError, match=r"take --config.data.name=folder"):
        sources.open_data_set(config_lib.Data(name="imagefolder", path=str(places / "photos")))


@pytest.mark.parametrize("place", ["coco", "lone"])
def test_a_coco_folder_leads_to_coco_and_is_readable_as_a_folder_of_images(places, place):
    words = f"--config.data.name=coco --config.data.path={places / place}"
    readers = [{"name": n, "path": str(places / place)} for n in ("arrays", "tokens", "parquet")]
    for settings in ({"name": str(places / place)}, *readers):
        with pytest.raises(InputError) as error:
            sources.open_data_set(config_lib.Data(**settings))
        assert words in str(error.value)
    folder = sources.open_data_set(config_lib.Data(name="folder", path=str(places / place)))
    assert "json are not read; --config.data.name=coco reads them" in folder.notes[-1]
