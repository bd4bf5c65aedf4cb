"""A greedy attack on the class of an image, which changes a few of the image's tokens.

Each step changes one more token: of the candidates that the gradient of the class's margin at the
embeddings of the input names, the one after which the margin is least, as HotFlip does with the
letters of a text (Ebrahimi et al. 2018, arXiv:1712.06751). Every candidate takes a pass of the
network. Random changes, without a gradient and with one candidate a step, are the floor.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import sharding
from gptv_jax.model.gpt import GPT, Network
from gptv_jax.train import objective

DRAW_KEY = 7  # folded into the seed's key, so that other draws of the seed differ
PER_POSITION = 4  # token values of one position that may be among the candidates


class Budget(NamedTuple):
    """What an attack may do to an image."""

    tokens: int  # that differ from the image's at most
    candidates: int  # changes that each step tries
    guided: bool = True  # whether the gradient names the candidates; False: they are random

    @property
    def calls(self) -> int:
        """Passes of the network over an image at most; a gradient counts as one."""
        return 1 + self.tokens * self.calls_of_step

    @property
    def calls_of_step(self) -> int:
        return self.candidates + self.guided


class Attacked(NamedTuple):
    """What an attack has found of a batch's images, on the host of every process."""

    index: Int[np.ndarray, " B"]  # number of the image
    mask: Float[np.ndarray, " B"]  # 0 of rows that do not count
    label: Int[np.ndarray, " B"]
    original: Int[np.ndarray, "B T"]  # tokens
    tokens: Int[np.ndarray, "B T"]  # of the images as they end
    # Number of changed tokens at which the class was first wrong: 0 where the unchanged image was
    # classified wrongly, the budget plus 1 where the class was right to the end.
    fell: Int[np.ndarray, " B"]
    given: Int[np.ndarray, " B"]  # the class that the network gives the image as it ends
    calls: Int[np.ndarray, " B"]  # passes of the network over the image


def budget_of(tokens: int, calls: int) -> Budget:
    """The attack of at most `tokens` changes and `calls` passes, with most candidates a step.

    ValueError: `calls` is less than 1 + 2 * tokens.
    """
    candidates = (calls - 1) // tokens - 1
    if candidates < 1:
        raise ValueError(f"{tokens} changes take {1 + 2 * tokens} passes or more, not {calls}.")
    return Budget(tokens, candidates)


def check(network: Network) -> str:
    """Why the attack does not take this network, or ""."""
    if not network.classes:
        return "it has no class head"
    if network.patch:
        return "it reads pixels"
    if network.config.objective == "bert":
        return "config.model.objective=bert classifies by a vote over masks that are drawn anew"
    return ""


def attack(
    network: Network, params: dict, batch: dict, budget: Budget, key: PRNGKeyArray
) -> Attacked:
    """Changes tokens of every image until its class is wrong or the budget is spent.

    `batch` has "tokens" [B, T], "label", "index", "mask" and perhaps "variant", as global arrays;
    random changes depend on the key and the image's index. ValueError: see `check`.
    """
    if reason := check(network):
        raise ValueError(f"the attack does not take this network: {reason}.")
    asked = budget.tokens
    budget = budget._replace(tokens=min(asked, network.length - 1))  # the last token is not read
    state = _begin(network, params, batch)
    steps = 0
    while steps < budget.tokens and not state["ended"]:
        state = _change_one(
            network, params, batch, state, jax.random.fold_in(key, DRAW_KEY), budget
        )
        steps += 1
    rows = {"index": batch["index"], "mask": batch["mask"], "label": batch["label"]}
    found = jax.device_get(_fetched(state | rows | {"original": batch["tokens"]}))
    changes = found["changed"].sum(axis=1)
    fell = np.where(found["wrong"], changes, asked + 1)
    calls = 1 + changes * budget.calls_of_step
    kept = {name: found[name] for name in (*rows, "original", "tokens", "given")}
    return Attacked(**kept, fell=fell, calls=calls)


@functools.partial(jax.jit, static_argnames="network")
def _begin(network: Network, params: dict, batch: dict) -> dict:
    """The state before any change."""
    logits = _class_logits(network.bind(params), batch, batch["tokens"])
    given = jnp.argmax(logits, axis=-1)
    return {
        "tokens": batch["tokens"],
        "changed": jnp.zeros(batch["tokens"].shape, bool, out_sharding=sharding.BATCH_FIRST),
        "given": given,
        **_judged(given, batch["label"]),
    }


