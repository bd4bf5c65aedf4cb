"""Image files of every kind to pixels, and the refusal of what is none."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from conftest import encoded, random_image
from PIL import Image

from gptv_jax.data.images import DamagedImageError, Decode

DECODE = Decode()


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(width: int, height: int, *, bits=8, color=0, rows=b"") -> bytes:
    """A PNG written by hand, for what Pillow does not write; rows without their filter bytes."""

    def chunk(kind, content):
        sum_ = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", sum_)

    stride = len(rows) // height
    lines = b"".join(
        b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height if rows else 0)
    )
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def smooth() -> np.ndarray:
    """An image that looks different in all eight orientations, and that JPEG hardly changes."""
    y, x = np.mgrid[:24, :40]
    return np.stack([x * 6, y * 10, (x + 2 * y) * 2], axis=-1).astype(np.uint8)


def assert_close(found, wanted, atol):
    assert found.dtype == np.uint8 and found.shape == wanted.shape
    np.testing.assert_allclose(found.astype(float), wanted, atol=atol)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda u: u),
        (2, lambda u: u[:, ::-1]),
        (3, lambda u: u[::-1, ::-1]),
        (4, lambda u: u[::-1]),
        (5, lambda u: u.swapaxes(0, 1)),
        (6, lambda u: np.rot90(u)),
        (7, lambda u: np.rot90(u, 2).swapaxes(0, 1)),
        (8, lambda u: np.rot90(u, -1)),
    ],
)
def test_the_orientation_in_the_exif_data_is_carried_out(orientation, turned, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    stored = np.ascontiguousarray(turned(smooth()))
    found = DECODE.pixels(encoded(stored, form, exif=exif, **options.get(form, {})))
    assert_close(found, smooth(), atol=12 if form == "JPEG" else 0)


@pytest.mark.parametrize("background", [0, 100, 255])
@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L", "RGB"])
def test_what_is_transparent_lies_on_the_background(mode, background):
    pixels = random_image(6, 10, {"LA": 2, "RGBA": 4, "L": 1, "P": 1, "RGB": 3}[mode])
    options = {}
    if mode in ("LA", "RGBA"):
        content, alpha = pixels[..., :-1], pixels[..., -1:] / 255
        image = Image.fromarray(pixels)
    elif mode == "P":
        palette = random_image(256, 3, seed=1)
        image = Image.fromarray(pixels[..., 0])
        image.putpalette(palette.tobytes())
        shares = random_image(256, seed=2)
        content, alpha = palette[pixels[..., 0]], shares[pixels] / 255
        options = {"transparency": shares.tobytes()}
    else:
        image = Image.fromarray(pixels.squeeze())
        clear = pixels[2, 3]
        content, alpha = pixels, (pixels != clear).any(axis=-1, keepdims=True)
        options = {"transparency": tuple(map(int, clear)) if mode == "RGB" else int(clear[0])}
    wanted = np.broadcast_to(content, (6, 10, 3)) * alpha + background * (1 - alpha)
    assert_close(Decode(background=background).pixels(saved(image, **options)), wanted, atol=1)


def test_grey_and_black_and_white_become_rgb_and_stay_grey():
    grey = random_image(6, 10, 1)
    np.testing.assert_array_equal(DECODE.pixels(encoded(grey)), np.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(Decode(channels=1).pixels(encoded(grey)), grey)
    bits = Image.fromarray(grey[..., 0] > 100)
    wanted = np.where(grey > 100, np.uint8(255), np.uint8(0))
    np.testing.assert_array_equal(Decode(channels=1).pixels(saved(bits)), wanted)


def test_one_channel_is_luminance():
    rgb = random_image(6, 10, 3)
    wanted = (rgb @ [0.299, 0.587, 0.114])[..., None]
    assert_close(Decode(channels=1).pixels(encoded(rgb)), wanted, atol=1)


def test_sixteen_bits_are_scaled_to_eight():
    deep = np.random.default_rng(0).integers(2**16, size=(6, 10, 3), dtype=np.uint16)
    deep[0, :2] = [[0], [65535]]
    grey = deep[..., :1]
    in_tiff, pgm = saved(Image.fromarray(grey[..., 0]), "TIFF"), b"P5 10 6 65535\n"
    in_png = png(10, 6, bits=16, rows=grey.astype(">u2").tobytes())
    for file in (in_tiff, in_png, pgm + grey.astype(">u2").tobytes()):
        assert_close(DECODE.pixels(file), np.repeat(grey, 3, axis=-1) / 257, atol=1)
    file = png(10, 6, bits=16, color=2, rows=deep.astype(">u2").tobytes())
    assert_close(DECODE.pixels(file), deep / 257, atol=1)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(form):
    frames = [Image.new("RGB", (10, 6), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    file = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(
        DECODE.pixels(file), np.broadcast_to(np.uint8([255, 0, 0]), (6, 10, 3))
    )


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 128, 255), (255, 255, 255), (0, 0, 0)])
def test_cmyk_becomes_rgb(color):
    file = saved(Image.new("RGB", (16, 16), color).convert("CMYK"), "JPEG", quality=95)
    assert_close(DECODE.pixels(file), np.broadcast_to(color, (16, 16, 3)), atol=4)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_broken_metadata_does_no_harm_to_the_pixels(form):
    broken = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x07\0\xff\xff\xff\xff"
    file = encoded(smooth(), form, exif=broken)
    np.testing.assert_array_equal(DECODE.pixels(file), DECODE.pixels(encoded(smooth(), form)))


JPEG, PNG = encoded(random_image(32, 32, 3), "JPEG"), encoded(random_image(32, 32, 3))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "empty"),
        (b"this is text, called .png\nand more of it\n", "not an image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
        (JPEG[:20], ""),
        (PNG[:20], ""),
        (PNG[:33], ""),
        (encoded(random_image(32, 32, 3), "WEBP")[:500], ""),
        (encoded(random_image(32, 32, 1), "GIF")[:500], ""),
        (PNG[:60] + bytes(400) + PNG[460:], ""),
        (bytes(1000), "not an image"),
        (encoded(random_image(1, 1, 3)), "1 x 1 pixels"),
        (encoded(random_image(1, 9, 3)), "9 x 1 pixels"),
        (png(50_000, 50_000), "50000 x 50000 pixels"),
        (png(10_000, 10_000), "10000 x 10000 pixels"),
        (png(2**13 + 1, 2**13), "8193 x 8192 pixels"),
    ],
)
def test_what_cannot_be_used_is_an_error_with_a_reason_of_one_line(file, reason):
    with pytest.raises(DamagedImageError) as error:
        DECODE.pixels(file)
    words = str(error.value)
    assert reason in words and words and len(words.splitlines()) == 1 and len(words) <= 200


@pytest.mark.parametrize("side", [10_000, 50_000])
def test_a_bomb_is_refused_before_it_is_unpacked(side):
    file = png(side, side, bits=1, rows=bytes(side // 8 * side if side < 20_000 else 0))
    start = time.monotonic()
    # Pillow's own memory is not in tracemalloc's books; it could not be had in this time either.
    with pytest.raises(DamagedImageError, match="pixels"):
        DECODE.pixels(file)
    assert time.monotonic() - start < 0.1


def test_the_limits_are_the_configs():
    file = encoded(random_image(6, 10, 3))
    assert Decode(max_pixels=60, min_side=6).pixels(file).shape == (6, 10, 3)
    for decode in (Decode(max_pixels=59), Decode(min_side=7)):
        with pytest.raises(DamagedImageError, match="10 x 6 pixels"):
            decode.pixels(file)


def test_real_photographs_are_decoded(shared_data):
    files = sorted((shared_data / "imagenet_sample_128").glob("*.jpg"))[::50]
    images = np.stack([DECODE.pixels(file.read_bytes()) for file in files])
    assert images.shape == (20, 128, 128, 3) and images.std() > 30


def test_a_long_thin_image_is_damaged_before_a_resize_blows_it_up():
    file = io.BytesIO()
    Image.new("RGB", (2, 60_000)).save(file, "PNG")
    with pytest.raises(DamagedImageError, match="max_ratio"):
        Decode().pixels(file.getvalue())


# Images of more than 8 bits: which value is white.

SHORT, TAGS = 3, {"<f4": 3, "<i4": 2, "<u4": 1, "<u2": 1, "<i2": 2}


def tiff(values: np.ndarray, **tags: int) -> bytes:
    """An uncompressed TIFF of one channel, written by hand, with whatever tags."""
    height, width = values.shape
    numbers = {"width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262}
    numbers |= {"offset": 273, "rows": 278, "count": 279, "max": 281, "format": 339}
    facts = {"width": width, "height": height, "bits": 8 * values.itemsize, "compression": 1}
    facts |= {"photometric": 1, "offset": 8, "rows": height, "count": values.nbytes}
    facts |= {"format": TAGS[values.dtype.str]} | tags
    entries = sorted((numbers[name], value) for name, value in facts.items())
    table = b"".join(struct.pack("<HHII", tag, SHORT, 1, value) for tag, value in entries)
    head = b"II*\0" + struct.pack("<I", 8 + values.nbytes)
    return head + values.tobytes() + struct.pack("<H", len(entries)) + table + bytes(4)


def ramp(kind: str, most: float, **changes) -> np.ndarray:
    """Values from 0 to `most`, with a fifth of it in the middle of the first row."""
    values = np.linspace(0, most, 60).reshape(6, 10)
    values[0, 5] = most / 5
    return values.astype(kind)


@pytest.mark.parametrize(
    ("kind", "most", "white"),
    [
        *(("<f4", 1, 1), ("<f4", 0.5, 1), ("<f4", 255, 255), ("<f4", 100, 255)),
        *(("<f4", 65535, 65535), ("<f4", 20000, 65535), ("<f4", 0, 1)),
        *(("<i4", 255, 255), ("<i4", 3, 255), ("<i4", 65535, 65535), ("<u4", 255, 255)),
        *(("<i2", 255, 255), ("<i2", 32767, 32767), ("<u2", 65535, 65535), ("<u2", 4095, 65535)),
    ],
)
def test_white_is_the_most_of_the_range_that_the_values_lie_in(kind, most, white):
    values = ramp(kind, most)
    for channels in (1, 3):
        found = Decode(channels=channels).pixels(tiff(values))
        wanted = np.rint(values.astype(float) * 255 / white)[..., None]
        assert_close(found, np.repeat(wanted, channels, axis=-1), atol=0.51)
    if most == white:
        assert found.min() == 0 and found.max() == 255 and found[0, 5, 0] == 51


def test_a_file_says_how_many_of_its_bits_are_used():
    values = ramp("<u2", 4095)
    wanted = np.repeat(np.rint(values / 4095 * 255)[..., None], 3, axis=-1)
    assert_close(DECODE.pixels(tiff(values, max=4095)), wanted, atol=0)
    # An image's own greatest value says nothing of other images.
    dark = Decode().pixels(tiff(values, max=3000))
    np.testing.assert_array_equal(dark, DECODE.pixels(tiff(values)))
    assert dark.max() == 16
    # 12 bits each, two values in three bytes.
    high, low = values.reshape(-1, 2).T
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=-1)
    packed = packed.astype(np.uint8).tobytes() + b"\0\0"  # 92 bytes: the file's 46 numbers
    stand_in = np.frombuffer(packed, "<u2").reshape(1, -1)
    facts = {"width": 10, "height": 6, "rows": 6, "count": 90, "bits": 12}
    assert_close(DECODE.pixels(tiff(stand_in, **facts)), wanted, atol=0)
    # A PGM says its greatest value in its header.
    pgm = b"P5 10 6 4095\n" + values.astype(">u2").tobytes()
    assert_close(DECODE.pixels(pgm), wanted, atol=1)


def test_maximum_says_what_is_white_whatever_the_file_says():
    for kind in ("<u2", "<i4", "<f4"):
        values = ramp(kind, 4095)
        wanted = np.repeat((values / 4095 * 255)[..., None], 3, axis=-1)
        assert_close(Decode(maximum=4095.0).pixels(tiff(values)), wanted, atol=0.51)
        clipped = Decode(maximum=819.0).pixels(tiff(values))
        assert clipped[0, 5, 0] == 255 and (clipped[2:] == 255).all()
    assert_close(
        Decode(maximum=1.0).pixels(tiff(ramp("<f4", 1.1)))[-1, -1], np.full(3, 255), atol=0
    )
    whole = ramp("<u4", 2.0**32 - 1)
    found = Decode(channels=1, maximum=2.0**32 - 1).pixels(tiff(whole))
    assert_close(found, whole[..., None] / 2**32 * 255, atol=1)
    # Of 8 bits: levels of 0 to 16 are scaled, and a maximum of 12 bits is not theirs.
    levels = random_image(6, 10, 1) % 17
    scaled = np.rint(levels / 16 * 255)
    assert_close(Decode(channels=1, maximum=16.0).pixels(encoded(levels)), scaled, atol=0)
    assert_close(Decode(channels=1, maximum=16.0).pixels(levels), scaled, atol=0)
    np.testing.assert_array_equal(
        Decode(channels=1, maximum=4095.0).pixels(encoded(levels)), levels
    )


def test_white_may_be_zero_and_a_deep_value_transparent_and_the_image_turned():
    values = ramp("<u2", 65535)
    inverse = np.repeat(255 - np.rint(values / 257)[..., None], 3, axis=-1)
    assert_close(DECODE.pixels(tiff(values, photometric=0)), inverse, atol=0)
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = DECODE.pixels(saved(Image.fromarray(values), exif=exif))
    np.testing.assert_array_equal(turned, DECODE.pixels(tiff(values))[::-1, ::-1])
    image = saved(Image.fromarray(values), transparency=int(values[0, 5]))
    found = Decode(background=2).pixels(image)
    assert found[0, 5].tolist() == [2] * 3 and (found == 2).all(axis=-1).sum() == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (ramp("<f4", 1.1), "0 to 1.1"),
        (ramp("<f4", 4095), "0 to 4095"),
        (ramp("<f4", 70000), "0 to 70000"),
        (ramp("<f4", 1) * 2 - 1, "-1 to 1"),
        (ramp("<i4", 4095), "0 to 4095"),
        (ramp("<i4", 255) - 100, "-100 to 155"),
        (ramp("<u4", 2.0**32 - 1), "0 to 4.29497e+09"),
        (np.where(ramp("<f4", 1) == 0, np.float32("nan"), ramp("<f4", 1)), "not finite"),
        (np.where(ramp("<f4", 1) == 0, np.float32("inf"), ramp("<f4", 1)), "not finite"),
    ],
)
def test_an_image_of_an_unknown_range_is_damaged_and_the_reason_has_the_cure(values, words):
    with pytest.raises(DamagedImageError) as error:
        DECODE.pixels(tiff(values))
    reason = str(error.value)
    assert words in reason and len(reason) <= 200
    assert "finite" in reason or "decode(maximum=...)" in reason


def test_deep_colours_have_no_maximum_since_pillow_reads_only_their_upper_bits():
    deep = np.arange(6 * 10 * 3) * 20
    file = png(10, 6, bits=16, color=2, rows=deep.astype(">u2").tobytes())
    assert_close(DECODE.pixels(file), deep.reshape(6, 10, 3) // 256, atol=0)
    with pytest.raises(DamagedImageError, match="upper 8 of the 16 bits"):
        Decode(maximum=4095.0).pixels(file)


# Other modes and several pages.


def test_lab_becomes_rgb():
    """Lab of D50, as in TIFF, to sRGB: CIE's formulas and Lindbloom's matrix.

    Little CMS, which converts, interpolates in a table, up to 5 of 255 beside dark values.
    """
    lab = np.array([[0, 0, 0], [255, 0, 0], [137, 0, 0], [133, -35, 19], [78, 28, -67]])
    y = (lab[:, 0] / 2.55 + 16) / 116
    cubes = np.stack([y + lab[:, 1] / 500, y, y - lab[:, 2] / 200], axis=-1)
    white = [0.96422, 1, 0.82521]
    xyz = white * np.where(cubes > 6 / 29, cubes**3, (116 * cubes - 16) * 27 / 24389)
    to_xyz = [
        *([0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169]),
        [0.0139322, 0.0971045, 0.7141733],
    ]
    linear = np.linalg.solve(to_xyz, xyz.T).T.clip(0, 1)
    rgb = 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    pixels = np.repeat((lab % 256).astype(np.uint8)[None], 4, axis=0)  # a and b are signed
    image = Image.frombytes("LAB", (5, 4), pixels.tobytes())
    assert_close(DECODE.pixels(saved(image, "TIFF")), np.repeat(rgb[None], 4, axis=0), atol=6)
    grey = (rgb @ [0.299, 0.587, 0.114])[None, :, None]
    assert_close(
        Decode(channels=1).pixels(saved(image, "TIFF")), np.repeat(grey, 4, axis=0), atol=6
    )


def test_indexed_colours_with_transparency_and_other_colour_spaces_become_rgb():
    rgb = np.broadcast_to(np.uint8([200, 60, 20]), (8, 8, 3))
    picture = Image.fromarray(np.ascontiguousarray(rgb))
    assert_close(DECODE.pixels(saved(picture.convert("YCbCr"), "TIFF")), rgb, atol=2)
    assert_close(DECODE.pixels(saved(picture.convert("CMYK"), "TIFF")), rgb, atol=2)
    # Pillow inverts Adobe's JPEGs of CMYK, which are stored as 255 - ink.
    assert_close(DECODE.pixels(saved(picture.convert("CMYK"), "JPEG", quality=95)), rgb, atol=4)
    indexed = Image.new("PA", (8, 8))
    indexed.putpalette([0, 0, 0, 200, 60, 20])
    indexed.putdata([(1, 255)] * 32 + [(1, 0)] * 32)
    found = Decode(background=10).pixels(saved(indexed, "TIFF"))
    assert_close(found[:4], rgb[:4], atol=0)
    assert (found[4:] == 10).all()


def test_of_a_file_of_several_pages_the_first_is_taken():
    first, second = Image.fromarray(ramp("<f4", 1)), Image.new("RGB", (7, 7), "red")
    file = saved(first, "TIFF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(DECODE.pixels(file), DECODE.pixels(saved(first, "TIFF")))
