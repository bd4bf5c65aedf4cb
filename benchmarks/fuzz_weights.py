"""Files of weights and palettes, changed for `benchmarks/fuzz.py`."""

import dataclasses
import json
import struct

import jax
import ml_dtypes
import numpy as np

from benchmarks.fuzz_cases import BYTES, Subject, change_values
from gptv_jax import config as config_lib
from gptv_jax import sharding, weights
from gptv_jax.tokens import Palette
from gptv_jax.tokens import palette as palettes
from gptv_jax.weights import huggingface, native

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
