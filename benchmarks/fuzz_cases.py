"""The files that `benchmarks/fuzz.py` changes, the mutations, and what accepted files must hold."""

import dataclasses
import io
import json
import pathlib
import re
import struct
import zlib
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
from PIL import Image, ImageOps

from gptv_jax import config as config_lib
from gptv_jax import sharding, weights
from gptv_jax.data.images import Animation, Decode, count_frames, shown_size
from gptv_jax.tokens import Palette
from gptv_jax.tokens import palette as palettes
from gptv_jax.weights import huggingface, native

EXTREMES = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
NUMBERS = ("0", "-1", "1e999", "1e9", "99999999999999999999", "0.5", "NaN", "null", "true", '""')
NUMBERS += ("[]", "{}", '"\\ud800"', "16777216", "[[[[[[[[]]]]]]]]", "1000000", "-2147483649")
UNHARMED = ("metadata", "checked bits")  # mutations after which an accepted image is unchanged


def flip_bits(rng: np.random.Generator, data: bytes) -> bytes:
    """Changes 1 to 8 bits."""
    changed = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 9)).tolist():
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def change_header(rng: np.random.Generator, data: bytes) -> bytes:
    """Replaces 1 to 4 of the first 64 bytes."""
    changed = bytearray(data)
    for place in rng.integers(min(64, len(data)), size=rng.integers(1, 5)).tolist():
        changed[place] = int(rng.choice((0, 1, 127, 128, 255, rng.integers(256))))
    return bytes(changed)


def change_number(rng: np.random.Generator, data: bytes) -> bytes:
    """Writes an extreme number of 2 or 4 bytes, in either order, mostly near the beginning."""
    order, form = rng.choice(("<", ">")), rng.choice(("H", "I"))
    value = int(rng.choice(EXTREMES)) % (2**16 if form == "H" else 2**32)
    word = struct.pack(order + form, value)
    last = max(len(data) - len(word), 1)
    place = int(rng.integers(last if rng.random() < 0.5 else min(last, 128)))
    return data[:place] + word + data[place + len(word) :]


def cut(rng: np.random.Generator, data: bytes) -> bytes:
    """Keeps the beginning."""
    return data[: int(rng.integers(len(data)))]


def move(rng: np.random.Generator, data: bytes) -> bytes:
    """Removes, repeats or inserts a stretch of bytes."""
    start, end = sorted(rng.integers(len(data) + 1, size=2).tolist())
    stretch = data[start:end]
    middle = (b"", stretch * 2, rng.bytes(int(rng.integers(1, 64))) + stretch)[rng.integers(3)]
    return data[:start] + middle + data[end:]


BYTES = {"bits": flip_bits, "header": change_header, "numbers": change_number}
BYTES |= {"cut": cut, "moved bytes": move}


@dataclasses.dataclass
class Subject:
    """Files of one kind: the originals, the mutations of each, and how the files are read."""

    folder: pathlib.Path  # in which files may be written

    def begin(self) -> None:
        """Reads an original, so that what is loaded once is there before the limit of memory."""
        name = next(iter(self.originals))
        self.read(name, "none", self.originals[name])

    def mutations(self, name: str) -> dict[str, Callable]:
        """The mutations of an original by their names."""
        return BYTES

    def mutated(self, rng: np.random.Generator) -> tuple[str, str, bytes]:
        """An original's name, a mutation's name, and the changed content."""
        names = list(self.originals)
        name = names[rng.integers(len(names))]
        known = self.mutations(name)
        mutation = list(known)[rng.integers(len(known))]
        return name, mutation, known[mutation](rng, self.originals[name])

    def read(self, name: str, mutation: str, content: bytes) -> None:
        """Reads a file: InputError, DamagedImageError, or AssertionError: its content is wrong."""
        raise NotImplementedError


# Images


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
        if mutation == "cut":
            assert np.array_equal(pixels, self.whole[name]), "a part is not the whole"
        if mutation in UNHARMED:
            turned = [np.rot90(each, k) for each in (pixels, pixels[:, ::-1]) for k in range(4)]
            same = (np.array_equal(each, self.whole[name]) for each in turned)
            assert any(same), "pixels have changed"
        with Image.open(io.BytesIO(content)) as image:  # by Pillow alone
            assert image.format in Image.MIME or image.format in ("QOI", "DDS"), image.format
            if image.mode in ("RGB", "L") and not image.info.get("transparency"):
                plain = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
                assert np.array_equal(pixels, plain), "Pillow alone gives other pixels"


