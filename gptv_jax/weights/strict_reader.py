"""Tensors of other programs, of which none may be missing, misshapen or ignored."""

import pathlib
from collections.abc import Callable

import numpy as np

from gptv_jax import files
from gptv_jax.errors import InputError, first_line


class StrictReader:
    """Reads named tensors, and refuses any that is missing, misshapen or never asked for.

    Every tensor must be taken once. Faults are collected, and `close` lists all of them in one
    error.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], get: Callable[[str], np.ndarray]):
        """Reads nothing yet.

        Args:
          shapes: shape of every tensor in the source, by name.
          get: reads the tensor of a name.
        """
        self.shapes, self._get = shapes, get
        self._left, self._wrong = dict(shapes), []

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> "StrictReader":
        """A reader of arrays that are in memory already."""
        return cls({name: array.shape for name, array in arrays.items()}, arrays.__getitem__)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor in float32; zeros, which take no room, where `close` will refuse it."""
        array = self._taken(name, shape)
        return np.broadcast_to(np.float32(0), shape) if array is None else array

    def _taken(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        found = self._left.pop(name, None)
        if found is None:
            self._wrong.append(f"{name} {shape} is missing")
        elif tuple(found) != shape:
            self._wrong.append(f"{name} is {tuple(found)}, not {shape}")
        else:
            try:
                array = self._get(name)
            except Exception as error:  # whatever the reader raises at a damaged file
                self._wrong.append(f"{name} cannot be read ({first_line(error)})")
                return None
            if files.is_floating(array):
                return np.asarray(array, np.float32)
            self._wrong.append(f"{name} is of type {array.dtype}, which is not floating-point")
        return None

    def stack(self, names: list[str], shape: tuple[int, ...], layer: tuple[int, ...]) -> np.ndarray:
        """Tensors of one shape along a new first axis, each reshaped to `layer`."""
        if any(self.shapes.get(name) != shape for name in names):  # which `close` will tell of
            for name in names:
                self._taken(name, shape)
            return np.broadcast_to(np.float32(0), (len(names), *layer))
        stacked = np.empty((len(names), *layer), np.float32)
        for i, name in enumerate(names):
            stacked[i] = self.take(name, shape).reshape(layer)
        return stacked

    def zeros(self, name: str, shape: tuple[int, ...]) -> None:
        """Takes a tensor that must be all zeros, and may be missing."""
        if name in self and np.any(self.take(name, shape)):
            self._wrong.append(f"{name} is not zero, and this network has no biases")

    def close(self, where: pathlib.Path, network: str = "an Image GPT") -> None:
        """Refuses what is missing, misshapen or left over.

        Args:
          where: the tensors lie, for the message.
          network: that they are meant for.

        Raises:
          InputError: lists all of it.
        """
        left = [f"{name} {tuple(shape)} is left over" for name, shape in self._left.items()]
        if self._wrong or left:
            raise InputError(
                f"the weights in {where} are not those of {network}: "
                f"{'; '.join([*self._wrong, *left])}."
            )
