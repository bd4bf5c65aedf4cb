"""Videos as folders of frames, animations, arrays and TFDS sets: which frames are a clip."""

import dataclasses
import io
import itertools
import json
import pathlib
import pickle
import struct

import numpy as np
import pytest
from conftest import encoded, generator, make_folder, random_image
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax.data import pipeline, sources
from gptv_jax.data.clips import Clips
from gptv_jax.data.damage import DamageLog, DecodedSource
from gptv_jax.data.images import DamagedImageError, Decode
from gptv_jax.errors import InputError

SIDE = 8


def values(numbers) -> list[np.ndarray]:
    """A frame of each number, all of whose values are 10 times the number."""
    return [np.full((SIDE, SIDE, 3), 10 * n, np.uint8) for n in numbers]


def frames(folder: str, numbers, name: str = "{}.png") -> dict[str, bytes]:
    pixels = values(numbers)
    return {f"{folder}/{name.format(n)}": encoded(p) for n, p in zip(numbers, pixels, strict=True)}


def animation(numbers, form: str = "GIF", **options) -> bytes:
    first, *rest = map(Image.fromarray, values(numbers))
    options |= {"lossless": True} if form == "WEBP" else {}
    with io.BytesIO() as file:
        first.save(file, form, save_all=True, append_images=rest, **options)
        return file.getvalue()


def settings(path, **changes) -> config_lib.Data:
    changes = {"frames": 3, "name": "folder", "image_size": SIDE} | changes
    return config_lib.Data(path=str(path), **changes)


def opened(path, split: str = "train", **changes) -> sources.Selected:
    sources.open_data_set.cache_clear()
    return sources.open_source(settings(path, **changes), split)


