"""The class that several votes and several clips of a video elect, and how often it is which."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def over_clips(class_logits: list[Float[Array, "B C"]], votes: int) -> Float[Array, "votes B C"]:
    """Logits of the mean probabilities of the K clips of every video, of each vote.

    The list has votes * K arrays, vote by vote.
    """
    logits, clips = jnp.stack(class_logits), len(class_logits) // votes
    if clips == 1:
        return logits
    logits = jax.nn.log_softmax(logits.reshape(votes, clips, *logits.shape[1:]), axis=-1)
    return jax.nn.logsumexp(logits, axis=1) - math.log(clips)


def majority_class(class_logits: Float[Array, "votes *B C"]) -> Int[Array, "*B"]:
    """The class with the most votes; among equals the one of higher mean probability."""
    votes = jax.nn.one_hot(jnp.argmax(class_logits, axis=-1), class_logits.shape[-1]).sum(axis=0)
    likely = jax.nn.softmax(class_logits, axis=-1).mean(axis=0)
    return jnp.argmax(votes + likely, axis=-1)  # a probability is less than a vote


def confusion(
    labels: Int[Array, " B"], chosen: Int[Array, " B"], mask: Float[Array, " B"], classes: int
) -> Int[Array, "C C"]:
    """Number of images of each class (row) that were taken for each class (column).

    Only images whose mask is 1 count. Every device and process gets an equal matrix.
    """
    # Float32 products at the highest precision are exact for counts below 2 ** 24, one batch's.
    shares = jax.nn.one_hot(labels, classes) * mask[:, None], jax.nn.one_hot(chosen, classes)
    exact = {"precision": jax.lax.Precision.HIGHEST, "out_sharding": jax.P(None, None)}
    return jnp.einsum("bc,bd->cd", *shares, **exact).astype(jnp.int32)
