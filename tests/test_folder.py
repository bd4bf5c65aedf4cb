"""Folders as people have them: splits by other names, other endings, strays, labels from a CSV."""

import collections
import itertools
import logging
import pathlib
import re

import numpy as np
import pytest
from conftest import make_folder
from PIL import Image, features

from gptv_jax import config as config_lib
from gptv_jax.data import folder as folders
from gptv_jax.data import sources
from gptv_jax.errors import InputError
from gptv_jax.stages import setup


def images(*names: str) -> dict[str, bytes]:
    """Files whose content is their name; nothing is decoded here."""
    return {name: name.encode() for name in names}


def classes(count: int, *names: str) -> list[str]:
    return [f"{name}/{i:03d}.png" for name in names for i in range(count)]


def image_folder(path: pathlib.Path, **changes) -> folders.ImageFolder:
    return folders.ImageFolder(config_lib.Data(name="folder", path=str(path), **changes))


def contents(source) -> list[str]:
    return sorted(source[i]["encoded"].decode() for i in range(len(source)))


def opened(folder: pathlib.Path, split: str = "train", **changes) -> sources.Selected:
    return sources.open_source(config_lib.Data(name="folder", path=str(folder), **changes), split)


def refused(folder: pathlib.Path, **changes) -> str:
    with pytest.raises(InputError) as caught:
        opened(folder, **changes)
    assert len(str(caught.value)) <= 300 + len(str(folder)) * 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "valid", "test"),
        ("Train", "dev", "TEST"),
        ("training", "eval", "testing"),
        ("train2017", "val2017", "test2017"),
        ("train_set", "Validation", "test-set"),
        ("train_images", "validation_images", "test_images"),
        ("training_data", "02_val", "tests"),
        ("TRAIN-IMAGES", "imagesVal", "test1"),
        ("birds_train", "birds_valid", "birds_test"),
    ],
)
def test_splits_are_known_by_their_usual_names_in_any_case(tmp_path, train, validation, test):
    files = {
        split: classes(3, f"{folder}/cat", f"{folder}/dog")
        for split, folder in (("train", train), ("validation", validation), ("test", test))
    }
    make_folder(tmp_path, images(*itertools.chain(*files.values())))
    for split, names in files.items():
        source = opened(tmp_path, split)
        assert contents(source) == names and source.class_names == ("cat", "dog")


def test_names_of_classes_that_begin_like_splits_are_classes(tmp_path):
    names = ("bullet_train", "cat", "evaluators", "testudo", "trains", "validators")
    data_set = image_folder(make_folder(tmp_path, images(*classes(2, *names))))
    assert data_set.class_names == names


def test_empty_folders_with_names_of_splits_do_not_count(tmp_path):
    files = classes(2, "Train/a", "Train/b", "valid/a", "valid/b")
    make_folder(tmp_path, images(*files, "train/README.md"))
    for name in ("val", "test"):
        (tmp_path / name).mkdir()
    assert image_folder(tmp_path).lengths == {"train": 4, "validation": 4}


def test_a_link_to_a_sibling_is_no_class_and_takes_no_image_away(tmp_path):
    make_folder(tmp_path, images(*classes(2, "cat", "dog")))
    for name, target in (("a", "dog"), ("kitten", "cat"), ("cat/more", "dog")):
        (tmp_path / name).symlink_to(tmp_path / target)
    data_set = image_folder(tmp_path)
    assert contents(data_set.open("train")) == classes(2, "cat", "dog")
    assert data_set.class_names == ("cat", "dog")
    assert data_set.left_out == ["folders without images: a, kitten"]


def test_the_split_test_may_be_a_link_to_the_split_validation(tmp_path):
    make_folder(tmp_path, images(*classes(2, "train/a", "train/b", "val/a", "val/b")))
    (tmp_path / "train/c").symlink_to(tmp_path / "train/b")
    (tmp_path / "test").symlink_to(tmp_path / "val")
    data_set = image_folder(tmp_path)
    assert data_set.lengths == {"train": 4, "validation": 4, "test": 4}


def test_a_class_folder_that_is_to_be_ignored_is_left_out(tmp_path):
    make_folder(tmp_path, images(*classes(2, "0", "1", "255")))
    data_set = image_folder(tmp_path, ignore_label=255)
    assert contents(data_set.open("train")) == classes(2, "0", "1") and data_set.classes == 2
    assert "2 of 6 images of the split train have the label 255" in data_set.notes[0]
    assert "no image has the label" in image_folder(tmp_path, ignore_label=7).notes[0]


