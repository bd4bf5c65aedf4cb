"""The real command that writes a token cache."""

import json
import pathlib
import shlex
import signal

import numpy as np
import pytest
from conftest import Ended, encoded, make_folder, random_image
from test_taught_cache import export

from gptv_jax import config as config_lib
from gptv_jax.data import cache, sources
from gptv_jax.data.teacher_draws import DRAWS
from gptv_jax.errors import InputError
from gptv_jax.tokens import PaletteCodec

pytestmark = pytest.mark.process

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


@pytest.fixture
def prepare(command):
    """`prepare(config, *arguments)` is the command, and gives `Ended`."""

    def call(config: str, *arguments: str) -> Ended:
        return command("prepare", f"--config={CONFIGS / config}", *arguments)

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 20, in files of several sizes; one of each cannot be read."""
    files = {
        f"{name}/{i}.png": encoded(random_image(20 + i, 40 - i, 3, seed=100 * k + i) // (k + 1))
        for k, name in enumerate(("light", "dark"))
        for i in range(20)
    }
    files |= {"light/text.jpg": b"this is text", "dark/empty.png": b""}
    return make_folder(tmp_path_factory.mktemp("images"), files)


def test_a_folder_of_images_becomes_a_cache_that_training_can_read(prepare, folder, tmp_path):
    out = tmp_path / "caches" / "mine"
    fields = ["image_size=16", 'eval_transforms=("decode()","resize(16)")']
    ended = prepare(
        "image_folder.py",
        f"--out={out}",
        f"--config.data.path={folder}",
        *(f"--config.data.{field}" for field in fields),
        "--config.tokens.colors=12",
        "--config.data.max_damaged=0.1",
    )
    assert ended.code == 0, ended.errors[-3000:]
    summary = json.loads(ended.output)
    assert summary["folder"] == str(out) and summary["damaged"] == 2
    assert summary["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert summary["train"]["images"] == 40 and summary["train"]["tokens_used"] == 12
    assert summary["train"]["mean_squared_error"] > 0
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {pathlib.Path(s["name"]).name for s in skipped} == {"text.jpg", "empty.png"}
    for line in skipped:
        assert ended.errors.count(line["name"]) == 1
    found = cache.TokenCache(out)
    assert found.lengths == {"train": 40} and found.classes == 2
    assert found.transforms == ("decode()", "resize(16)")
    codec, source = found.codec(), found.open("train")
    assert isinstance(codec, PaletteCodec) and codec.definition.provenance["method"]
    labels = [int(source[i]["label"]) for i in range(40)]
    assert sorted(labels) == [0] * 20 + [1] * 20
    tokens = np.stack([source[i]["tokens"].ravel() for i in range(40)]).astype(np.int32)
    brightness = codec.decode(tokens).mean(axis=(1, 2, 3))
    assert (brightness > 100).astype(int).tolist() == labels  # dark is 0, light is 1


def test_the_command_of_a_refused_cache_makes_one_of_the_very_images(command, tmp_path):
    """Digits, whose grey levels are lossless; the refused header is one of version 0.1.0."""
    header = {
        "format": 1,
        "lengths": {},
        "source": {"name": "digits", "dir": None, "path": None},
        "tokens": {"kind": "grey", "levels": 17},
        "image_size": 8,
        "transforms": [],
        "classes": 10,
    }
    old = tmp_path / "an old cache"
    old.mkdir()
    (old / "header.json").write_text(json.dumps(header))
    with pytest.raises(InputError) as error:
        cache.TokenCache(old)
    _, _, arguments = str(error.value).partition("python -m gptv_jax.prepare ")
    arguments = arguments.replace("=FILE ", f"={CONFIGS / 'digits.py'} ")
    ended = command("prepare", *shlex.split(arguments))
    assert ended.code == 0, ended.errors[-3000:]
    summary = json.loads(ended.output)
    assert summary["damaged"] == 0
    folder = pathlib.Path(summary["folder"])
    found, images = cache.TokenCache(folder), sources.digits()
    assert found.lengths == images.lengths and found.classes == 10
    for split, count in found.lengths.items():
        assert summary[split]["images"] == count and summary[split]["mean_squared_error"] == 0
        assert summary[split]["psnr"] is None
        source, wanted = found.open(split), images.open(split)
        for i in range(count):
            np.testing.assert_array_equal(source[i]["tokens"], wanted[i]["image"][..., 0])
            assert source[i]["label"] == wanted[i]["label"]
    config = config_lib.Data(name="tokens", path=str(folder))
    assert len(sources.open_source(config, "train[:50%]")) == 598


def assert_refused(ended: Ended, words: str) -> None:
    assert ended.code == 1 and ended.output == ""
    assert "Traceback" not in ended.errors
    (line,) = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    assert words in line


def test_an_out_folder_that_is_not_empty_is_refused_and_left_alone(prepare, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    assert_refused(prepare("digits.py", f"--out={tmp_path}"), "is not empty; name a new folder")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_out_folder_must_be_given(prepare):
    assert_refused(prepare("digits.py"), "--out must be given")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (['--config.data.eval_transforms=("decode()","flip()")'], "which is random"),
        (["--config.data.eval_transforms=('decode()','resize(8.5)')"], "resize(8.5)"),
    ],
)
def test_what_cannot_be_prepared_is_refused_in_one_sentence(
    prepare, folder, tmp_path, arguments, words
):
    given = [f"--out={tmp_path / 'cache'}", f"--config.data.path={folder}", *arguments]
    assert_refused(prepare("image_folder.py", *given), words)
    assert not list(tmp_path.glob("cache/*"))  # over which the mended command would stumble


# With a teacher.


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Random weights of a small network of digits."""
    folder = tmp_path_factory.mktemp("teacher")
    config = config_lib.Config(model=config_lib.Model(layers=1, width=16, heads=2))
    return export(folder / "teacher.safetensors", config)


