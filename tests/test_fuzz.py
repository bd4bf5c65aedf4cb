"""A short form of benchmarks/fuzz.py, and faults that the long form found; see also test_faults."""

import dataclasses
import io
import json
import struct

import numpy as np
import pytest
from conftest import encoded, random_image
from PIL import Image
from safetensors.numpy import save_file

from benchmarks import fuzz, fuzz_cases, fuzz_truth, fuzz_weights
from gptv_jax import config as config_lib
from gptv_jax import files, weights
from gptv_jax.config import run_file
from gptv_jax.data import coco_files, label_maps
from gptv_jax.data.images import Decode
from gptv_jax.data.limits import DamagedImageError
from gptv_jax.errors import InputError
from gptv_jax.tokens import palette

COUNTS = {"images": 300, "weights": 30, "texts": 60, "tables": 60}


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_files_are_refused_or_right(kind, tmp_path):
    subject = fuzz.SUBJECTS[kind](tmp_path)
    outcomes = fuzz.run(subject, COUNTS[kind], seed=1, memory=2**29, seconds=20.0)
    assert [each for each in outcomes if each.fault] == []
    verdicts = {each.verdict for each in outcomes}
    assert verdicts == {"refused", "accepted"} and len(outcomes) == COUNTS[kind]


@pytest.mark.parametrize("kind", fuzz.SUBJECTS)
def test_every_case_is_changed_and_drawn_again_alike(kind, tmp_path):
    subject = fuzz.SUBJECTS[kind](tmp_path)
    for number in range(200):
        name, mutation, content = fuzz.case(subject, 0, number)
        assert content != subject.originals[name]
        assert (name, mutation, content) == fuzz.case(subject, 0, number)


def test_the_truth_is_found_without_the_code_that_it_judges(tmp_path):
    """Of every original NumPy's pixels are those of `Decode`, and one other pixel is noticed."""
    subject = fuzz.Images(tmp_path)
    compared = 0
    for name, pixels in subject.whole.items():
        content = subject.originals[name]
        with Image.open(io.BytesIO(content)) as image:
            truths = [fuzz_truth.of_image(image)]
        truths += [fuzz_truth.of_png(content)] if name.startswith("PNG") else []
        other = pixels.copy()
        other[1, 2] ^= 8
        for truth in truths:
            compared += 1
            assert fuzz.Images.turned(pixels, truth) and not fuzz.Images.turned(other, truth), name
    assert compared >= len(subject.originals) + 6


class Broken(fuzz_cases.Subject):
    """A reader with a fault of each kind."""

    originals = {"a": b"1", "b": b"2"}  # noqa: RUF012

    def begin(self):
        """Reads nothing."""

    def mutated(self, rng):
        return "a", ("end", "hang", "memory", "crash", "wrong content")[rng.integers(5)], b""

    def read(self, name, mutation, content):
        import os
        import time

        match mutation:
            case "end":
                os.abort()
            case "hang":
                time.sleep(60)
            case "memory":
                np.zeros(2**31, np.uint8)
            case "crash":
                raise KeyError("a")
            case _:
                raise AssertionError("other")


def test_the_script_notices_every_fault_and_goes_on(tmp_path):
    outcomes = fuzz.run(Broken(tmp_path), 12, seed=0, memory=2**28, seconds=1.0)
    assert [each.verdict for each in outcomes] == [each.mutation for each in outcomes]
    assert len({each.verdict for each in outcomes}) == 5
    assert "| images | all | 12 | 0 | 0 | 12 |" in fuzz.table({"images": outcomes})


# The faults that were found.


def test_a_cut_pcx_file_does_not_come_out_grey():
    content = encoded(random_image(12, 20, 1), "PCX")
    with pytest.raises(DamagedImageError, match="truncated"):
        Decode().pixels(content[:-400])


