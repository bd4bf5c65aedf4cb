"""Configurations of runs and annotations of images, changed for `benchmarks/fuzz.py`."""

import contextlib
import csv
import dataclasses
import io
import json
import re

import numpy as np
from PIL import Image

from benchmarks.fuzz_cases import BYTES, Subject, change_values
from gptv_jax import config as config_lib
from gptv_jax.config import fields, run_file
from gptv_jax.data import label_maps, sources
from gptv_jax.data.damage import DecodedSource
from gptv_jax.data.images import Decode

SIDES = (12, 16)  # height and width of the images
NAMES = [f"{name}.png" for name in "abcdef"]


def change_whole(rng: np.random.Generator, data: bytes) -> bytes:
    """Replaces 1 to 3 whole numbers of a JSON text by others that are one greater."""
    for _ in range(rng.integers(1, 4)):
        places = list(re.finditer(rb"(?<=[ \[])\d{1,6}(?=[,\]}])", data))
        place = places[rng.integers(len(places))]
        data = data[: place.start()] + str(int(place[0]) + 1).encode() + data[place.end() :]
    return data


def change_lines(rng: np.random.Generator, data: bytes) -> bytes:
    """Drops, doubles, exchanges or changes lines and their separators."""
    lines = data.split(b"\n")
    i, j = rng.integers(len(lines), size=2).tolist()
    match rng.integers(5):
        case 0:
            del lines[i]
        case 1:
            lines.insert(j, lines[i])
        case 2:
            lines[i], lines[j] = lines[j], lines[i]
        case 3:
            lines[i] = re.sub(rb"\d+", lambda m: m[0] * int(rng.integers(1, 9)), lines[i])
        case 4:
            lines[i] = lines[i].replace(
                *((b",", b";"), (b" ", b"\t"), (b",", b"\x00"))[rng.integers(3)]
            )
    return b"\n".join(lines)


def make_coco() -> dict:
    """Objects with boxes, polygons and run lengths in six images."""
    height, width = SIDES
    images = [
        {"id": i + 1, "file_name": name, "height": height, "width": width}
        for i, name in enumerate(NAMES)
    ]
    rng, objects = np.random.default_rng(0), []
    for i in range(12):
        x, y = rng.integers(1, 8, size=2).tolist()
        shape = [[x, y, x + 4, y, x + 4, y + 3]]
        if i % 4 == 3:
            shape = {"size": [height, width], "counts": [y, 5, height * width - y - 5]}
        objects.append(
            {"id": i, "image_id": i % 6 + 1, "category_id": i % 3 + 1, "bbox": [x, y, 4.0, 3.0],
             "area": 12.0, "iscrowd": int(i % 4 == 3), "segmentation": shape}
        )  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "car"), start=1)]
    return {"images": images, "annotations": objects, "categories": categories}


@dataclasses.dataclass
class Texts(Subject):
    """A run's config.json, a COCO file, a table of classes of label maps, and a CSV of labels."""

    def __post_init__(self):
        rng = np.random.default_rng(0)
        for name in NAMES:
            Image.fromarray(rng.integers(256, size=(*SIDES, 3), dtype=np.uint8)).save(
                self.folder / name
            )
        config = {"config": fields.flatten(config_lib.Config())}
        colours = "".join(f"{70 * i} {i} 20 class {i}\n" for i in range(4))
        labels = "file,label\n" + "".join(f"{n},{i % 2}\n" for i, n in enumerate(NAMES))
        self.originals = {
            "config.json": json.dumps(config).encode(),
            "instances.json": json.dumps(make_coco()).encode(),
            "classes.txt": colours.encode(),
            "labels.csv": labels.encode(),
        }

    def mutations(self, name):
        more = change_values if name.endswith(".json") else change_lines
        greater = {"greater numbers": change_whole} if name.endswith(".json") else {}
        return BYTES | {"values": more, "more values": more} | greater

    def read(self, name, mutation, content):
        path = self.folder / name
        path.write_bytes(content)
        sources.open_data_set.cache_clear()
        try:
            {"config.json": self.config, "instances.json": self.coco, "classes.txt": self.classes,
             "labels.csv": self.labels}[name](content)  # fmt: skip
        finally:
            path.unlink()

    def config(self, content: bytes) -> None:
        """Every field has the value in the file, or its default where the file has none."""
        found, given = (
            fields.flatten(run_file.config_of(self.folder)),
            json.loads(content)["config"],
        )
        for name, value in given.items():
            value = tuple(value) if isinstance(value, list) else value
            assert found[name] == value and type(found[name]) in (type(value), float, tuple), name

    def coco(self, content: bytes) -> None:
        """Every box is one of the file's, clipped to its image, and has its class."""
        for maps in (None, "semantic,masks"):
            data = config_lib.Data(
                name="coco", path=str(self.folder / "instances.json"), images=".", maps=maps
            )
            data_set = sources.open_data_set(data)
            given = json.loads(content)
            for split in data_set.lengths:
                source = sources.Selected(data_set, split)
                decoded = DecodedSource(source, Decode())
                for index in range(len(source)):
                    record = decoded[index]
                    if record["damaged"] < 0:
                        self._check(record, source, index, given)

    def _check(self, record: dict, source: sources.Selected, index: int, given: dict) -> None:
        height, width = record["image"].shape[:2]
        most, boxes = np.array([height, width] * 2), record["boxes"]
        assert np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= most).all(), "outside"
        assert (boxes[:, 2:] > boxes[:, :2]).all() and np.isfinite(record["area"]).all(), "empty"
        number = source.image_id(index)
        own = [each for each in given["annotations"] if each.get("image_id") == number]
        for box, label in zip(boxes, record["box_labels"], strict=True):
            kind = source.object_ids[label]
            same = [each.get("bbox") for each in own if each.get("category_id") == kind]
            ends = []
            for each in same:
                with contextlib.suppress(TypeError, ValueError):  # another annotation is none
                    x, y, w, h = map(float, each)
                    ends.append(np.clip([y, x, y + h, x + w], 0, most))
            assert any(np.allclose(box, each, atol=1e-3) for each in ends), "a box has changed"
        for key in ("segmentation", "masks"):
            assert key not in record or record[key].shape[-2:] == (height, width), key

    def classes(self, content: bytes) -> None:
        """Every name and its colour or value stand in a line of the file."""
        where = str(self.folder / "classes.txt")
        table = label_maps.read_table(
            config_lib.Data(name="folder", path=str(self.folder), maps="maps", map_names=where)
        )
        assert len(set(table.keys)) == len(table.keys) == len(table.classes)
        assert set(table.classes) == set(range(len(table.names)))
        text = content.decode("utf-8-sig")
        for key, number in zip(table.keys, table.classes, strict=True):
            numbers = [str(key >> 16), str(key >> 8 & 255), str(key & 255)] if table.colors else []
            words = r"[\s,]+".join([*(f"0*{n}" for n in numbers), re.escape(table.names[number])])
            assert re.search(words, text), f"{table.names[number]} has changed"

    def labels(self, content: bytes) -> None:
        """Every image's class is the label of one of its rows."""
        data = config_lib.Data(
            name="folder", path=str(self.folder), labels_file=str(self.folder / "labels.csv")
        )
        source = sources.open_source(data, "train")
        if not source.classes:
            return
        rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"))))
        for index in range(len(source)):
            name, label = source.name(index).rpartition("/")[2], source[index]["label"]
            given = source.class_names[label]
            cells = [row for row in rows if any(name[:1] in cell for cell in row)]
            assert any(given in map(str.strip, row) for row in cells), f"{name} is not {given}"