def test_a_split_is_named_in_an_expression_as_its_folder_is(tmp_path):
    make_folder(tmp_path, images(*classes(4, "train/a", "train/b", "valid/a", "valid/b")))
    assert contents(opened(tmp_path, "valid[:4]+train")) == contents(
        opened(tmp_path, "validation[:4]+train")
    )


def test_what_lies_beside_the_splits_is_left_out_and_told(tmp_path):
    wanted = classes(3, "train/cat", "train/dog", "test/cat", "test/dog")
    beside = [
        "README.md",
        "overview.png",
        "__MACOSX/train/0.png",
        "@eaDir/1.png",
        "thumbnails/2.png",
    ]
    beside += ["annotations/a.json", "labels/b.txt", "train/cat/@eaDir/3.png", ".git/4.png"]
    make_folder(tmp_path, images(*wanted, *beside))
    (tmp_path / "empty").mkdir()
    data_set = image_folder(tmp_path)
    found = [name for split in ("train", "test") for name in contents(data_set.open(split))]
    assert sorted(found) == sorted(wanted) and data_set.class_names == ("cat", "dog")
    told = "; ".join([*data_set.left_out, *data_set.notes])
    for name in ("__MACOSX", "@eaDir", "thumbnails", "annotations", "labels", "empty", "overview"):
        assert name in told
    assert "1 files by their endings: .md 1" in told


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (classes(2, "train/a", "train/b", "test/a", "test/b", "more"), "beside images in more"),
        (classes(2, "train/a", "train/b", "cat", "dog"), "beside images in cat, dog"),
        (classes(2, "test/a", "test/b"), "no folder called train"),
        (classes(2, "test", "val"), "no folder called train"),
        (classes(2, "test", "cat", "dog"), "beside images in cat, dog"),
        (classes(2, "train", "val", "valid"), "both val and valid"),
        (classes(2, "Train", "train"), "both Train and train"),
        ([*classes(2, "train/a", "train/b"), *classes(2, "test")], "without class folders"),
        (classes(2, "cat/train", "cat/test", "dog/train", "dog/test"), "inside what would be"),
        (classes(2, "set/train", "set/test"), "lie in .*/set; set config.data.path=.*/set"),
    ],
)
def test_folders_that_can_be_read_in_two_ways_are_refused(tmp_path, files, words):
    assert re.search(words, refused(make_folder(tmp_path, images(*files))))


def test_a_class_of_trains_is_a_class(tmp_path):
    data_set = image_folder(make_folder(tmp_path, images(*classes(2, "bus", "car", "train"))))
    assert data_set.class_names == ("bus", "car", "train") and data_set.lengths == {"train": 6}
    assert "taken as a class" in data_set.notes[0]


def test_few_images_outside_the_class_folders_are_left_out_by_name(tmp_path):
    wanted = classes(16, "cat", "dog")
    make_folder(tmp_path, images(*wanted, "overview.png"))
    data_set = image_folder(tmp_path)
    assert contents(data_set.open("train")) == wanted and data_set.classes == 2
    assert str(tmp_path / "overview.png") in data_set.notes[0]
    make_folder(tmp_path, images("2.png"))
    data_set = image_folder(tmp_path)
    assert data_set.classes == 0 and data_set.lengths == {"train": 34}
    assert "2 of 34 images lie in no class folder" in data_set.notes[0]
    assert image_folder(tmp_path, labels=False).notes == []


def test_a_single_class_is_told(tmp_path):
    data_set = image_folder(make_folder(tmp_path, images(*classes(3, "cats"))))
    assert data_set.classes == 0 and "single class folder, cats" in data_set.notes[0]
    data_set = image_folder(
        make_folder(tmp_path / "x", images(*classes(3, "set/cats", "set/dogs")))
    )
    assert f"set config.data.path={tmp_path}/x/set" in data_set.notes[0]


def test_files_of_every_format_that_pillow_reads_are_taken_and_others_counted(tmp_path):
    picture = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "pnm": "PPM", "tga": "TGA"}
    kinds |= {"jp2": "JPEG2000"} if features.check("jpg_2000") else {}
    kinds |= {"avif": "AVIF"} if features.check("avif") else {}
    for ending, kind in kinds.items():
        picture.save(tmp_path / f"a.{ending.upper()}", kind)
    make_folder(tmp_path, images("b.pdf", "c.eps", "d.mp4", "e.mpg", "f.h5", "g.txt", "h.txt", "i"))
    data_set = image_folder(tmp_path)
    assert data_set.lengths == {"train": len(kinds)}
    for counted in (".txt 2", ".pdf 1", ".eps 1", ".mp4 1", ".mpg 1", ".h5 1", "no ending 1"):
        assert counted in data_set.left_out[0]
    only = make_folder(tmp_path / "other", images("a.txt", "b.txt", "c.xyz"))
    assert "it has .txt 2, .xyz 1)" in refused(only)


