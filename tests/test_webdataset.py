"""WebDataset: image files in tar files."""

import io
import json
import pathlib
import pickle
import tarfile

import numpy as np
import pytest
from conftest import encoded, random_image

from gptv_jax import config as config_lib
from gptv_jax.data import cache, sources
from gptv_jax.errors import InputError

IMAGES = [encoded(random_image(8, 8, 3, seed=i)) for i in range(12)]


def write(path: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def shard(rows: range, labels: bool = True) -> dict[str, bytes]:
    members = {}
    for i in rows:
        members[f"set/{i:06}.png"] = IMAGES[i]
        members[f"set/{i:06}.seg.png"] = b"another file of the example"
        members[f"set/{i:06}.txt"] = b"a caption"
        members |= {f"set/{i:06}.cls": str(i % 3).encode()} if labels else {}
    return members


def open_set(path, split="train", **changes) -> sources.Selected:
    return sources.open_source(config_lib.Data(name="webdataset", path=str(path), **changes), split)


def test_examples_are_the_images_and_labels_of_all_shards(tmp_path):
    write(tmp_path / "train-000000.tar", shard(range(5)))
    write(tmp_path / "train-000001.tar", shard(range(5, 9)))
    write(tmp_path / "val-000000.tar", shard(range(9, 12)))
    for path in (tmp_path, tmp_path / "train-{000000..000001}.tar", tmp_path / "train-*.tar"):
        source = pickle.loads(pickle.dumps(open_set(path)))
        assert len(source) == 9 and source.classes == 3
        for i in np.random.default_rng(0).permutation(9).tolist():
            assert source[i] == {"encoded": IMAGES[i], "label": i % 3}
    assert source.name(6) == f"{tmp_path}/train-000001.tar:set/000006"
    assert [open_set(tmp_path, "validation")[i]["encoded"] for i in range(3)] == IMAGES[9:]
    assert open_set(tmp_path, labels=False)[2] == {"encoded": IMAGES[2]}
    (tmp_path / "classnames.txt").write_text("owl\nkingfisher bird\ndog\n")
    again = config_lib.Data(name="webdataset", path=str(tmp_path), image_size=9)  # not cached
    assert sources.open_source(again, "train").class_names == ("owl", "kingfisher bird", "dog")


def test_texts_and_json_are_labels(tmp_path):
    members = shard(range(4), labels=False)
    for i, name in enumerate(["dog", "cat", "cat", "dog"]):
        members[f"set/{i:06}.json"] = json.dumps({"label": name, "width": 8}).encode()
    source = open_set(write(tmp_path / "x.tar", members))
    assert source.class_names == ("cat", "dog")
    assert [source[i]["label"] for i in range(4)] == [1, 0, 0, 1]
    source = open_set(write(tmp_path / "y.tar", shard(range(4), labels=False)))
    assert source.classes == 0 and source[3] == {"encoded": IMAGES[3]}


def test_images_with_the_label_to_ignore_are_left_out(tmp_path):
    path = write(tmp_path / "x.tar", shard(range(6)) | {"set/000004.cls": b"255"})
    with pytest.raises(InputError, match=r"set config.data.ignore_label=255"):
        open_set(path)
    source = open_set(path, ignore_label=255)
    assert [source[i]["encoded"] for i in range(len(source))] == [*IMAGES[:4], IMAGES[5]]


def harmed(content: bytes, kind: str) -> bytes:
    if kind == "cut in an image":
        return content[: content.index(IMAGES[3]) + 50]
    if kind == "cut in a header":
        return content[: content.index(b"set/000003.png") + 100]
    place = content.index(b"set/000003.png")
    return content[:place] + b"\x07" * 512 + content[place + 512 :]  # a header


@pytest.mark.parametrize("kind", ["cut in an image", "cut in a header", "a harmed header"])
def test_a_broken_tar_file_is_named(tmp_path, kind):
    path = write(tmp_path / "x.tar", shard(range(5)))
    path.write_bytes(harmed(path.read_bytes(), kind))
    with pytest.raises(InputError, match=r"x.tar is damaged, compressed, or no tar file \("):
        open_set(path)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.txt": b"text"}, "has no image"),
        ({"a.png": IMAGES[0], "a.cls": b"0", "b.png": IMAGES[1]}, "no label .* in 1 of 2 rows"),
        ({"a.png": IMAGES[0], "a.json": b"{"}, "the label of a in .*x.tar is damaged"),
        ({"a.png": IMAGES[0], "a.json": b'{"label": [1, 2]}'}, "holds list; it must hold whole"),
    ],
)
def test_tar_files_that_are_no_data_set_are_an_error(tmp_path, members, words):
    with pytest.raises(InputError, match=words):
        open_set(write(tmp_path / "x.tar", members))


@pytest.mark.process
def test_shards_become_a_token_cache(command, tmp_path):
    write(
        tmp_path / "shards/train-000000.tar",
        shard(range(9)) | {"set/bad.png": b"", "set/bad.cls": b"0"},
    )
    write(tmp_path / "shards/test-000000.tar", shard(range(9, 12)))
    config = pathlib.Path(__file__).parent.parent / "configs" / "image_folder.py"
    data = {"name": "webdataset", "path": tmp_path / "shards", "image_size": 8}
    ended = command(
        "prepare",
        f"--config={config}",
        f"--out={tmp_path / 'cache'}",
        *(f"--config.data.{name}={value}" for name, value in data.items()),
        '--config.data.eval_transforms=("decode()","resize(8)")',
        "--config.data.max_damaged=0.5",
        "--config.tokens.colors=8",
    )
    assert ended.code == 0, ended.errors[-2000:]
    found = cache.TokenCache(tmp_path / "cache")
    assert found.lengths == {"train": 9, "test": 3} and found.classes == 3
    assert f"{tmp_path}/shards/train-000000.tar:set/bad is left out" in ended.errors
    codec, source = found.codec(), found.open("test")
    for i in range(3):
        pixels = np.asarray(random_image(8, 8, 3, seed=9 + i))
        wanted = codec.encode(pixels[None]).reshape(8, 8)
        np.testing.assert_array_equal(source[i]["tokens"], wanted)
        assert source[i]["label"] == (9 + i) % 3
