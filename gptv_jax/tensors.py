"""Files of .safetensors, which a user may hand over damaged; nothing in them is ever executed."""

import hashlib
import pathlib
from collections.abc import Callable

import numpy as np
import safetensors
import safetensors.numpy

from gptv_jax.errors import InputError, first_line


def open_file(path: pathlib.Path):
    """An open .safetensors file, whose tensors are read one by one.

    Raises:
      InputError: it is none, or damaged.
    """
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path} is no .safetensors file, or damaged ({first_line(error)})."
        ) from error


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file, by name.

    Raises:
      InputError: it cannot be read.
    """
    with open_file(path) as file:
        try:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # of types that NumPy has not, too
            raise InputError(f"{path} is damaged ({first_line(error)}).") from error


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """The metadata of a .safetensors file."""
    with open_file(path) as file:
        return file.metadata() or {}


def write(arrays: dict[str, np.ndarray], path: pathlib.Path, metadata: dict) -> None:
    """Writes a .safetensors file, whole or not at all.

    Raises:
      InputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(arrays, temporary, metadata=metadata)
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be written ({first_line(error)}).") from error


def digest(arrays: dict[str, np.ndarray]) -> str:
    """What tells weights from others: 16 hexadecimal digits, of names, types, shapes and values."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def floating(array: np.ndarray) -> bool:
    """Whether an array is of floating-point numbers, bfloat16 among them."""
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


class Accounted:
    """Named tensors of which every one must be taken, once, in the shape that is expected."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], get: Callable[[str], np.ndarray]):
        """Nothing is read yet.

        Args:
          shapes: of all tensors there are, by name.
          get: reads one of them.
        """
        self.shapes, self._get = shapes, get
        self._left, self._wrong = dict(shapes), []

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
            if floating(array):
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
