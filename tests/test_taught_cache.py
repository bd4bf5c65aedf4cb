"""Token caches with a teacher's draws: equal however they are interrupted, and read by runs."""

import dataclasses
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
from conftest import make_mesh, random_params

from gptv_jax import config as config_lib
from gptv_jax import sharding, tokens
from gptv_jax.data import cache, pipeline
from gptv_jax.data.teacher_draws import DRAWS
from gptv_jax.errors import InputError
from gptv_jax.stages import teacher_cache
from gptv_jax.tasks.network import network_of
from gptv_jax.weights import native

MODEL = config_lib.Model(layers=1, width=16, heads=2)
CONFIG = config_lib.Config(model=MODEL)  # digits: 8 x 8 pixels of 17 grey levels
SAMPLES, COUNT = 5, 2 * teacher_cache.PART + 10


def export(path: pathlib.Path, config: config_lib.Config, seed: int = 0, **facts) -> str:
    """Random weights of the config's network as a file; `facts` are fields of `WeightsFile`."""
    network = network_of(config)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = sharding.by_name(random_params(network, seed))
    known = {"image_size": config.data.image_size, "starts": network.starts}
    arrays = {name: np.asarray(leaf) for name, leaf in params.items()}
    found = native.WeightsFile(config.model, config.tokens, params=arrays, **known | facts)
    native.write(found, path)
    return str(path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A file of weights."""
    return export(tmp_path_factory.mktemp("teacher") / "teacher.safetensors", CONFIG)


@pytest.fixture
def codec():
    return tokens.codec_of(CONFIG)


def some_examples(count=COUNT):
    rng = np.random.default_rng(0)
    rows = rng.integers(17, size=(count, 64), dtype=np.int32)
    return [{"tokens": row, "label": np.int32(i % 10)} for i, row in enumerate(rows)]


def drawer(folder, teacher, codec, seed=0, rows=teacher_cache.ROWS) -> teacher_cache.Drawer:
    names = (teacher,)
    teachers, _ = teacher_cache.load(names, CONFIG, codec, 10)
    taught = teacher_cache.describe(names, teachers, SAMPLES, 1.0, seed)
    return teacher_cache.Drawer(teachers, taught, folder, rows)


def write(folder, made: teacher_cache.Drawer | None, codec, examples) -> None:
    """Makes a cache of a single split, or goes on making it; without a drawer no draws."""
    cache.claim(folder)
    header = {
        "source": {"name": "digits"},
        "tokens": dataclasses.asdict(CONFIG.tokens),
        "image_size": 8,
        "transforms": (),
        "classes": 10,
    }
    if made:
        header["teacher"], examples = made.taught, made.add("train", examples)
    cache.write(folder, codec, {"train": examples}, header)


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher):
    """A finished cache that nothing interrupted."""
    folder, codec = tmp_path_factory.mktemp("whole") / "cache", tokens.codec_of(CONFIG)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        write(folder, drawer(folder, teacher, codec), codec, some_examples())
    return folder


def test_a_cache_has_the_draws_of_its_teacher(whole, teacher, codec, one_device, tmp_path):
    found = cache.TokenCache(whole)
    assert found.taught.names == (teacher,) and found.taught.samples == SAMPLES
    made, source = drawer(tmp_path, teacher, codec), found.open("train")
    for i, example in enumerate(made.add("train", some_examples())):
        stored = source[i]
        np.testing.assert_array_equal(stored["tokens"].ravel(), example["tokens"])
        assert stored["label"] == example["label"]
        for name in ("distinct", "ids", "counts"):
            np.testing.assert_array_equal(
                getattr(stored[DRAWS], name), getattr(example[DRAWS], name)
            )
        assert stored[DRAWS].ids.dtype == stored[DRAWS].counts.dtype == np.uint8
    assert i == COUNT - 1 and made.found == 0
    largest = max(int(source[i][DRAWS].distinct.max()) for i in range(COUNT))
    assert found.taught.distinct == largest <= SAMPLES


def test_an_interrupted_cache_is_continued_to_equal_files(
    whole, teacher, codec, one_device, tmp_path
):
    folder = tmp_path / "cache"

    def until(count: int):
        yield from itertools.islice(some_examples(), count)
        raise KeyboardInterrupt

    for stop, before in ((teacher_cache.PART - 1, 0), (teacher_cache.PART + 1, 0), (COUNT - 1, 1)):
        made = drawer(folder, teacher, codec)
        with pytest.raises(KeyboardInterrupt):
            write(folder, made, codec, until(stop))
        assert made.found == before * teacher_cache.PART
        assert not (folder / "header.json").exists()
    made = drawer(folder, teacher, codec)
    write(folder, made, codec, some_examples())
    assert (made.found, made.drawn) == (2 * teacher_cache.PART, COUNT)
    assert content(folder) == content(whole)


@pytest.mark.parametrize("change", ["seed", "teacher", "tokens"])
def test_the_draws_of_another_command_are_not_taken(change, teacher, codec, one_device, tmp_path):
    folder = tmp_path / "cache"
    cache.claim(folder)
    examples = some_examples(teacher_cache.PART)
    first = drawer(folder, teacher, codec)
    before = [each[DRAWS] for each in first.add("train", examples)]
    if change == "tokens":
        examples = [each | {"tokens": 16 - each["tokens"]} for each in examples]
    other = export(tmp_path / "b.safetensors", CONFIG, seed=1) if change == "teacher" else teacher
    second = drawer(folder, other, codec, seed=int(change == "seed"))
    after = [each[DRAWS] for each in second.add("train", examples)]
    assert second.found == 0
    assert any(a.ids.tolist() != b.ids.tolist() for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("rows", [16, 256])
def test_draws_do_not_depend_on_the_batch(rows, teacher, codec, one_device, tmp_path):
    drawn = []
    for name, count in (("a", teacher_cache.ROWS), ("b", rows)):
        made = drawer(tmp_path / name, teacher, codec, rows=count)
        drawn.append([each[DRAWS] for each in made.add("train", some_examples(70))])
    for one, other in zip(*drawn, strict=True):
        np.testing.assert_array_equal(one.distinct, other.distinct)
        np.testing.assert_array_equal(one.ids, other.ids)


# What is refused.

OTHERS = {
    "levels": ({"tokens": config_lib.Tokens(levels=9)}, "vocabulary 9, not 17"),
    "size": ({"data": config_lib.Data(image_size=16)}, r"grid \(16, 16\), not \(8, 8\)"),
    "objective": (
        {"model": dataclasses.replace(MODEL, objective="bert")},
        "objective bert, not autoregressive",
    ),
    "classes": (
        {"model": dataclasses.replace(MODEL, class_tokens=3)},
        "3 class tokens for data with 10 classes",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_teacher_of_other_tokens_is_refused(name, codec, one_device, tmp_path):
    changes, words = OTHERS[name]
    other = export(tmp_path / "other.safetensors", dataclasses.replace(CONFIG, **changes))
    with pytest.raises(InputError, match=words):
        teacher_cache.load((other,), CONFIG, codec, 10)


def test_a_palette_is_taken_from_the_teacher_and_another_is_refused(one_device, tmp_path):
    settings = config_lib.Tokens(kind="palette", colors=6)
    config = dataclasses.replace(CONFIG, tokens=settings)
    own, other = (
        tokens.Palette(np.random.default_rng(i).uniform(-1, 1, (6, 3)).astype(np.float32), {})
        for i in range(2)
    )
    path = export(tmp_path / "colours.safetensors", config, definition=own)
    _, found = teacher_cache.load((path,), config, None, 10)
    assert found.definition.equivalent(own)
    with pytest.raises(InputError, match="has another palette or tokenizer; a teacher"):
        teacher_cache.load((path,), config, tokens.codec_of(config, other), 10)


def test_a_teacher_of_grey_levels_has_no_colours_for_a_cache(teacher, one_device):
    config = dataclasses.replace(CONFIG, tokens=config_lib.Tokens(kind="palette", colors=17))
    with pytest.raises(InputError, match="kind of tokens grey, not palette; a teacher"):
        teacher_cache.load((teacher,), config, None, 10)


def test_a_teacher_that_the_mesh_does_not_divide_is_refused(teacher, codec):
    heads = r"config\.model\.heads"
    with jax.set_mesh(make_mesh((1, 1, 4))), pytest.raises(InputError, match=heads):
        teacher_cache.load((teacher,), CONFIG, codec, 10)


# Batches.


def data_of(folder, **changes) -> config_lib.Data:
    splits = {"train_split": "train[:80%]", "validation_split": "train[80%:]"}
    splits |= {"test_split": "train"}
    return config_lib.Data(name="tokens", path=str(folder), **splits | changes)


def test_batches_have_ids_and_counts_where_they_are_asked_for(whole, codec):
    data = pipeline.Pipeline(data_of(whole), codec, seed=3)
    plain, taught = next(data.train(6)), next(data.train(6, taught=True))
    assert taught.keys() - plain.keys() == {"teacher_ids", "teacher_counts"}
    most = cache.TokenCache(whole).taught.distinct
    for name in ("teacher_ids", "teacher_counts"):
        assert taught[name].shape == (6, 64, most) and taught[name].dtype == np.uint8
    assert (taught["teacher_counts"].sum(axis=-1) == SAMPLES).all()
    source, rows = cache.TokenCache(whole).open("train"), {}
    for i in range(COUNT):
        rows[source[i]["tokens"].tobytes()] = source[i][DRAWS].padded(most)
    for row, ids, counts in zip(
        taught["tokens"], taught["teacher_ids"], taught["teacher_counts"], strict=True
    ):
        wanted = rows[row.astype(np.uint16).tobytes()]
        np.testing.assert_array_equal(ids, wanted[0])
        np.testing.assert_array_equal(counts, wanted[1])
    for key in plain:
        np.testing.assert_array_equal(plain[key], taught[key])


def test_draws_of_moved_tokens_and_draws_that_are_absent_are_refused(whole, codec, tmp_path):
    moved = pipeline.Pipeline(data_of(whole, train_transforms=("flip()",)), codec, 0)
    with pytest.raises(InputError, match=r"train_transforms has flip\(\); leave"):
        moved.train(6, taught=True)
    next(moved.train(6))  # without draws, tokens may be moved
    with pytest.raises(InputError, match=r"make a token cache by gptv_jax.prepare --teacher=RUN"):
        pipeline.Pipeline(config_lib.Data(), codec, 0).train(6, taught=True)


def test_a_damaged_description_of_the_draws_is_an_error(whole, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, each in content(whole).items():
        (folder / name).write_bytes(each)
    header = json.loads((folder / "header.json").read_text())
    del header["teacher"]["samples"]
    (folder / "header.json").write_text(json.dumps(header))
    with pytest.raises(InputError, match=r"header.json is damaged"):
        cache.TokenCache(folder)
