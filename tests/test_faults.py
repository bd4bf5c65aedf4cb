"""Every file that was once accepted, or refused too late, is refused at once, in one sentence."""

import contextlib
import importlib
import pathlib
import time
import tracemalloc

import pytest
from PIL import Image

import gptv_jax
from gptv_jax import files
from gptv_jax.config import Data, Limits
from gptv_jax.data import sources
from gptv_jax.data.images import Animation, Decode, count_frames
from gptv_jax.data.limits import DamagedImageError
from gptv_jax.errors import InputError
from gptv_jax.tokens import palette

FAULTS = pathlib.Path(__file__).parent / "faults"
SMALL, BYTE = Limits(max_pixels=1000), Limits(max_bits=8)
# A file, the limits it is read under, and words of the sentence.
IMAGES = {
    "large_tile.tif": (SMALL, "a tile of 512 x 512 pixels"),
    "six_samples.tif": (Limits(max_channels=3), "6 channels"),
    "repeated_scans.jpg": (Limits(max_work=20 * 12 * 30), "scans of 20 x 12 pixels"),
    "large_inside.ico": (Limits(), "9000 x 9000 pixels"),
    "large_bitmap_inside.ico": (Limits(), "9000 x 9000 pixels"),
    "large_inside.icns": (Limits(), "9000 x 9000 pixels"),
    "deep_colours.ppm": (BYTE, "16 bits"),
    "deep_colours.sgi": (BYTE, "16 bits"),
    "floats.pfm": (Limits(max_bits=16), "32 bits"),
    "doubles.fits": (Limits(), "64 bits"),
    "compressed.fits": (Limits(), "compressed FITS"),
    "checksum.png": (Limits(), "checksum of its part"),
    "no_palette.png": (Limits(), "palette is missing"),
    "cut_palette.pcx": (Limits(), "truncated"),
    "document.eps": (Limits(), "EPS is no picture"),
}
CLIPS = {
    "frames_of_a_large_canvas.gif": (Limits(), "40 frames of 8000 x 8000 pixels"),
    "frame_beyond_the_canvas.gif": (SMALL, "5000 x 5000 pixels"),
}
ARRAYS = {
    "long_shape.npy": "is cut short",
    "long_shape.npz": "is cut short",
    "large_inside.npz": "4800128 bytes; they may have 4194304",
}
TENSORS = ("long_header.safetensors", "long_shape.safetensors", "hole.safetensors")


@pytest.fixture(autouse=True)
def at_once():
    """No test takes a second or 8 MiB: nothing is decoded."""
    Image.init()  # which takes time once, as does pyarrow
    with contextlib.suppress(ImportError):
        importlib.import_module("pyarrow.parquet")
    tracemalloc.start()
    start = time.monotonic()
    yield
    seconds, (_, most) = time.monotonic() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1 and most < 2**23


def test_every_file_has_its_test():
    known = {"offset_beyond_the_file.arrow", *IMAGES, *CLIPS, *ARRAYS, *TENSORS}
    assert {path.name for path in FAULTS.iterdir()} == known


def test_an_arrow_file_whose_rows_lie_outside_does_not_end_the_process():
    pytest.importorskip("pyarrow")
    path = FAULTS / "offset_beyond_the_file.arrow"
    source = sources.open_source(Data(name="parquet", path=str(path)), "train")
    for index in range(len(source)):
        with pytest.raises(DamagedImageError, match="out of bounds"):
            source[index]


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_refused_before_its_pixels_are_decoded(name):
    limits, words = IMAGES[name]
    with pytest.raises(ValueError, match=words) as error:
        gptv_jax.load_image(FAULTS / name, limits)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_refused_before_its_pixels_are_decoded(name):
    limits, words = CLIPS[name]
    content = (FAULTS / name).read_bytes()
    with pytest.raises(DamagedImageError, match=words):
        frames = tuple(range(count_frames(content, limits)))
        Animation(content, frames).decoded(Decode().within(limits))


@pytest.mark.parametrize("name", ARRAYS)
def test_a_palette_is_refused_before_memory_is_taken(name):
    with pytest.raises(InputError, match=ARRAYS[name]):
        palette.load(FAULTS / name)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_refused_before_memory_is_taken(name):
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        files.read_safetensors(FAULTS / name)
