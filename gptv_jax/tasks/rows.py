"""A metric's results that are kept for every image of a split, on the host."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import PartitionSpec as P


class Rows(dict):
    """Arrays with a row for each image that was read; `known` is what was computed of them."""

    def __init__(self, rows: dict):
        super().__init__(rows)
        self.known: dict = {}


def compiled(step: Callable) -> Callable:
    """The compiled step of a metric: the rows of `step(params, batch)`, whole on every process.

    Rows that tell the images apart are added: "index", "mask" and "view", and the number "images".
    """

    def rows(params: dict, batch: dict) -> dict[str, jax.Array]:
        found = {name: batch[name] for name in ("index", "mask", "view")} | step(params, batch)
        whole = {name: jax.sharding.reshard(x, P(*[None] * x.ndim)) for name, x in found.items()}
        return whole | {"images": batch["mask"].sum()}

    return jax.jit(rows)


def by_image(total: dict) -> dict[int, list[int]]:
    """The rows of `total` that show each image, by its number "index", the plain view first.

    Padding and damaged images, whose "mask" is 0, are left out.
    """
    rows: dict[int, list[int]] = {}
    for row, (index, counts) in enumerate(zip(total["index"], total["mask"], strict=True)):
        if counts:
            rows.setdefault(int(index), []).append(row)
    return dict(sorted(rows.items()))


def plain(total: dict) -> dict[int, int]:
    """The row of each image's plain view, by its number "index"."""
    return {index: rows[0] for index, rows in by_image(total).items()}


def others(total: dict) -> dict[int, int]:
    """For the row of each image's plain view, the row of another image, where there is one."""
    rows = [*plain(total).values()]
    return dict(zip(rows, rows[-1:] + rows[:-1], strict=True))


def known(total: dict) -> dict:
    """What was computed of the rows, to be added to; nothing of arrays that are no `Rows`."""
    return total.known if isinstance(total, Rows) else {}


def collect(total: dict | list[dict], part: dict) -> list[dict]:
    """Adds a batch's rows, fetched to the host; the `add` of a `Metric`."""
    total = total if isinstance(total, list) else [jax.device_get(total)]
    total.append(jax.device_get(part))
    return total


def join(total: dict | list[dict]) -> Rows:
    """The rows of all batches, and the number "images"; the `finish` of a `Metric`."""
    parts = total if isinstance(total, list) else [total]
    rows = {n: np.concatenate([part[n] for part in parts]) for n in parts[0] if n != "images"}
    return Rows(rows | {"images": sum(part["images"] for part in parts)})
