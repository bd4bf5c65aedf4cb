"""NumPy's files, which a user may hand over damaged or of another kind."""

import pathlib
import tokenize
import zipfile
import zlib

import numpy as np

# What NumPy, zipfile and zlib raise at files that are none of theirs, or cut, or changed.
RAISED = (
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
    """No file of NumPy's, or a damaged one; the message is the reason, in a few words."""

    def __init__(self, error: Exception):
        told = error.strerror if isinstance(error, OSError) else None
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        super().__init__((told or first_line).rstrip("."))


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name; of an `.npy` file the one, under "".

    Raises:
      UnreadableError: no such file, or none of NumPy's, or damaged.
    """
    try:
        with path.open("rb") as file:
            content = np.load(file)
            return {"": content} if isinstance(content, np.ndarray) else dict(content)
    except RAISED as error:
        raise UnreadableError(error) from error


def memory_map(path: pathlib.Path) -> np.ndarray:
    """The array of an `.npy` file, read where it lies.

    Raises:
      UnreadableError: as `read`.
    """
    try:
        return np.load(path, mmap_mode="r")
    except RAISED as error:
        raise UnreadableError(error) from error
