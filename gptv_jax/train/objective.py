"""What pretraining predicts: each token from earlier tokens, or masked tokens from all others.

The second is the BERT objective of Image GPT (Chen et al. 2020), which hides a share `masked_share`
of the tokens. Evaluation masks as well, since the network has never seen a whole image; the masks
then depend only on the image's number in its split and on the number of the vote.

Random orders (RAR, Yu et al. 2024, arXiv:2411.00776) change which tokens come "before".
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gptv_jax import sharding
from gptv_jax.model.gpt import GPT, Network, Output
from gptv_jax.model.layout import Layout, Part
from gptv_jax.model.parts import soft_targets

LOGITS_BYTES = 2**27  # most float32 logits that a device holds at a time
# Folded into a step's key; dropout folds in the numbers of the layers, which are smaller.
MASK_KEY, LABEL_DROPOUT_KEY, ORDER_KEY, CONTEXT_KEY = (2**31 - i for i in (1, 2, 3, 4))


def cross_entropy(logits: Float[Array, "*B V"], targets: Int[Array, "..."]) -> Float[Array, "*B"]:
    """Negative log-likelihood, in nats, of every target or of targets along the last axes of B."""
    targets = jnp.broadcast_to(targets, logits.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def sequence(layout: Layout, batch: dict, key: str = "inputs") -> Int[Array, "B T"]:
    """The tokens of whole sequences: what the network reads, or with key="targets" predicts.

    The first part is batch["tokens"], every other part batch[key][name]. A part without "inputs" is
    read as its "targets" are. A part without tokens is zeros.
    """
    first, count = layout.parts[0], len(jax.tree.leaves(batch)[0])
    found = {**batch.get("targets", {}), **batch.get(key, {})}
    found |= {first.name: batch["tokens"]} if "tokens" in batch else {}

    def row(part: Part) -> Int[Array, "B n"]:
        if part.name in found or (part.vocabulary and part != first):
            return found[part.name]
        return jnp.zeros((count, part.size), jnp.int32, out_sharding=sharding.BATCH_FIRST)

    return jnp.concatenate([row(part) for part in layout.parts], axis=1)


def _by_part(
    network: Network, params: dict, batch: dict, key: PRNGKeyArray | None, soft: Mapping[str, float]
) -> dict[str, tuple[Float[Array, "B n"], Float[Array, "B n"]]]:
    """Nats and weights of the positions of every predicted part; a part's weights are 1 or given.

    `soft` has parts whose targets are `soft_targets`, and the deviation of these. Without a key
    there is no dropout.
    """
    model, layout = network.bind(params), network.layout
    final = model(sequence(layout, batch), key=key, pixels=network.pixels_of(batch)).final
    with jax.named_scope("loss"):
        final, found = jax.sharding.reshard(final, sharding.BATCH_FIRST), {}
        targets = sequence(layout, batch, "targets")
        for part in (part for part in layout.parts if part.predicted):
            where, deviation = layout.slices[part.name], soft.get(part.name, 0.0)
            nats = part_nats(model, part, final[:, where], targets[:, where], deviation)
            weights = batch.get("weights", {}).get(part.name, jnp.ones_like(nats))
            found[part.name] = nats, weights
    return found


def parts_nats(network: Network, params: dict, batch: dict) -> Float[Array, " B"]:
    """Mean nats of each row's tokens of the predicted parts, of the tokens with a weight above 0.

    The mean is not weighted, targets are not soft, and there is no dropout; 0 for a row without any
    such token.
    """
    found = _by_part(network, params, batch, None, {}).values()
    nats, weights = (jnp.concatenate(each, axis=1) for each in zip(*found, strict=True))
    return masked_mean(nats, weights > 0)


def make_parts_loss(network: Network, soft: Mapping[str, float] = MappingProxyType({})) -> Callable:
    """The loss of a network of several parts, see `train.step`; no step and no array changes it.

    The sum over the predicted parts of the mean over rows and positions of nats times
    batch["weights"][name], or 1. `soft` has parts whose targets are `soft_targets`, and the
    deviation of these.
    """

    def loss(params, frozen, batch, key, step=None):
        del frozen, step
        parts = _by_part(network, params, batch, key, soft)
        losses = {name: (nats * weights).mean() for name, (nats, weights) in parts.items()}
        total = sum(losses.values())
        by_part = {f"{name}_loss": each for name, each in losses.items()} if len(parts) > 1 else {}
        return total, {"loss": total, **by_part}

    return loss


@jax.named_scope("loss")
def nats_per_token(
    model: GPT, output: Output, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"] | None
) -> Float[Array, " B"]:
    """Mean negative log-likelihood of each image's tokens; of the masked tokens only for BERT."""
    return row_means(token_nats(model, output, tokens), mask)


