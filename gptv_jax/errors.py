"""Errors that end in one sentence."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn


class InputError(ValueError):
    """An error that the user can mend; the message says what is wrong, where, and what to do.

    The message is one line, also where names of files or classes in the message have line breaks.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


LONGEST = 300  # characters of the line in which an error reaches the user
# Why a system cannot write: by the number of its error, and by the text, which libraries keep.
DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full, by your quota",
    errno.EFBIG: "the disk takes no file as large as this",
    errno.EROFS: "the disk is read-only",
}
DISK_TEXTS = {os.strerror(number): words for number, words in DISK.items()}


def shorten(items: Iterable, separator: str = ", ", room: int = 120) -> str:
    """The first items, as many as `room` characters take and at least one, "and N more"."""
    items, shown = list(items), ""
    for count, item in enumerate(items):
        longer = (shown + separator if count else "") + cut(str(item), room)
        if count and len(longer) > room:
            return f"{shown} and {len(items) - count} more"
        shown = longer
    return shown


def counted(number: int, noun: str) -> str:
    """`1 image`, or `2 images`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def cut(text: str, room: int, end: int = 0) -> str:
    """The text as one line of at most `room` characters; what is cut ends `end` before its end."""
    text = " ".join(text.splitlines())
    if len(text) <= room:
        return text
    return f"{text[: room - end - 3]}...{text[len(text) - end :]}"


def disk_problem(error: BaseException) -> str | None:
    """`PATH cannot be written: the disk is full` where this led to the error; else None."""
    chain, reasons = [error], {}  # the reasons by the file that an error names
    for each in chain:  # and the errors that it was raised from, or while they were handled
        chain += [e for e in (each.__cause__, each.__context__) if e and e not in chain]
        if reason := _disk_reason(each):
            in_text = re.search(r'local file "([^"]+)"', str(each))  # of tensorstore
            path = getattr(each, "filename", None) or (in_text and in_text[1])
            reasons.setdefault(path, reason)
    path = next(filter(None, reasons), None)
    return f"{path or 'a file'} cannot be written: {reasons[path]}" if reasons else None


def _disk_reason(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in DISK:
        return DISK[error.errno]
    return next((words for text, words in DISK_TEXTS.items() if text in str(error)), None)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Within the `with`, an exception that names no file, as of a full disk, names `path`."""
    try:
        yield
    except Exception as error:
        error.filename = getattr(error, "filename", None) or str(path)
        raise


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters; its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def as_input_error(
    problem: str, kinds=Exception, advice: str = "", reason: Callable = lambda error: None
) -> Iterator[None]:
    """Within the `with`, an exception becomes an InputError, which says `problem (reason)advice.`.

    `kinds` is the type of the exception, or a tuple of types; an InputError passes as it is.
    `reason(error)` is a better reason than the error's own words, or None.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        found = reason(error) or _disk_reason(error) or getattr(error, "strerror", None)
        found = found or first_line(error).rstrip(".")
        raise InputError(f"{problem} ({found}){advice}.") from error


def list_differences(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    """One phrase for every name that is missing in `found`, left over there, or differs."""
    changed = [name for name in expected if name in found and found[name] != expected[name]]
    return [
        *(f"{n} {value!r} is missing" for n, value in expected.items() if n not in found),
        *(f"{n} {value!r} is left over" for n, value in found.items() if n not in expected),
        *(f"{n} is {found[n]!r}, expected {expected[n]!r}" for n in changed),
    ]


def end(code: int, message: str) -> NoReturn:
    """Ends the process at once, with a message on stderr.

    An ordinary exit may be aborted by library threads that are still running.
    """
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
