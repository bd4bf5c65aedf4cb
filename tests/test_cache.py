"""Token caches: what is written comes back, and training from one is training from the images."""

import dataclasses
import itertools
import json
import shlex

import numpy as np
import pytest
from conftest import encoded, make_folder, random_image

from gptv_jax import config as config_lib
from gptv_jax import tokens
from gptv_jax.config import fields
from gptv_jax.data import cache, pipeline, sources
from gptv_jax.data.damage import DamageLog
from gptv_jax.errors import InputError
from gptv_jax.stages import setup
from gptv_jax.tokens import Palette, palette

SIZE = 5  # 25 tokens: no whole number of bytes in a bit plane


def random_palette(colors: int, seed: int = 0) -> Palette:
    centers = np.random.default_rng(seed).uniform(-1, 1, (colors, 3)).astype(np.float32)
    return Palette(centers, {"seed": seed})


def make_codec(name: str, vocabulary: int, size: int = SIZE) -> tokens.Codec:
    if name == "grey":
        return tokens.make_codec(config_lib.Tokens("grey", levels=vocabulary), size)
    settings = config_lib.Tokens("palette", colors=vocabulary)
    return tokens.make_codec(settings, size, random_palette(vocabulary))


def settings_of(codec) -> config_lib.Tokens:
    if codec.definition:
        return config_lib.Tokens("palette", colors=codec.vocabulary)
    return config_lib.Tokens("grey", levels=codec.vocabulary)


def write(folder, codec, splits, transforms=(), classes=3):
    """Writes a token cache; `splits` maps a name to tokens [N, T] and labels [N] or None."""
    cache.claim(folder)
    header = {
        "source": {"name": "folder", "dir": None, "path": "/photos of mine"},
        "tokens": dataclasses.asdict(settings_of(codec)),
        "image_size": codec.image_shape[0],
        "transforms": transforms,
        "classes": classes,
    }
    examples = {}
    for name, (rows, labels) in splits.items():
        examples[name] = [{"tokens": row} for row in rows]
        for example, label in zip(examples[name], labels if classes else (), strict=bool(classes)):
            example["label"] = label
    cache.write(folder, codec, examples, header)
    return folder


def some_tokens(vocabulary: int, count: int, size: int = SIZE) -> np.ndarray:
    found = np.random.default_rng(0).integers(vocabulary, size=(count, size**2), dtype=np.int32)
    found[0] = vocabulary - 1
    found[1, :] = np.arange(size**2) % vocabulary
    return found


@pytest.mark.parametrize(
    ("name", "vocabulary"),
    [("grey", 2), ("grey", 17), ("grey", 256)]
    + [("palette", n) for n in (2, 256, 257, 512, 5000, 65536)],
)
def test_tokens_and_labels_are_read_as_they_were_written(tmp_path, name, vocabulary):
    codec, rows = make_codec(name, vocabulary), some_tokens(vocabulary, 21)
    labels = np.arange(21, dtype=np.int32) % 3
    folder = write(
        tmp_path / "cache", codec, {"train": (rows, labels), "test": (rows[:1], labels[:1])}
    )
    found = cache.TokenCache(folder)
    assert found.lengths == {"train": 21, "test": 1} and found.classes == 3
    for split, count in found.lengths.items():
        source = found.open(split)
        assert len(source) == count
        for i in (*range(count), 0):
            example = source[i]
            assert example["tokens"].dtype == np.uint16
            np.testing.assert_array_equal(example["tokens"], rows[i].reshape(SIZE, SIZE))
            assert example["label"] == labels[i] and example["label"].dtype == np.int32
    again = found.codec()
    assert (again.vocabulary, again.grid) == (codec.vocabulary, codec.grid)
    np.testing.assert_array_equal(again.decode(rows), codec.decode(rows))


def test_a_cache_of_unlabelled_images_has_no_labels(tmp_path):
    codec = make_codec("grey", 17)
    folder = write(tmp_path / "c", codec, {"train": (some_tokens(17, 4), None)}, classes=0)
    source = cache.TokenCache(folder).open("train")
    assert source[2].keys() == {"tokens"} and source.name(2) == f"{folder}/train[2]"
    data = config_lib.Data(name="tokens", path=str(folder))
    assert sources.open_source(data, "train[:50%]").classes == 0


