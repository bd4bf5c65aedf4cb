"""The network: a GPT over image tokens, iGPT (Chen et al. 2020) by default.

`Network` is the shape, `GPT` the shape with weights, and `gptv_jax.Model` (api.py) what users hold:
a GPT together with the meaning of its tokens, for images. `GPT` is a pytree; training works on the
plain nested dict of `Network.init` and binds it where it is used, so that everything outside this
folder is plain JAX.

The input of position t is token t-1, that of position 0 a learned start vector, and position t
predicts token t. With objective=bert the input of position t is token t itself, or nothing where it
is masked. In training an order may be given: the input of position t is then token order[t-1], and
position t predicts token order[t]. Which positions attend to which is decided in `GPT.__call__`.

Letters: B batch, T tokens, D width, H heads, K head size, F MLP width, V vocabulary, L layers,
C classes.
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
from gptv_jax.model import attention, layers
from gptv_jax.model.layout import Layout


class Output(NamedTuple):
    """Results of one forward pass; inside jit, results that are not used are not computed."""

    logits: Float[Array, "B T V"]  # float32; position t predicts token t
    pooled: Float[Array, "L+1 B D"]  # float32: means over positions of each layer's normed input
    class_logits: Float[Array, "B C"] | None  # float32; None without a class head
    kept: Float[Array, "N B T D"] | None  # features at every position of the layers in `keep`
    final: Float[Array, "B T D"]  # output of the final norm, the input of `GPT.token_logits`


@dataclasses.dataclass(frozen=True)
class Network:
    """Shape of a network, without weights (see `GPT`); hashable, so a static argument of jit."""

    config: config_lib.Model
    layout: Layout
    starts: int = 1  # start vectors: 1, one per augmentation variant, or one per class and one more
    classes: int = 0  # C; 0: no class head

    @property
    def unconditional(self) -> int:
        """Index of the start vector without a class: the last of several, or the only one."""
        return self.config.class_tokens

    @property
    def votes(self) -> int:
        """Number of masks under which BERT classifies an image; 1 for other objectives."""
        return self.config.votes if self.config.objective == "bert" else 1

    @property
    def vocabulary(self) -> int:
        """V, number of token values of the first part, which is the image."""
        return self.layout.parts[0].vocabulary

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns of the first part."""
        return self.layout.parts[0].shape

    @property
    def length(self) -> int:
        """T, number of positions."""
        return self.layout.length

    def init(self, key: PRNGKeyArray) -> dict:
        """Fresh weights as a nested dict of float32 arrays; call it under a mesh, inside jit."""
        return layers.init(GPT, self, key=key)

    def bind(self, params: dict) -> "GPT":
        """The module with these weights."""
        return layers.bind(GPT, self, params=params)