@pytest.fixture
def own(tmp_path):
    """Rewrites the header of a file of weights: of the settings' names and values."""
    subject = fuzz_weights.Weights(tmp_path)

    def change(**changes):
        content = subject.originals["own"]
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        told = json.loads(header["__metadata__"]["gptv_jax"])
        for name, value in changes.items():
            section = told["model" if name == "class_tokens" else "tokens"]
            (told if name in told else section)[name] = value
        header["__metadata__"]["gptv_jax"] = json.dumps(told)
        text = json.dumps(header).encode()
        subject.own.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        return subject.own

    return change


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 10**6}, "1000000000000 positions"),  # gigabytes of attention mask
        ({"frames": 10**9}, "positions"),
        ({"kind": "grey", "patch": [1000, 1000], "levels": 256}, "describe no network"),
        ({"kind": "learned"}, "describe no network"),
        ({"class_tokens": 10}, "1 start vectors for 10 classes"),  # classes drew as others
    ],
)
def test_settings_beside_weights_that_do_not_fit_are_refused_before_memory_is_taken(
    own, changes, words
):
    with pytest.raises(InputError, match=words):
        weights.read(own(**changes))


@pytest.mark.parametrize("shape", [(10**12, 3), (10**9, 3), (10**30, 3)])
def test_an_array_longer_than_its_file_is_refused_before_memory_is_taken(tmp_path, shape):
    """Of an .npy file, and of a member of an .npz file."""
    path = tmp_path / "colours.npy"
    np.save(path, np.zeros((3, 3), np.float32))
    short = str((3, 3)).encode()
    content = path.read_bytes()
    line = content[10:128].replace(short, str(shape).encode()).strip().ljust(117) + b"\n"
    path.write_bytes(content[:10] + line + content[128:])
    with pytest.raises(InputError, match="is cut short"):
        palette.load(path)
    import zipfile

    with zipfile.ZipFile(tmp_path / "colours.npz", "w") as archive:
        archive.write(path, "centers.npy")
    with pytest.raises(InputError, match="is cut short"):
        palette.load(tmp_path / "colours.npz")


def test_a_header_that_begins_with_a_huge_length_takes_no_memory(tmp_path):
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    for length in (2**63, 2**40, 2**20):
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + content[8:])
        with pytest.raises(InputError, match=r"no \.safetensors file"):
            files.read_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 10**12]},
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 12]},
        {"dtype": "F64", "shape": [3], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [3], "data_offsets": [12, 0]},
        {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},  # bytes that are of no tensor
        {"dtype": "pickle", "shape": [3], "data_offsets": [0, 12]},
    ],
)
def test_tensors_that_do_not_fit_their_file_are_refused_before_memory_is_taken(tmp_path, entry):
    path, header = tmp_path / "a.safetensors", json.dumps({"a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        files.read_safetensors(path)


def test_deeply_nested_json_is_damaged(tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match="damaged"):
        run_file.config_of(tmp_path)
    (tmp_path / "instances.json").write_text('{"images": ' + "[" * 200_000)
    with pytest.raises(InputError, match="cannot be read as JSON"):
        coco_files.read(tmp_path / "instances.json")


def test_a_label_map_of_a_size_that_only_the_json_file_has_takes_no_memory(tmp_path):
    """Masks have the size in the JSON file, also where the image cannot be read."""
    from gptv_jax.data import sources

    pytest.importorskip("pycocotools")
    content = fuzz.Texts(tmp_path).originals["instances.json"]
    told = json.loads(content)
    for image in told["images"]:
        image["height"] = image["width"] = 10**6
        (tmp_path / image["file_name"]).write_bytes(b"no image")
    (tmp_path / "instances.json").write_text(json.dumps(told))
    data = config_lib.Data(name="coco", path=str(tmp_path / "instances.json"), images=".",
                           maps="semantic,masks")  # fmt: skip
    source = sources.open_source(data, "train")
    with pytest.raises(DamagedImageError, match="1000000 x 1000000 pixels"):
        source.annotations(0)


def test_a_value_too_large_for_any_label_map_is_one_sentence(tmp_path):
    data = config_lib.Data(name="folder", path=str(tmp_path), maps="maps", map_names="")
    for line in (f"{10**30} road,7 sky", f"1 2 {10**30} road,1 2 3 sky"):
        with pytest.raises(InputError, match="too large"):
            label_maps.read_table(dataclasses.replace(data, map_names=line))