def test_equal_tokens_are_written_as_equal_bytes(tmp_path):
    codec, rows = make_codec("palette", 300), some_tokens(300, 20)
    folders = [write(tmp_path / name, codec, {"train": (rows, None)}, classes=0) for name in "ab"]
    first, second = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert first == second


def test_images_of_cifar10_take_less_than_900_bytes_each(tmp_path, shared_data):
    colors = palette.load(shared_data / "igpt_palette" / "kmeans_centers.npy")
    codec = tokens.make_codec(config_lib.Tokens("palette"), 32, colors)
    folder = str(shared_data / "tfds")
    config = config_lib.Data(name="cifar10", dir=folder, eval_transforms=("decode()",))
    images = pipeline.images(config, "train[:1500]", DamageLog(config, None))
    rows = codec.encode(np.stack([element["image"] for element in images]))
    written = write(tmp_path / "cache", codec, {"train": (rows, None)}, classes=0)
    sizes = [path.stat().st_size for path in written.iterdir() if path.name != "palette.npz"]
    assert sum(sizes) / 1500 < 900
    source = cache.TokenCache(written).open("train")
    np.testing.assert_array_equal(source[1499]["tokens"].ravel(), rows[1499])


# Other formats, and damage.


@pytest.mark.parametrize("kind", ["grey", "palette", "learned"])
def test_a_cache_of_another_format_is_refused_with_the_command_that_makes_it_anew(tmp_path, kind):
    """A header as version 0.1.0 wrote it; test_prepare.py runs such a command."""
    header = {
        "format": 1,
        "lengths": {"train": 3},
        "source": {"name": "folder", "dir": None, "path": "/photos of mine"},
        "lexicon": None,
        "tokens": fields.flatten(config_lib.Tokens(kind, levels=9, colors=40)),
        "image_size": 8,
        "transforms": ["decode()", "resize(8)"],
        "classes": 3,
    }
    (tmp_path / "header.json").write_text(json.dumps(header))
    with pytest.raises(InputError, match=r"of format 1, but .* reads format 2") as error:
        cache.TokenCache(tmp_path)
    _, _, command = str(error.value).partition("python -m gptv_jax.prepare ")
    arguments = shlex.split(command)
    assert arguments[:2] == ["--config=FILE", f"--out={tmp_path}-new"]
    wanted = ["data.name=folder", "data.path=/photos of mine", "data.image_size=8"]
    wanted += ["data.eval_transforms=('decode()', 'resize(8)')", f"tokens.kind={kind}"]
    wanted += ["tokens.autoencoder.levels=(8, 8, 8, 8)"] if kind == "learned" else []
    wanted += {
        "grey": ["tokens.levels=9"],
        "palette": ["tokens.colors=40", f"tokens.palette={tmp_path}/palette.npz"],
        "learned": [f"tokens.tokenizer={tmp_path}/tokenizer.safetensors"],
    }[kind]
    assert {f"--config.{field}" for field in wanted} <= set(arguments[2:])


@pytest.fixture
def written(tmp_path):
    labels = np.arange(20, dtype=np.int32) % 3
    return write(
        tmp_path / "c", make_codec("palette", 300), {"train": (some_tokens(300, 20), labels)}
    )


def read_all(folder) -> list:
    source = cache.TokenCache(folder).open("train")
    return [(source[i]["tokens"].tobytes(), int(source[i]["label"])) for i in range(len(source))]


@pytest.mark.parametrize("change", ["cut", "empty", "text", "list", "binary", "field", "format"])
def test_a_damaged_header_is_an_error(written, change):
    path = written / "header.json"
    header = json.loads(path.read_text())
    contents = {
        "cut": path.read_bytes()[:100],
        "empty": b"",
        "text": b"hello",
        "list": b"[1, 2]",
        "binary": bytes(range(128, 256)),
        "field": json.dumps({k: v for k, v in header.items() if k != "tokens"}).encode(),
        "format": json.dumps(header | {"format": 99}).encode(),
    }
    path.write_bytes(contents[change])
    with pytest.raises(InputError, match=r"of format 99" if change == "format" else r"is damaged"):
        read_all(written)


@pytest.mark.parametrize("missing", ["header.json", "palette.npz", "train.array_record"])
def test_a_missing_file_is_an_error(written, missing):
    (written / missing).unlink()
    with pytest.raises(InputError) as error:
        read_all(written)
    assert str(written) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_file_is_no_token_cache(written):
    data = config_lib.Data(name="tokens", path=str(written / "train.array_record"))
    with pytest.raises(InputError, match=r"train.array_record is no token cache"):
        sources.open_source(data, "train")


