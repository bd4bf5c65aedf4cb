"""The collectives that the sharding of a GPT requires in a step, by arithmetic."""

from collections.abc import Iterator
from typing import NamedTuple

from gptv_jax.model import flops
from gptv_jax.model.gpt import Network

WIDTHS = {"float32": 4, "bfloat16": 2}  # bytes


class Call(NamedTuple):
    """A collective that the sharding of a training requires, `count` times a step."""

    kind: str
    axes: tuple[str, ...]  # mesh axes; axes of size 1 are ignored
    count: int
    bytes: float | int  # of one call: of the whole array, on one device


def of_training(network: Network, rows: int, parts: int, sizes: dict[str, int]) -> Iterator[Call]:
    """Of the forward and the backward pass of `rows` sequences in so many microbatches."""
    c = network.config
    width, sequence = WIDTHS[c.dtype], sizes["sequence"]
    for weight in _weights(network, sizes):
        yield Call("all-gather", ("fsdp",), c.layers * parts * 2, weight)  # forward, backward
        yield Call("reduce-scatter", ("fsdp",), c.layers * parts, weight)
        shard = weight / sizes["fsdp"]
        yield Call("all-reduce", ("data", "sequence"), c.layers * parts, shard)
    tables = _tables(network)
    yield Call("all-gather", ("fsdp",), parts, tables)
    yield Call("all-reduce", ("data", "fsdp", "sequence"), parts, tables)

    # Each layer has two products whose results are partial sums, in each direction.
    hidden = _positions(network, rows, parts, sizes) * c.width * width
    sums = 4 + (c.remat == "full")
    yield Call("all-reduce", ("tensor",), c.layers * parts * sums, hidden)
    # Keys and values of all positions, and their gradients.
    again, both = c.remat != "none", 2 * hidden * sequence / sizes["tensor"]
    yield Call("all-gather", ("sequence",), c.layers * parts * (1 + again), both)
    yield Call("reduce-scatter", ("sequence",), c.layers * parts, both)


def of_forward(network: Network, rows: int, parts: int, sizes: dict[str, int]) -> Iterator[Call]:
    """Of the forward pass alone, as of a teacher."""
    c = network.config
    for weight in _weights(network, sizes):
        yield Call("all-gather", ("fsdp",), c.layers * parts, weight)
    yield Call("all-gather", ("fsdp",), parts, _tables(network))
    hidden = _positions(network, rows, parts, sizes) * c.width * WIDTHS[c.dtype]
    yield Call("all-reduce", ("tensor",), c.layers * parts * 2, hidden)
    both = 2 * hidden * sizes["sequence"] / sizes["tensor"]
    yield Call("all-gather", ("sequence",), c.layers * parts, both)


def _weights(network: Network, sizes: dict[str, int]) -> Iterator[float]:
    """Bytes of a layer's matrices in the compute dtype on one device, gathered over fsdp."""
    c = network.config
    # Columns of qkv, attention_out, and the MLP's first and second matrix.
    first = 2 * c.mlp_width if c.mlp == "swiglu" else c.mlp_width
    for columns in (3 * c.width, c.width, first, c.mlp_width):
        yield columns * c.width * WIDTHS[c.dtype] / sizes["tensor"]


def matrix_bytes(network: Network) -> int:
    """Bytes of all matrices in the compute dtype."""
    return flops.forward(network)["matmul"] // 2 * WIDTHS[network.config.dtype]


def _tables(network: Network) -> int:
    """Bytes of embeddings, heads and positions in the compute dtype."""
    c = network.config
    parts = network.layout.parts
    vectors = sum(part.vocabulary + part.predicted * part.head_vectors for part in parts)
    vectors += c.learned_positions * network.length
    return vectors * c.width * WIDTHS[c.dtype]


def _positions(network: Network, rows: int, parts: int, sizes: dict[str, int]) -> float:
    """Positions of a microbatch on one device."""
    split = parts * sizes["data"] * sizes["fsdp"] * sizes["sequence"]
    return rows * network.length / split
