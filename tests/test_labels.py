"""Arrays as people have them: labels of many kinds, and images of other types and shapes."""

import copy
import logging

import numpy as np
import pytest

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.errors import InputError
from gptv_jax.stages import setup

LABELS = np.arange(60) % 3
IMAGES = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
PARTS = {"train": slice(40), "validation": slice(40, 50), "test": slice(50, 60)}


def npz(tmp_path, numbers=None, images=IMAGES, parts=PARTS, **changes) -> config_lib.Data:
    arrays = {f"{split}_images": images[rows] for split, rows in parts.items()}
    if numbers is not None:
        arrays |= {f"{split}_labels": numbers[rows] for split, rows in parts.items()}
    np.savez(tmp_path / "set.npz", **arrays)
    return config_lib.Data(name="arrays", path=str(tmp_path / "set.npz"), **changes)


def found(config: config_lib.Data, split: str) -> list[int]:
    source = sources.open_source(config, split)
    return [int(source[i]["label"]) for i in range(len(source))]


NAMES = np.array(["cat", "dog", "owl"])


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (LABELS, ()),
        (LABELS.astype(np.uint8), ()),
        (LABELS.astype(np.float32), ()),
        (LABELS + 1, ("1", "2", "3")),
        (np.array([7, 1005, 800_000])[LABELS], ("7", "1005", "800000")),
        (np.array([0, 500, 800_000])[LABELS], ("0", "500", "800000")),
        (NAMES[LABELS], ("cat", "dog", "owl")),
        (NAMES.astype("S")[LABELS], ("cat", "dog", "owl")),
        (LABELS > 0, ()),
        (np.array([0, 255])[LABELS // 2].astype(np.uint8), ("0", "255")),
    ],
    ids=str,
)
def test_labels_become_numbers_from_0_and_keep_their_values_as_names(tmp_path, labels, names):
    config = npz(tmp_path, labels)
    wanted = np.unique(labels, return_inverse=True)[1]
    data_set = sources.open_data_set(config)
    assert data_set.class_names == names and data_set.classes == wanted.max() + 1
    for split, rows in PARTS.items():
        assert found(config, split) == wanted[rows].tolist()
    assert bool(data_set.notes) == (bool(names) and names[0] != "cat")


def test_a_few_classes_without_images_stay_and_are_named(tmp_path, caplog):
    labels = np.array([0, 1, 4])[LABELS]
    config = npz(tmp_path, labels)
    assert sources.open_data_set(config).classes == 5 and found(config, "test") == [
        *labels[50:].tolist()
    ]
    with caplog.at_level(logging.INFO, "gptv_jax"):
        config = config_lib.Config(data=config_lib.Data(**{**vars(config)}))
        with pytest.raises(InputError):  # grey levels do not take colours
            setup.open_run(config, str(tmp_path / "run"))
    told = "\n".join(caplog.messages)
    assert "classes without a training image: 2, 3" in told
    assert "5 classes with training images: 0 14, 1 13, 2 0, 3 0, 4 13" in told


@pytest.mark.parametrize("mark", [255, -1, 800_000])
@pytest.mark.parametrize("first", [0, 1])
def test_a_label_that_marks_images_to_ignore_is_refused_and_left_out_on_request(
    tmp_path, mark, first
):
    labels = np.where(LABELS == 2, mark, LABELS + first)
    with pytest.raises(InputError, match=f"config.data.ignore_label={mark}") as caught:
        sources.open_data_set(npz(tmp_path, labels))
    assert len(str(caught.value)) <= 300
    config = npz(tmp_path, labels, ignore_label=mark)
    data_set = sources.open_data_set(config)
    assert data_set.classes == 2 and data_set.class_names == (("1", "2") if first else ())
    for split, rows in PARTS.items():
        kept = LABELS[rows] != 2
        source = sources.open_source(config, split)
        assert found(config, split) == LABELS[rows][kept].tolist()
        np.testing.assert_array_equal(
            [source[i]["image"] for i in range(len(source))], IMAGES[rows][kept]
        )
    assert any(
        f"13 of 40 images of the split train have the label {mark}" in n for n in data_set.notes
    )


def test_a_split_whose_images_are_all_ignored_is_no_split(tmp_path):
    labels = np.where(np.arange(60) >= 50, -1, LABELS)  # as of a test set whose labels are secret
    config = npz(tmp_path, labels, ignore_label=-1)
    assert sources.open_data_set(config).lengths == {"train": 40, "validation": 10}
    with pytest.raises(InputError, match="all images have the label"):
        sources.open_data_set(npz(tmp_path, labels * 0, ignore_label=0))


@pytest.mark.parametrize("ignore", [None, 1])
def test_arrays_of_a_single_class_are_unlabelled(tmp_path, ignore):
    labels = LABELS * 0 if ignore is None else LABELS % 2
    data_set = sources.open_data_set(npz(tmp_path, labels, ignore_label=ignore))
    assert data_set.classes == 0 and "there is a single class, 0" in data_set.notes[-1]
    assert data_set.open("train")[0].keys() == {"image"}


def test_training_images_of_a_single_class_stop_the_stages_that_need_classes(tmp_path):
    config = npz(tmp_path, np.sort(LABELS), train_split="train[:10]")
    opened = {split: sources.open_source(config, split) for split in sources.SPLITS}
    with pytest.raises(InputError, match=r"train_split=train.:10. has images of a single class"):
        sources.check_labels(config, opened)


