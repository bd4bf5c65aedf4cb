"""Typed, checked settings: frozen dataclasses from and to ml_collections, dicts and flat names.

A dataclass declares its settings by `field`; a field whose type is a dataclass is a section.
"""

import ast
import collections.abc
import dataclasses
import difflib
import math
import operator
import types
import typing

import ml_collections
from ml_collections import config_dict

from gptv_jax.errors import InputError, cut, shorten

# Accepted values: words for the message, and a test.
POSITIVE = ("1 or more", lambda v: v >= 1)
FROM_ZERO = ("0 or more", lambda v: 0 <= v < math.inf)
ABOVE_ZERO = ("more than 0", lambda v: 0 < v < math.inf)
BELOW_ONE = ("0 up to but not 1", lambda v: 0 <= v < 1)
SHARE = ("0 to 1", lambda v: 0 <= v <= 1)


def _is_one(entry: str) -> bool:
    """Whether the text may name one transform: it is not empty, and no list with commas."""
    try:
        return not isinstance(ast.parse(entry.strip(), mode="eval").body, ast.Tuple)
    except SyntaxError:  # `transforms.parse` says more
        return bool(entry.strip())


ENTRIES = (
    "a tuple of texts, one for each transform, as in ('flip()', 'resize((48, 64))'); without a "
    "transform write ()",
    lambda v: all(map(_is_one, v)),
)


def one_of(*values):
    """The condition that a field has one of these values."""
    return "one of " + ", ".join(map(str, values)), lambda v: v in values


def field(default=dataclasses.MISSING, accepted=None, *, free: bool = False):
    """A field that takes the accepted values; `free`: it may change when a run is continued.

    Free fields change where and when work is done, but results only by rounding.
    """
    return dataclasses.field(default=default, metadata={"accepted": accepted, "free": free})


def by_name(cls: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """`{"train.steps": its Field, ...}` for every field, in order of declaration."""
    found = {}
    for each in dataclasses.fields(cls):
        name = f"{prefix}{each.name}"
        nested = dataclasses.is_dataclass(each.type)
        found.update(by_name(each.type, f"{name}.") if nested else {name: each})
    return found


def free(cls: type) -> set[str]:
    """Names of the fields that may change when a run is continued."""
    return {name for name, each in by_name(cls).items() if each.metadata.get("free")}


def flatten(config, prefix: str = "") -> dict[str, object]:
    """`{"train.steps": 500, ...}` for every field, in order of declaration."""
    return {prefix + name: operator.attrgetter(name)(config) for name in by_name(type(config))}


def unflatten(flat: dict[str, object]) -> dict:
    """The inverse of `flatten`, as nested dicts, for `from_dict`."""
    nested: dict = {}
    for name, value in flat.items():
        *sections, last = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return nested


def to_dict(config) -> ml_collections.ConfigDict:
    """A locked ConfigDict with the fields and types of a dataclass."""
    settings = ml_collections.ConfigDict()
    for each in dataclasses.fields(config):
        value, (kinds, optional) = getattr(config, each.name), _kinds(each.type)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif len(kinds) > 1:  # ml_collections would keep the type of the default alone
            value = config_dict.FieldReference(value, field_type=object)
        elif optional and value is None:
            value = config_dict.placeholder(kinds[0])
        settings[each.name] = value
    return settings.lock()


def from_dict(cls: type, settings, where: str):
    """The dataclass of a ConfigDict or a dict that has all of its fields.

    `where` is the section's name in error messages.

    Raises:
      InputError: an unknown or missing field, a wrong type, or a value that is not accepted; the
        message names the field, its value and what would be accepted.
    """
    if not isinstance(settings, collections.abc.Mapping | ml_collections.ConfigDict):
        raise InputError(f"{where} is {settings!r}; it is a section with fields of its own.")
    known = {each.name: each for each in dataclasses.fields(cls)}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {where}.{near[0]}? " if near else ""
            accepted = shorten(known)
            raise InputError(f"{where}.{name} is not a field; {hint}{where} takes: {accepted}.")
    values = {}
    for name, each in known.items():
        if name not in settings:
            raise InputError(f"{where}.{name} is missing; start from gptv_jax.config.default().")
        values[name] = checked(settings[name], each, f"{where}.{name}")
    return cls(**values)


def checked(value, each: dataclasses.Field, where: str):
    """`value` as the field's type, or InputError, which calls the field `where`."""
    if dataclasses.is_dataclass(each.type):
        return from_dict(each.type, value, where)
    kinds, optional = _kinds(each.type)
    if value is None and optional:
        return None
    words, holds = each.metadata.get("accepted") or (None, None)
    try:
        value = typed(value, kinds)
    except TypeError:
        found = f"{where} is {value!r}, of type {type(value).__name__}"
        takes = words if words and len(kinds) > 1 else type_words(each)
        raise InputError(f"{found}; it takes {takes}.") from None
    if holds and not holds(value):
        alternative = ", or None" if optional else ""
        raise InputError(f"{where} is {cut(repr(value), 100)}; it takes {words}{alternative}.")
    return value


def typed(value, kinds: tuple):
    """`value` as one of `kinds`, or TypeError; whole numbers become floats, lists tuples."""
    for kind in kinds:
        if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
            return tuple(typed(v, typing.get_args(kind)[:1]) for v in value)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is kind:
            return value
    raise TypeError


def type_words(each: dataclasses.Field) -> str:
    """What a field takes, in words: `an int`, `a float or None`, `a tuple of str`."""
    kinds, optional = _kinds(each.type)
    words = [
        f"a tuple of {typing.get_args(kind)[0].__name__}"
        if typing.get_origin(kind) is tuple
        else f"{'an' if kind is int else 'a'} {kind.__name__}"
        for kind in kinds
    ]
    return " or ".join(words + ["None"] * optional)


def _kinds(kind) -> tuple[tuple, bool]:
    """`((float,), True)` for `float | None`, `((float, str), False)` for `float | str`."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return tuple(k for k in kinds if k is not type(None)), type(None) in kinds


def refuse(config: object, name: str, reason: str) -> typing.NoReturn:
    """Raises InputError: the name and the value of the field `config.<name>`, and the reason."""
    value = operator.attrgetter(name)(config)
    raise InputError(f"config.{name} is {value!r}, but {reason}.")
