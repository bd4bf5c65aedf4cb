"""Outputs of a network that are not drawn: logits, pooled features, class probabilities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gptv_jax.model.gpt import Network
from gptv_jax.train import objective


def of_regions(network: Network, params: dict, regions: int) -> tuple[Network, dict]:
    """A network, and its parameters, whose pooled features are the means over `Network.regions`.

    The class head is left out, since it reads the mean over all positions.
    """
    network = dataclasses.replace(network, regions=regions, classes=0)
    return network, {name: p for name, p in params.items() if name != "classifier"}


@functools.partial(jax.jit, static_argnames=("network", "output"))
def network_output(
    network: Network, params: dict, batch: dict, labels: jax.Array | None, output: str
) -> jax.Array:
    """One output of the network: "logits", "pooled" features [B, L+1, D] or "classes".

    The batch has "tokens", and for a network that reads pixels "image".
    """
    tokens = batch["tokens"]
    if output == "logits":
        return network.bind(params)(tokens, labels).logits
    if network.config.objective == "bert":  # sees images under masks, as in training
        batch = {"tokens": tokens, "variant": None, "index": jnp.arange(len(tokens))}
        each = (objective.evaluate_batch(network, params, batch, v) for v in range(network.votes))
        votes = [found for found, _ in each]
    else:
        votes = [network.bind(params)(tokens, labels, pixels=network.pixels_of(batch))]
    if output == "pooled":
        return sum(vote.pooled for vote in votes).swapaxes(0, 1) / len(votes)
    return sum(jax.nn.softmax(vote.class_logits, axis=-1) for vote in votes) / len(votes)
