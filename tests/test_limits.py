"""The one policy of what an image may be: training, prepare and the Python interface alike."""

import dataclasses
import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from conftest import encoded, make_folder, random_image
from PIL import Image

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax.config import fields
from gptv_jax.data import pipeline, sources
from gptv_jax.data.damage import DecodedSource
from gptv_jax.data.images import Animation, Decode, count_frames
from gptv_jax.data.limits import DamagedImageError
from gptv_jax.errors import InputError

PHOTO = random_image(12, 20, 3)
DEEP = (random_image(12, 20) * np.uint16(257)).astype(np.uint16)
RGBA = random_image(12, 20, 4)
# A limit, a file that is outside, and one that is inside.
CASES = {
    "formats": (("PNG",), encoded(PHOTO, "JPEG"), encoded(PHOTO)),
    "max_bytes": (600, encoded(PHOTO), encoded(PHOTO[:4])),
    "max_pixels": (239, encoded(PHOTO), encoded(PHOTO[:, :19])),
    "max_side": (19, encoded(PHOTO), encoded(PHOTO[:, :19])),
    "min_side": (12, encoded(PHOTO[:11]), encoded(PHOTO)),
    "max_ratio": (1.7, encoded(PHOTO[:11]), encoded(PHOTO)),
    "max_channels": (3, encoded(RGBA), encoded(PHOTO)),
    "max_bits": (8, encoded(DEEP), encoded(PHOTO)),
}


def limits(name: str, value) -> config_lib.Limits:
    return config_lib.Limits(**{name: value})


@pytest.mark.parametrize("name", CASES)
def test_every_limit_holds_wherever_an_image_comes_from(name, tmp_path):
    """One sentence refuses a file outside in training and in Python; a file inside is taken."""
    value, outside, inside = CASES[name]
    given = limits(name, value)
    folder = make_folder(tmp_path, {"outside.png": outside, "inside.png": inside})
    assert gptv_jax.load_image(folder / "inside.png", given).dtype == np.uint8
    for source in (folder / "outside.png", str(folder / "outside.png"), outside):
        with pytest.raises(ValueError) as error:
            gptv_jax.load_image(source, given)
        words = str(error.value)
        assert len(words.splitlines()) == 1 and (name in words or name == "formats"), words
    data = config_lib.Data(name="folder", path=str(folder), labels=False, limits=given)
    decoded = pipeline.open_examples(data, "train", ("decode()",)).source
    damaged = [i for i in range(2) if decoded[i]["damaged"] >= 0]
    assert [decoded.name(i) for i in damaged] == [str(folder / "outside.png")]


def test_an_animation_may_have_so_many_frames():
    frames = [Image.fromarray(random_image(4, 4, 3, seed=i)) for i in range(5)]
    with io.BytesIO() as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
        content = file.getvalue()
    assert count_frames(content, limits("max_frames", 5)) == 5
    with pytest.raises(DamagedImageError, match="more than max_frames=4 frames"):
        count_frames(content, limits("max_frames", 4))


def test_arrays_and_open_images_are_checked_by_their_size():
    assert np.array_equal(gptv_jax.load_image(PHOTO), PHOTO)
    grey = gptv_jax.load_image(PHOTO[..., 0], channels=1)
    assert np.array_equal(grey[..., 0], PHOTO[..., 0])
    assert gptv_jax.load_image(Image.fromarray(PHOTO)).shape == PHOTO.shape
    assert gptv_jax.load_image(PHOTO[:1, :1]).shape == (1, 1, 3)  # an array may be small
    for source in (PHOTO, Image.fromarray(PHOTO)):
        with pytest.raises(ValueError, match="20 x 12 pixels are more than max_pixels=239"):
            gptv_jax.load_image(source, limits("max_pixels", 239))
    for wrong in (PHOTO.astype(float), PHOTO[0, 0], PHOTO[:0], PHOTO[None]):
        with pytest.raises(ValueError, match="give uint8"):
            gptv_jax.load_image(wrong)