# Labels from a CSV file.


def csv(path: pathlib.Path, *rows: str, header: str = "file,label") -> str:
    path.write_text("\n".join([header, *rows]), encoding="utf-8-sig")
    return str(path)


def labels(source) -> dict[str, str]:
    return {
        source[i]["encoded"].decode(): source.class_names[source[i]["label"]]
        for i in range(len(source))
    }


def test_a_csv_file_gives_the_labels(tmp_path, caplog):
    folder = make_folder(tmp_path / "set", images(*(f"{i}.png" for i in range(6)), "x/6.jpg"))
    rows = [
        f"{folder}/0.png,owl",
        "1,owl",
        "set/2.png,cat",
        "set\\3.png,cat",
        '"4.png", owl',
        "6.jpg,cat",
    ]
    file = csv(tmp_path / "a.csv", *rows, "9.png,cat", "5.png,")
    data_set = image_folder(folder, labels_file=file)
    assert labels(sources.Selected(data_set, "train")) == {
        **dict.fromkeys(("0.png", "1.png", "4.png"), "owl"),
        **dict.fromkeys(("2.png", "3.png", "x/6.jpg"), "cat"),
    }
    assert any(
        "1 image left out, without a row or a label" in note and "5.png" in note
        for note in data_set.notes
    )
    assert any("1 row of" in note and "9.png" in note for note in data_set.notes)


def test_a_csv_file_labels_the_splits_of_a_folder(tmp_path):
    names = [f"{split}/{i}.png" for split in ("train", "test") for i in range(6)]
    folder = make_folder(tmp_path / "set", images(*names))
    rows = [f"{name},{(2, 10, -1)[i % 3]}" for i, name in enumerate(names)]
    file = csv(tmp_path / "a.csv", *rows)
    for split in ("train", "test"):
        source = opened(folder, split, labels_file=file, ignore_label=-1)
        assert source.class_names == ("2", "10") and len(source) == 4  # in order of their values
        assert labels(source) == {
            f"{split}/{i}.png": ("2", "10")[i % 3] for i in range(6) if i % 3 < 2
        }


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        (("0.png,a",), "name,class", "needs the header file,label"),
        (("0.png;a",), "file;label", "needs the header file,label"),
        (("0.png,0", "1.png,1", "x/same,-1"), "file,label", "config.data.ignore_label=-1 leaves"),
        (("0.png,0", "1.png,1", "x/same,255"), "file,label", "set config.data.ignore_label=255"),
        (("0.png,a", "0.png,b"), "file,label", "gives 0.png the labels a, b"),
        (("0.png,a", "0,b", "1.png,a"), "file,label", "gives 0.png the labels a, b"),
        (("7.png,a",), "file,label", "label for none of 4 images"),
        (("0.png,a", "1.png,a", "x/same,b"), "file,label", "only one image of class b"),
        (("0.png,a", "1.png,b", "same.png,a"), "file,label", "fits x/same.png and y/same.png"),
    ],
)
def test_a_csv_file_that_cannot_be_used_is_refused(tmp_path, rows, header, words):
    names = ["0.png", "1.png", "x/same.png", "y/same.png"]
    folder = make_folder(tmp_path / "set", images(*names))
    assert words in refused(folder, labels_file=csv(tmp_path / "a.csv", *rows, header=header))


def test_numbers_with_a_point_in_a_csv_file_are_whole_numbers(tmp_path):
    folder = make_folder(tmp_path / "set", images(*(f"{i}.png" for i in range(6))))
    file = csv(tmp_path / "a.csv", *(f"{i}.png,{(0, 1, 255)[i % 3]}.0" for i in range(6)))
    source = opened(folder, labels_file=file, ignore_label=255)
    assert source.class_names == ("0", "1") and len(source) == 4


def test_a_missing_csv_file_and_one_for_arrays_are_refused(tmp_path):
    folder = make_folder(tmp_path / "set", images("0.png"))
    assert "labels_file" in refused(folder, labels_file=str(tmp_path / "none.csv"))
    with pytest.raises(InputError, match=r"labels_file=x.csv is for config.data.name=folder"):
        sources.open_data_set(config_lib.Data(labels_file="x.csv"))


# A run of a folder.


def picture_folder(folder: pathlib.Path, *names: str) -> pathlib.Path:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 9 * i % 256, np.uint8)).save(path)
    return folder


