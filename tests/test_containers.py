"""What is inside image files is held to the limits, wherever the files come from."""

import io
import os
import pathlib
import tarfile

import numpy as np
import pytest
from conftest import encoded, make_folder, random_image
from PIL import Image

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import tokens, validation
from gptv_jax.config import Limits
from gptv_jax.data import sources
from gptv_jax.data.damage import DecodedSource
from gptv_jax.data.images import Animation, Decode
from gptv_jax.data.limits import DamagedImageError, Rewritten, read
from gptv_jax.errors import InputError

PHOTO = random_image(12, 20, 3)
pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


@pytest.mark.parametrize("kind", ["ICO", "ICNS"])
def test_icons_within_the_limits_are_read(kind):
    """The limits are those of the pictures inside: all of them, the largest first."""
    content = saved(Image.fromarray(random_image(16, 16, 4)), kind)
    found = gptv_jax.load_image(content)
    side = len(found)
    assert np.array_equal(gptv_jax.load_image(content, Limits(max_side=side)), found)
    with pytest.raises(ValueError, match=f"{side} x {side} pixels are more than max_side"):
        gptv_jax.load_image(content, Limits(max_side=side - 1))


def test_ordinary_files_of_several_passes_are_read():
    """A strip may be larger than its image, a JPEG file may have scans for each colour."""
    photo = Image.fromarray(PHOTO)
    for content in (
        saved(photo, "JPEG", progressive=True),
        saved(photo.convert("CMYK"), "JPEG", progressive=True),
        saved(photo, "TIFF", compression="tiff_adobe_deflate", tiffinfo={278: 2**32 - 1}),
    ):
        assert gptv_jax.load_image(content, Limits(max_pixels=240)).shape == PHOTO.shape


def test_the_limits_of_a_process_are_not_changed():
    """An image above Pillow's own limit is read where the limits say so, and by no one else."""
    before = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = 50  # in place of an image of 180 million pixels
        content = encoded(PHOTO)
        assert np.array_equal(gptv_jax.load_image(content), PHOTO)
        with pytest.raises(ValueError, match="20 x 12 pixels are more than max_pixels=239"):
            gptv_jax.load_image(content, Limits(max_pixels=239))
        with pytest.raises(Image.DecompressionBombError):
            Image.open(io.BytesIO(content))
        assert Image.MAX_IMAGE_PIXELS == 50
    finally:
        Image.MAX_IMAGE_PIXELS = before


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_frames_are_counted_also_of_an_image(kind):
    frames = [Image.fromarray(random_image(8, 8, 3, seed=i)) for i in range(3)]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert gptv_jax.load_image(content, Limits(max_frames=3)).shape == (8, 8, 3)
    with pytest.raises(ValueError, match="more than max_frames=1 frames"):
        gptv_jax.load_image(content, Limits(max_frames=1))


def test_frames_come_in_the_order_that_is_asked_for():
    frames = [Image.fromarray(random_image(8, 8, 3, seed=i)) for i in range(4)]
    content = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    found = Animation(content, (3, 0, 3)).decoded(Decode())
    for pixels, number in zip(found, (3, 0, 3), strict=True):
        assert np.array_equal(pixels, np.asarray(frames[number]))
    with pytest.raises(DamagedImageError, match="4 frames of 8 x 8 pixels are more than max_work"):
        Animation(content, (3,)).decoded(Decode().within(Limits(max_work=255)))


def test_a_refused_format_is_named():
    with pytest.raises(ValueError, match="a file of the format PNG, and formats takes JPEG"):
        gptv_jax.load_image(encoded(PHOTO), Limits(formats=("JPEG",)))
    with pytest.raises(ValueError, match=r"formats has XYZ.* it reads .*PNG"):
        gptv_jax.load_image(encoded(PHOTO), Limits(formats=("XYZ",)))


def test_what_the_program_wrote_itself_has_any_format_and_length():
    content = encoded(PHOTO)
    given = Limits(formats=("JPEG",), max_bytes=10)
    assert np.array_equal(Decode().within(given).pixels(Rewritten(content)), PHOTO)
    with pytest.raises(DamagedImageError, match="max_bytes=10"):
        Decode().within(given).pixels(content)


