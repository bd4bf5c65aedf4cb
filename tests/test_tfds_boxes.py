"""TFDS sets with boxes and with label maps."""

import dataclasses
import json

import numpy as np
import pytest
from coco_sets import BOX, H, W, bounds, picture
from conftest import encoded
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.data.damage import DecodedSource
from gptv_jax.data.images import Decode
from gptv_jax.errors import InputError


def prepare(folder, features, examples: list[dict]) -> config_lib.Data:
    """Writes a TFDS set `boxes` of one split, train, as its builders do but without TensorFlow."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder.mkdir()
    features.save_config(folder)
    place = {"name": "train", "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
    info = {"name": "boxes", "version": "1.0.0", "fileFormat": "array_record"}
    splits = [place | {"numBytes": "1", "shardLengths": [str(len(examples))]}]
    (folder / "dataset_info.json").write_text(json.dumps(info | {"splits": splits}))
    path = folder / "boxes-train.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for example in examples:
        record = tf_example_pb2.Example()
        for name, values in example.items():
            feature = record.features.feature[name]
            if isinstance(values, bytes):
                feature.bytes_list.value.append(values)
            elif np.asarray(values).dtype.kind == "f":
                feature.float_list.value.extend(np.ravel(values))
            else:
                feature.int64_list.value.extend(np.ravel(values))
        writer.write(record.SerializeToString())
    writer.close()
    sources.open_data_set.cache_clear()
    return config_lib.Data(name="boxes", dir=str(folder))


def test_boxes_of_tfds_sets_are_in_pixels_of_the_decoded_image(tmp_path):
    import tensorflow_datasets as tfds

    label = tfds.features.ClassLabel(names=["cat", "bee"])
    flags = {
        "is_crowd": np.bool_,
        "area": np.int64,
        "label": label,
        "bbox": tfds.features.BBoxFeature(),
    }
    features = {"image": tfds.features.Image(), "objects": tfds.features.Sequence(flags)}
    features = tfds.features.FeaturesDict({**features, "image/id": np.int64})
    exif = Image.Exif()
    exif[0x0112] = 6
    boxes = [[6 / H, 4 / W, 18 / H, 14 / W], [0.5, 0.5, 0.5, 0.9], [0.5, 0.9, 1.5, 1.2]]
    parts = {"bbox": np.array(boxes, float), "label": [1, 0, 0], "is_crowd": [0, 0, 1]}
    parts |= {"area": [99, 1, 0]}
    examples = [
        {"image": encoded(picture(*BOX)), "image/id": 77},
        {"image": encoded(np.rot90(picture(*BOX)), exif=exif), "image/id": 3},
        {"image": b"no picture", "image/id": 4},
        {"image": encoded(picture(*BOX)), "image/id": 5},
    ]
    for example in examples[:3]:
        example |= {f"objects/{name}": values for name, values in parts.items()}
    none = {"bbox": np.zeros((0, 4)), "label": [], "is_crowd": [], "area": []}
    examples[3] |= {
        f"objects/{n}": np.array(each, np.float32 if n == "bbox" else int)
        for n, each in none.items()
    }
    config = prepare(tmp_path / "boxes", features, examples)
    source = sources.open_source(config, "train")
    assert source.object_names == ("cat", "bee") and "boxes" in source.keys
    assert [source.image_id(i) for i in range(4)] == [77, 3, 4, 5]
    decoded = DecodedSource(source, Decode())
    for index in (0, 1):
        record = decoded[index]
        np.testing.assert_allclose(record["boxes"], [[6, 4, 18, 14], [15, 36, H, W]], rtol=1e-6)
        np.testing.assert_array_equal(record["boxes"][0].round(), bounds(record["image"]))
        assert record["box_labels"].tolist() == [1, 0] and record["crowd"].tolist() == [False, True]
        np.testing.assert_allclose(record["area"], [99, 15 * 4], rtol=1e-5)
        assert record["boxes"].dtype == record["area"].dtype == np.float32
        again = source.annotations(index)
        np.testing.assert_array_equal(again["boxes"], record["boxes"])
        assert "encoded" not in again
    assert decoded[2]["damaged"] == 2  # and the last image is in its place
    assert decoded[3]["boxes"].shape == (0, 4) and decoded[3]["box_labels"].dtype == np.int32
    assert source.object_counts() is None


def test_boxes_of_tfds_without_labels_are_of_one_class_and_other_sequences_no_boxes(tmp_path):
    import tensorflow_datasets as tfds

    faces = tfds.features.Sequence({"bbox": tfds.features.BBoxFeature(), "blur": np.int64})
    words = {"words": tfds.features.Sequence(np.int64), "image": tfds.features.Image()}
    image = {"image": encoded(picture(*BOX)), "words": [1, 2]}
    own = {"faces/bbox": np.array([0, 0, 0.5, 1]), "faces/blur": [2]}
    with_faces = tfds.features.FeaturesDict(words | {"faces": faces})
    source = sources.open_source(prepare(tmp_path / "a", with_faces, [image | own]), "train")
    assert source.object_names == ("faces",)
    record = source.annotations(0)
    np.testing.assert_array_equal(record["boxes"], [[0, 0, H / 2, W]])
    assert record["box_labels"].tolist() == [0] and record["area"].tolist() == [H / 2 * W]
    assert source.image_id(0) == 0
    without = tfds.features.FeaturesDict(words | {"image/id": tfds.features.Text()})
    named = image | {"image/id": "a/é.jpg".encode()}
    source = sources.open_source(prepare(tmp_path / "b", without, [named]), "train")
    assert source.image_id(0) == "a/é.jpg"
    assert source.object_names == () and set(source[0]) == {"encoded"}


def test_label_maps_of_tfds_sets_are_a_feature_that_the_config_names(tmp_path):
    import tensorflow_datasets as tfds

    values = np.arange(H * W, dtype=np.uint8).reshape(H, W) % 5
    pairs = np.stack([values, values * 0 + 9, values * 0], -1)  # ADE20K: classes, then objects
    kinds = tfds.features
    features = {
        "image_left": kinds.Image(),  # as Cityscapes calls it
        "annotation": kinds.Image(encoding_format="png"),
        "segmentation_mask": kinds.Image(shape=(None, None, 1), use_colormap=True),
        "named": kinds.LabeledImage(labels=["car", "bus", "bee"], encoding_format="png"),
    }
    grey = encoded(values[..., None])
    maps = {"annotation": encoded(pairs), "segmentation_mask": grey, "named": grey}
    examples = [{"image_left": encoded(picture(*BOX)), **maps} for _ in range(2)]
    examples.append(examples[0] | {"named": b"torn"})
    config = prepare(tmp_path / "a", kinds.FeaturesDict(features), examples)
    (tmp_path / "a/named.labels.txt").write_text("car\nbus\nbee\n")
    for feature, fields, names, wanted in (
        ("named", {}, ("car", "bus", "bee"), np.where(values < 3, values, 255)),
        ("segmentation_mask", {"map_names": "1 pet,2 not,3 edge"}, ("pet", "not", "edge"),
         np.where((values > 0) & (values < 4), values - 1, 255).astype(np.uint8)),
        ("annotation", {"map_names": "a,b,c,d", "map_channel": 0, "map_ignore": (0,)}, (*"abcd",),
         np.where(values > 0, values - 1, 255)),
    ):  # fmt: skip
        source = sources.open_source(dataclasses.replace(config, maps=feature, **fields), "train")
        assert source.map_names == names and source.keys == {"segmentation"}
        record = DecodedSource(source, Decode())[1]
        np.testing.assert_array_equal(record["segmentation"], wanted)
        np.testing.assert_array_equal(record["image"], picture(*BOX))
        if feature == "named":
            assert "its label map cannot be read" in DecodedSource(source, Decode()).reason(2)
            assert source.map_counts()["maps"] == 2
    assert set(sources.open_source(config, "train")[2]) == {"encoded"}  # unless asked for
    with pytest.raises(
        InputError, match=r"maps=boxes is no .* annotation, named, segmentation_mask"
    ):
        sources.open_source(dataclasses.replace(config, maps="boxes"), "train")
    with pytest.raises(InputError, match="needs the names of the classes"):
        sources.open_source(dataclasses.replace(config, maps="annotation"), "train")