@functools.partial(jax.jit, static_argnames=("network", "budget"))
def _change_one(
    network: Network, params: dict, batch: dict, state: dict, key: PRNGKeyArray, budget: Budget
) -> dict:
    """The state after one more change of every image that is still right."""
    model, tokens = network.bind(params), state["tokens"]
    scores = (
        _slopes(model, batch, tokens)
        if budget.guided
        else _random_scores(network, batch, state, key)
    )
    # Of the positions that are read, so many at least have not been changed yet.
    room = scores.shape[1] - budget.tokens + 1
    count = min(budget.candidates, room * (network.vocabulary - 1))
    each = min(max(PER_POSITION, -(-count // room)), network.vocabulary - 1)
    pick = functools.partial(_best, count=count, each=each)
    places, values = jax.vmap(pick)(scores, tokens[:, : scores.shape[1]], state["changed"])

    def tried(candidate):
        place, value = candidate
        new = _with(tokens, place, value)
        logits = _class_logits(model, batch, new)
        return _margin(logits, batch["label"]), jnp.argmax(logits, axis=-1)

    margins, given = jax.lax.map(tried, (places.T, values.T))  # [candidates, B]
    best = jnp.argmin(margins, axis=0)
    chosen = jnp.arange(count)[:, None] == best[None]
    place, value, given = (jnp.where(chosen, x, 0).sum(axis=0) for x in (places.T, values.T, given))
    moving = ~state["wrong"]
    at = moving[:, None] & (jnp.arange(tokens.shape[1])[None] == place[:, None])
    given = jnp.where(moving, given, state["given"])
    return {
        "tokens": jnp.where(at, value[:, None], tokens),
        "changed": state["changed"] | at,
        "given": given,
        **_judged(given, batch["label"]),
    }


def _judged(given: Int[Array, " B"], label: Int[Array, " B"]) -> dict[str, Array]:
    """Which images have a wrong class, and whether all have."""
    return {"wrong": given != label, "ended": (given != label).all()}


def _class_logits(model: GPT, batch: dict, tokens: Int[Array, "B T"], added=None):
    start = objective.start_vectors(model.network, batch, condition_on_label=False)
    return model(tokens, start, added=added).class_logits


def _margin(logits: Float[Array, "B C"], label: Int[Array, " B"]) -> Float[Array, " B"]:
    """Logit of the true class minus the largest other one.

    Unlike the cross-entropy its gradient does not vanish where the network is sure (Carlini &
    Wagner 2017, arXiv:1608.04644).
    """
    true = jnp.arange(logits.shape[1])[None] == label[:, None]
    other = jnp.where(true, -jnp.inf, logits).max(axis=1)
    return jnp.where(true, logits, 0).sum(axis=1) - other


def _slopes(model: GPT, batch: dict, tokens: Int[Array, "B T"]) -> Float[Array, "B N V"]:
    """First-order fall of the margin when token n becomes v; the last token is never read."""
    width = model.network.config.width

    def margin(added):
        return _margin(_class_logits(model, batch, tokens, added), batch["label"]).sum()

    zeros = jnp.zeros((*tokens.shape, width), jnp.float32, out_sharding=sharding.HIDDEN)
    slope = jax.sharding.reshard(jax.grad(margin)(zeros), sharding.BATCH_FIRST)
    slope = slope[:, 1:]  # the input of position t is token t - 1
    table = sharding.gather(model.token_embedding[...], jnp.float32)
    along = jnp.einsum("bnd,vd->bnv", slope, table)
    own = jnp.arange(table.shape[0])[None, None] == tokens[:, : slope.shape[1], None]
    return jnp.where(own, along, 0).sum(axis=-1, keepdims=True) - along


def _random_scores(network: Network, batch: dict, state: dict, key) -> Float[Array, "B N V"]:
    """A random order of all changes, which differs between images and between steps."""
    shape = (network.length - 1, network.vocabulary)

    def draw(index, changes):
        own = jax.random.fold_in(jax.random.fold_in(key, index), changes)
        return jax.random.uniform(own, shape)

    return jax.vmap(draw)(batch["index"], state["changed"].sum(axis=1))


def _best(scores, tokens, changed, count: int, each: int):
    """Places and values, [count], of the best changes of one image: scores [N, V], tokens [N].

    A place has at most `each` changes; a changed token is not changed again.
    """
    number, values = scores.shape
    own = jnp.arange(values)[None] == tokens[:, None]
    scores = jnp.where(own | changed[:number, None], -jnp.inf, scores)
    best, ids = jax.lax.top_k(scores, each)
    _, at = jax.lax.top_k(best.reshape(-1), count)
    return (at // each).astype(jnp.int32), ids.reshape(-1)[at]


def _with(tokens: Int[Array, "B T"], place: Int[Array, " B"], value: Int[Array, " B"]):
    at = jnp.arange(tokens.shape[1])[None] == place[:, None]
    return jnp.where(at, value[:, None], tokens)


@jax.jit
def _fetched(state: dict) -> dict:
    """The state, whole on every process."""
    return jax.tree.map(_whole, state)


def _whole(x: Array) -> Array:
    """The array on every device of every process."""
    return jax.sharding.reshard(x, P(*[None] * x.ndim))