def test_open_pictures_are_upright_and_whole():
    """As `tokenize` takes Pillow images: as `load_image` does."""
    codec = tokens.make_codec(config_lib.Tokens(kind="grey", levels=256), (12, 20), None)
    plane = random_image(12, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    content = saved(Image.fromarray(np.rot90(plane)), "PNG", exif=exif)
    found = validation.images([Image.open(io.BytesIO(content))], codec)
    assert np.array_equal(found[0, ..., 0], plane)
    assert np.array_equal(gptv_jax.load_image(content, channels=1)[..., 0], plane)
    with pytest.raises(InputError, match=r"an image cannot be read \(.*trunc"):
        validation.images([Image.open(io.BytesIO(content[:-60]))], codec)


def test_label_maps_have_any_format(tmp_path):
    """`formats` says what the images are; a JPEG file cannot be a label map."""
    plane = random_image(12, 20) % 2
    make_folder(tmp_path, {"a.jpg": encoded(PHOTO, "JPEG"), "maps/a.png": encoded(plane)})
    data = config_lib.Data(
        name="folder", path=str(tmp_path), images=".", maps="maps", map_names="no,yes",
        labels=False, limits=Limits(formats=("JPEG",)),
    )  # fmt: skip
    record = sources.open_source(data, "train")[0]
    assert np.array_equal(record["segmentation"], plane)


def test_no_more_is_read_than_the_limit_says(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(content := encoded(PHOTO))
    assert read(path, Limits()) == content and read(path, Limits(), 8, 4) == content[8:12]
    for most, start, count in ((100, 0, None), (100, 0, 101), (2**62, 8, 2**40)):
        with pytest.raises(DamagedImageError, match=r"more than max_bytes|become shorter"):
            read(path, Limits(max_bytes=most), start, count)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="a file that says 0 bytes")
def test_a_file_longer_than_its_size_is_refused():
    """As a file that grows while it is read."""
    with pytest.raises(DamagedImageError, match="grown"):
        read(pathlib.Path("/proc/self/status"), Limits())


@pipes
def test_pipes_stop_no_listing(tmp_path):
    frames = {f"v{i}/{j}.png": encoded(PHOTO) for i in range(2) for j in range(3)}
    make_folder(tmp_path / "videos", frames)
    os.mkfifo(tmp_path / "videos/v0/-.png")
    data = config_lib.Data(name="folder", path=str(tmp_path / "videos"), frames=2, labels=False)
    assert len(sources.open_source(data, "train")) == 2
    make_folder(tmp_path / "images", {"a.png": encoded(PHOTO)})
    os.mkfifo(tmp_path / "images/x.json")
    data = config_lib.Data(name="folder", path=str(tmp_path / "images"), labels=False)
    assert len(sources.open_source(data, "train")) == 1


def tar(path, members: dict[str, bytes | int]) -> None:
    """A tar file; a number is the length of a member of zeros, which takes no space on disk."""
    with path.open("wb") as file:
        for name, content in members.items():
            told = tarfile.TarInfo(name)
            told.size = content if isinstance(content, int) else len(content)
            file.write(told.tobuf(tarfile.GNU_FORMAT))
            if not isinstance(content, int):
                file.write(content)
            file.seek(-(-(file.tell() + told.size * isinstance(content, int)) // 512) * 512)
        file.write(bytes(1024))


def test_a_long_member_of_a_tar_file_is_not_read(tmp_path):
    tar(tmp_path / "train.tar", {"a.png": encoded(PHOTO), "b.png": 2**40})
    data = config_lib.Data(name="webdataset", path=str(tmp_path), labels=False)
    decoded = DecodedSource(sources.open_source(data, "train"), Decode())
    assert [decoded[i]["damaged"] >= 0 for i in range(2)] == [False, True]
    assert "1099511627776 bytes are more than max_bytes" in decoded.reason(1)
    tar(tmp_path / "train.tar", {"a.png": encoded(PHOTO), "a.cls": 2**40})
    with pytest.raises(InputError, match=r"label a\.cls .*bytes; it may have 1048576"):
        sources.open_source(config_lib.Data(name="webdataset", path=str(tmp_path)), "train")


@pytest.mark.parametrize("nested", [False, True])
def test_an_image_that_a_table_has_once_is_in_memory_once(nested, tmp_path):
    """A thousand rows of one image of a dictionary, as a column or as `datasets` writes it."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = encoded(random_image(60, 60, 3))
    column = pa.array([{"bytes": content}] * 1000 if nested else [content] * 1000)
    parquet.write_table(pa.table({"image": column}), tmp_path / "train.parquet")
    source = sources.open_source(
        config_lib.Data(name="parquet", path=str(tmp_path), labels=False), "train"
    )
    before = pa.total_allocated_bytes()
    assert source[7]["encoded"] == content and len(source) == 1000
    assert pa.total_allocated_bytes() - before < 20 * len(content)