def test_a_teacher_draws_ids_for_every_token_and_a_killed_command_continues(
    prepare, start, teacher, tmp_path
):
    given = [f"--teacher={teacher}", "--teacher_samples=300", "--teacher_temperature=2"]
    whole = prepare("digits.py", f"--out={tmp_path / 'whole'}", *given)
    assert whole.code == 0, whole.errors[-3000:]
    found = cache.TokenCache(tmp_path / "whole")
    assert (found.taught.samples, found.taught.temperature) == (300, 2.0)
    assert found.taught.names == (teacher,) and found.taught.distinct <= 17
    ids, counts = found.open("test")[0][DRAWS].padded(found.taught.distinct)
    assert ids.shape == (64, found.taught.distinct) and (counts.sum(axis=1) == 300).all()

    killed = tmp_path / "killed"
    arguments = [f"--config={CONFIGS / 'digits.py'}", f"--out={killed}", *given]
    process = start("prepare", *arguments)
    while not list(killed.glob(".drawn-*.npz")):
        assert process.poll() is None, process.errors[-3000:]
    process.send_to_all(signal.SIGKILL)
    process.wait()
    again = prepare("digits.py", f"--out={killed}", *given)
    assert again.code == 0, again.errors[-3000:]
    assert "draws of an earlier command" in again.errors
    first, second = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (tmp_path / "whole", killed)
    )
    assert first == second


def test_a_teacher_that_does_not_fit_is_refused_before_any_work(prepare, teacher, tmp_path):
    out = tmp_path / "cache"
    for more, words in (
        ([f"--teacher={teacher}", "--config.tokens.levels=18"], "has vocabulary 17, not 18"),
        (["--teacher=nowhere"], "--teacher=nowhere does not exist"),
        (["--teacher_samples=9"], "--teacher_samples is for --teacher"),
    ):
        assert_refused(prepare("digits.py", f"--out={out}", *more), words)
        assert not out.exists()
