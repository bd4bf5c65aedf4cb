"""The pixels of an image file by NumPy alone, with which `fuzz_images.py` compares."""

import struct
import zlib

import numpy as np
from PIL import Image

SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG file's pixel, by its type of colour


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours [H, W, 3] of 0 to 255 over white, by their opacity [H, W] of 0 to 255, float."""
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def of_image(image: Image.Image) -> np.ndarray:
    """The colours [H, W, 3], float, of what Pillow has read, converted here and not by Pillow."""
    mode, clear = image.mode, image.info.get("transparency")
    values = np.asarray(image)
    if mode == "P":
        kind = image.palette.mode
        table = np.zeros((256, 4))
        table[:, 3] = 255
        colours = np.frombuffer(bytes(image.palette.palette), np.uint8).reshape(-1, len(kind))[:256]
        table[: len(colours), : len(kind)] = colours
        if isinstance(clear, bytes):
            table[: len(clear), 3] = list(clear)[:256]
        elif isinstance(clear, int):
            table[clear, 3] = 0
        return on_white(table[values][..., :3], table[values][..., 3])
    if mode == "CMYK":
        ink = 255 - values.astype(float)
        return ink[..., :3] * ink[..., 3:] / 255
    if mode in ("RGBA", "LA"):
        colours = values[..., :3] if mode == "RGBA" else np.repeat(values[..., :1], 3, axis=-1)
        return on_white(colours, values[..., -1])
    if mode == "1":
        values = values * 255
    elif mode == "F" or mode.startswith("I"):
        values = values.astype(float)
        whole = 65535 if mode.startswith("I") else 1
        white = next((w for w in (whole, 255, 65535) if values.max() <= w), 65535)
        values = values * (255 / white)
        if getattr(image, "tag_v2", {}).get(262) == 0:  # white is zero
            values = 255 - values
    colours = values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=-1)
    if clear is not None:  # one colour, or one grey
        hidden = (np.asarray(image) == np.asarray(clear)).reshape(*colours.shape[:2], -1).all(-1)
        colours = np.where(hidden[..., None], 255, colours)
    return colours


def of_png(content: bytes) -> np.ndarray | None:
    """The colours [H, W, 3], float, of a PNG file (ISO 15948); None: it is interlaced."""
    at, data, found = 8, b"", {}
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        if kind == b"IDAT":
            data += content[at + 8 : at + 8 + length]
        else:
            found[kind] = content[at + 8 : at + 8 + length]
        at += 12 + length
    width, height, bits, kind, *_, interlaced = struct.unpack(">2I5B", found[b"IHDR"][:13])
    if interlaced:
        return None
    samples = SAMPLES[kind]
    row, step = -(-width * samples * bits // 8), max(samples * bits // 8, 1)
    # Without the header and the sum of the compressed stream: readers of PNG, as libpng, take
    # pixels whose sum is wrong. Damage to a file is found by the sums of the file's parts.
    raw = np.frombuffer(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[2:]), np.uint8)
    lines = _unfiltered(raw[: height * (row + 1)].reshape(height, row + 1), step)
    if bits == 16:
        values = lines.reshape(height, -1, 2) @ np.array([256, 1])
    else:
        places = np.arange(8 - bits, -1, -bits)
        values = (lines[..., None] >> places & 2**bits - 1).reshape(height, -1)
    values = values[:, : width * samples].reshape(height, width, samples)
    clear = found.get(b"tRNS")
    if kind == 3:
        table = np.zeros((256, 4))
        table[:, 3] = 255
        colours = np.frombuffer(found[b"PLTE"], np.uint8).reshape(-1, 3)[:256]
        table[: len(colours), :3] = colours
        table[: len(clear or b""), 3] = list(clear or b"")[:256]
        return on_white(table[values[..., 0]][..., :3], table[values[..., 0]][..., 3])
    # Pillow has the upper 8 of the 16 bits of colours, and all of grey ones.
    deep = bits == 16 and samples > 1
    scaled = values >> 8 if deep else values * (255 / (2**bits - 1))
    if kind in (4, 6):
        return on_white(np.broadcast_to(scaled[..., :-1], (height, width, 3)), scaled[..., -1])
    if clear:
        hidden = (values == np.frombuffer(clear, ">u2")[:samples]).all(-1)
        scaled = np.where(hidden[..., None], 255, scaled)
    return np.broadcast_to(scaled, (height, width, 3))


def _unfiltered(lines: np.ndarray, step: int) -> np.ndarray:
    """The bytes [H, row] of filtered lines [H, 1 + row]; `step` bytes are a pixel's."""
    height, row = lines.shape[0], lines.shape[1] - 1
    found = np.zeros((height + 1, row + step), int)  # zeros above and to the left
    for y in range(height):
        kind, line = lines[y, 0], lines[y, 1:]
        for x in range(row):
            left, above, corner = found[y + 1, x], found[y, x + step], found[y, x]
            near = left + above - corner
            paeth = min((abs(near - left), 0, left), (abs(near - above), 1, above),
                        (abs(near - corner), 2, corner))[2]  # fmt: skip
            guess = (0, left, above, (left + above) // 2, paeth)[kind]
            found[y + 1, x + step] = (line[x] + guess) & 255
    return found[1:, step:].astype(np.uint8)
