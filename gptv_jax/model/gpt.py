"""The network: a GPT over image tokens, iGPT (Chen et al. 2020) by default.

Position t holds token t-1 (position 0 a learned start vector), and predicts token t; with the BERT
objective it holds token t itself, or nothing, and sees all others. In training an order may be
given: position t then holds token order[t-1], and predicts token order[t]. Letters: B
batch, T tokens, D width, H heads, K head size, F MLP width, V vocabulary, L layers, C classes.

`GPT` holds weights and is a pytree; training works on the plain nested dict of `Network.init` and
binds it where it is used, so that everything outside this folder is plain JAX.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import attention, heads, layers, remat, rotary


class Output(NamedTuple):
    """What one pass gives; inside jit, what is not used is not computed."""

    logits: Float[Array, "B T V"]  # float32; position t predicts token t
    pooled: Float[Array, "L+1 B D"]  # float32 means over positions of every layer's normed input
    class_logits: Float[Array, "B C"] | None  # float32; None without a class head
    kept: Float[Array, "N B T D"] | None  # what `pooled` are means of, of the layers in `keep`
    final: Float[Array, "B T D"]  # what `GPT.token_logits` makes the logits of


class GPT(nnx.Module):
    """The network of `Network`, with its weights."""

    def __init__(self, network: "Network", *, rngs: nnx.Rngs):
        config, V, D = network.config, network.vocabulary, network.config.width
        rows, columns = network.grid
        self.network = network
        self.token_embedding = layers.normal(rngs, "token_embedding", (V, D), 0.02)
        if config.objective == "autoregressive":
            self.start = layers.normal(rngs, "start", (network.starts, D), 0.02)
        if config.learned_positions:  # with target_positions, of the start and of every place held
            places = rows * columns + config.target_positions
            self.position = layers.normal(rngs, "position", (places, D), 0.01)
        if config.axial_positions:
            self.row = layers.normal(rngs, "row", (rows, D), 0.01)
            self.column = layers.normal(rngs, "column", (columns, D), 0.01)
        if config.target_positions:
            self.target_position = layers.normal(rngs, "target_position", (rows * columns, D), 0.01)
        self.blocks = layers.Block(config, rngs=rngs)
        self.final_norm = layers.constant("final_norm", (D,), 1.0)
        self.head = layers.constant("head", (V, D), 0.0)  # zero: the first loss is ln V
        if network.classes:
            self.classifier = heads.ClassHead(network.classes, D)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        variant: Int[Array, "B"] | None = None,
        key: PRNGKeyArray | None = None,
        hidden: Bool[Array, "B T"] | None = None,
        order: Int[Array, "B T"] | None = None,
        *,
        raw: bool = False,
        keep: tuple[int, ...] = (),
    ) -> Output:
        """Logits, features and, with a class head, class logits of whole sequences.

        Args:
          tokens: 0 <= token < V, in raster order; but for BERT the last one of a row, or of its
            order, is only ever a target.
          variant: which start vector each row begins with; None: `Network.unconditional`.
          key: of dropout; None switches it off.
          hidden: BERT: where tokens are not shown; None: all are.
          order: of each row, a permutation of its places: position t predicts token order[t] of it,
            from those at order[:t]; None: raster order. The logits lie as the positions do.
          raw: features are of the layers' inputs h^l themselves, not of the normed n^l.
          keep: layers, 0 .. L, whose features are wanted at every position as well.
        """
        config = self.network.config
        keys = None if key is None else jax.random.split(key, config.layers + 1)
        if config.objective == "bert":
            x, attend = self.embed_in_place(tokens, hidden), attention.bidirectional_attention
        else:
            known = (tokens if order is None else in_order(tokens, order))[:, :-1]
            x, attend = self.embed(known, variant, order=order), attention.causal_attention
        x = layers.dropout(x, config.dropout, None if keys is None else keys[-1])
        rotation = self.rotation(0, x.shape[1], order)

        def layer(carry, inputs):
            (x, kept), (block, key, slot) = carry, inputs
            after, normed = block(x, attend, key, rotation)
            read = x if raw else normed
            if keep:
                kept = jax.lax.dynamic_update_index_in_dim(kept, read, slot, 0)
            return (after, kept), _pool(read)

        keys = None if keys is None else keys[:-1]
        kept, slots = _places(keep, config.layers, x) if keep else (None, None)
        (x, kept), pooled = self.walk(layer, (x, kept), (self.blocks, keys, slots))
        final = layers.rms_norm(x, self.final_norm[...])
        read, pooled_final = x if raw else final, _pool(final)
        pooled = jnp.concatenate([pooled, (_pool(x) if raw else pooled_final)[None]])
        if keep:
            last = keep.index(config.layers) if config.layers in keep else len(keep)
            kept = jax.lax.dynamic_update_index_in_dim(kept, read, last, 0)[: len(keep)]
        class_logits = self.classifier(pooled_final) if self.network.classes else None
        return Output(self.token_logits(final), pooled, class_logits, kept, final)

    def predict(self, x: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
        """Logits of one position, of the residual stream behind all layers."""
        return self.token_logits(layers.rms_norm(x, self.final_norm[...]))[:, 0]

    def embed(
        self,
        tokens: Int[Array, "B P"],
        variant: Int[Array, "B"] | None = None,
        spec: PartitionSpec = sharding.HIDDEN,
        order: Int[Array, "B P+1"] | None = None,
    ) -> Float[Array, "B P+1 D"]:
        """Inputs of positions 0 .. P: the start vector, then the first P tokens.

        Args:
          tokens: that the positions after the first hold.
          variant: see `__call__`.
          spec: how the result is to be split.
          order: places of the tokens that the positions predict; None: 0 .. P.
        """
        if variant is None:
            variant = jnp.full(len(tokens), self.network.unconditional, jnp.int32)
        # Start vectors are looked up behind the tokens: what is shifted then is numbers, not
        # vectors, and no device needs a neighbour's where the sequence is split.
        variant, tokens = jax.sharding.reshard((variant, tokens), sharding.BATCH_FIRST)
        ids = jnp.concatenate([self.network.vocabulary + variant[:, None], tokens], axis=1)
        x = self._lookup([self.token_embedding, self.start], ids, spec)
        return self._place(x, 0, order)

    def embed_in_place(
        self, tokens: Int[Array, "B T"], hidden: Bool[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """BERT's inputs: every token at its own position, hidden ones as their position alone."""
        x = self._lookup([self.token_embedding], tokens, sharding.HIDDEN)
        if hidden is not None:
            x = jnp.where(hidden[..., None], jnp.zeros((), x.dtype), x)
        return self._place(x, 0)

    def embed_one(
        self, tokens: Int[Array, "B T"], position: Int[Array, ""]
    ) -> Float[Array, "B 1 D"]:
        """Input of `position` >= 1, which holds the token before it; later ones do not matter."""
        held = jax.lax.dynamic_slice_in_dim(tokens, position - 1, 1, axis=1)
        x = self._lookup([self.token_embedding], held, sharding.BATCH_FIRST)
        return self._place(x, position)

    def _lookup(
        self, tables: list[nnx.Param], ids: Int[Array, "*ids"], spec: PartitionSpec
    ) -> Float[Array, "*ids D"]:
        """Rows of the tables, one below the other."""
        whole = [sharding.gather(table[...], self.network.config.dtype) for table in tables]
        return jnp.concatenate(whole).at[ids].get(out_sharding=spec)

    def _place(
        self,
        x: Float[Array, "B P D"],
        start: int | Int[Array, ""],
        order: Int[Array, "B P"] | None = None,
    ) -> Float[Array, "B P D"]:
        """Adds their tables to the inputs of positions start .. start+P-1, or of all in an order.

        A table with a row for each place is read at that of the token which is predicted, one that
        begins with a row for the start vector at that which is held: in raster order, both at the
        position's own number.
        """
        config, held = self.network.config, None if order is None else held_places(order) + 1
        tables = [(self._own_table(), held if config.target_positions else order)]
        if config.target_positions:
            tables.append((sharding.gather(self.target_position[...], config.dtype), order))
        for table, places in tables:
            if table is None:
                continue
            if places is None:
                x = x + jax.lax.dynamic_slice_in_dim(table, start, x.shape[1])[None]
            else:
                x = x + table.at[places].get(out_sharding=sharding.HIDDEN)
        return x

    def _own_table(self) -> Float[Array, "places D"] | None:
        """The sum of `position`, `row` and `column`, as far as they are there.

        With target positions it begins with a row for the start vector, which is on no row or
        column; then, as without, there is one for every place.
        """
        config, (rows, columns), tables = self.network.config, self.network.grid, []
        if config.learned_positions:
            tables.append(sharding.gather(self.position[...], config.dtype))
        if config.axial_positions:
            row = sharding.gather(self.row[...], config.dtype)
            column = sharding.gather(self.column[...], config.dtype)
            of_start = ((int(config.target_positions), 0), (0, 0))
            axial = jnp.repeat(row, columns, axis=0), jnp.tile(column, (rows, 1))
            tables += [jnp.pad(table, of_start) for table in axial]
        return functools.reduce(jnp.add, tables) if tables else None

    def rotation(
        self, start: int | Int[Array, ""], count: int, order: Int[Array, "B T"] | None = None
    ) -> rotary.Rotation | None:
        """Of the queries and keys of positions start .. start+count-1, or of all in an order."""
        config, columns = self.network.config, self.network.grid[1]
        if not config.rotary:
            return None
        size = config.width // config.heads
        if order is not None:
            every = rotary.turns(jnp.arange(-1, count), columns, size)
            spec = PartitionSpec(None, *sharding.HIDDEN)
            places = order, held_places(order)
            return rotary.Rotation(*(every.at[:, p + 1].get(out_sharding=spec) for p in places))
        predicted = start + jnp.arange(count)
        held = predicted if config.objective == "bert" else predicted - 1
        return rotary.Rotation(*(rotary.turns(p, columns, size) for p in (predicted, held)))

    def token_logits(self, final: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
        """Float32 logits of some positions, of the final norm's output."""
        head = sharding.gather(self.head[...], final.dtype)
        return jnp.einsum(
            "btd,vd->btv", final, head, preferred_element_type=layers.accumulator(final)
        )

    def walk(self, layer: Callable, carry, xs):
        """`lax.scan` of `layer` over the stacked layers, or the same loop unrolled."""
        config, scan = self.network.config, self.network.config.scan_layers
        if scan is None:
            scan = sharding.platform() != "cpu"
        if config.remat != "none":
            # Inside scan the loop itself keeps XLA from merging the two computations.
            barrier = not scan
            layer = jax.checkpoint(layer, prevent_cse=barrier, policy=remat.POLICIES[config.remat])
        if scan:
            return jax.lax.scan(layer, carry, xs)
        # A split's gradient is one concatenation; that of a slice a layer would be a sum of as many
        # arrays, each as large as the stack.
        leaves, tree = jax.tree.flatten(xs)
        outs, parts = [], (jax.lax.split(leaf, (1,) * config.layers) for leaf in leaves)
        for of_layer in zip(*parts, strict=True):
            carry, out = layer(carry, tree.unflatten(jnp.squeeze(x, axis=0) for x in of_layer))
            outs.append(out)
        return carry, jax.tree.map(lambda *out: jnp.stack(out), *outs)


def in_order(tokens: Int[Array, "B T"], order: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Tokens as they follow each other: the t-th of a row is that at the place order[t]."""
    return jnp.take_along_axis(*jax.sharding.reshard((tokens, order), sharding.BATCH_FIRST), axis=1)


def held_places(order: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Places of the tokens that the positions of an order hold; -1, of the start vector."""
    return jnp.pad(order[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def _places(
    keep: tuple[int, ...], count: int, x: Float[Array, "B T D"]
) -> tuple[Float[Array, "places B T D"], Int[Array, "L"]]:
    """Room for what is kept of some layers, and each layer's place in it.

    So a walk over all layers holds no more than is wanted: the others write to one last place.
    """
    spec = PartitionSpec(None, *sharding.HIDDEN)
    room = jnp.zeros((len(keep) + 1, *x.shape), x.dtype, out_sharding=spec)
    return room, jnp.array([keep.index(i) if i in keep else len(keep) for i in range(count)])


def _pool(x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    return jnp.mean(x.astype(layers.accumulator(x)), axis=1)


@dataclasses.dataclass(frozen=True)
class Network:
    """All that fixes the network's shape; hashable, so that jit can take it as static."""

    config: config_lib.Model
    vocabulary: int  # V
    grid: tuple[int, int]  # rows and columns of tokens; T is their product
    starts: int = 1  # start vectors: 1, one per augmentation variant, or one per class and one more
    classes: int = 0  # C; 0: no class head

    @property
    def unconditional(self) -> int:
        """The start vector that tells no class: behind those of the classes, or the first."""
        return self.config.class_tokens

    @property
    def votes(self) -> int:
        """Evaluations of an image that its class is decided by."""
        return self.config.votes if self.config.objective == "bert" else 1

    @property
    def length(self) -> int:
        """T, tokens an image."""
        return self.grid[0] * self.grid[1]

    def init(self, key: PRNGKeyArray) -> dict:
        """Fresh weights as a nested dict of float32 arrays; call it under a mesh, inside jit."""
        return nnx.to_pure_dict(nnx.state(GPT(self, rngs=nnx.Rngs(key)), nnx.Param))

    def bind(self, params: dict) -> GPT:
        """The module with these weights."""
        return nnx.merge(_graphdef(self), params)


@functools.cache
def _graphdef(network: Network):
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(network, rngs=nnx.Rngs(0))))


def parameter_count(params: dict) -> int:
    """Number of weights, of arrays or of their abstract shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