def test_an_entrys_own_limits_take_over():
    decode = Decode(max_pixels=100, min_side=3).within(config_lib.Limits(max_pixels=10, max_side=9))
    assert decode.limits == config_lib.Limits(max_pixels=100, min_side=3, max_side=9)
    assert Decode().within(limits("max_ratio", 2.0)).limits.max_ratio == 2


def test_a_format_that_pillow_does_not_read_is_refused_before_any_work(tmp_path):
    make_folder(tmp_path, {"a.png": encoded(PHOTO)})
    data = config_lib.Data(name="folder", path=str(tmp_path), limits=limits("formats", ("XYZ",)))
    with pytest.raises(InputError, match=r"formats has XYZ.* it reads .*"):
        sources.open_data_set(data)
    with pytest.raises(InputError, match="in capitals"):
        flat = fields.flatten(config_lib.Limits()) | {"formats": ("png",)}
        fields.from_dict(config_lib.Limits, flat, "config.data.limits")


def test_documents_that_other_programs_draw_are_no_images():
    with io.BytesIO() as file:
        Image.fromarray(PHOTO).save(file, "EPS")
        content = file.getvalue()
    with pytest.raises(DamagedImageError, match="EPS is no picture"):
        Decode().pixels(content)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_among_the_files_does_not_stop_a_run(tmp_path):
    make_folder(tmp_path, {"a.png": encoded(PHOTO), "b.png": encoded(PHOTO)})
    os.mkfifo(tmp_path / "c.png")
    source = sources.open_source(config_lib.Data(name="folder", path=str(tmp_path)), "train")
    decoded = DecodedSource(source, Decode())
    reasons = [decoded.reason(i) for i in range(3) if decoded[i]["damaged"] >= 0]
    assert reasons == ["it is no regular file"]


def test_a_frame_larger_than_its_header_says_is_refused():
    """The second frame of a GIF file may lie outside the size that the file's header has."""
    frames = [Image.fromarray(random_image(8, 8, 1, seed=i)[..., 0]) for i in range(2)]
    with io.BytesIO() as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], optimize=False)
        content = bytearray(file.getvalue())
    second = content.rindex(b"\x2c\0\0\0\0" + struct.pack("<2H", 8, 8))
    content[second + 1 : second + 9] = struct.pack("<4H", 0, 0, 5000, 5000)
    start = time.monotonic()
    with pytest.raises(DamagedImageError, match="pixels are"):
        clip = Animation(bytes(content), (0, 1))
        clip.decoded(Decode().within(limits("max_pixels", 100)))
    assert time.monotonic() - start < 1


def test_every_changed_part_of_a_png_files_pixels_is_found():
    with io.BytesIO() as file:
        Image.fromarray(PHOTO).quantize(16).save(file, "PNG", transparency=3)
        content = file.getvalue()
    at, ends = 8, {}
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        at += 12 + length
        ends[kind] = at - 4  # of the chunk's own bytes
    for kind in (b"PLTE", b"tRNS", b"IDAT"):
        changed = bytearray(content)
        changed[ends[kind] - 1] ^= 1  # of IDAT a byte of zlib's own sum
        with pytest.raises(DamagedImageError, match=r"checksum of its part|not an image"):
            Decode().pixels(bytes(changed))


def test_an_icon_with_a_huge_image_inside_is_refused_at_once():
    """Pillow opens an ICO file by decoding it, under its own limit."""
    body = struct.pack(">2I5B", 2**15, 2**15, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(body)) + b"IHDR" + body
    png = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + bytes(30)
    icon = struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png
    start = time.monotonic()
    with pytest.raises(DamagedImageError):
        Decode().pixels(icon)
    assert time.monotonic() - start < 0.5


def test_the_limits_are_a_section_of_the_configuration():
    settings = config_lib.default()
    settings.data.limits.max_pixels = 1000
    assert config_lib.resolve(settings).data.limits.max_pixels == 1000
    settings.data.limits.max_pixels = 0
    with pytest.raises(InputError, match=r"config.data.limits.max_pixels is 0"):
        config_lib.resolve(settings)
    assert dataclasses.asdict(config_lib.Limits()) == dataclasses.asdict(gptv_jax.Limits())