class GPT(nnx.Module):
    """A `Network` with its weights; `gptv_jax.Model` adds what its tokens mean, for users."""

    def __init__(self, network: Network, *, rngs: nnx.Rngs):
        config, V, D = network.config, network.vocabulary, network.config.width
        rows, columns = network.grid
        self.network = network
        self.token_embedding = layers.normal(rngs, "token_embedding", (V, D), 0.02)
        if config.objective == "autoregressive":
            self.start = layers.normal(rngs, "start", (network.starts, D), 0.02)
        if config.learned_positions:  # with target_positions, one row more for the start vector
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
            self.classifier = layers.ClassHead(network.classes, D)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        variant: Int[Array, " B"] | None = None,
        key: PRNGKeyArray | None = None,
        hidden: Bool[Array, "B T"] | None = None,
        order: Int[Array, "B T"] | None = None,
        *,
        raw: bool = False,
        keep: tuple[int, ...] = (),
    ) -> Output:
        """Logits, features and, with a class head, class logits of whole sequences.

        Args:
          tokens: 0 <= token < V, in raster order; unless the objective is bert, the last token of
            a row (or of its order) is only a target.
          variant: index of the start vector of each row; None: `Network.unconditional`.
          key: of dropout; None switches dropout off.
          hidden: True where BERT's input is masked; None: nothing is masked.
          order: a permutation of 0 .. T-1 for each row: position t predicts token order[t] from
            the tokens at order[:t]; None: raster order. Logits are in the order of positions.
          raw: features are the layers' inputs h^l instead of the normed inputs n^l.
          keep: layers, 0 .. L, whose features are returned at every position.
        """
        config = self.network.config
        keys = None if key is None else jax.random.split(key, config.layers + 1)
        layout = self.network.layout
        attend = functools.partial(attention.self_attention, visible=layout.visible)
        if layout.shift:
            known = (tokens if order is None else reorder(tokens, order))[:, :-1]
            x = self.embed(known, variant, order=order)
        else:
            x = self.embed_masked(tokens, hidden)
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
        kept = slots = None
        if keep:  # layers that are not in `keep` all write to the last index, which is thrown away
            spec = PartitionSpec(None, *sharding.HIDDEN)
            kept = jnp.zeros((len(keep) + 1, *x.shape), x.dtype, out_sharding=spec)
            indices = [keep.index(i) if i in keep else len(keep) for i in range(config.layers + 1)]
            slots = jnp.array(indices[:-1])
        (x, kept), pooled = self.walk(layer, (x, kept), (self.blocks, keys, slots))
        final = layers.rms_norm(x, self.final_norm[...])
        read, pooled_final = x if raw else final, _pool(final)
        pooled = jnp.concatenate([pooled, (_pool(x) if raw else pooled_final)[None]])
        if keep:
            kept = jax.lax.dynamic_update_index_in_dim(kept, read, indices[-1], 0)[: len(keep)]
        class_logits = self.classifier(pooled_final) if self.network.classes else None
        return Output(self.token_logits(final), pooled, class_logits, kept, final)

    def predict(self, x: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
        """Logits of one position, given the residual stream after the last layer."""
        return self.token_logits(layers.rms_norm(x, self.final_norm[...]))[:, 0]

    def embed(
        self,
        tokens: Int[Array, "B P"],
        variant: Int[Array, " B"] | None = None,
        spec: PartitionSpec = sharding.HIDDEN,
        order: Int[Array, "B P+1"] | None = None,
    ) -> Float[Array, "B P+1 D"]:
        """Inputs of positions 0 .. P, sharded by `spec`: the start vector, then P tokens.

        `variant` is as in `__call__`. The `order` has the places on the grid of the tokens that the
        positions predict; None: 0 .. P.
        """
        if variant is None:
            variant = jnp.full(len(tokens), self.network.unconditional, jnp.int32)
        # Start vectors are looked up as rows V, V+1, ... of one table with tokens: token numbers
        # are then shifted by one position, not vectors, and where the sequence is split no device
        # needs vectors of its neighbour.
        variant, tokens = jax.sharding.reshard((variant, tokens), sharding.BATCH_FIRST)
        ids = jnp.concatenate([self.network.vocabulary + variant[:, None], tokens], axis=1)
        x = self._lookup([self.token_embedding, self.start], ids, spec)
        return self._place(x, 0, order)

    def embed_masked(
        self, tokens: Int[Array, "B T"], hidden: Bool[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """BERT's inputs: each position's own token and its place; of masked tokens the place."""
        x = self._lookup([self.token_embedding], tokens, sharding.HIDDEN)
        if hidden is not None:
            x = jnp.where(hidden[..., None], jnp.zeros((), x.dtype), x)
        return self._place(x, 0)

    def embed_one(
        self, tokens: Int[Array, "B T"], position: Int[Array, ""]
    ) -> Float[Array, "B 1 D"]:
        """Input of `position` >= 1: the token before it; later tokens are not read."""
        held = jax.lax.dynamic_slice_in_dim(tokens, position - 1, 1, axis=1)
        x = self._lookup([self.token_embedding], held, sharding.BATCH_FIRST)
        return self._place(x, position)

    def _lookup(
        self, tables: list[nnx.Param], ids: Int[Array, "*ids"], spec: PartitionSpec
    ) -> Float[Array, "*ids D"]:
        """Rows `ids` of the tables, which are concatenated first."""
        whole = [sharding.gather(table[...], self.network.config.dtype) for table in tables]
        return jnp.concatenate(whole).at[ids].get(out_sharding=spec)

    def _place(
        self,
        x: Float[Array, "B P D"],
        start: int | Int[Array, ""],
        order: Int[Array, "B P"] | None = None,
    ) -> Float[Array, "B P D"]:
        """Adds the tables of positions to the inputs of positions start .. start+P-1.

        With an `order` the P inputs are those of the whole order. A table with one row per place is
        read at the place of the predicted token; a table whose first row is of the start vector, at
        the row of the input token. In raster order both are the row of the position's number.
        """
        config, (rows, columns) = self.network.config, self.network.grid
        gather = functools.partial(sharding.gather, dtype=config.dtype)
        of_place, tables = [], []
        if config.learned_positions:
            of_place.append(gather(self.position[...]))
        if config.axial_positions:  # with target_positions, zeros for the start vector come first
            row = jnp.repeat(gather(self.row[...]), columns, axis=0)
            column = jnp.tile(gather(self.column[...]), (rows, 1))
            of_start = ((int(config.target_positions), 0), (0, 0))
            of_place += [jnp.pad(table, of_start) for table in (row, column)]
        if of_place:
            inputs = None if order is None else input_places(order) + 1
            places = inputs if config.target_positions else order
            tables.append((functools.reduce(jnp.add, of_place), places))
        if config.target_positions:
            tables.append((gather(self.target_position[...]), order))
        for table, places in tables:
            if places is None:
                x = x + jax.lax.dynamic_slice_in_dim(table, start, x.shape[1])[None]
            else:
                x = x + table.at[places].get(out_sharding=sharding.HIDDEN)
        return x

    def rotation(
        self, start: int | Int[Array, ""], count: int, order: Int[Array, "B T"] | None = None
    ) -> layers.Rotation | None:
        """Rotary phases of positions start .. start+count-1, or of all positions of an order."""
        config, columns = self.network.config, self.network.grid[1]
        if not config.rotary:
            return None
        size = config.width // config.heads
        if order is not None:
            every = layers.phases(jnp.arange(-1, count), columns, size)
            spec = PartitionSpec(None, *sharding.HIDDEN)
            places = order, input_places(order)
            return layers.Rotation(*(every.at[:, p + 1].get(out_sharding=spec) for p in places))
        predicted = start + jnp.arange(count)
        inputs = predicted if config.objective == "bert" else predicted - 1
        return layers.Rotation(*(layers.phases(p, columns, size) for p in (predicted, inputs)))

    def token_logits(self, final: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
        """Float32 logits, given the output of the final norm at N positions."""
        head = sharding.gather(self.head[...], final.dtype)
        dtype = layers.accumulator(final)
        return jnp.einsum("btd,vd->btv", final, head, preferred_element_type=dtype)

    def walk(self, layer: Callable, carry, xs):
        """`lax.scan` of `layer` over arrays with a leading axis of layers, or an unrolled loop."""
        config, scan = self.network.config, self.network.config.scan_layers
        if scan is None:
            scan = sharding.platform() != "cpu"
        if config.remat != "none":
            # Inside scan the loop keeps XLA from merging the computation and its repetition.
            policy = layers.REMAT[config.remat]
            layer = jax.checkpoint(layer, prevent_cse=not scan, policy=policy)
        if scan:
            return jax.lax.scan(layer, carry, xs)
        # The gradient of one split is one concatenation; the gradient of L slices would be a sum of
        # L arrays, each as large as the stack.
        leaves, tree = jax.tree.flatten(xs)
        outs, parts = [], (jax.lax.split(leaf, (1,) * config.layers) for leaf in leaves)
        for of_layer in zip(*parts, strict=True):
            carry, out = layer(carry, tree.unflatten(jnp.squeeze(x, axis=0) for x in of_layer))
            outs.append(out)
        return carry, jax.tree.map(lambda *out: jnp.stack(out), *outs)


def reorder(tokens: Int[Array, "B T"], order: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Tokens in the given order: entry t of a row is the row's token at place order[t]."""
    return jnp.take_along_axis(*jax.sharding.reshard((tokens, order), sharding.BATCH_FIRST), axis=1)


def input_places(order: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Places of the input tokens of the positions of an order; -1 for the start vector."""
    return jnp.pad(order[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def _pool(x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    return jnp.mean(x.astype(layers.accumulator(x)), axis=1)


def parameter_count(params: dict) -> int:
    """Number of weights in a nested dict of arrays or of abstract shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