@pytest.mark.parametrize(
    ("present", "mark"),
    [
        ([*range(150), 255], 255),
        ([*range(1, 150), 255], 255),
        ([7, 8, 11, 255], 255),
        ([*range(5), 254, 255], -1),
        ([*range(400), 65535], 65535),
    ],
)
def test_the_usual_marks_are_seen_beside_any_number_of_classes(tmp_path, present, mark):
    images = np.zeros((len(present), 2, 2, 1), np.uint8)
    arrays = {"train_images": images, "train_labels": np.array(present)}
    np.savez(tmp_path / "set.npz", **arrays)
    config = config_lib.Data(name="arrays", path=str(tmp_path / "set.npz"))
    with pytest.raises(InputError, match=f"set config.data.ignore_label={mark}; ") as caught:
        sources.open_data_set(config)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("labels", "cure"),
    [
        (LABELS[:, None], lambda labels: labels[:, 0]),
        (np.eye(3, dtype=np.uint8)[LABELS], lambda labels: labels.argmax(1)),
        (np.eye(3)[LABELS], lambda labels: labels.argmax(1)),
    ],
)
def test_labels_of_another_shape_are_refused_with_the_expression_that_helps(tmp_path, labels, cure):
    with pytest.raises(InputError, match=r"store labels.*\.$") as caught:
        sources.open_data_set(npz(tmp_path, labels))
    advice = str(caught.value).rpartition("store ")[2].rstrip(".")
    changed = eval(advice, {"labels": labels})
    np.testing.assert_array_equal(changed, cure(labels))
    assert found(npz(tmp_path, changed), "train") == LABELS[:40].tolist()


@pytest.mark.parametrize(
    "images",
    [
        IMAGES.transpose(0, 3, 1, 2),
        IMAGES[..., :1].transpose(0, 3, 1, 2),
        IMAGES.transpose(1, 2, 3, 0),
        IMAGES[..., 0],
        IMAGES.astype(np.float32) / 255,
        IMAGES.astype(np.float32) / 127.5 - 1,
        IMAGES.astype(np.float64),
        IMAGES.astype(np.int64),
        IMAGES.astype(np.uint16) * 257,
        IMAGES > 127,
    ],
    ids=lambda images: f"{images.dtype}{images.shape}",
)
def test_images_of_another_kind_are_refused_with_the_expression_that_helps(tmp_path, images):
    with pytest.raises(InputError) as caught:
        sources.open_data_set(npz(tmp_path, LABELS, images))
    assert len(str(caught.value)) <= 300
    advice = str(caught.value).partition("store ")[2].partition("; images must")[0]
    changed = eval(advice.removesuffix(" of grey images"), {"images": images})
    source = sources.open_source(npz(tmp_path, LABELS, changed), "train")
    wanted = (IMAGES > 127) * 255 if images.dtype == bool else IMAGES[..., : changed.shape[-1]]
    np.testing.assert_array_equal(source[5]["image"], wanted[5])


@pytest.mark.parametrize("channels", [5, 8])
def test_images_of_many_channels_are_refused(tmp_path, channels):
    images = np.zeros((60, 16, 16, channels), np.uint8)
    with pytest.raises(InputError, match="1 to 4 channels"):
        sources.open_data_set(npz(tmp_path, None, images))


def test_arrays_of_objects_are_refused_in_a_sentence(tmp_path):
    several = np.empty(2, object)
    several[:] = [IMAGES[0], IMAGES[0, :4]]
    np.savez(tmp_path / "set.npz", train_images=several)
    with pytest.raises(InputError, match=r"config.data.name=folder") as caught:
        sources.open_data_set(config_lib.Data(name="arrays", path=str(tmp_path / "set.npz")))
    assert len(str(caught.value)) <= 300 + len(str(tmp_path))


def test_splits_of_arrays_have_their_usual_names_too(tmp_path):
    parts = {"train": PARTS["train"], "val": PARTS["validation"], "testing": PARTS["test"]}
    config = npz(tmp_path, LABELS, parts=parts)
    assert sources.open_data_set(config).lengths == {"train": 40, "validation": 10, "test": 10}
    assert found(config, "val") == found(config, "validation") == LABELS[40:50].tolist()


def test_labels_that_are_not_used_need_not_be_sound(tmp_path):
    config = npz(tmp_path, LABELS[:, None] - 1, labels=False)
    assert sources.open_source(config, "train").classes == 0


def test_a_split_without_labels_stops_the_stages_that_need_them():
    class Set(sources.DataSet, sources.Source):
        """A set whose test split has no labels, as TFDS marks them: -1, read with the images."""

        classes = 2
        lengths = {"train": 4, "validation": 4, "test": 4}  # noqa: RUF012

        def open(self, split: str):
            self.label = np.int32(-1 if split == "test" else 1)
            return copy.copy(self)

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict:
            return {"image": IMAGES[0], "label": self.label}

        def name(self, index: int) -> str:
            return str(index)

    opened = {split: sources.Selected(Set(), split) for split in sources.SPLITS}
    assert opened["test"].label_counts() is None
    with pytest.raises(InputError, match=r"config.data.test_split=test has images without a label"):
        sources.check_labels(config_lib.Data(), opened)
    del opened["test"]
    sources.check_labels(config_lib.Data(), opened)
