"""What pretraining predicts: each token from those before it, or hidden ones from all others.

The second is the BERT objective of Image GPT (Chen et al. 2020): `masked_share` of the positions
lose their content, but not their place, and their tokens are to be told. Evaluation hides as well,
since the network has never seen whole images; which positions then depends on the number of the
image in its split, and of the vote, alone.

What the first means by "before" is drawn here, too, where training has random orders (RAR, Yu et
al. 2024, arXiv:2411.00776), and whether a class-conditional network is told the class is decided.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gptv_jax import sharding
from gptv_jax.model.gpt import GPT, Network, Output

LOGITS_BYTES = 2**27  # of float32 logits, that a device holds at a time
# What is folded into a step's key, beyond the numbers of layers, which dropout takes.
HIDE, UNTELL, REORDER = (2**31 - i for i in (1, 2, 3))


def cross_entropy(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Negative log-likelihood of every target, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


@jax.named_scope("loss")
def nats_per_token(
    model: GPT, output: Output, tokens: Int[Array, "B T"], hidden: Bool[Array, "B T"] | None
) -> Float[Array, "B"]:
    """Of each image: the mean over all its tokens or, where some are hidden, over these."""
    nats = token_nats(model, output, jax.sharding.reshard(tokens, sharding.HIDDEN))
    return nats.mean(axis=1) if hidden is None else mean_where(hidden, nats)


def mean_where(hidden: Bool[Array, "B T"], nats: Float[Array, "B T"]) -> Float[Array, "B"]:
    """Of each image: the mean over what is hidden; 0 where nothing is."""
    return (nats * hidden).sum(axis=1) / jnp.maximum(hidden.sum(axis=1), 1)


def token_nats(model: GPT, output: Output, tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Cross-entropy of every token.

    Where all logits are too many for a device they are computed for a part of the positions at a
    time and, as only their gradient's sums are kept, once more in the backward pass.
    """
    parts = loss_parts(model.network, len(tokens), jax.sharding.get_abstract_mesh().shape)
    if parts == 1:
        return cross_entropy(output.logits, tokens)
    spec = PartitionSpec(*sharding.HIDDEN, None)

    def split(x):  # part r has the positions r, r + parts ...: so all devices work on every part
        shape = (x.shape[0], -1, parts, *x.shape[2:])
        return jnp.moveaxis(x.reshape(shape, out_sharding=spec), 2, 0)

    @jax.checkpoint
    def nats(part):
        final, tokens = part
        return cross_entropy(model.token_logits(final), tokens)

    found = jax.lax.map(nats, (split(output.final), split(tokens)))
    return jnp.moveaxis(found, 0, 2).reshape(tokens.shape, out_sharding=sharding.HIDDEN)


