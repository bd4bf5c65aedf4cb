"""Bytes that travel between devices in one step, and over which axes of the mesh."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from gptv_jax.planning import hlo
from gptv_jax.planning.training import Call


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over the same axes in one step."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, whose devices take part
    count: int
    bytes: int  # of the arrays that are gathered, reduced or moved, of all collectives together
    inside: float  # bytes that a device sends to devices of its slice or node
    between: float  # bytes that a device sends to other slices or nodes


def of_program(
    found: Iterable[hlo.Collective], sizes: dict[str, int], slice_of: Sequence[int]
) -> list[Traffic]:
    """Traffic of the collectives of a compiled program, the largest first.

    Args:
      found: the collectives.
      sizes: of the mesh, by axis.
      slice_of: the slice of each device, in the order of the mesh.
    """
    places = np.array(np.unravel_index(np.arange(len(slice_of)), tuple(sizes.values()))).T
    rows = []
    first_of_each_slice = tuple(slice_of.index(i) for i in sorted(set(slice_of)))
    for each in found:
        group = each.group or first_of_each_slice
        members = places[list(group)]
        along = (members != members[0]).any(axis=0)
        axes = tuple(axis for axis, varies in zip(sizes, along, strict=True) if varies)
        rows.append(_row(each.kind, axes, each.count, each.bytes, group, slice_of))
    return _merged(rows)


def by_arithmetic(
    calls: Iterable[Call], sizes: dict[str, int], slice_of: Sequence[int]
) -> list[Traffic]:
    """Traffic of the collectives that a sharding requires; arguments as of `of_program`."""
    ids, rows = np.arange(len(slice_of)).reshape(tuple(sizes.values())), []
    for each in calls:
        axes = tuple(axis for axis in each.axes if sizes.get(axis, 1) > 1)
        if axes and each.count:
            group = ids[tuple(slice(None) if axis in axes else 0 for axis in sizes)].ravel()
            rows.append(_row(each.kind, axes, each.count, round(each.bytes), group, slice_of))
    return _merged(rows)


def _row(kind, axes, count, size, group, slice_of) -> Traffic:
    """Traffic of `count` collectives as rings: first inside every slice, then between slices."""
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
    """Rows of the same kind and axes added up, the row with most bytes first."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row.kind, row.axes].append(dataclasses.astuple(row)[2:])
    added = (Traffic(*key, *map(sum, zip(*each, strict=True))) for key, each in groups.items())
    return sorted(added, key=lambda row: -row.bytes)