def numbers(source, index: int, rng=None) -> list[int]:
    """Of a clip of `values`, the number of every frame."""
    clip = DecodedSource(source, Decode()).read(index, rng)["image"]
    assert clip.shape[1:] == (SIDE, SIDE, 3)
    return (clip[:, 0, 0, 0] // 10).tolist()


def by_name(source) -> dict[str, int]:
    return {pathlib.Path(source.name(i)).name: i for i in range(len(source))}


@pytest.mark.parametrize(
    ("length", "count", "stride"), [(9, 3, 1), (9, 3, 2), (5, 5, 1), (9, 1, 4)]
)
def test_clips_begin_at_random_in_training_and_lie_in_the_middle_in_evaluation(
    length, count, stride
):
    clips = Clips(count, stride)
    drawn = np.array([clips.choose(length, generator(seed)) for seed in range(200)])
    assert (np.diff(drawn) == stride).all()
    assert set(drawn[:, 0].tolist()) == set(range(length - clips.span + 1))
    middle = clips.choose(length, None)
    before, after = middle[0], length - 1 - middle[-1]
    assert (np.diff(middle) == stride).all() and after - before in (0, 1)


@pytest.mark.parametrize(("count", "stride"), [(1, 1), (3, 1), (4, 2), (2, 5)])
def test_a_cover_has_every_two_frames_that_follow_one_another_in_any_clip(count, stride):
    clips = Clips(count, stride)
    for length in range(1, 25):
        possible = [clips.choose(length, generator(seed)) for seed in range(60)]
        wanted = {pair for clip in possible for pair in itertools.pairwise(clip)}
        covers = list(clips.cover(length))
        assert {n for clip in possible for n in clip} <= {n for clip in covers for n in clip}
        assert wanted <= {p for c in covers for p in itertools.pairwise(c)}


def test_a_folder_of_files_is_a_video_whose_frames_are_in_the_order_of_their_numbers(tmp_path):
    make_folder(tmp_path, frames("a", range(12)) | frames("b", range(5), "shot{}_1.png"))
    source = opened(tmp_path)
    assert source.classes == 0 and set(by_name(source)) == {"a", "b"}
    assert numbers(source, by_name(source)["a"]) == [4, 5, 6]
    assert numbers(source, by_name(source)["b"]) == [1, 2, 3]
    rng = generator(1)
    assert {tuple(numbers(source, by_name(source)["a"], rng)) for _ in range(60)} == {
        (n, n + 1, n + 2) for n in range(10)
    }
    assert numbers(opened(tmp_path, frame_stride=4), by_name(source)["a"]) == [1, 5, 9]


def test_splits_and_classes_are_folders_as_those_of_images(tmp_path):
    files = {}
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for kind in ("walk", "run"):
            for i in range(count):
                files |= frames(f"{split}/{kind}/{split[:2]}{i}", range(4))
    make_folder(tmp_path, files)
    for split, count in (("train", 3), ("validation", 1), ("test", 2)):
        source = opened(tmp_path, split)
        assert len(source) == 2 * count and source.class_names == ("run", "walk")
        for i in range(len(source)):
            assert f"/{source.class_names[source[i]['label']]}/" in source.name(i)
    source = opened(tmp_path / "train" / "run", split="train")
    assert source.classes == 0 and len(source) == 3


def test_a_csv_file_gives_the_labels_of_videos(tmp_path):
    make_folder(tmp_path, {k: v for i in range(6) for k, v in frames(f"v{i}", range(3)).items()})
    (tmp_path / "l.csv").write_text(
        "file,label\n" + "".join(f"v{i},{'ab'[i % 2]}\n" for i in range(6))
    )
    source = opened(tmp_path, labels_file=str(tmp_path / "l.csv"))
    assert source.class_names == ("a", "b")
    assert all(source[i]["label"] == int(source.name(i)[-1]) % 2 for i in range(6))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_a_video(tmp_path, form):
    ending = {"PNG": "png"}.get(form, form.lower())
    files = {f"{kind}/{i}.{ending}": animation(range(9), form) for kind in "ab" for i in range(2)}
    source = opened(make_folder(tmp_path, files), frame_stride=2)
    assert len(source) == 4 and source.class_names == ("a", "b")
    assert numbers(source, 0) == [2, 4, 6]
    rng = generator(2)
    assert len({tuple(numbers(source, 0, rng)) for _ in range(40)}) == 5


def test_an_ending_apng_is_a_video_and_previews_beside_frames_are_left_out(tmp_path, caplog):
    files = {"a.apng": animation(range(3), "PNG"), "b.apng": animation([5, 6, 7], "PNG")}
    source = opened(make_folder(tmp_path / "one", files))
    assert sorted(numbers(source, i) for i in range(2)) == [[0, 1, 2], [5, 6, 7]]
    files = frames("v", range(4)) | {"v/preview.gif": animation(range(2))} | frames("w", range(4))
    files |= {"cover.png": encoded(values([3])[0])}
    data_set = sources.open_data_set(settings(make_folder(tmp_path / "two", files)))
    assert data_set.lengths == {"train": 2}
    (note,) = [n for n in data_set.notes if "beside videos" in n]
    assert "preview.gif" in note and "cover.png" in note


def test_a_video_shorter_than_a_clip_repeats_its_last_frame_and_is_noted(tmp_path):
    files = frames("short", range(2)) | frames("long", range(9))
    files |= {"one.gif": animation([7])}
    data_set = sources.open_data_set(settings(make_folder(tmp_path, files), frames=4))
    source = opened(tmp_path, frames=4)
    at = by_name(source)
    assert numbers(source, at["short"]) == [0, 1, 1, 1] == numbers(source, at["short"], generator())
    assert numbers(source, at["one.gif"]) == [7, 7, 7, 7]
    (note,) = [n for n in data_set.notes if "last frame" in n]
    assert "2 videos" in note and "short 2" in note and "one.gif 1" in note and "long" not in note


def test_only_the_frames_of_a_clip_are_read(tmp_path):
    source = opened(make_folder(tmp_path, frames("v", range(9))))
    for n in (0, 1, 2, 6, 7, 8):
        (tmp_path / f"v/{n}.png").unlink()
    assert numbers(source, 0) == [3, 4, 5]


def test_a_damaged_frame_is_named_wherever_it_lies(tmp_path, caplog):
    files = frames("bad", range(25)) | {"bad/20.png": encoded(values([2])[0])[:45]}
    files |= frames("sizes", range(25)) | {"sizes/9.png": encoded(random_image(4, 6, 3))}
    files |= {k: v for i in range(10) for k, v in frames(f"good{i}", range(3)).items()}
    source = DecodedSource(opened(make_folder(tmp_path, files)), Decode())
    at = by_name(source)
    assert source[at["bad"]]["damaged"] == -1  # the clip in the middle is sound
    assert "truncated" in source.reason(at["bad"])
    assert "several sizes: 8 x 8, 6 x 4 pixels" in source.reason(at["sizes"])
    damaged = {int(source.read(at["bad"], generator(seed))["damaged"]) for seed in range(40)}
    assert damaged == {-1, at["bad"]}


def test_arrays_of_videos(tmp_path):
    videos = np.broadcast_to(np.arange(9, dtype=np.uint8)[:, None, None, None], (9, SIDE, SIDE, 3))
    videos = np.stack([videos * 10, videos * 10, videos * 10])
    path = tmp_path / "v.npz"
    np.savez(
        path,
        train_images=videos,
        train_labels=[0, 1, 0],
        test_images=videos[:, :2],
        test_labels=[1, 0, 0],
    )
    source = opened(path, name="arrays", frame_stride=2)
    assert [numbers(source, i) for i in range(3)] == [[2, 4, 6]] * 3
    assert [int(source[i]["label"]) for i in range(3)] == [0, 1, 0]
    rng = generator(3)
    assert {numbers(source, 0, rng)[1] for _ in range(60)} == {2, 3, 4, 5, 6}
    assert numbers(opened(path, "test", name="arrays"), 1) == [0, 1, 1]
    data_set = sources.open_data_set(settings(path, name="arrays"))
    assert any("last frame is repeated: those of test 2" in note for note in data_set.notes)
    for changes, array, words in (
        ({"frames": 0}, videos, "config.data.frames is 0"),
        ({}, videos[:, 0], "has images"),
        ({}, videos[..., 0], "videos\\[..., None\\]"),
        ({}, videos.transpose(0, 1, 4, 2, 3), "transpose\\(0, 1, 3, 4, 2\\)"),
    ):
        np.savez(path, train_images=array)
        with pytest.raises(InputError, match=words):
            opened(path, name="arrays", **changes)


def test_folders_of_images_and_of_videos_are_told_apart_by_frames(tmp_path):
    make_folder(tmp_path, frames("a", range(3)) | frames("b", range(3)))
    assert len(opened(tmp_path, frames=0)) == 6 and len(opened(tmp_path)) == 2
    make_folder(tmp_path / "files", {"a/b.mp4": b"", "a/c.avi": b""})
    with pytest.raises(InputError, match=r"prepare --videos=FOLDER"):
        opened(tmp_path / "files")


def video_set(folder, lengths) -> config_lib.Data:
    """A TFDS set of one feature of type Video, whose frame k of video n is of value 10 k."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder.mkdir()
    label = tfds.features.ClassLabel(names=["cat", "bee"])
    tfds.features.FeaturesDict({"label": label}).save_config(folder)
    path = folder / "features.json"
    content = json.loads(path.read_text())
    video = {"shape": {"dimensions": ["-1", str(SIDE), str(SIDE), "3"]}, "dtype": "uint8"}
    module = "tensorflow_datasets.core.features.video_feature.Video"
    content["featuresDict"]["features"]["video"] = {
        "pythonClassName": module,
        "video": video | {"encodingFormat": "png"},
    }
    path.write_text(json.dumps(content))
    split = {"name": "train", "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
    split |= {"numBytes": "1", "shardLengths": [str(len(lengths))]}
    info = {"name": "clips", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    writer = ArrayRecordWriter(
        str(folder / "clips-train.array_record-00000-of-00001"), "group_size:1"
    )
    for n, length in enumerate(lengths):
        example = tf_example_pb2.Example()
        files = map(encoded, values(range(length)))
        example.features.feature["video"].bytes_list.value.extend(files)
        example.features.feature["label"].int64_list.value.append(n % 2)
        writer.write(example.SerializeToString())
    writer.close()
    return config_lib.Data(name="clips", dir=str(folder), frames=3, frame_stride=2)


def test_videos_of_tfds_are_read_without_tensorflow(tmp_path):
    data = video_set(tmp_path / "set", (9, 1, 0, 5))
    sources.open_data_set.cache_clear()
    source = sources.open_source(data, "train")
    assert source.class_names == ("cat", "bee")
    assert numbers(source, 0) == [2, 4, 6] and numbers(source, 1) == [0, 0, 0]
    assert [int(source[i]["label"]) for i in (0, 1, 3)] == [0, 1, 1]
    with pytest.raises(DamagedImageError, match="no frame"):
        source[2]
    with pytest.raises(InputError, match="has videos"):
        sources.open_data_set(dataclasses.replace(data, frames=0))
    whole = [file for record in source.every(0) for file in record["encoded"]]
    assert {*whole} == {*map(encoded, values(range(9)))}


def test_worker_processes_get_the_videos(tmp_path):
    files = {"a.gif": animation(range(20))} | frames("v", range(20))
    source = opened(make_folder(tmp_path, files))
    copy = pickle.loads(pickle.dumps(source))
    for index in range(2):
        assert numbers(copy, index, generator(1)) == numbers(source, index, generator(1))


def cuts(whole: bytes, count: int) -> list[bytes]:
    return [whole[: len(whole) * i // count] for i in range(count)]


def odd_animations() -> dict[str, bytes]:
    """Damaged and odd files of every kind that is read as a video."""
    noise = [random_image(12, 12, 3, seed=i) for i in range(4)]
    files = {}
    for form in ("gif", "webp", "apng"):
        with io.BytesIO() as file:
            first, *rest = map(Image.fromarray, noise)
            kind = "PNG" if form == "apng" else form.upper()
            first.save(file, kind, save_all=True, append_images=rest)
            whole = file.getvalue()
        files |= {f"cut{i}.{form}": part for i, part in enumerate(cuts(whole, 16))}
        for i in range(8):  # a byte changed
            at = len(whole) * (2 * i + 1) // 16
            files[f"flip{i}.{form}"] = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
        files |= {f"png.{form}": encoded(noise[0]), f"text.{form}": b"no picture"}
        files[f"twice.{form}"] = whole + whole
    huge = bytearray(animation(range(3)))
    huge[6:10] = struct.pack("<HH", 65535, 65535)
    apng = bytearray(animation(range(3), "PNG"))
    place = apng.index(b"acTL") + 4
    apng[place : place + 4] = struct.pack(">I", 2**31 - 1)
    ihdr = bytearray(animation(range(3), "PNG"))
    ihdr[16:24] = struct.pack(">II", 2**30, 2**30)
    files |= {"huge.gif": bytes(huge), "many.apng": bytes(apng), "huge.apng": bytes(ihdr)}
    files |= {"v_sizes/0.png": encoded(noise[0]), "v_sizes/1.png": encoded(noise[0][:6])}
    files |= {"v_empty/0.png": b"", "v_one/0.png": encoded(noise[0])}
    return files


def test_a_hundred_damaged_and_odd_files_never_end_a_run(tmp_path):
    files = odd_animations()
    assert len(files) >= 80
    good = {k: v for i in range(20) for k, v in frames(f"good{i}", range(5)).items()}
    make_folder(tmp_path / "data", files | good)
    sources.open_data_set.cache_clear()
    entries = ("decode()", f"resize({SIDE})")
    data = settings(
        tmp_path / "data", train_transforms=entries, eval_transforms=entries, max_damaged=1.0
    )
    log = DamageLog(data, tmp_path)
    clips = [r["image"] for r in pipeline.images(data, "train", log)]
    total = sources.open_data_set(data).lengths["train"]
    assert {clip.shape for clip in clips} == {(3, SIDE, SIDE, 3)}
    assert len(clips) + log.count == total and len(clips) >= 20 + 3 * 3
    names = " ".join(log.names)
    for name in ("cut0.gif", "cut9.webp", "cut9.apng", "text.gif", "huge.gif", "huge.apng"):
        assert name in names
    assert "v_sizes" in names and "v_empty" in names and "v_one" not in names
    reasons = [
        json.loads(line)["reason"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()
    ]
    assert all(reason and "could not be read before" not in reason for reason in reasons)
    run = pipeline.Pipeline(data, None, seed=0, folder=tmp_path / "other")
    (tmp_path / "other").mkdir()
    batches = run.train(40)
    assert all(next(batches)["image"].shape == (40, 3, SIDE, SIDE, 3) for _ in range(6))
