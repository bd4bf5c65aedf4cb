"""Pretraining after prefixes: the first rows of an image are read at once, and have no loss.

A prefix is a part of the attention mask, and so of a program. The program of a step has a branch
for each of `Model.prefixes`, and runs the branch that the step's key draws.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from gptv_jax import sharding
from gptv_jax.model.gpt import Network

PREFIX_KEY = 2**31 - 5  # folded into a step's key, see the keys in `objective`


def counted(network: Network, rows: int) -> Bool[Array, "B T"]:
    """Which tokens of a batch count in the loss: those after the prefix."""
    after = jnp.arange(network.length) >= network.layout.prefix
    after = jnp.broadcast_to(after[None], (rows, network.length))
    return jax.sharding.reshard(after, sharding.HIDDEN)


def make_loss(make: Callable, network: Network, steps: int | None) -> Callable:
    """The loss after a drawn prefix, see `train.step`; without a key, of all tokens.

    `make` is `step.make_loss`. A branch of the program computes the loss and its gradient: if a
    branch returned what a backward pass reads, the program would hold these arrays of all branches.
    """
    config = dataclasses.replace(network.config, prefixes=())

    def after(layout) -> Callable:
        return make(dataclasses.replace(network, config=config, layout=layout), steps=steps)

    plain, losses = after(network.layout), [after(layout) for layout in network.prefixed_layouts]

    def run_one(functions: list[Callable], params, key, frozen, batch, step):
        drawn = jax.random.randint(jax.random.fold_in(key, PREFIX_KEY), (), 0, len(functions))
        return jax.lax.switch(drawn, functions, params, frozen, batch, key, step)

    @jax.custom_vjp
    def of_drawn(params, *rest):
        return run_one(losses, params, *rest)

    def forward(params, *rest):
        return run_one([jax.value_and_grad(each, has_aux=True) for each in losses], params, *rest)

    def backward(gradient, cotangents):
        scaled = jax.tree.map(lambda x: cotangents[0].astype(x.dtype) * x, gradient)
        return scaled, None, None, None, None

    of_drawn.defvjp(forward, backward)

    def loss(params, frozen, batch, key, step=None):
        if key is None:
            return plain(params, frozen, batch, key, step)
        return of_drawn(params, key, frozen, batch, step)

    return loss
