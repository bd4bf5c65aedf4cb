"""Errors that end in one sentence."""


class InputError(ValueError):
    """Something the user can mend: one sentence that says what, where and what to do."""


def first_line(error: Exception) -> str:
    """What a library's error says, short enough for a sentence; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
