"""Data sets in one file, changed for `benchmarks/fuzz.py`: tar, Parquet, Arrow and NumPy files."""

import dataclasses
import io
import tarfile

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import ipc, parquet

from benchmarks.fuzz_cases import Subject
from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.data.damage import DecodedSource
from gptv_jax.data.images import Decode

KINDS = {"train.tar": "webdataset", "train.parquet": "parquet", "train.arrow": "parquet"}


@dataclasses.dataclass
class Tables(Subject):
    """Tar, Parquet and Arrow files of PNG files, whose checksums notice every change of a pixel."""

    def __post_init__(self):
        rng = np.random.default_rng(0)
        self.images, encoded = rng.integers(256, size=(4, 6, 8, 3), dtype=np.uint8), []
        for image in self.images:
            with io.BytesIO() as file:
                Image.fromarray(image).save(file, "PNG")
                encoded.append(file.getvalue())
        with io.BytesIO() as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for i, content in enumerate(encoded):
                    for ending, data in (("png", content), ("cls", str(i % 2).encode())):
                        told = tarfile.TarInfo(f"{i}.{ending}")
                        told.size = len(data)
                        tar.addfile(told, io.BytesIO(data))
            self.originals = {"train.tar": file.getvalue()}
        table = pyarrow.table({"image": encoded, "label": [0, 1, 0, 1]})
        with io.BytesIO() as file:
            parquet.write_table(table, file)
            self.originals["train.parquet"] = file.getvalue()
        with io.BytesIO() as file:
            with ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            self.originals["train.arrow"] = file.getvalue()

    def read(self, name, mutation, content):
        path = self.folder / name
        path.write_bytes(content)
        sources.open_data_set.cache_clear()
        data = config_lib.Data(
            name=KINDS[name], path=str(path), limits=config_lib.Limits(max_bytes=2**20)
        )
        decoded = DecodedSource(sources.open_source(data, "train"), Decode().within(data.limits))
        for index in range(min(len(decoded), 100)):
            record = decoded[index]
            if record["damaged"] < 0:
                same = (np.array_equal(record["image"], each) for each in self.images)
                assert any(same), "an image has changed"
