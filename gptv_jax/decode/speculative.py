"""Speculative sampling: a small network proposes tokens, and the large network checks them at once.

Leviathan et al. 2023 (arXiv:2211.17192) and Chen et al. 2023 (arXiv:2302.01318). The draft draws n
tokens one by one from its distributions q. The large network reads all n in one pass, which gives
its distributions p. Token x is accepted with probability min(1, p(x) / q(x)); in place of the first
token that is not, one is drawn from max(p - q, 0), normalised. So tokens are distributed as the
large network's alone, whatever the draft is. Temperature, top-k, top-p and guidance change p and q
before the comparison; known tokens are accepted without one.

A pass of the large network thus gives 1 to n tokens of each row, and rows go on at positions of
their own. The papers draw one more token where all n are accepted; here the next pass begins with
it, so that draft and large network have always read equally many tokens.

The random numbers of a token depend on its position and its row alone. A position is visited
twice only if a token before the position was replaced, and then the first visit's proposal was
discarded. So the second visit may use equal random numbers, and the result stays exact.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.decode import cache as caching
from gptv_jax.decode import generation
from gptv_jax.decode.cache import Cache
from gptv_jax.decode.generation import UNKNOWN, repeat_rows, token_key
from gptv_jax.decode.restriction import Restriction, guidance_scales, guide, restrict
from gptv_jax.errors import InputError, shorten
from gptv_jax.model.gpt import Network
from gptv_jax.model.inputs import take_rows
from gptv_jax.tokens import Codec
from gptv_jax.tokens.differences import token_differences


@dataclasses.dataclass(frozen=True)
class Draft:
    """A small network that proposes tokens, `config.Drawing.draft_tokens` for each pass."""

    network: Network
    params: dict


def check_draft(
    draft: Network,
    draft_codec: Codec | None,
    network: Network,
    codec: Codec | None,
    name: str = "the draft",
    kinds: tuple[str, str] | None = None,
) -> None:
    """Checks that the draft's tokens mean what the network's tokens mean.

    Codecs and `kinds` are as of `token_differences`. The InputError lists the differences.
    """
    differing = token_differences(draft, draft_codec, network, codec, kinds)
    if differing:
        raise InputError(
            f"{name} has {shorten(differing)}; a draft takes a network that was trained on the "
            "tokens of the network it draws for."
        )


PROPOSE, ACCEPT, REPLACE = range(3)  # uses of random numbers, folded into a token's key


class Start(NamedTuple):
    """What the loop knows of one of the two networks before it."""

    params: dict
    prompt: Cache
    # Guidance scale of each position; None: without guidance.
    scales: Float[Array, " T"] | None


class State(NamedTuple):
    """What a pass changes."""

    tokens: Int[Array, "B columns"]  # final before `position`, proposed or unknown from there on
    position: Int[Array, " B"]  # of the next token of each row
    passes: Int[Array, " B"]  # of the large network that the row has taken
    caches: tuple[Cache, Cache]  # of the large network and of the draft


def generate(
    draft: Draft,
    network: Network,
    params: dict,
    given: Int[Array, "G N"],
    key: PRNGKeyArray,
    drawing: config_lib.Drawing = generation.DEFAULTS,
    prefix: int = 0,
    labels: Int[Array, " G"] | None = None,
    samples: int = 1,
    stopwatch: generation.Stopwatch | None = None,
) -> Int[Array, "B N"]:
    """As `generation.generate`; a `stopwatch` also counts the passes of the large network.

    A draft without classes is told none, and a draft that was not trained for guidance is not
    guided: the result is exact all the same.
    """
    if prefix == given.shape[1]:
        return repeat_rows(given, samples)
    run = stopwatch.run if stopwatch else lambda program, static, *rest: program(*static, *rest)
    first, starts = None, []
    for net, weights in ((network, params), (draft.network, draft.params)):
        told = labels if net.config.class_tokens else None
        guided = told is not None and (net is network or net.config.label_dropout)
        scales = guidance_scales(drawing, net.length) if guided else None
        static = net, scales is not None
        logits, prompt = run(generation.prefill, static, weights, given[:, :prefix], told)
        starts.append(Start(weights, prompt, scales))
        first = logits if first is None else first
    restriction = Restriction.of(drawing, network.vocabulary)
    proposals = min(drawing.draft_tokens, given.shape[1] - prefix)  # behind the end is no token
    static = network, draft.network, prefix, samples, proposals
    tokens, passes = run(draw_tokens, static, given, first, *starts, key, restriction)
    if stopwatch:
        stopwatch.passes += int(passes)
    return tokens


def by_row(arrays):
    """Arrays split over the batch again: JAX 0.12 loses the sharding of a single row."""
    return jax.sharding.reshard(arrays, sharding.BATCH_FIRST)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def draw_tokens(
    network, draft, prefix, samples, proposals, given, logits, start, draft_start, key, restriction
) -> tuple[Int[Array, "B N"], Int[Array, ""]]:
    """As `generation.draw_tokens`, and the passes of the large network, summed over the rows.

    `logits` are the large network's after the prefix. `start` and `draft_start` are of the large
    network and of the draft, which proposes `proposals` tokens for a pass.

    Raises InputError where `Layout.check_drawable` does.
    """
    for each in (network, draft):
        each.layout.check_drawable(prefix, given.shape[1])
    end = given.shape[1]
    # Positions behind the end count as known.
    given = jnp.pad(repeat_rows(given, samples), ((0, 0), (0, proposals)))
    columns, open_ = jnp.arange(given.shape[1])[None], given == UNKNOWN
    rows = by_row(jnp.arange(len(given)))

    def write(tokens, position, drawn):
        """The tokens with those `drawn` at each row's position, where no token is known."""
        here = open_ & (columns == position[:, None])
        return by_row(jnp.where(here, drawn[:, None].astype(jnp.int32), tokens))

    def draw(draws, use, position, *arguments):
        """What `draws` makes of each row's key for this use and position, and of `arguments`."""

        def of_row(row, position, *own):
            of_token = jax.random.fold_in(token_key(key, position), row)
            return draws(jax.random.fold_in(of_token, use), *own)

        return jax.vmap(of_row)(*by_row((rows, position, *arguments)))

    def reader(network, start):
        """Function that reads tokens at n positions from `position` on: logits [B, n, V]."""
        model, blocks = caching.decoding_weights(network, start.params)
        guided = start.scales is not None

        def read(tokens, position, n, cache):
            places = position[:, None] + jnp.arange(n)[None]
            x, counts = model.embed_rows(tokens, places), position - prefix - 1
            if guided:
                x, counts = (repeat_rows(each, 2, group=samples) for each in (x, counts))
            found, cache = caching.extend(model, blocks, x, start.prompt, cache, counts)
            if guided:
                by_place = start.scales.at[places]
                scales = by_place.get(mode="clip", out_sharding=sharding.BATCH_FIRST)
                found = guide(found, scales[..., None], samples)
            flat = found.reshape(-1, found.shape[-1], out_sharding=sharding.BATCH_FIRST)
            flat = restrict(flat, *restriction)
            return flat.reshape(found.shape, out_sharding=sharding.BATCH_FIRST), cache

        return read

    read, read_draft = reader(network, start), reader(draft, draft_start)

    def advance(state):
        tokens, position, passes, (cache, draft_cache) = state
        places = position[:, None] + jnp.arange(proposals)[None]
        # The random numbers of all steps at once: made step by step they cost as much as a draft.
        gumbel = functools.partial(jax.random.gumbel, shape=(draft.vocabulary,))
        gumbel = jax.vmap(functools.partial(draw, gumbel, PROPOSE), 1, 0)(places)

        def propose(carry, step):
            (tokens, draft_cache), (number, noise) = carry, step
            at = position + number
            found, draft_cache = read_draft(tokens, at, 1, draft_cache)
            drawn = jnp.argmax(found[:, 0] + by_row(noise), axis=-1)
            return (write(tokens, at, drawn), draft_cache), by_row(found[:, 0])

        steps = jnp.arange(proposals), gumbel
        (tokens, draft_cache), proposed = jax.lax.scan(propose, (tokens, draft_cache), steps)
        q = jax.nn.softmax(jnp.swapaxes(proposed, 0, 1), axis=-1)
        found, cache = read(tokens, position, proposals, cache)
        p = jax.nn.softmax(found, axis=-1)

        drawn, is_open = (take_rows(each, places) for each in (tokens, open_))
        chosen = jax.nn.one_hot(drawn, p.shape[-1])
        uniform = functools.partial(draw, jax.random.uniform, ACCEPT)
        uniform = jax.vmap(uniform, 1, 1)(places)
        accepted = uniform * (q * chosen).sum(axis=-1) < (p * chosen).sum(axis=-1)
        accepted = jnp.cumprod(accepted | ~is_open, axis=1).sum(axis=1)  # before the first refusal

        p, q = (take_rows(each, accepted[:, None])[:, 0] for each in (p, q))
        rest = jnp.maximum(p - q, 0)
        # Where p and q are equal but for rounding, nothing may be left of p.
        rest = jnp.where(rest.sum(axis=1, keepdims=True) > 0, rest, p)
        refused, at = accepted < proposals, position + accepted
        replacing = draw(jax.random.categorical, REPLACE, at, jnp.log(rest))
        tokens = write(tokens, jnp.where(refused, at, -1), replacing)
        passes = passes + (position < end)
        position = jnp.minimum(position + accepted + refused, end)
        return State(*by_row((tokens, position, passes)), (cache, draft_cache))

    # The first token follows from the prompts.
    if start.scales is not None:
        logits = guide(logits, start.scales[prefix], 1)
    logits = restrict(repeat_rows(logits, samples), *restriction)
    position = rows * 0 + prefix
    tokens = write(given, position, draw(jax.random.categorical, REPLACE, position, logits))
    state = State(
        *by_row((tokens, position + 1, rows * 0 + 1)),
        tuple(
            caching.empty_cache(each, len(rows) * (1 if s.scales is None else 2), 0)
            for each, s in ((network, start), (draft, draft_start))
        ),
    )
    for size in caching.cache_capacities(end - prefix - 1):
        caches = tuple(caching.pad_cache(each, size + proposals) for each in state.caches)

        def more(state, size=size):
            last = state.position.max() - prefix - 1
            return (state.position < end).any() & (last <= size)

        state = jax.lax.while_loop(more, advance, state._replace(caches=caches))
    return state.tokens[:, :end], state.passes.sum()