def loss_parts(network: Network, rows: int, sizes: Mapping[str, int]) -> int:
    """Parts that the positions' logits are computed in, one after the other.

    Args:
      network: gives T and V.
      rows: of the batch, over all devices.
      sizes: of the mesh, by axis; none is one device.
    """
    sizes = {axis: sizes.get(axis, 1) for axis in sharding.AXES}
    length = network.length // sizes["sequence"]
    of_position = 4 * network.vocabulary * max(rows // (sizes["data"] * sizes["fsdp"]), 1)
    wanted = -(-length * of_position // LOGITS_BYTES)
    # Of two positions at least; one alone has no axis of its own.
    possible = [n for n in range(1, max(length // 2, 1) + 1) if length % n == 0]
    return next((n for n in possible if n >= wanted), possible[-1])


def hide(network: Network, rows: int, key: PRNGKeyArray | None) -> Bool[Array, "B T"] | None:
    """Which positions of a training batch are hidden; None where the objective hides nothing."""
    if network.config.objective == "autoregressive":
        return None
    key = jax.random.fold_in(key, HIDE)
    shape, share = (rows, network.length), network.config.masked_share
    return jax.random.bernoulli(key, share, shape, out_sharding=sharding.HIDDEN)


def starts(
    network: Network, batch: dict, key: PRNGKeyArray | None = None, *, told: bool
) -> Int[Array, "B"] | None:
    """Which start vector each row of a batch begins with, for `GPT.__call__`.

    Args:
      network: the network.
      batch: "variant" or, for a class-conditional network that is told the class, "label".
      key: of a training step, which does not tell a share `label_dropout` of the rows; None tells
        all of them.
      told: whether such a network may know the class: not where it, or a probe, is to find it out.
    """
    if not network.config.class_tokens:
        return batch["variant"]
    if not told:
        return None
    if key is None:
        return batch["label"]
    key, share = jax.random.fold_in(key, UNTELL), network.config.label_dropout
    shape, spec = batch["label"].shape, sharding.BATCH_FIRST
    untold = jax.random.bernoulli(key, share, shape, out_sharding=spec)
    return jnp.where(untold, network.unconditional, batch["label"])


def reordered(random_order: tuple[float, float], done: Float[Array, ""]) -> Float[Array, ""]:
    """Probability that a row has a random order, when a share `done` of the training is.

    1 up to the first share of `random_order`, from there in a line to 0 at the second.
    """
    return jnp.interp(done, jnp.array(random_order), jnp.array([1.0, 0.0]))


def draw_order(
    network: Network,
    rows: int,
    key: PRNGKeyArray | None,
    step: Int[Array, ""] | None,
    steps: int | None,
) -> Int[Array, "B T"] | None:
    """Orders for a training batch, see `GPT.__call__`; None where all of them are raster.

    Args:
      network: the network.
      rows: of the batch.
      key: of the step; None: raster.
      step: steps that were taken before.
      steps: of the whole training.
    """
    if not network.config.random_order or key is None:
        return None
    which, bits = jax.random.split(jax.random.fold_in(key, REORDER))
    shape, spec = (rows, network.length), sharding.BATCH_FIRST
    shuffled = jnp.argsort(jax.random.bits(bits, shape, out_sharding=spec), axis=1)
    share = reordered(network.config.random_order, step / steps)
    random = jax.random.bernoulli(which, share, (rows, 1), out_sharding=spec)
    return jnp.where(random, shuffled, jnp.arange(network.length)[None])


def evaluated(
    network: Network,
    params: dict,
    batch: dict,
    vote: int = 0,
    *,
    told: bool = False,
    raw: bool = False,
    keep: tuple[int, ...] = (),
) -> tuple[Output, Bool[Array, "B T"] | None]:
    """The network's output for a batch of `Pipeline.evaluation`, and what was hidden.

    Args:
      network: the network.
      params: its weights.
      batch: "tokens", what `starts` reads and, for BERT, "index", the image's number in its split.
      vote: 0 .. `network.votes`-1; which of BERT's masks.
      told: see `starts`.
      raw: see `GPT.__call__`.
      keep: the same.
    """
    hidden = None
    if network.config.objective == "bert":
        key = jax.random.fold_in(jax.random.key(0), vote)

        def draw(index: Int[Array, ""]) -> Bool[Array, "T"]:
            of_image = jax.random.fold_in(key, index)
            return jax.random.bernoulli(of_image, network.config.masked_share, (network.length,))

        hidden = jax.sharding.reshard(jax.vmap(draw)(batch["index"]), sharding.HIDDEN)
    model, inputs = network.bind(params), (batch["tokens"], starts(network, batch, told=told))
    return model(*inputs, hidden=hidden, raw=raw, keep=keep), hidden


def elect(class_logits: Float[Array, "votes *B C"]) -> Int[Array, "*B"]:
    """The class of most votes; among equals the one of higher mean probability."""
    votes = jax.nn.one_hot(jnp.argmax(class_logits, axis=-1), class_logits.shape[-1]).sum(axis=0)
    likely = jax.nn.softmax(class_logits, axis=-1).mean(axis=0)
    return jnp.argmax(votes + likely, axis=-1)  # a probability is less than a vote
