"""Image files, changed for `benchmarks/fuzz.py`."""

import dataclasses
import io
import re
import struct
import zlib

import numpy as np
from PIL import Image

from benchmarks import fuzz_truth
from benchmarks.fuzz_cases import BYTES, Subject
from gptv_jax import config as config_lib
from gptv_jax.data.images import Animation, Decode, count_frames, load_image
from gptv_jax.data.orientation import shown_size

UNHARMED = ("metadata", "checked bits")  # mutations after which an accepted image is unchanged


def blocks(data: bytes) -> list[bytes]:
    """The parts of a PNG, JPEG or RIFF (WebP) file; the first is the signature."""
    if data.startswith(b"\x89PNG"):
        at, size = 8, lambda at: 12 + struct.unpack_from(">I", data, at)[0]
    elif data.startswith(b"RIFF"):
        at, size = 12, lambda at: 8 + (n := struct.unpack_from("<I", data, at + 4)[0]) + n % 2
    else:
        at = 2
        size = lambda at: (  # noqa: E731 - the scan is one part
            len(data) if data[at + 1] == 0xDA else 2 + struct.unpack_from(">H", data, at + 2)[0]
        )
    found = [data[:at]]
    while at < len(data):
        found.append(data[at : at + size(at)])
        at += len(found[-1])
    return found


def change_blocks(rng: np.random.Generator, data: bytes) -> bytes:
    """Drops, doubles, exchanges or changes a part; checksums of a PNG file are made right."""
    first, *parts = blocks(data)
    i, j = rng.integers(len(parts), size=2).tolist()
    match rng.integers(4):
        case 0:
            del parts[i]
        case 1:
            parts.insert(j, parts[i])
        case 2:
            parts[i], parts[j] = parts[j], parts[i]
        case 3:
            parts[i] = BYTES[("bits", "numbers")[rng.integers(2)]](rng, parts[i])
    return first + b"".join(map(with_sum, parts) if data.startswith(b"\x89PNG") else parts)


def with_sum(chunk: bytes) -> bytes:
    """A chunk of a PNG file with the right checksum."""
    return chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4])) if len(chunk) >= 12 else chunk


def change_metadata(rng: np.random.Generator, data: bytes) -> bytes:
    """Changes bytes of the EXIF data."""
    parts = blocks(data)
    i = next(i for i, each in enumerate(parts) if re.search(b"II\\*\0|MM\0\\*", each))
    start = re.search(b"II\\*\0|MM\0\\*", parts[i]).start()
    end = len(parts[i]) - 4 * data.startswith(b"\x89PNG")
    for _ in range(rng.integers(1, 9)):
        place = int(rng.integers(start, end))
        byte = int(rng.choice((0, 1, 6, 8, 255, rng.integers(256))))
        parts[i] = parts[i][:place] + bytes([byte]) + parts[i][place + 1 :]
    return b"".join([*parts[:i], with_sum(parts[i]), *parts[i + 1 :]])


