"""What a network reads at every position: its token, its place, and for images their pixels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from gptv_jax import sharding
from gptv_jax.model import layers
from gptv_jax.model.layout import Part
from gptv_jax.model.parts import PartWeights, Stem, centers, scaled


class Inputs(nnx.Module):
    """The weights of a `Network` that make inputs of the layers, one for each position."""

    def __init__(self, network, *, rngs: nnx.Rngs):
        config, V, D = network.config, network.vocabulary, network.config.width
        first, *others = network.layout.parts
        _, rows, columns = first.axes
        self.network = network
        if network.patch:
            size = math.prod(network.patch)
            self.patch_embedding = layers.normal(rngs, "patch_embedding", (size, D), size**-0.5)
        elif V:
            self.token_embedding = layers.normal(rngs, "token_embedding", (V, D), 0.02)
        if network.layout.shift:
            self.start = layers.normal(rngs, "start", (network.starts, D), 0.02)
        if config.learned_positions:  # with target_positions, one row more for the start vector
            places = rows * columns + config.target_positions
            self.position = layers.normal(rngs, "position", (places, D), 0.01)
        if config.axial_positions:
            self.row = layers.normal(rngs, "row", (rows, D), 0.01)
            self.column = layers.normal(rngs, "column", (columns, D), 0.01)
        if config.target_positions:
            self.target_position = layers.normal(rngs, "target_position", (rows * columns, D), 0.01)
        if network.frames and not config.rotary:  # zero: the first frame begins as an image
            self.frame = layers.constant("frame", (network.frames, D), 0.0)
        if others:
            self.parts = nnx.Dict({p.name: PartWeights(p, D, rngs=rngs) for p in others})
        if network.stem:
            self.stem = Stem(network.stem, D, tokens=V > 0, rngs=rngs)

    def embed(
        self,
        tokens: Int[Array, "B P"],
        variant: Int[Array, " B"] | None = None,
        spec: jax.P = sharding.HIDDEN,
        order: Int[Array, "B N"] | None = None,
        pixels: UInt8[Array, "B *F height width C"] | None = None,
        hidden: Bool[Array, "B P"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Inputs of N = P + 1 positions, sharded by `spec`: the start vector, then P tokens.

        `variant` and `pixels` are as in `__call__`. The `order` has the places on the grid of the
        tokens that the positions predict; None: 0 .. P. Of `hidden` tokens only the place is read.
        """
        if variant is None:
            variant = jnp.full(len(tokens), self.network.unconditional, jnp.int32)
        # Start vectors are looked up as rows V, V+1, ... of one table with tokens: token numbers
        # are then shifted by one position, not vectors, and where the sequence is split no device
        # needs vectors of its neighbour.
        variant, tokens = jax.sharding.reshard((variant, tokens), sharding.BATCH_FIRST)
        network = self.network
        if network.patch or network.several or network.stem:
            start = self._lookup([self.start], variant[:, None], sharding.BATCH_FIRST)
            if network.patch:
                held = self.contents(tokens, pixels)
                held = jax.sharding.reshard(held, sharding.BATCH_FIRST)[:, : tokens.shape[1]]
            else:
                held = self._held(tokens, pixels)
            x = jax.sharding.reshard(jnp.concatenate([start, held], axis=1), spec)
        else:
            ids = jnp.concatenate([network.vocabulary + variant[:, None], tokens], axis=1)
            x = self._lookup([self.token_embedding, self.start], ids, spec)
        return self._place(self._seen(x, hidden, spec), 0, order)

    def _seen(self, x: Float[Array, "B N D"], hidden: Bool[Array, "B P"] | None, spec: jax.P):
        """The inputs of N positions, with zeros in place of hidden tokens."""
        if hidden is None:
            return x
        starts = x.shape[1] - hidden.shape[1]
        seen = jnp.pad(~hidden, ((0, 0), (starts, 0)), constant_values=True)
        seen = jax.sharding.reshard(seen, spec)
        return jnp.where(seen[..., None], x, jnp.zeros((), x.dtype))

    def embed_masked(
        self, tokens: Int[Array, "B T"], hidden: Bool[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """BERT's inputs: each position's own token and its place; of masked tokens the place."""
        x = self.contents(tokens)
        if hidden is not None:
            x = jnp.where(hidden[..., None], jnp.zeros((), x.dtype), x)
        return self._place(x, 0)

    def contents(
        self,
        tokens: Int[Array, "B P"],
        pixels: UInt8[Array, "B height width C"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What positions read of the first part's tokens, without their places, in raster order.

        Embeddings of the P tokens; with `Network.patch` the pixels, from -1 to 1, of all T tokens
        through a linear map.
        """
        if not self.network.patch:
            return self._lookup([self.token_embedding], tokens, sharding.HIDDEN)
        (rows, columns), (height, width, channels) = self.network.grid, self.network.patch
        shape = len(pixels), rows, height, columns, width, channels
        x = jax.sharding.reshard(pixels, sharding.BATCH_FIRST)
        x = x.reshape(shape, out_sharding=sharding.BATCH_FIRST).swapaxes(2, 3)
        x = x.reshape(len(pixels), rows * columns, -1, out_sharding=sharding.BATCH_FIRST)
        x = (x.astype(jnp.float32) / 127.5 - 1).astype(self.network.config.dtype)
        x = jax.sharding.reshard(x, sharding.HIDDEN)
        return layers.project("btp,pd->btd", x, self.patch_embedding[...], sharding.HIDDEN)

    def embed_one(
        self, tokens: Int[Array, "B T"], position: Int[Array, ""], part: Part | None = None
    ) -> Float[Array, "B 1 D"]:
        """Input of `position` >= 1: the token before it, in `part`; later tokens are not read.

        The part is by default the only one; of several parts, one after the first.
        """
        part = part or self.network.layout.parts[0]
        width = part.shape[-1] if part.summed else 1
        place = position - 1 - self.network.layout.slices[part.name].start
        held = jax.lax.dynamic_slice_in_dim(tokens, position - 1 - place % width, width, axis=1)
        x = self._of_tokens(part, held)
        if width > 1:  # the tokens of the row up to this one
            seen = jnp.arange(width) <= place % width
            x = jnp.where(seen[None, :, None], x, 0).sum(axis=1, keepdims=True)
        return self._place(x, position)

    def embed_rows(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B N"]
    ) -> Float[Array, "B N D"]:
        """Inputs of positions after start vectors of a layout of one part, each row at its own.

        Beyond the sequence the result has no meaning.
        """
        held = take_rows(tokens, positions - self.network.layout.shift)
        return self._place(self._of_tokens(self.network.layout.parts[0], held), positions)

    def _held(self, tokens, pixels) -> Float[Array, "B P D"]:
        """The first P tokens of every row, of all parts, before tables of positions are added."""
        found, (first, *_) = [], self.network.layout.parts
        for part in self.network.layout.parts:
            ids = tokens[:, self.network.layout.slices[part.name]]
            count, width = ids.shape[1], part.shape[-1]
            if count == 0:
                break
            if part.summed:  # over each row, whose last tokens may not be known
                ids = jnp.pad(ids, ((0, 0), (0, -count % width)))
            x = self._of_tokens(part, ids) if part.vocabulary else 0
            if part.summed:
                rows = x.reshape(len(x), -1, width, x.shape[2], out_sharding=sharding.BATCH_FIRST)
                x = jnp.cumsum(rows, axis=2)
                x = x.reshape(ids.shape + x.shape[3:], out_sharding=sharding.BATCH_FIRST)[:, :count]
            if part == first and self.network.stem:
                x = x + self.stem(pixels, self.network.config.dtype)[:, :count]
            if part == first and (features := self._features()) is not None:
                x = x + features[None, :count]
            found.append(x)
        return jnp.concatenate(found, axis=1)

    def _of_tokens(self, part: Part, ids: Int[Array, "B N"]) -> Float[Array, "B N D"]:
        """Embeddings of a part's tokens."""
        if part == self.network.layout.parts[0]:
            return self._lookup([self.token_embedding], ids, sharding.BATCH_FIRST)
        table = self.parts[part.name].table(self.network.config.dtype)
        return table.at[ids].get(out_sharding=sharding.BATCH_FIRST)

    def _features(self) -> Float[Array, "N D"] | None:
        """What positions are given that hold the image, for parts that are at places in it."""
        first, *others = self.network.layout.parts
        scales = [self.parts[part.name].place for part in others if part.has_places]
        if not scales:
            return None
        found, dtype = centers(first.shape, self.network.config.width), self.network.config.dtype
        return functools.reduce(jnp.add, [scaled(found, scale, dtype) for scale in scales])

    def _lookup(
        self, tables: list[nnx.Param], ids: Int[Array, "*ids"], spec: jax.P
    ) -> Float[Array, "*ids D"]:
        """Rows `ids` of the tables, which are concatenated first."""
        whole = [sharding.gather(table[...], self.network.config.dtype) for table in tables]
        return jnp.concatenate(whole).at[ids].get(out_sharding=spec)

    def _place(
        self,
        x: Float[Array, "B P D"],
        start: int | Int[Array, ""] | Int[Array, "B P"],
        order: Int[Array, "B P"] | None = None,
    ) -> Float[Array, "B P D"]:
        """Adds the tables of positions to the inputs of positions start .. start+P-1.

        `start` may be the positions themselves, of each row its own, without an `order`.
        With an `order` the P inputs are of the whole order. A table with one row per place is
        read at the place of the predicted token; a table whose first row is of the start vector, at
        the row of the input token. In raster order both are the row of the position's number.
        """
        config, (first, *others) = self.network.config, self.network.layout.parts
        frames, rows, columns = first.axes
        gather = functools.partial(sharding.gather, dtype=config.dtype)
        of_place, tables = [], []
        start_rows = int(config.target_positions)  # of a table, for the start vector

        def in_frames(table):  # the table of a frame's places, for the places of all frames
            own = [table[:start_rows], *[table[start_rows:]] * frames]
            return table if frames == 1 else jnp.concatenate(own)

        if config.learned_positions:
            of_place.append(in_frames(gather(self.position[...])))
        if config.axial_positions:  # zeros for the start vector come first
            row = jnp.repeat(gather(self.row[...]), columns, axis=0)
            column = jnp.tile(gather(self.column[...]), (rows, 1))
            of_place += [in_frames(jnp.pad(t, ((start_rows, 0), (0, 0)))) for t in (row, column)]
        if hasattr(self, "frame"):
            frame = jnp.repeat(gather(self.frame[...]), rows * columns, axis=0)
            of_place.append(jnp.pad(frame, ((start_rows, 0), (0, 0))))
        if others and not of_place:
            of_place.append(jnp.zeros((first.size, config.width), config.dtype))
        if of_place:
            inputs = None if order is None else input_places(order) + 1
            places = inputs if config.target_positions else order
            whole = functools.reduce(jnp.add, of_place)
            later = [self.parts[part.name].positions(config.dtype) for part in others]
            tables.append((jnp.concatenate([whole, *later]) if later else whole, places))
        if config.target_positions:
            tables.append((jnp.tile(gather(self.target_position[...]), (frames, 1)), order))
        for table, places in tables:
            if places is not None:
                x = x + table.at[places].get(out_sharding=sharding.HIDDEN)
            elif jnp.ndim(start):
                x = x + table.at[start].get(mode="clip", out_sharding=sharding.BATCH_FIRST)
            else:
                x = x + jax.lax.dynamic_slice_in_dim(table, start, x.shape[1])[None]
        return x

    def rotation(
        self, start: int | Int[Array, "*B"], count: int, order: Int[Array, "B T"] | None = None
    ) -> layers.Rotation | None:
        """Rotary phases of positions start .. start+count-1, or of all positions of an order.

        `start` is a number, or one of each row.
        """
        config, layout = self.network.config, self.network.layout
        if not config.rotary:
            return None
        # Frame, row and column of place -1, one before the first, and of every position.
        before = 0, -1, layout.parts[0].shape[-1] - 1
        known = jnp.array(np.concatenate([[before], layout.coordinates()]), jnp.int32)

        def held(predicted):  # places of input tokens; -1 of a start vector
            return jnp.maximum(predicted - layout.shift, -1)

        def phases(places):
            # A prompt's padding has no place, and is not seen.
            axes = known.at[places + 1].get(mode="clip").astype(jnp.float32)
            return layers.phases(axes, config.width // config.heads)

        def by_row(*places, spec):
            every, spec = phases(jnp.arange(-1, layout.length)), jax.P(None, *spec)
            found = (every.at[:, p + 1].get(mode="clip", out_sharding=spec) for p in places)
            return layers.Rotation(*found)

        if order is not None:
            return by_row(order, input_places(order), spec=sharding.HIDDEN)
        if jnp.ndim(start):
            predicted = start[:, None] + jnp.arange(count)[None]
            return by_row(predicted, held(predicted), spec=sharding.BATCH_FIRST)
        predicted = start + jnp.arange(count)
        return layers.Rotation(*(phases(p) for p in (predicted, held(predicted))))


def reorder(tokens: Int[Array, "B T"], order: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Tokens in the given order: entry t of a row is the row's token at place order[t]."""
    return jnp.take_along_axis(*jax.sharding.reshard((tokens, order), sharding.BATCH_FIRST), axis=1)


def take_rows(x: Shaped[Array, "B N *any"], places: Int[Array, "B P"]) -> Shaped[Array, "B P *any"]:
    """Picks entries of each row at that row's places; a place beyond the row gets the last entry.

    Unlike `jnp.take_along_axis`, this keeps the sharding of a batch of one row.
    """
    x, places = jax.sharding.reshard((x, places), sharding.BATCH_FIRST)
    return jax.vmap(lambda row, at: row.at[at].get(mode="clip"))(x, places)


def input_places(order: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Places of the input tokens of the positions of an order; -1 for the start vector."""
    return jnp.pad(order[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
