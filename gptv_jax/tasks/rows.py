"""A metric's results that are kept for every image of a split, on the host."""

import jax
import numpy as np


class Rows(dict):
    """Arrays with a row for each image that was read; `known` is what was computed of them."""

    def __init__(self, rows: dict):
        super().__init__(rows)
        self.known: dict = {}


def by_image(total: dict) -> dict[int, list[int]]:
    """The rows of `total` that show each image, by its number "index", the plain view first.

    Padding and damaged images, whose "mask" is 0, are left out.
    """
    rows: dict[int, list[int]] = {}
    for row, (index, counts) in enumerate(zip(total["index"], total["mask"], strict=True)):
        if counts:
            rows.setdefault(int(index), []).append(row)
    return dict(sorted(rows.items()))


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