def make_images() -> dict[str, bytes]:
    """Small image files of the formats and modes that Pillow writes."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(256, size=(5, 6, 3), dtype=np.uint8)).resize((24, 20))
    exif = photo.getexif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    frames = {"save_all": True, "append_images": [photo.rotate(90), photo.rotate(180)]}
    kinds = [
        ("PNG", "RGB", {"exif": exif}), ("PNG", "RGBA", {}), ("PNG", "P", {"transparency": 3}),
        ("PNG", "I;16", {}), ("PNG", "1", {}), ("PNG", "L", frames),
        ("JPEG", "RGB", {"exif": exif}),
        ("JPEG", "RGB", {"progressive": True}), ("JPEG", "CMYK", {}), ("JPEG", "L", {}),
        ("GIF", "P", {}), ("GIF", "RGB", frames), ("WEBP", "RGB", {"exif": exif}),
        ("WEBP", "RGBA", {"lossless": True}), ("WEBP", "RGB", frames), ("BMP", "RGB", {}),
        ("BMP", "P", {}), ("TIFF", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "L", {"compression": "tiff_adobe_deflate"}), ("TIFF", "F", {}),
        ("TIFF", "RGB", frames),
        ("TIFF", "RGB", {"compression": "jpeg"}), ("PPM", "RGB", {}), ("PPM", "L", {}),
        ("ICO", "RGBA", {}), ("TGA", "RGB", {"compression": "tga_rle"}), ("PCX", "P", {}),
        ("SGI", "RGB", {}), ("JPEG2000", "RGB", {}), ("AVIF", "RGB", {}), ("QOI", "RGB", {}),
        ("ICNS", "RGBA", {}), ("DDS", "RGBA", {}), ("MPO", "RGB", frames),
    ]  # fmt: skip
    found = {}
    Image.init()
    for form, mode, options in kinds:
        if form not in Image.SAVE:
            continue  # of an installed Pillow without this format
        shown = photo.convert("L") if mode in ("I;16", "F") else photo
        picture = Image.fromarray(np.asarray(shown, np.uint16) * 257) if mode == "I;16" else None
        with io.BytesIO() as file:
            (picture or shown.convert(mode)).save(file, form, **options)
            told = {"save_all": "frames", "progressive": "progressive", "lossless": "lossless"}
            told["compression"] = options.get("compression")
            words = [form, mode, *(told[key] for key in options if key in told)]
            found[" ".join(words)] = file.getvalue()
    return found


@dataclasses.dataclass
class Images(Subject):
    """Image files, read as training reads images, clips and sizes, with a limit of 2^20 pixels."""

    most_memory = 2**28  # 2^20 pixels need a tenth of it

    def __post_init__(self):
        self.originals = make_images()
        self.limits = config_lib.Limits(max_pixels=2**20, max_bytes=2**20)
        self.decode = Decode().within(self.limits)
        self.whole = {name: self.decode.pixels(data) for name, data in self.originals.items()}

    def mutations(self, name):
        known = dict(BYTES)
        if name.startswith(("PNG", "JPEG ", "WEBP")):
            known["parts"] = change_blocks
        if name in ("PNG RGB", "JPEG RGB", "WEBP RGB"):
            known["metadata"] = change_metadata
        if name.startswith("PNG"):
            known["checked bits"] = known.pop("bits")
        return known

    def read(self, name, mutation, content):
        shown_size(content, self.limits)
        if "frames" in name:
            with_frames = Animation(content, tuple(range(count_frames(content, self.limits))[:4]))
            assert len({frame.shape for frame in with_frames.decoded(self.decode)}) >= 1
        pixels = self.decode.pixels(content)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert pixels.shape[0] * pixels.shape[1] <= self.limits.max_pixels, "more pixels"
        path = self.folder / "image"
        path.write_bytes(content)
        assert np.array_equal(load_image(path, self.limits), pixels), "a file is read otherwise"
        if mutation == "cut":
            assert np.array_equal(pixels, self.whole[name]), "a part is not the whole"
        if mutation in UNHARMED:
            assert self.turned(pixels, self.whole[name]), "pixels have changed"
        with Image.open(io.BytesIO(content)) as image:
            assert image.format in Image.MIME or image.format in ("QOI", "DDS"), image.format
            assert self.turned(pixels, fuzz_truth.of_image(image)), f"other pixels, {image.mode}"
        if image.format == "PNG":
            truth = fuzz_truth.of_png(content)
            assert truth is None or self.turned(pixels, truth), "other pixels than the PNG file's"

    @staticmethod
    def turned(pixels: np.ndarray, truth: np.ndarray) -> bool:
        """Whether pixels are `truth`, float, up to rounding and one of the eight orientations."""
        turns = [np.rot90(each, k) for each in (pixels, pixels[:, ::-1]) for k in range(4)]
        alike = [each for each in turns if each.shape == truth.shape]
        return any(np.abs(each - truth.clip(0, 255)).max() <= 1.01 for each in alike)
