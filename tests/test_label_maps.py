"""Label maps in folders: layouts, kinds of files, sizes and every fault, on real small files."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import encoded, make_folder, random_image
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax.data import cache, inventory, pipeline, sources, whole_videos
from gptv_jax.data.damage import DamageLog, DecodedSource
from gptv_jax.data.images import Decode
from gptv_jax.errors import InputError
from gptv_jax.tokens import GreyCodec

H, W = 6, 8
NAMES = "sky,road,tree"
CLASSES = np.arange(H * W, dtype=np.uint8).reshape(H, W) % 3  # no two corners are alike


def photo(number: int) -> bytes:
    """An image whose grey value says which label map it has."""
    return encoded(np.full((H, W, 1), number, np.uint8))


def label_map(number: int) -> np.ndarray:
    return np.roll(CLASSES, number)


def opened(path, **changes) -> sources.Selected:
    """The training examples of a folder of label maps."""
    given = {"maps": "{split}_labels", "map_names": NAMES} | changes
    config = config_lib.Data(name="folder", path=str(path), **given)
    sources.open_data_set.cache_clear()
    return sources.open_source(config, "train")


def one(path, found: bytes, image: bytes = photo(0), **changes) -> dict:
    """The decoded record of the only image, or the reason why it is damaged."""
    make_folder(path, {"train/a.png": image, "train_labels/a.png": found})
    source = DecodedSource(opened(path, **changes), Decode(channels=1))
    try:
        return source[0]
    except InputError:
        return {"reason": source.reason(0)}


@pytest.mark.parametrize(
    ("image", "found", "fields"),
    [
        ("{s}/{n}.jpg", "{s}_labels/{n}.png", {}),  # CamVid, as SegNet has it
        ("{s}/{n}.jpg", "{s}_labels/{n}_L.png", {"maps": "{split}_labels/{name}_L"}),
        ("images/{s}ing/{n}.png", "annotations/{s}ing/{n}.png",  # ADE20K
         {"images": "images/{split}", "maps": "annotations/{split}"}),
        ("leftImg8bit/{s}/aachen/{n}_leftImg8bit.png", "gtFine/{s}/aachen/{n}_labelIds.png",
         {"images": "leftImg8bit/{split}/{name}_leftImg8bit",
          "maps": "gtFine/{split}/{name}_labelIds.png"}),  # Cityscapes
        ("{s}/{n}.jpg", "{s}/{n}.png",
         {"images": "{split}/{name}.jpg", "maps": "{split}/{name}.png"}),
        ("{s}/{n}.png", "{s}/{n}_mask.bmp", {"maps": "{split}/{name}_mask"}),
        ("{s}/{n}.png", "all maps/{s}/{n}.tif", {"images": "{split}", "maps": "all maps/{split}"}),
        ("{s}/{n}.png", "segmentation/{n}.png", {"images": "{split}", "maps": "segmentation"}),
    ],
)  # fmt: skip
def test_images_and_label_maps_are_matched_in_the_usual_layouts(tmp_path, image, found, fields):
    contents = {}
    for number in range(6):
        place = {"s": "train" if number < 4 else "val", "n": f"00{number}.a"}
        contents[image.format(**place)] = photo(number)
        kind = {"png": "PNG", "bmp": "BMP", "tif": "TIFF"}[found[-3:]]
        contents[found.format(**place)] = encoded(label_map(number)[..., None], kind)
    if "ADE" not in image and "images/" in image:
        contents = {n.replace("valing", "validation"): each for n, each in contents.items()}
    source = opened(make_folder(tmp_path / "data", contents), **fields)
    data_set = sources.open_data_set(
        config_lib.Data(name="folder", path=str(tmp_path / "data"), map_names=NAMES,
                        **({"maps": "{split}_labels"} | fields))
    )  # fmt: skip
    assert data_set.lengths == {"train": 4, "validation": 2} and data_set.notes == []
    assert source.map_names == ("sky", "road", "tree") and source.keys == {"segmentation"}
    decoded = DecodedSource(source, Decode(channels=1))
    numbers = [int(decoded[i]["image"].mean()) for i in range(4)]
    assert sorted(numbers) == [0, 1, 2, 3] and numbers != sorted(numbers)  # mixed
    for index, number in enumerate(numbers):
        found = decoded[index]["segmentation"]
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, label_map(number))
        np.testing.assert_array_equal(source.annotations(index)["segmentation"], found)


def test_a_folder_without_splits_is_the_split_train_and_a_text_file_names_the_classes(tmp_path):
    contents = {f"images/{i}.png": photo(i) for i in range(3)}
    contents |= {f"labels/{i}.png": encoded(label_map(i)[..., None]) for i in range(3)}
    contents["labels/classes.txt"] = b"\xef\xbb\xbf# names\n\n0 the sky\n2\ttree, or bush\n"
    source = opened(
        make_folder(tmp_path, contents),
        images="images", maps="labels", map_names="labels/classes.txt",
    )  # fmt: skip
    assert len(source) == 3 and source.map_names == ("the sky", "tree, or bush")
    found = source[0]["segmentation"]
    assert {*np.unique(found).tolist()} == {0, 1, 255}  # the value 1 is no class


def indexed(values: np.ndarray, colors: list[int]) -> Image.Image:
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette(colors)
    return image


def as_png(image: Image.Image, path) -> bytes:
    image.save(path / "x.png")
    return (path / "x.png").read_bytes()


COLORS = np.array([[128, 128, 128], [128, 64, 128], [0, 0, 192]], np.uint8)
TABLE = "128 128 128 sky,128 64 128 road,0 0 192 tree"


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (lambda: Image.fromarray(CLASSES), {}),
        (lambda: indexed(CLASSES, COLORS.ravel().tolist()), {}),
        (lambda: indexed(CLASSES, COLORS.ravel().tolist()), {"map_names": TABLE}),
        (lambda: Image.fromarray(COLORS[CLASSES]), {"map_names": TABLE}),
        (lambda: Image.fromarray(COLORS[CLASSES]).convert("RGBA"), {"map_names": TABLE}),
        (lambda: Image.fromarray(CLASSES).convert("RGB"), {}),
        (lambda: Image.fromarray(CLASSES).convert("LA"), {}),
        (lambda: Image.fromarray(CLASSES.astype(np.uint16) * 1000),
         {"map_names": "0 sky,1000 road,2000 tree"}),
        (lambda: Image.fromarray(CLASSES + 7), {"map_names": "7 sky,8 road,9 tree"}),
        (lambda: Image.fromarray(CLASSES * 2), {"map_ignore": (1, 3)}),
        (lambda: Image.fromarray(CLASSES + 1), {"map_ignore": (0,)}),
        # As TFDS has ADE20K: classes in the red channel, numbers of objects in the green one.
        (lambda: Image.fromarray(np.stack([CLASSES, CLASSES + 9, CLASSES * 0], -1)),
         {"map_channel": 0}),
    ],
)  # fmt: skip
def test_label_maps_are_read_as_values_or_colours(tmp_path, make, fields):
    record = one(tmp_path, as_png(make(), tmp_path), **fields)
    np.testing.assert_array_equal(record["segmentation"], CLASSES)


def test_what_is_no_class_has_one_value_whatever_the_file_has(tmp_path):
    values = np.array([[0, 1, 2, 3], [11, 100, 254, 255]], np.uint8).repeat(3, 0).repeat(2, 1)
    wanted = np.where(values < 3, values, 255)
    record = one(tmp_path / "a", encoded(values[..., None]), map_ignore=(11,))
    np.testing.assert_array_equal(record["segmentation"], wanted)
    image = COLORS[np.minimum(values, 2)]
    image[0, 0] = 128, 128, 129
    found = one(tmp_path / "b", encoded(image), map_names=TABLE)["segmentation"]
    assert found[0, 0] == 255 and (found != 255).sum() == H * W - 1
    many = ",".join(f"c{i}" for i in range(256))  # 255 is a class, so maps need more bits
    found = one(tmp_path / "c", encoded(values[..., None]), map_names=many)["segmentation"]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, values)
    two = Image.fromarray(values > 2)
    found = one(tmp_path / "d", as_png(two, tmp_path), map_names="no,yes")["segmentation"]
    np.testing.assert_array_equal(found, values > 2)
    both = one(tmp_path / "e", encoded(values[..., None]), map_names="0 car,1 car,2 road")
    np.testing.assert_array_equal(both["segmentation"] == 0, values < 2)  # lines of one name


def test_label_maps_of_another_size_are_resized_where_the_ratio_is_the_images(tmp_path):
    half = CLASSES[::2, ::2]
    found = one(tmp_path / "a", encoded(half[..., None]))["segmentation"]
    np.testing.assert_array_equal(found, half.repeat(2, 0).repeat(2, 1))
    found = one(tmp_path / "b", encoded(CLASSES.repeat(3, 0).repeat(3, 1)[..., None]))
    np.testing.assert_array_equal(found["segmentation"], CLASSES)
    reason = one(tmp_path / "c", encoded(CLASSES[:, :6, None]))["reason"]
    assert reason == "its label map has 6 x 6 pixels, the image 8 x 6"


@pytest.mark.parametrize("as_stored", [True, False])
def test_label_maps_fit_the_picture_as_stored_or_upright(tmp_path, as_stored):
    exif = Image.Exif()
    exif[0x0112] = 6  # the picture is shown turned by 90 degrees
    image = encoded((CLASSES * 100)[..., None], exif=exif)
    drawn = CLASSES if as_stored else np.rot90(CLASSES, -1)
    record = one(tmp_path, encoded(np.ascontiguousarray(drawn)[..., None]), image)
    assert record["segmentation"].shape == record["image"].shape[:2] == drawn.shape
    np.testing.assert_array_equal(record["segmentation"] * 100, record["image"][..., 0])


@pytest.mark.parametrize(
    ("found", "fields", "reason"),
    [
        (b"", {}, "its label map cannot be read: not an image"),
        (b"text", {}, "its label map cannot be read: not an image"),
        (encoded(random_image(60, 80, 1))[:3000], {}, "its label map cannot be read: "),
        (encoded(CLASSES[..., None], "JPEG"), {}, "its label map is a JPEG file"),
        (encoded(COLORS[CLASSES]), {}, 'give classes as "r g b name"'),
        (encoded(CLASSES[..., None]), {"map_channel": 1}, "has 1 channels, but config.data.map_"),
        (encoded(CLASSES.astype(np.uint16)), {"map_names": TABLE}, "has no colours (mode I;16)"),
    ],
)
def test_a_label_map_that_cannot_be_used_makes_its_image_a_damaged_one(
    tmp_path, found, fields, reason
):
    assert reason in one(tmp_path, found, **fields)["reason"]


def test_batches_go_on_without_damaged_maps_and_name_their_images(tmp_path, caplog):
    contents = {f"train/{i}.png": photo(i) for i in range(20)}
    contents |= {f"train_labels/{i}.png": encoded(label_map(i)[..., None]) for i in range(20)}
    contents["train_labels/7.png"] = b"torn"
    folder, entries = make_folder(tmp_path, contents), ("decode(channels=1)", "flip()")
    config = config_lib.Data(
        name="folder", path=str(folder), maps="{split}_labels", map_names=NAMES, max_damaged=0.1,
        image_size=(H, W), train_transforms=entries, eval_transforms=entries[:1],
    )  # fmt: skip
    sources.open_data_set.cache_clear()
    data = pipeline.Pipeline(config, GreyCodec(256, (H, W)), 0, damage_log=DamageLog(config, None))
    take = lambda record, rng: {"truth": record["segmentation"]}  # noqa: E731
    seen, mirrored = 0, set()
    for batch in data.evaluation("train", 5, example=take):
        for tokens, truth, mask in zip(batch["tokens"], batch["truth"], batch["mask"], strict=True):
            seen += int(mask)
            np.testing.assert_array_equal(truth, label_map(tokens[0]))
    assert seen == 19 and "train/7.png is left out: its label map" in caplog.text
    batches = data.train(10, example=take)
    for batch in (next(batches), next(batches)):
        for tokens, truth in zip(batch["tokens"], batch["truth"], strict=True):
            wanted = label_map(tokens[0])
            mirrored.add(not np.array_equal(truth, wanted))
            assert any(np.array_equal(truth, each) for each in (wanted, wanted[:, ::-1]))
    assert mirrored == {True, False}


def test_folders_of_frames_beside_folders_of_maps_are_videos(tmp_path, caplog):
    contents = {}
    for video, count in (("a", 12), ("b/one", 3)):
        for i in range(1, count + 1):
            contents[f"train/{video}/{i}.png"] = photo(i)
            contents[f"train_labels/{video}/{i}.png"] = encoded(label_map(i)[..., None])
    del contents["train_labels/a/5.png"]
    folder = make_folder(tmp_path, contents)
    source = opened(folder, frames=4, frame_stride=2, max_damaged=0.1)
    config = config_lib.Data(
        name="folder", path=str(folder), maps="{split}_labels", map_names=NAMES, frames=4,
        frame_stride=2, max_damaged=0.1, train_transforms=("decode(channels=1)", "flip(1.0)"),
    )  # fmt: skip
    notes = "; ".join(sources.open_data_set(config).notes)
    assert "1 of 15 images of the split train have no label map and have no class" in notes
    assert f"the 7 of a clip, so the last frame is repeated: {folder}/train/b/one 3" in notes
    decoded = DecodedSource(source, Decode(channels=1))
    lengths = {}
    for index in range(2):
        starts = set()
        for seed in range(40):
            record = decoded.read(index, np.random.default_rng(seed))
            numbers = record["image"][:, 0, 0, 0]
            assert record["segmentation"].shape == (4, H, W)
            starts.add(int(numbers[0]))
            for number, found in zip(numbers, record["segmentation"], strict=True):
                missing = number == 5 and source.name(index).endswith("a")
                np.testing.assert_array_equal(found, 255 if missing else label_map(number))
        frames = [*decoded.frames(index)]
        lengths[source.name(index)] = [frame["image"][0, 0, 0, 0] for frame in frames]
        assert frames[1]["segmentation"].shape == (1, H, W)
        assert starts == (set(range(1, 7)) if len(frames) > 2 else {1})
    assert lengths == {f"{folder}/train/a": [1, 3, 5, 7, 9, 11], f"{folder}/train/b/one": [1, 3]}
    make = pipeline.open_examples(config, "train", config.train_transforms)
    make = dataclasses.replace(make, annotated=True)
    plain, moved = decoded[0], make.record(0)
    np.testing.assert_array_equal(moved["segmentation"], plain["segmentation"][..., ::-1])
    whole = [
        *whole_videos.records(
            dataclasses.replace(config, eval_transforms=("decode(channels=1)",)), "train", 9
        )
    ]
    assert sorted(record["image"].shape for record in whole) == [(2, H, W, 1), (6, H, W, 1)]
    assert sorted(record["original"].shape for record in whole) == [(2, H, W), (6, H, W)]
    drawn = pipeline.images(
        config, "train", DamageLog(config, None), 9, annotated=True, anywhere=True
    )
    # Evaluation's transforms are empty here, so the files are not decoded.
    with pytest.raises(InputError, match="decode"):
        next(drawn)
    small = encoded(np.zeros((H, W + 1, 1), np.uint8))
    for name in ("train/a/3.png", "train_labels/a/3.png"):
        (folder / name).write_bytes(small)
    for index in range(2):
        if source.name(index).endswith("a"):
            reason = DecodedSource(source, Decode(channels=1)).reason(index)
            assert "its label maps have several sizes" in reason


def test_images_without_a_label_map_are_left_out_up_to_a_share(tmp_path):
    contents = {f"train/{i}.png": photo(i) for i in range(20)}
    contents |= {f"train_labels/{i}.png": encoded(label_map(i)[..., None]) for i in range(1, 22)}
    contents |= {f"test/{i}.png": photo(i) for i in range(2)}  # labels that are secret
    folder = make_folder(tmp_path, contents)
    source = opened(folder)
    assert len(source) == 19
    data_set = sources.open_data_set(
        config_lib.Data(name="folder", path=str(folder), maps="{split}_labels", map_names=NAMES)
    )
    assert data_set.lengths == {"train": 19}
    notes = "; ".join(data_set.notes)
    assert "1 of 20 images of the split train have no label map and are left out" in notes
    assert "2 of 2 images of the split test have no label map" in notes
    assert "2 label maps without an image" in notes and "20.png" in notes
    with pytest.raises(InputError, match=r"1 of 20 images .* more than the share .*=0\."):
        opened(folder, damaged="fail")
    (folder / "train/3.jpg").write_bytes(photo(3))
    with pytest.raises(InputError, match=r"3.jpg and .*3.png have one name"):
        opened(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"map_names": None}, "needs the names of the classes"),
        ({"map_names": "gone.txt"}, "map_names=gone.txt cannot be read"),
        ({"map_names": "0 sky,road"}, "'0 sky' with a value, but 'road' without one"),
        ({"map_names": "1 2 3 sky,4 road"}, "'1 2 3 sky' with a colour, but '4 road' without"),
        ({"map_names": "1 2 3 sky,1 2 333 road"}, "a colour with 333"),
        ({"map_names": "1 sky,1 road"}, "gives one value twice: 1 sky, 1 road"),
        ({"map_names": "0 sky,1 road", "map_ignore": (5,)}, "map_ignore=\\(5,\\) out"),
        ({"map_names": "sky"}, "single class sky"),
        ({"map_names": "classes.csv"}, "single class classes.csv.*a text file, which ends in .txt"),
        ({"map_names": "#000000 sky,#ff0000 road"}, "'#000000 sky'.*as in .128 64 128 road"),
        ({"map_names": "0 0 0 sky,#ff0000 road,0 0 9 tree"}, "'#ff0000 road'"),
        ({"maps": "{split}_maps"}, "{split}_maps fits no image file in .*it has train"),
        ({"maps": "nowhere/{split}"}, "fits no image file in .*nowhere, which is no folder"),
        ({"maps": "train_labels", "images": "other"}, "images=other fits no image"),
        ({"labels_file": "x.csv"}, "labels_file=x.csv is for config.data.name=folder without"),
        ({"name": "arrays"}, "maps={split}_labels is for config.data.name=folder"),
        ({"maps": None, "images": "x"}, "images=x is for config.data.name=coco"),
    ],
)
def test_settings_that_cannot_be_used_end_in_a_sentence(tmp_path, fields, words):
    maps = {f"train_labels/{i}.png": encoded(label_map(i)[..., None]) for i in range(2)}
    folder = make_folder(tmp_path, {f"train/{i}.png": photo(i) for i in range(2)} | maps)
    config = {"name": "folder", "path": str(folder), "maps": "{split}_labels", "map_names": NAMES}
    with pytest.raises(InputError, match=words.replace("{split}", "\\{split\\}")) as error:
        sources.open_data_set(config_lib.Data(**config | fields))
    assert len(str(error.value)) < 300 + 3 * len(str(tmp_path))


def test_folders_of_maps_that_are_taken_for_splits_are_told_of(tmp_path):
    names = [f"{split}{kind}/1.png" for split in ("train", "val") for kind in ("", "_labels")]
    make_folder(tmp_path, dict.fromkeys(names, photo(1)))
    with pytest.raises(InputError, match=r"config\.data\.maps, such as .?\{split\}_labels"):
        sources.open_data_set(config_lib.Data(name="folder", path=str(tmp_path)))


def test_the_classes_of_label_maps_and_their_pixels_are_told_and_recorded(tmp_path, caplog):
    caplog.set_level("INFO")
    values = np.zeros((H, W, 1), np.uint8)
    values[:3] = 9
    maps = {"a": values, "b": values, "c": values * 0 + 9}
    contents = {f"train/{n}.png": photo(1) for n in maps}
    source = opened(
        make_folder(tmp_path, contents | {f"train_labels/{n}.png": encoded(each)
                                          for n, each in maps.items()})
    )  # fmt: skip
    assert source.map_counts() == {"pixels": [48, 0, 0], "none": 96, "maps": 3, "empty": 1}
    assert source.map_counts(2)["maps"] == 2
    config = config_lib.Data(name="folder", path=str(tmp_path), maps="{split}_labels",
                             map_names=NAMES)  # fmt: skip
    found = inventory.describe(sources.open_data_set(config), {"train": source})
    assert json.loads(json.dumps(found["maps"])) == source.map_counts()
    inventory.log(config, found, {"train": source})
    assert "3 classes of label maps: sky 33.3%, road 0.0%, tree 0.0%" in caplog.text
    assert "pixels without a class: 66.7% (3 maps read, 1 without any)" in caplog.text
    assert "classes without a pixel in 3 label maps: road, tree" in caplog.text


def test_a_token_cache_keeps_label_maps_and_the_names_of_their_classes(tmp_path):
    contents = {f"train/{i}.png": photo(i) for i in range(5)}
    contents |= {f"train_labels/{i}.png": encoded(label_map(i)[..., None]) for i in range(5)}
    source = opened(make_folder(tmp_path / "data", contents))
    entries = ("decode(channels=1)", "resize((3, 4))")
    config = config_lib.Data(
        name="folder", path=str(tmp_path / "data"), maps="{split}_labels", map_names=NAMES,
        image_size=(3, 4), eval_transforms=entries,
    )  # fmt: skip
    codec, log = GreyCodec(256, (3, 4)), DamageLog(config, None)
    records = list(pipeline.images(config, "train", log, annotated=True))
    header = {
        "source": {"name": "folder", "dir": None, "path": None},
        "tokens": dataclasses.asdict(config_lib.Tokens("grey", levels=256)),
        "image_size": (3, 4),
        "transforms": entries,
        "classes": 0,
        "map_names": source.map_names,
    }
    cache.claim(tmp_path / "cache")
    chunks = pipeline.tokenized(codec, iter(records))
    cache.write(tmp_path / "cache", codec, {"train": (r for c in chunks for r in c)}, header)
    # The settings of the data that the cache was made of may stay.
    cached = dataclasses.replace(config, name="tokens", path=str(tmp_path / "cache"))
    held = sources.open_source(cached, "train")
    assert held.map_names == source.map_names and held.keys == {"segmentation"}
    assert (
        held.map_counts()["pixels"]
        == np.bincount(np.ravel([r["segmentation"] for r in records]), minlength=3).tolist()
    )
    for index, record in enumerate(records):
        again = held[index]
        np.testing.assert_array_equal(again["segmentation"], record["segmentation"])
        assert again["segmentation"].dtype == np.uint8
        np.testing.assert_array_equal(again["tokens"], record["image"][..., 0])


def test_camvid_is_read_as_its_files_say(shared_data):
    names = "sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist"
    folder = shared_data / "camvid"
    config = config_lib.Data(
        name="folder", path=str(folder), maps="{split}_labels", map_names=names, map_ignore=(11,)
    )
    data_set = sources.open_data_set(config)
    assert data_set.lengths == {"train": 367, "validation": 101, "test": 233}
    assert data_set.notes == [] and len(data_set.map_names) == 11
    source = sources.open_source(config, "test")
    wanted = np.zeros(256, np.int64)
    for file in (folder / "test_labels").iterdir():
        with Image.open(file) as image:
            wanted += np.bincount(np.asarray(image).ravel(), minlength=256)
    counts = source.map_counts()
    assert counts["pixels"] == wanted[:11].tolist() and counts["none"] == wanted[11]
    assert counts["maps"] == 233 and counts["empty"] == 0
    assert DecodedSource(source, Decode())[0]["image"].shape == (180, 240, 3)
