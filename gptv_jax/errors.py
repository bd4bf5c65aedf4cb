"""Errors that end in one sentence."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn


class InputError(ValueError):
    """An error that the user can mend; the message says what is wrong, where, and what to do."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters; its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def shorten(names: Iterable[object], most: int = 3) -> str:
    """The first names of a list for a message, with "and N more" where the list is longer."""
    shown = [str(name) for name in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


@contextlib.contextmanager
def as_input_error(problem: str, kinds=Exception, advice: str = "") -> Iterator[None]:
    """Within the `with`, an exception becomes an InputError, which says `problem (reason)advice.`.

    `kinds` is the type of the exception, or a tuple of types; an InputError passes as it is.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or first_line(error).rstrip(".")
        raise InputError(f"{problem} ({reason}){advice}.") from error


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
