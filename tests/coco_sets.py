"""Small COCO sets, for the tests of all that reads COCO files."""

import json

import numpy as np
from conftest import encoded, make_folder

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.data.coco import Coco

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "bee"}, {"id": 90, "name": "ant"}]
H, W = 30, 40
BOX = (4, 6, 10, 12)  # x, y, width, height


def picture(x: float, y: float, width: float, height: float, shape=(H, W)) -> np.ndarray:
    """Black pixels with a white rectangle."""
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[y : y + height, x : x + width] = 255
    return pixels


def annotation(number: int, image: int, **changes) -> dict:
    given = {"bbox": list(BOX), "category_id": 7, "iscrowd": 0, "area": 99.5}
    shape = {"segmentation": [[1.5, 2, 3e1, 4], [5, 6]]}
    return {"id": number, "image_id": image, **given, **shape, **changes}


def coco(count: int = 4, first: int = 1, images: tuple = (), annotations: tuple = ()) -> dict:
    """A COCO file of images first, first + 1, ... with one box each, and more entries."""
    numbers = range(first, first + count)
    own = [{"id": i, "file_name": f"{i:04d}.png", "height": H, "width": W} for i in numbers]
    boxes = [annotation(10 * i, i) for i in numbers]
    return {
        "info": {"description": 'a "segmentation": [1'},
        "images": [*own, *images],
        "annotations": [*boxes, *annotations],
        "categories": CATEGORIES,
    }


def write(root, files: dict[str, dict | str], folders: dict[str, range]):
    """JSON files by their paths, and image files 0001.png, ... in folders."""
    png = encoded(picture(*BOX))
    texts = {n: each if isinstance(each, str) else json.dumps(each) for n, each in files.items()}
    pictures = {f"{f}/{i:04d}.png": png for f, numbers in folders.items() for i in numbers}
    return make_folder(root, {n: text.encode() for n, text in texts.items()} | pictures)


def settings(path, **changes) -> config_lib.Data:
    given = {"eval_transforms": ("decode()",), "train_transforms": ("decode()",)}
    return config_lib.Data(name="coco", path=str(path), **given, **changes)


def opened(root, content: dict, count: int = 4, **changes) -> tuple[Coco, sources.Selected]:
    """A data set of one file, train, and `count` images."""
    write(root, {"train.json": content}, {"images": range(1, count + 1)})
    config = settings(root, **changes)
    sources.open_data_set.cache_clear()
    return sources.open_data_set(config), sources.open_source(config, "train")


def by_id(source: sources.Selected) -> dict[int, dict]:
    """The records without their pictures, by the ids of their images."""
    return {source.image_id(i): source.annotations(i) for i in range(len(source))}


def bounds(image: np.ndarray) -> list[int]:
    """The box around bright pixels."""
    rows, columns = (np.flatnonzero((image[..., 0] > 128).any(axis=axis)) for axis in (1, 0))
    return [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]


UNCHANGED = [[6, 4, 18, 14]]  # the boxes of an image of `coco`
