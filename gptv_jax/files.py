"""Reading and writing files: writes are atomic, and damaged files are named in the error."""

import fcntl
import hashlib
import json
import logging
import os
import pathlib
import tokenize
import weakref
import zipfile
import zlib
from collections.abc import Callable

import jax
import numpy as np
import safetensors
import safetensors.numpy

from gptv_jax.errors import InputError, first_line

LOG = logging.getLogger(__name__)

# What NumPy, zipfile and zlib raise for files of another format, and for damaged files.
_RAISED_BY_NUMPY = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    NotImplementedError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class UnreadableError(ValueError):
    """A damaged file, or one of another format; the message is the reason, in a few words."""

    def __init__(self, error: Exception):
        reason = error.strerror if isinstance(error, OSError) else None
        super().__init__((reason or first_line(error)).rstrip("."))


def claim(folder: pathlib.Path, flag: str) -> None:
    """Makes a folder and checks that it can be written to.

    Args:
      folder: its path.
      flag: the command-line flag that named the folder, for the message.

    Raises:
      InputError: the folder cannot be made, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{jax.process_index()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"--{flag}={folder} cannot be written ({error.strerror}); name a folder that you may "
            "write to."
        ) from error


def lock(folder: pathlib.Path, flag: str, holder: object) -> None:
    """Locks a folder for this process until the process ends.

    Of several processes process 0 alone takes the lock; a file system without locks has none.

    Args:
      folder: its path.
      flag: the command-line flag that named the folder, for the message.
      holder: the lock is released when this object is deleted.

    Raises:
      InputError: another process holds the lock.
    """
    if jax.process_index() != 0:
        return
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    weakref.finalize(holder, os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"--{flag}={folder} is in use by another process; wait until it has ended, or name "
            "another folder."
        ) from error
    except OSError:
        LOG.info("%s lies on a file system without locks: nothing keeps a second run out.", folder)


def replace(path: pathlib.Path, content: bytes | Callable[[pathlib.Path], object]) -> None:
    """Writes a file atomically, on process 0 alone.

    Args:
      path: the file, which holds either the old content or the whole new content at any moment.
      content: the new content, or a function that writes it to the path it is given.
    """
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    content(temporary) if callable(content) else temporary.write_bytes(content)
    temporary.replace(path)


def write_json(path: pathlib.Path, value) -> None:
    """Writes a JSON file as `replace` does."""
    replace(path, json.dumps(value, indent=2).encode() + b"\n")


def read_json(path: pathlib.Path, absent):
    """The content of a JSON file, or `absent` where there is no such file.

    Raises:
      InputError: the file is not JSON, or not of the type of `absent`.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, type(absent)):
            raise InputError(f"{path} is damaged (it holds {content!r}); restore it.")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return absent
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is damaged ({error}); restore it or take another folder."
        ) from error


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name; of an `.npy` file the one, under "".

    Raises:
      UnreadableError: no such file, or none of NumPy's, or damaged.
    """
    try:
        with path.open("rb") as file:
            content = np.load(file)
            return {"": content} if isinstance(content, np.ndarray) else dict(content)
    except _RAISED_BY_NUMPY as error:
        raise UnreadableError(error) from error


def open_safetensors(path: pathlib.Path):
    """An open .safetensors file, whose tensors are read one by one.

    Raises:
      InputError: the file is missing, damaged, or of another format.
    """
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path} is no .safetensors file, or damaged ({first_line(error)})."
        ) from error


def read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a .safetensors file by name, and the file's metadata.

    Raises:
      InputError: the file cannot be read, or holds a type that NumPy does not have.
    """
    with open_safetensors(path) as file:
        try:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises several types
            raise InputError(f"{path} is damaged ({first_line(error)}).") from error
        return arrays, file.metadata() or {}


def read_weights(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """As `read_safetensors`, in float32.

    Raises:
      InputError: the file cannot be read, or holds arrays that are not floating-point.
    """
    arrays, metadata = read_safetensors(path)
    wrong = [f"{name} {a.dtype}" for name, a in arrays.items() if not is_floating(a)]
    if wrong:
        raise InputError(f"{path} holds weights that are not floating-point: {', '.join(wrong)}.")
    return {name: np.asarray(a, np.float32) for name, a in arrays.items()}, metadata


def write_safetensors(arrays: dict[str, np.ndarray], path: pathlib.Path, metadata: dict) -> None:
    """Writes a .safetensors file as `replace` does.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        replace(path, lambda target: safetensors.numpy.save_file(arrays, target, metadata))
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be written ({first_line(error)}).") from error


def hash_arrays(arrays: dict[str, np.ndarray]) -> str:
    """16 hexadecimal digits of the names, types, shapes and values of `arrays`."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def is_floating(array: np.ndarray) -> bool:
    """Whether an array holds floating-point numbers, bfloat16 included."""
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"
