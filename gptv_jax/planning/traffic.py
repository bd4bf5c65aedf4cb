"""What travels between devices in one step, and over which axis of the mesh."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from gptv_jax import sharding
from gptv_jax.planning import hlo
from gptv_jax.planning.training import Call


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same axes, in one step."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, whose devices take part
    count: int
    bytes: int  # of all of them: of the arrays that are gathered, reduced or moved
    inside: float  # bytes that a device sends to others of its slice or node
    between: float  # bytes that it sends to other slices or nodes


def of_program(
    found: Iterable[hlo.Collective], sizes: dict[str, int], slice_of: Sequence[int]
) -> list[Traffic]:
    """The collectives of a compiled program, by kind and axes.

    Args:
      found: them.
      sizes: of the mesh, by axis.
      slice_of: the slice of each device, in the order of the mesh.
    """
    places = np.array(np.unravel_index(np.arange(len(slice_of)), tuple(sizes.values()))).T
    rows = []
    firsts = tuple(slice_of.index(i) for i in sorted(set(slice_of)))
    for each in found:
        group = each.group or firsts
        members = places[list(group)]
        along = (members != members[0]).any(axis=0)
        axes = tuple(axis for axis, varies in zip(sizes, along, strict=True) if varies)
        rows.append(_row(each.kind, axes, each.count, each.bytes, group, slice_of))
    return _merged(rows)


def by_arithmetic(
    calls: Iterable[Call], sizes: dict[str, int], slice_of: Sequence[int]
) -> list[Traffic]:
    """The collectives that the sharding of a network calls for.

    Args:
      calls: them.
      sizes: of the mesh, by axis.
      slice_of: the slice of each device, in the order of the mesh.
    """
    ids, rows = np.arange(len(slice_of)).reshape(tuple(sizes.values())), []
    for each in calls:
        axes = tuple(axis for axis in each.axes if sizes.get(axis, 1) > 1)
        if axes and each.count:
            group = ids[tuple(slice(None) if axis in axes else 0 for axis in sizes)].ravel()
            rows.append(_row(each.kind, axes, each.count, round(each.bytes), group, slice_of))
    return _merged(rows)


def _row(kind, axes, count, size, group, slice_of) -> Traffic:
    """What each device sends, in rings: first inside every slice, then between the slices."""
    slices = len({slice_of[i] for i in group})
    members = len(group) // slices
    passes = 2 if kind == "all-reduce" else 1
    if kind == "collective-permute":
        inside, between = (float(size), 0.0) if slices == 1 else (0.0, float(size))
    else:
        inside = passes * size * (members - 1) / members
        between = passes * size / members * (slices - 1) / slices
    return Traffic(kind, axes, count, count * size, count * inside, count * between)


def _merged(rows: list[Traffic]) -> list[Traffic]:
    """Rows of the same kind and axes added up, the one with most bytes first."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row.kind, row.axes].append(row)
    added = [
        Traffic(*key, *(sum(getattr(row, field) for row in same) for field in _SUMMED))
        for key, same in groups.items()
    ]
    return sorted(added, key=lambda row: -row.bytes)


_SUMMED = ("count", "bytes", "inside", "between")


def slices_of(count: int, per_slice: int) -> list[int]:
    """The slice of each device where slices follow one another along the first axes."""
    return [i // per_slice for i in range(count)]


def order(sizes: Sequence[int]) -> dict[str, int]:
    """Sizes by axis."""
    return dict(zip(sharding.AXES, sizes, strict=True))
