"""What segmentation asks of the network: one pass over whole sequences, or maps token by token."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray, UInt8

from gptv_jax import sharding
from gptv_jax.decode import answers
from gptv_jax.decode.restriction import Restriction
from gptv_jax.model.gpt import GPT, Network, Output
from gptv_jax.tasks.task import Grammar, Task
from gptv_jax.train import objective

NAME = "labels"  # the part of the sequence that is the written label map


def forward(model: GPT, batch: dict, key: PRNGKeyArray | None = None) -> Output:
    """The network's output of whole sequences, with the layers that are read."""
    network = model.network
    pixels = network.pixels_of(batch)
    keep = network.reading.layers if network.reading else ()
    return model(objective.sequence(network.layout, batch), key=key, pixels=pixels, keep=keep)


def written_nats(model: GPT, output: Output, batch: dict) -> Float[Array, "B T"]:
    """The nats of every token of the label maps."""
    part, places = model.network.layout.parts[1], model.network.layout.slices[NAME]
    final = jax.sharding.reshard(output.final, sharding.BATCH_FIRST)[:, places]
    return objective.part_nats(model, part, final, batch["targets"][NAME])


@functools.partial(jax.jit, static_argnums=0)
def map_nats(network: Network, params: dict, batch: dict) -> Float[Array, " B"]:
    """The nats of each written label map: the sum over its tokens whose weight is above 0."""
    model = network.bind(params)
    nats = written_nats(model, forward(model, batch), batch)
    return (nats * (batch["weights"][NAME] > 0)).sum(axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def classes_read(
    task: Task,
    network: Network,
    params: dict,
    tokens: Int[Array, "B N"] | None,
    pixels: UInt8[Array, "B *F height width C"] | None,
) -> Integer[Array, "B *F H W"]:
    """The most likely class of every pixel, from the positions of the image alone."""
    if tokens is None:
        tokens = jnp.zeros((len(pixels), network.layout.parts[0].size), jnp.int32)
    tokens = jnp.pad(jax.sharding.reshard(tokens, sharding.BATCH_FIRST), ((0, 0), (0, 1)))
    model = network.bind(params)
    output = model(tokens, pixels=pixels, keep=network.reading.layers)
    return task.most_likely(task.read(model, output))


def written(
    task: Task,
    network: Network,
    params: dict,
    tokens: Int[Array, "G N"] | None,
    pixels: UInt8[Array, "G *F height width C"] | None,
    key: PRNGKeyArray,
    numbers: Int[Array, " G"] | None,
    temperature: float = 0.0,
    samples: int = 1,
    known: Int[Array, "G n"] | None = None,
    read: int = 0,
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Tokens of label maps and their probabilities, see `answers.answer`.

    Tokens are drawn at the temperature; at 0 they are the most likely ones. With `known` the label
    maps end after n tokens.
    """
    vocabulary = jnp.int32(network.layout.parts[1].vocabulary)
    settings = Restriction(jnp.float32(temperature), vocabulary, jnp.float32(1))
    given = (tokens, pixels, key, settings, Grammar(task), samples, numbers, known, read)
    places = network.layout.slices[NAME]
    drawn, probabilities = answers.answer(network, params, *given)
    return drawn[:, places], probabilities[:, places]