def configuration(folder: pathlib.Path, **changes) -> config_lib.Config:
    decode = ("decode(channels=1)",)
    data = {"train_transforms": decode, "eval_transforms": decode} | changes
    return config_lib.Config(
        data=config_lib.Data(name="folder", path=str(folder), **data),
        tokens=config_lib.Tokens(levels=256),
    )


def test_every_start_tells_the_splits_and_the_classes_and_config_json_keeps_them(tmp_path, caplog):
    names = [
        *classes(6, "train/cat"),
        *classes(4, "train/dog"),
        *classes(2, "valid/cat", "test/dog"),
    ]
    config = configuration(picture_folder(tmp_path / "set", *names))
    make_folder(tmp_path / "set", images("train/notes.txt"))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, "gptv_jax"):
            run = setup.open_run(config, str(tmp_path / "run"), ["pretrain"])
        (line,) = [r.getMessage() for r in caplog.records if "images: " in r.getMessage()]
        assert "train 10, validation 2, test 2; 2 classes" in line and "cat 6, dog 4" in line
        assert ".txt 1" in line
        del run
    record = setup.files.read_json(tmp_path / "run" / "config.json", {})
    assert record["found"]["by_class"] == {"train": [6, 4], "validation": [2, 0], "test": [0, 2]}
    assert record["found"]["images"] == {"train": 10, "validation": 2, "test": 2}
    assert record["images"] == {"train": 10, "validation": 2, "test": 2}


def test_a_later_run_of_a_process_reads_what_the_data_have_become(tmp_path):
    folder = picture_folder(tmp_path / "set", *classes(3, "a", "b"))
    config = configuration(folder, validation_split="train", test_split="train")
    for count in (3, 5):
        picture_folder(folder, *classes(count, "a", "b"))
        setup.open_run(config, str(tmp_path / f"run{count}"), ["pretrain"])
        record = setup.files.read_json(tmp_path / f"run{count}" / "config.json", {})
        assert record["images"]["train"] == 2 * count


def test_splits_of_the_data_that_a_run_does_not_use_are_told(tmp_path, caplog):
    names = [f"{split}/{i}.png" for split in ("train", "valid", "test") for i in range(3)]
    own = {"train_split": "train[:1]", "validation_split": "train[1:2]", "test_split": "test"}
    config = configuration(picture_folder(tmp_path / "set", *names), **own)
    setup.open_run(config, str(tmp_path / "run"), ["pretrain"])
    (warning,) = [m for r in caplog.records if (m := r.getMessage()).startswith("data: ")]
    assert "--config.data.validation_split=validation" in warning and "test" not in warning


@pytest.mark.parametrize("count", [1, 3, 5])
def test_too_few_images_end_in_a_sentence_that_leads_on(tmp_path, count):
    shares = {"train_split": "train[:90%]", "validation_split": "train[90%:95%]"}
    folder = picture_folder(tmp_path / "set", *(f"{i}.png" for i in range(count)))
    config = configuration(folder, **shares, test_split="train[95%:]")
    with pytest.raises(InputError, match="each split needs 1 image, but") as caught:
        setup.open_run(config, str(tmp_path / "run"))
    message = str(caught.value)
    assert f"train ({count} image{'s' * (count > 1)})" in message and len(message) <= 300
    assert not (tmp_path / "run").exists()
    assert ("3 are the fewest" in message) == (count < 3)
    if count >= 3:
        given = dict(
            word.rstrip(".").removeprefix("--config.data.").split("=")
            for word in message.split()
            if word.startswith("--config.data.")
        )
        found = setup.open_run(configuration(folder, **given), str(tmp_path / "run"), ["pretrain"])
        assert len(sources.open_source(found.config.data, "train")) == count - 2


@pytest.mark.parametrize(
    ("workdir", "data", "refused"),
    [
        ("set/run", "set", True),
        ("set", "set", True),
        ("set/cat/run", "set", True),
        ("run", "run/samples", True),
        ("set/.run", "set", False),
        ("set-run", "set", False),
        (".", "set", False),
    ],
)
def test_a_run_never_writes_into_its_own_data(tmp_path, monkeypatch, workdir, data, refused):
    monkeypatch.chdir(tmp_path)
    picture_folder(tmp_path / data, "0.png", "1.png", "2.png")
    own = {"train_split": "train[:1]", "validation_split": "train[1:2]", "test_split": "train[2:]"}
    config = configuration(pathlib.Path(data), **own)
    before = collections.Counter(p.name for p in tmp_path.rglob("*"))
    if refused:
        with pytest.raises(InputError, match=r"--workdir=.* lie in one another"):
            setup.open_run(config, workdir, ["pretrain"])
        assert collections.Counter(p.name for p in tmp_path.rglob("*")) == before
    else:
        setup.open_run(config, workdir, ["pretrain"])