def token_nats(model: GPT, output: Output, tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Negative log-likelihood of each token of images or clips."""
    tokens = jax.sharding.reshard(tokens, sharding.HIDDEN)
    return part_nats(model, model.network.layout.parts[0], output.final, tokens)


def row_means(nats: Float[Array, "B T"], mask: Bool[Array, "B T"] | None) -> Float[Array, " B"]:
    """Mean of each row; with a mask, see `masked_mean`."""
    return nats.mean(axis=1) if mask is None else masked_mean(nats, mask)


def masked_mean(nats: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Mean of each row over the positions where `mask` is true; 0 for a row without any."""
    return (nats * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)


def part_nats(
    model: GPT,
    part: Part,
    final: Float[Array, "B n D"],
    tokens: Int[Array, "B n"],
    soft: float = 0.0,
) -> Float[Array, "B n"]:
    """Cross-entropy of every token of a part, given the output of the final norm; see `by_chunks`.

    `soft` is the deviation of the `soft_targets`, 0 without. A `LevelHead` needs no chunks.
    """
    if part.levels:
        return model.head.nats(final, tokens)

    def nats(final, tokens):
        logits = model.token_logits(final, part)
        if not soft:
            return cross_entropy(logits, tokens)
        return optax.softmax_cross_entropy(logits, soft_targets(tokens, part, soft))

    return by_chunks(nats, model.network, part, (final, tokens))


def by_chunks(
    compute: Callable, network: Network, part: Part, arrays: tuple[Array, ...], networks: int = 1
):
    """A tree of arrays, `compute(*arrays)`, which computes logits; all arrays are [B, n, ...].

    Where the logits of all positions do not fit into LOGITS_BYTES, they are computed for a chunk of
    the positions at a time, and once more in the backward pass. `networks` is the number of
    networks whose logits `compute` holds.
    """
    rows, sizes = len(arrays[0]), jax.sharding.get_abstract_mesh().shape
    chunks = loss_chunks(network, rows, sizes, part, networks)
    if chunks == 1:
        return compute(*arrays)
    spec = sharding.BATCH_FIRST if network.several else sharding.HIDDEN

    def split(x):  # chunk r has the positions r, r + chunks ...: so all devices work on every chunk
        shape = (x.shape[0], -1, chunks, *x.shape[2:])
        return jnp.moveaxis(x.reshape(shape, out_sharding=spec), 2, 0)

    found = jax.lax.map(jax.checkpoint(lambda chunk: compute(*chunk)), tuple(map(split, arrays)))

    def join(x):
        shape = (*arrays[0].shape[:2], *x.shape[3:])
        return jnp.moveaxis(x, 0, 2).reshape(shape, out_sharding=spec)

    return jax.tree.map(join, found)


def loss_chunks(
    network: Network,
    rows: int,
    sizes: Mapping[str, int],
    part: Part | None = None,
    networks: int = 1,
) -> int:
    """Number of chunks in which `by_chunks` computes a part's logits, one after the other.

    `rows` is the batch size over all devices, `sizes` are the mesh's by axis (1 where missing). The
    part is by default the first one. `networks` have logits of it at a time.
    """
    sizes = {axis: sizes.get(axis, 1) for axis in sharding.AXES}
    part = part or network.layout.parts[0]
    # Of several parts, each is whole on the devices that the sequence is split over.
    length = part.size if network.several else part.size // sizes["sequence"]
    held = max(rows // (sizes["data"] * sizes["fsdp"]), 1)
    position_bytes = 4 * networks * part.vocabulary * held
    needed = -(-length * position_bytes // LOGITS_BYTES)
    # A chunk has two positions at least: one alone has no axis that could be split.
    possible = [n for n in range(1, max(length // 2, 1) + 1) if length % n == 0]
    return next((n for n in possible if n >= needed), possible[-1])


def draw_mask(network: Network, rows: int, key: PRNGKeyArray | None) -> Bool[Array, "B T"] | None:
    """Which tokens of a training batch are masked; None unless the objective is BERT."""
    if network.config.objective == "autoregressive":
        return None
    key = jax.random.fold_in(key, MASK_KEY)
    shape, share = (rows, network.length), network.config.masked_share
    return jax.random.bernoulli(key, share, shape, out_sharding=sharding.HIDDEN)


def draw_hidden(network: Network, rows: int, key: PRNGKeyArray | None) -> Bool[Array, "B T"] | None:
    """Which input tokens of a training batch are hidden; see `Model.context_masking`.

    Each row hides a share of its tokens, which it draws; of clips, of those before the last frame.
    None: no token, as where the network learns to classify.
    """
    most = network.config.context_masking
    if key is None or not most or network.classes:
        return None
    of_clip, of_token = jax.random.split(jax.random.fold_in(key, CONTEXT_KEY))
    # Whole along the positions, as tokens are: both are moved by one position.
    spec, shape = sharding.BATCH_FIRST, (rows, network.length)
    share = jax.random.uniform(of_clip, (rows, 1), maxval=most, out_sharding=spec)
    drawn = jax.random.uniform(of_token, shape, out_sharding=spec)
    last = network.length - (network.length // network.frames if network.frames else 0)
    return (drawn < share) & (jnp.arange(network.length) < last)[None]


def of_stills(network: Network, still: Bool[Array, " B"]) -> Bool[Array, "B T"]:
    """Which tokens count in the loss: of a row that is a single image, those of the first frame."""
    first = jnp.arange(network.length) < network.length // network.frames
    return jax.sharding.reshard(first[None] | ~still[:, None], sharding.HIDDEN)


def start_vectors(
    network: Network, batch: dict, key: PRNGKeyArray | None = None, *, condition_on_label: bool
) -> Int[Array, " B"] | None:
    """Index of the start vector that each row begins with; None: `Network.unconditional` for all.

    A class-conditional network has one for each class and one for "no class", which a share
    `label_dropout` of the rows gets where a training step gives its key. `condition_on_label` is
    false where the class must be predicted, by the network's class head or by a probe. Any other
    network has one for each variant of the training's augmentation, or a single one: an image whose
    variant has no start vector begins with the first, as one that is not augmented does.
    """
    if network.config.class_tokens:
        if not condition_on_label:
            return None
        if key is None:
            return batch["label"]
        key, share = jax.random.fold_in(key, LABEL_DROPOUT_KEY), network.config.label_dropout
        shape, spec = batch["label"].shape, sharding.BATCH_FIRST
        dropped = jax.random.bernoulli(key, share, shape, out_sharding=spec)
        return jnp.where(dropped, network.unconditional, batch["label"])
    variant = batch.get("variant")
    return None if variant is None else jnp.where(variant < network.starts, variant, 0)


def random_order_share(bounds: tuple[float, float], done: Float[Array, ""]) -> Float[Array, ""]:
    """Probability of a random order: 1 up to the first bound, then linearly to 0 at the second."""
    return jnp.interp(done, jnp.array(bounds), jnp.array([1.0, 0.0]))


def draw_order(
    network: Network,
    rows: int,
    key: PRNGKeyArray | None,  # without it all orders are raster
    step: Int[Array, ""] | None,  # steps taken of `steps`
    steps: int | None,
) -> Int[Array, "B T"] | None:
    """Orders of a training batch's tokens, see `GPT.__call__`; None where all are raster."""
    if not network.config.random_order or key is None:
        return None
    which, bits = jax.random.split(jax.random.fold_in(key, ORDER_KEY))
    shape, spec = (rows, network.length), sharding.BATCH_FIRST
    shuffled = jnp.argsort(jax.random.bits(bits, shape, out_sharding=spec), axis=1)
    share = random_order_share(network.config.random_order, step / steps)
    random = jax.random.bernoulli(which, share, (rows, 1), out_sharding=spec)
    return jnp.where(random, shuffled, jnp.arange(network.length)[None])


def evaluate_batch(
    network: Network,
    params: dict,
    batch: dict,
    vote: int = 0,
    *,
    condition_on_label: bool = False,
    raw: bool = False,
    keep: tuple[int, ...] = (),
) -> tuple[Output, Bool[Array, "B T"] | None]:
    """The network's output for a batch of `Pipeline.evaluation`, and the mask of its tokens.

    For BERT, `vote` (0 .. `network.votes`-1) says which mask each image, named by batch["index"],
    gets. `condition_on_label` is explained at `start_vectors`, `raw` and `keep` at `GPT.__call__`.
    """
    mask = None
    if network.config.objective == "bert":
        key = jax.random.fold_in(jax.random.key(0), vote)

        def draw(index: Int[Array, ""]) -> Bool[Array, " T"]:
            image_key = jax.random.fold_in(key, index)
            return jax.random.bernoulli(image_key, network.config.masked_share, (network.length,))

        mask = jax.sharding.reshard(jax.vmap(draw)(batch["index"]), sharding.HIDDEN)
    start = start_vectors(network, batch, condition_on_label=condition_on_label)
    model = network.bind(params)
    given, pixels = (batch["tokens"], start), network.pixels_of(batch)
    return model(*given, hidden=mask, pixels=pixels, raw=raw, keep=keep), mask


def clips_of(batch: dict) -> list[dict]:
    """A batch for each of the K clips of every video, whose "tokens" are [B, K, T]."""
    tokens = batch["tokens"]
    if tokens.ndim == 2:
        return [batch]
    return [batch | {"tokens": tokens[:, clip]} for clip in range(tokens.shape[1])]
