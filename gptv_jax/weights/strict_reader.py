"""Tensors of other programs, of which none may be missing, misshapen or ignored."""

import pathlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from gptv_jax.errors import InputError, first_line, list_differences


class StrictReader:
    """Reads named tensors, and refuses any that is missing, misshapen or never asked for.

    Faults are collected, and `close` lists all of them in one error.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], get: Callable[[str], np.ndarray]):
        """Reads nothing yet.

        Args:
          shapes: shape of every tensor in the source, by name.
          get: reads the tensor of a name.
        """
        self.shapes, self._get = shapes, get
        self._expected: dict[str, tuple[int, ...]] = {}
        self._faults: list[str] = []

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> "StrictReader":
        """A reader of arrays that are in memory already."""
        return cls({name: array.shape for name, array in arrays.items()}, arrays.__getitem__)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

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
        if name in self and np.any(self.take(name, shape)):
            self._faults.append(f"{name} is not zero, and this network has no biases")

    def close(self, where: pathlib.Path, network: str = "an Image GPT") -> None:
        """Raises InputError where a tensor of `network` in `where` was faulty or never taken."""
        faults = list_differences(self._expected, self.shapes) + self._faults
        if faults:
            raise InputError(
                f"the weights in {where} are not those of {network}: {'; '.join(faults)}."
            )
