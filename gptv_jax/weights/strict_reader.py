"""Tensors of other programs, of which none may be missing, misshapen or ignored."""

import pathlib
import re
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from gptv_jax import files
from gptv_jax.errors import InputError, first_line, list_differences, shorten
from gptv_jax.model import lpips


class StrictReader:
    """Reads named tensors, and refuses any that is missing, misshapen or never asked for.

    `shapes` has the shape of every tensor in the source, and `get` reads the tensor of a name.
    Faults are collected, and `close` lists all of them in one error.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], get: Callable[[str], np.ndarray]):
        self.shapes, self._get = shapes, get
        self._expected: dict[str, tuple[int, ...]] = {}
        self._faults: list[str] = []

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> "StrictReader":
        return cls({name: array.shape for name, array in arrays.items()}, arrays.__getitem__)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor in float32, or zeros that use no memory where `close` will raise."""
        self._expected[name] = shape
        if self.shapes.get(name) == shape:
            try:
                array = self._get(name)
            except Exception as error:  # libraries raise several types for damaged files
                self._faults.append(f"{name} cannot be read ({first_line(error)})")
            else:
                if jnp.issubdtype(array.dtype, jnp.floating):
                    return np.asarray(array, np.float32)
                self._faults.append(f"{name} is of type {array.dtype}, not floating-point")
        return np.broadcast_to(np.float32(0), shape)

    def stack(self, names: list[str], shape: tuple[int, ...], layer: tuple[int, ...]) -> np.ndarray:
        """Tensors of equal `shape` along a new first axis, each reshaped to `layer`."""
        if any(self.shapes.get(name) != shape for name in names):  # `close` will raise
            self._expected |= dict.fromkeys(names, shape)
            return np.broadcast_to(np.float32(0), (len(names), *layer))
        stacked = np.empty((len(names), *layer), np.float32)
        for i, name in enumerate(names):
            stacked[i] = self.take(name, shape).reshape(layer)
        return stacked

    def require_zeros(self, name: str, shape: tuple[int, ...]) -> None:
        """Takes a tensor that must be all zeros and may be missing."""
        if name in self.shapes and np.any(self.take(name, shape)):
            self._faults.append(f"{name} is not zero, and this network has no biases")

    def close(self, where: pathlib.Path, network: str = "an Image GPT") -> None:
        """Raises InputError where a tensor of `network` in `where` was faulty or never taken."""
        if faults := "; ".join(list_differences(self._expected, self.shapes) + self._faults):
            raise InputError(f"the weights in {where} are not those of {network}: {faults}.")


def read_state_dict(
    path: str | pathlib.Path, shapes: dict[str, tuple[int, ...]], network: str, ignored: str
) -> dict[str, np.ndarray]:
    """The tensors of `shapes`, in float32, from a .safetensors file with weights of `network`.

    The file may hold other tensors where the expression `ignored` matches a part of the name.
    InputError lists every tensor that is missing, left over or misshapen, or not finite.
    """
    path = files.user_path(path)
    arrays, _ = files.read_safetensors(path)
    reader = StrictReader.of_arrays({n: a for n, a in arrays.items() if not re.search(ignored, n)})
    found = {name: reader.take(name, shape) for name, shape in shapes.items()}
    reader.close(path, network)
    if bad := [name for name, array in found.items() if not np.isfinite(array).all()]:
        raise InputError(f"{path} holds values that are not finite, in {shorten(bad)}.")
    return found


def load_lpips(path: str | pathlib.Path) -> lpips.Weights:
    """Reads the state dict of `lpips.LPIPS(net="vgg")`, see `read_state_dict`."""
    # The state dict holds the linear layers twice, and constants that `model.lpips` has.
    return read_state_dict(path, lpips.shapes(), "LPIPS with VGG-16", r"^(lins|scaling_layer)\.")


def read_class_head(reader: StrictReader, name: str, width: int) -> dict[str, np.ndarray]:
    """The parameters of a class head that does not standardise its input, if `name` is there."""
    if name not in reader.shapes:
        return {}
    classes = reader.shapes[name][0] if reader.shapes[name] else 0
    return {
        "classifier.class_head": reader.take(name, (classes, width)),
        "classifier.class_center": np.zeros(width, np.float32),
        "classifier.class_scale": np.ones(width, np.float32),
    }
