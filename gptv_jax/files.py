"""Reading and writing files: writes are atomic, and damaged files are named in the error."""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import pathlib
import weakref
import zipfile
from collections.abc import Callable

import numpy as np
from etils import epath, epy

from gptv_jax.errors import InputError, as_input_error, cut, naming, shorten

with epy.lazy_imports():  # see `command`
    import jax
    import jax.numpy as jnp
    import safetensors
    import safetensors.numpy

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

LOG = logging.getLogger(__name__)
MOST_PACKED = 1032  # bytes that zip files make of one at most
LOCK = ".lock"  # name of the file that `lock` makes


def user_path(path: str | os.PathLike) -> pathlib.Path:
    """The absolute path that a user's text names; a leading ~ is the home folder."""
    if "://" in str(path):
        hub = "; model.push_to_hub uploads a model" if str(path).startswith("hf://") else ""
        raise InputError(f"{path} is an address; name a path on this machine{hub}.")
    with as_input_error(f"{cut(str(path), 100)} is no path", (RuntimeError, OSError)):
        found = pathlib.Path(path).expanduser().absolute()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.lstat(found)  # refuses names that are too long
    # Libraries drop "link/.." from a path, but the system goes up from where the link leads.
    return found.resolve() if ".." in found.parts else found


def user_place(text: str) -> epath.Path:
    """The path that `user_path` gives; an address, such as gs://bucket/path, is not changed."""
    return epath.Path(text if "://" in text else user_path(text))


def claim(folder: pathlib.Path | epath.Path, setting: str) -> None:
    """Makes a folder that the flag or field `setting` names, and checks that it is writable."""
    advice = "; name a folder that you may write to"
    with as_input_error(f"{setting}={folder} cannot be written", advice=advice):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{jax.process_index()}"
        probe.touch()
        probe.unlink()


def lock(folder: pathlib.Path, setting: str, holder: object) -> Callable[[], None]:
    """Locks a folder until this process ends or `holder` is deleted; for process 0.

    Returns a function that unlocks the folder.
    """
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    unlock = weakref.finalize(holder, os.close, file)
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # PermissionError where it is locked
        else:
            raise OSError("this system has no locks")
    except (BlockingIOError, PermissionError) as error:
        unlock()
        problem = f"{setting}={folder} is in use by another process"
        raise InputError(f"{problem}; wait until it has ended, or name another folder.") from error
    except OSError:
        LOG.info("%s lies on a file system without locks: nothing keeps a second run out.", folder)
    return unlock


def replace(path: pathlib.Path, content: bytes | Callable[[pathlib.Path], object]) -> None:
    """Writes a file on process 0 alone; a kill leaves the old content or the whole new content.

    `content` is the new content, or a function that writes it to the path it is given.
    """
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        content(temporary) if callable(content) else temporary.write_bytes(content)
    temporary.replace(path)


def write_json(path: pathlib.Path, value) -> None:
    """Writes a JSON file as `replace` does."""
    replace(path, json.dumps(value, indent=2).encode() + b"\n")


def read_json(path: pathlib.Path, absent):
    """The content of a JSON file, or `absent` where there is no such file."""
    advice = "; restore it or take another folder"
    try:
        with as_input_error(f"{path} is damaged", (ValueError, RecursionError), advice=advice):
            content = json.loads(path.read_text())
            if not isinstance(content, type(absent)):
                raise ValueError(f"it holds {content!r}")
            return content
    except (FileNotFoundError, NotADirectoryError):
        return absent


def read_arrays(path: pathlib.Path, most: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name; an `.npy` file's only array has the key "".

    `most` is how many bytes all arrays may have. For a missing, damaged or other file NumPy raises
    many types of exceptions.
    """
    with path.open("rb") as file:
        return load_arrays(file, most)


def load_arrays(file: io.BufferedIOBase, most: int | None = None) -> dict[str, np.ndarray]:
    """As `read_arrays`, of an open file; ValueError: an array is not as long as its header says."""
    length = file.seek(0, os.SEEK_END)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            whole = sum(member.file_size for member in archive.infolist())
            _check_most(whole, most)
            for member in archive.infolist():
                if member.file_size > MOST_PACKED * length:
                    raise ValueError(f"{member.filename} is cut short")
                with archive.open(member) as array:
                    _check_length(array, member.file_size)
    else:
        _check_most(length, most)
        file.seek(0)
        _check_length(file, length)
    file.seek(0)
    content = np.load(file)
    return {"": content} if isinstance(content, np.ndarray) else dict(content)


def _check_most(length: int, most: int | None) -> None:
    if most is not None and length > most:
        raise ValueError(f"its arrays have {length} bytes; they may have {most}")


def _check_length(file: io.BufferedIOBase, length: int) -> None:
    """Raises ValueError where an array needs more bytes than there are; NumPy allocates first."""
    first = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > length - file.tell():
        raise ValueError(f"an array {dtype} {list(shape)} is cut short")


def open_safetensors(path: pathlib.Path):
    """An open .safetensors file, whose tensors are read one by one."""
    with as_input_error(f"{path} is no .safetensors file, or damaged"):
        return safetensors.safe_open(path, framework="numpy")


def read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a .safetensors file by name, and the file's metadata."""
    with open_safetensors(path) as file, as_input_error(f"{path} is damaged"):
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return arrays, file.metadata() or {}


def read_weights(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """As `read_safetensors`, in float32; arrays that are not floating-point raise InputError."""
    arrays, metadata = read_safetensors(path)
    types = {name: a.dtype for name, a in arrays.items()}
    wrong = [f"{n} {kind}" for n, kind in types.items() if not jnp.issubdtype(kind, jnp.floating)]
    if wrong:
        raise InputError(f"{path} holds weights that are not floating-point: {shorten(wrong)}.")
    return {name: np.asarray(a, np.float32) for name, a in arrays.items()}, metadata


def write_safetensors(arrays: dict[str, np.ndarray], path: pathlib.Path, metadata: dict) -> None:
    """Writes a .safetensors file as `replace` does; InputError where it cannot be written."""
    with as_input_error(f"{path} cannot be written", (OSError, safetensors.SafetensorError)):
        replace(path, lambda target: safetensors.numpy.save_file(arrays, target, metadata))


def hash_arrays(arrays: dict[str, np.ndarray]) -> str:
    """16 hexadecimal digits of the names, types, shapes and values of `arrays`."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]