@pytest.mark.parametrize("file", ["train.array_record", "palette.npz"])
def test_a_damaged_byte_is_an_error_and_never_other_tokens(written, file):
    """One byte at a time, of the bytes that are not padding; unread metadata may be anything."""
    path, wanted = written / file, read_all(written)
    colors = cache.TokenCache(written).codec().definition
    content, wrong = path.read_bytes(), set()
    places = np.flatnonzero(np.frombuffer(content, np.uint8))
    for place in places[:: max(len(places) // 300, 1)]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            same = cache.TokenCache(written).codec().definition.equivalent(colors)
            if read_all(written) != wanted or not same:
                wrong.add("other tokens")
        except InputError as error:
            assert len(str(error).splitlines()) == 1
        except Exception as error:  # each kind once, to see all of them
            wrong.add(f"{type(error).__name__}: {error}"[:80])
    assert not wrong


@pytest.mark.parametrize("file", ["train.array_record", "palette.npz"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_cut_file_is_an_error(written, file, share):
    content = (written / file).read_bytes()
    (written / file).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError) as error:
        read_all(written)
    assert str(written) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_folder_for_a_cache_is_new(tmp_path):
    cache.claim(tmp_path / "a" / "b")
    cache.claim(tmp_path / "a" / "b")  # still empty
    with pytest.raises(InputError, match=r"is not empty; name a new folder"):
        cache.claim(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written"):
        cache.claim(tmp_path / "file")


# Training from it.


def make_images(folder, size=8):
    files = {
        f"{name}/{i}.png": encoded(random_image(size, size, 3, seed=100 * k + i) // (k + 1))
        for k, name in enumerate("ab")
        for i in range(14)
    }
    return make_folder(folder, files)


def cached(tmp_path, config: config_lib.Config, codec) -> config_lib.Config:
    """The same configuration, to read the tokens that it makes."""
    splits = {}
    whole = dataclasses.replace(config.data, train_split="train")
    for split in sources.open_data_set(whole).lengths:
        elements = list(pipeline.images(whole, split, DamageLog(whole, None)))
        rows = np.stack([pipeline.to_tokens(codec, element) for element in elements])
        splits[split] = (rows, [element["label"] for element in elements])
    folder = write(tmp_path / "cache", codec, splits, config.data.eval_transforms, classes=2)
    data = dataclasses.replace(config.data, name="tokens", path=str(folder))
    return dataclasses.replace(config, data=data)


def configured(tmp_path, name, train=("decode()", "flip()"), evaluation=("decode()",)):
    channels = "decode()" if name == "palette" else "decode(channels=1)"
    train, evaluation = (
        tuple(entry.replace("decode()", channels) for entry in entries)
        for entries in (train, evaluation)
    )
    data = config_lib.Data(
        name="folder",
        path=str(make_images(tmp_path / "images")),
        train_split="train[:75%]",
        validation_split="train[75%:]",
        test_split="train",
        image_size=8,
        train_transforms=train,
        eval_transforms=evaluation,
    )
    settings = config_lib.Tokens(name, levels=256, colors=40)
    config = dataclasses.replace(config_lib.Config(), data=data, tokens=settings)
    colors = random_palette(40) if name == "palette" else None
    return config, tokens.make_codec(settings, 8, colors)


def batches(config, codec, position=0):
    data = pipeline.Pipeline(config.data, codec, seed=3)
    train = itertools.islice(data.train(6, position), 9)  # more than two epochs
    found = [*train, *data.evaluation("validation", 4), *data.evaluation("test", 6)]
    return [{k: (str(v.dtype), v.tolist()) for k, v in batch.items()} for batch in found]


@pytest.mark.parametrize(
    ("name", "train", "evaluation"),
    [
        ("grey", ("decode()", "shift(pixels=2, keep=0.2)", "flip()"), ("decode()",)),
        # Transforms of pixels that training and evaluation share are in the cache already.
        (
            "palette",
            ("decode()", "resize(8, method='nearest')", "random_crop(8, padding=1)", "flip()"),
            ("decode()", "resize(8, method='nearest')"),
        ),
        (
            "palette",
            ("decode()", "resize_short(12)", "center_crop(8)", "normalize()", "flip()"),
            ("decode()", "resize_short(12)", "center_crop(8)", "normalize()"),
        ),
    ],
)
def test_training_from_the_cache_is_training_from_the_images(tmp_path, name, train, evaluation):
    config, codec = configured(tmp_path, name, train, evaluation)
    from_cache = cached(tmp_path, config, codec)
    found = setup.find_codec(from_cache)
    assert found.vocabulary == codec.vocabulary
    assert batches(from_cache, found) == batches(config, codec)
    assert batches(from_cache, found, position=5)[:4] == batches(config, codec)[5:9]


def test_worker_processes_read_the_cache_alike(tmp_path):
    config, codec = configured(tmp_path, "palette")
    from_cache = cached(tmp_path, config, codec)
    data = dataclasses.replace(from_cache.data, workers=1)
    with_workers = dataclasses.replace(from_cache, data=data)
    found = itertools.islice(pipeline.Pipeline(with_workers.data, codec, 3).train(6), 3)
    wanted = itertools.islice(pipeline.Pipeline(from_cache.data, codec, 3).train(6), 3)
    for f, w in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(f["tokens"], w["tokens"])


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        ("tokens", {"kind": "grey"}, "tokens.kind is 'grey', expected 'palette'"),
        ("tokens", {"colors": 41}, "tokens.colors is 41, expected 40"),
        ("data", {"image_size": 16}, "data.image_size is 16, expected 8"),
        ("data", {"eval_transforms": ("decode()", "resize(8)")}, "data.eval_transforms is "),
    ],
)
def test_another_configuration_is_refused_with_what_differs(tmp_path, section, changes, named):
    config, codec = configured(tmp_path, "palette")
    from_cache = cached(tmp_path, config, codec)
    other = dataclasses.replace(getattr(from_cache, section), **changes)
    with pytest.raises(InputError) as error:
        setup.find_codec(dataclasses.replace(from_cache, **{section: other}))
    assert "made by another configuration" in str(error.value) and named in str(error.value)


# Whose palette.


def test_a_palette_is_built_where_there_is_none_and_is_the_same_every_time(tmp_path):
    config, _ = configured(tmp_path, "palette")
    assert setup.find_codec(config) is None
    first, again = (setup.build_codec(config, DamageLog(config.data, None)) for _ in range(2))
    assert first.definition.equivalent(again.definition) and first.vocabulary == 40
    assert first.definition.provenance["images"] == 21  # training images only
    run = tmp_path / "run"
    tokens.save_definition(first.definition, run)
    assert setup.find_codec(config, run).definition.equivalent(first.definition)


def test_palettes_that_differ_are_an_error_that_names_both(tmp_path):
    config, codec = configured(tmp_path, "palette")
    from_cache = cached(tmp_path, config, codec)
    random_palette(40).save(tmp_path / "same.npz")
    random_palette(40, seed=1).save(tmp_path / "other.npz")

    def given(name):
        return dataclasses.replace(config.tokens, palette=str(tmp_path / name))

    same = dataclasses.replace(from_cache, tokens=given("same.npz"))
    assert setup.find_codec(same).definition.equivalent(codec.definition)
    other = dataclasses.replace(from_cache, tokens=given("other.npz"))
    with pytest.raises(InputError, match=r"tokens.palette=.*other.npz is another one .*the token"):
        setup.find_codec(other)


def test_a_palette_of_grey_images_is_an_error(tmp_path):
    config, _ = configured(tmp_path, "palette", evaluation=("decode(channels=1)",))
    with pytest.raises(InputError, match=r"images have 1 channel"):
        setup.build_codec(config, DamageLog(config.data, None))


def test_a_palette_is_built_of_random_pixels_of_random_images_and_depends_on_the_seed(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(300, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", train_images=images)
    data = config_lib.Data(name="arrays", path=str(tmp_path / "set.npz"), validation_split="train")
    settings = config_lib.Config(data=data, tokens=config_lib.Tokens(kind="palette", colors=8))
    first, other = (
        setup.build_codec(dataclasses.replace(settings, seed=seed), DamageLog(data, None))
        for seed in (0, 1)
    )
    assert not first.definition.equivalent(other.definition)
    drawn = [
        e["image"].tobytes() for e in pipeline.images(data, "train", DamageLog(data, None), 20)
    ]
    assert len(set(drawn)) == 20 and drawn != [image.tobytes() for image in images[:20]]