# Weights

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}


def plain_tensors(content: bytes) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file, as the format's description says, in float32."""
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]])
        .reshape(entry["shape"])
        .astype(np.float32)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def change_words(rng: np.random.Generator, data: bytes) -> bytes:
    """Replaces a number, a name or a type in the header, whose length is made right."""
    (length,) = struct.unpack_from("<Q", data)
    header = change_values(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def change_values(rng: np.random.Generator, data: bytes) -> bytes:
    """Replaces 1 to 3 numbers or texts of a JSON text: by other numbers, or anything."""
    for _ in range(rng.integers(1, 4)):
        found = list(re.finditer(rb'-?\d+(\.\d+)?|"[^"\\]*"|\btrue\b|\bfalse\b|\bnull\b', data))
        if not found:
            return data
        place = found[rng.integers(len(found))]
        old = place[0].decode(errors="replace")
        whole = re.fullmatch(r"-?\d{1,9}", old)
        match rng.integers(3):
            case 0 if whole:
                factor = int(rng.choice((2, 10, 10**4, 10**8)))
                new = str(rng.choice((int(old) + 1, int(old) - 1, -int(old), int(old) * factor)))
            case 1:  # the value of another place
                new = found[rng.integers(len(found))][0].decode(errors="replace")
            case _:
                new = str(rng.choice((*NUMBERS, '"F64"', '"x"', old * 3)))
        data = data[: place.start()] + new.encode() + data[place.end() :]
    return data


@dataclasses.dataclass
class Weights(Subject):
    """A file of this project with a palette, a folder of Hugging Face's, and a palette's .npz."""

    def __post_init__(self):
        colours = np.random.default_rng(0).uniform(-1, 1, (8, 3)).astype(np.float32)
        self.colours = Palette(colours, {"by": "the generator"})
        described = native.WeightsFile(
            model=config_lib.Model(layers=1, width=8, heads=2),
            tokens=config_lib.Tokens(kind="palette", colors=8),
            image_size=4,
            params={},
            definition=self.colours,
        )
        with jax.set_mesh(sharding.make_mesh(config_lib.Mesh())):
            shapes = sharding.by_name(sharding.abstract(described.network.init))
        rng = np.random.default_rng(0)
        params = {n: rng.normal(size=x.shape).astype(np.float32) for n, x in shapes.items()}
        described = dataclasses.replace(described, params=params)
        self.own, self.other = self.folder / "own.safetensors", self.folder / "huggingface"
        self.palette = self.folder / "palette.npz"
        native.write(described, self.own)
        huggingface.write(described, self.other, "generation")
        described.definition.save(self.palette)
        tensors = self.other / huggingface.WEIGHTS
        self.paths = {"own": self.own, "huggingface": tensors, "palette": self.palette}
        self.paths["config"] = self.other / "config.json"
        self.originals = {name: path.read_bytes() for name, path in self.paths.items()}

    def mutations(self, name):
        more = {"own": change_words, "huggingface": change_words, "config": change_values}
        return BYTES | ({"values": more[name]} if name in more else {})

    def read(self, name, mutation, content):
        self.paths[name].write_bytes(content)
        try:
            if name == "palette":  # a zip file, whose members have checksums
                same = palettes.load(self.palette).equivalent(self.colours)
                assert same, "colours have changed"
                return
            path = self.own if name == "own" else self.other
            found = weights.read(path)
            weights.read_definition(path)
            plain = plain_tensors(
                self.paths["huggingface" if name == "config" else name].read_bytes()
            )
            assert all(np.isfinite(array).all() for array in found.params.values())
            if name == "own":
                for tensor, array in found.params.items():
                    assert np.array_equal(array, plain[tensor]), f"{tensor} has changed"
            else:
                known = np.sort(np.concatenate([array.ravel() for array in plain.values()]))
                for tensor, array in found.params.items():
                    place = np.searchsorted(known, array.ravel()).clip(max=len(known) - 1)
                    assert (known[place] == array.ravel()).all(), f"{tensor} has other values"
        finally:
            self.paths[name].write_bytes(self.originals[name])
