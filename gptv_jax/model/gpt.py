"""The network: a GPT over image tokens, iGPT (Chen et al. 2020) by default, and parts after them.

`Network` is the shape, `GPT` the shape with weights, and `gptv_jax.Model` (api.py) what users hold:
a GPT together with the meaning of its tokens, for images. `GPT` is a pytree; training works on the
plain nested dict of `Network.init` and binds it where it is used, so that everything outside this
folder is plain JAX.

The input of position t is token t-1, that of position 0 a learned start vector, and position t
predicts token t. With objective=bert the input of position t is token t itself, or nothing where it
is masked. In training an order may be given: the input of position t is then token order[t-1], and
position t predicts token order[t]. Which positions attend to which is in the network's `Layout`.

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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.model import attention, layers
from gptv_jax.model.inputs import Inputs, reorder
from gptv_jax.model.layout import Layout, Part
from gptv_jax.model.level_head import LevelHead, make_head
from gptv_jax.model.parts import ReadHead, Reading


class Output(NamedTuple):
    """Results of one forward pass; inside jit, results that are not used are not computed."""

    # Float32; position t predicts token t. Of a layout of several parts {name: [B, n, V]}, the
    # logits of every predicted part.
    logits: Float[Array, "B T V"] | dict[str, Array]
    # Float32: means over positions of each layer's normed input, over each of `Network.pool` parts.
    pooled: Float[Array, "L+1 B features"]
    class_logits: Float[Array, "B C"] | None  # float32; None without a class head
    kept: Float[Array, "N B T D"] | None  # features at every position of the layers in `keep`
    final: Float[Array, "B T D"]  # output of the final norm, the input of `GPT.token_logits`


# Fields of the configuration that are for a sequence of image tokens alone, and their other value.
# A network with a stem takes no other value of the fields in NO_STEM.
NO_STEM = {"objective": "autoregressive", "random_order": (), "context_masking": 0.0}
NO_STEM |= {"image_input": "tokens"}
IMAGES_ALONE = NO_STEM | {"target_positions": False, "start_per_variant": False}


@dataclasses.dataclass(frozen=True)
class Network:
    """Shape of a network, without weights (see `GPT`); hashable, so a static argument of jit.

    Raises InputError where the configuration is for image tokens alone, and the layout has more
    parts or the network a stem; and where the layout's shift does not fit the objective.
    """

    config: config_lib.Model
    layout: Layout
    starts: int = 1  # start vectors: 1, one per augmentation variant, or one per class and one more
    classes: int = 0  # C; 0: no class head
    stem: tuple[int, ...] = ()  # channels of the convolutions of `Stem`; (): there is no stem
    # Height and width of a token's pixels, and their channels, where config.image_input=pixels.
    patch: tuple[int, ...] = ()
    reading: Reading | None = None  # shape of `GPT.read`'s head on the positions of the image
    # Equal parts of the sequence, such as the frames of a clip. Pooled features are the means over
    # the positions of each part, side by side.
    pool: int = 1
    # Rows and columns of equal regions of the grid: pooled features are the means over each region,
    # row by row. 1: there is one region. Where there are more, `pool` is 1.
    regions: int = 1

    def __post_init__(self):
        more = "sequence has further parts" if self.several else "network has a stem"
        refused = IMAGES_ALONE if self.several else NO_STEM if self.stem else {}
        for name, plain in refused.items():
            if (value := getattr(self.config, name)) != plain:
                raise InputError(
                    f"config.model.{name} is {value!r}, which is for images alone, but the {more}; "
                    f"take {plain!r}."
                )
        objective = self.config.objective
        shift = 0 if objective == "bert" else 1
        if self.layout.shift != shift:
            raise InputError(
                f"the layout's shift is {self.layout.shift}, so position t reads token t - "
                f"{self.layout.shift}, but config.model.objective={objective} takes shift {shift} "
                f"alone; make the Layout with shift={shift}."
            )

    @property
    def several(self) -> bool:
        """Whether the sequence has more than one part."""
        return len(self.layout.parts) > 1

    def pixels_of(self, batch: dict) -> Array | None:
        """The images of a batch, for a network that reads pixels; None for other networks."""
        return batch["image"] if self.stem or self.patch else None

    @property
    def predicts_images(self) -> bool:
        """Whether positions of the first part predict their tokens."""
        return self.layout.parts[0].predicted

    @property
    def pooled_width(self) -> int:
        """Number of pooled features of a layer."""
        return self.pool * self.regions**2 * self.config.width

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
        """Shape of the first part: rows and columns; of clips frames, rows and columns."""
        return self.layout.parts[0].shape

    @property
    def frames(self) -> int:
        """Number of frames of the first part, where it is a clip; 0: it is an image."""
        return self.grid[0] if len(self.grid) == 3 else 0

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


class GPT(Inputs):
    """A `Network` with its weights; `gptv_jax.Model` adds what its tokens mean, for users."""

    def __init__(self, network: Network, *, rngs: nnx.Rngs):
        super().__init__(network, rngs=rngs)
        config, V, D = network.config, network.vocabulary, network.config.width
        self.blocks = layers.Block(config, rngs=rngs)
        self.final_norm = layers.constant("final_norm", (D,), 1.0)
        if V and (network.layout.parts[0].predicted or not network.several):
            self.head = make_head(network.layout.parts[0], D)  # zero: the first loss is ln V
        if network.classes:
            self.classifier = layers.ClassHead(network.classes, network.pooled_width)
        if network.reading:
            self.reading = ReadHead(network.reading, D)

    def __call__(
        self,
        tokens: Int[Array, "B P"],
        variant: Int[Array, " B"] | None = None,
        key: PRNGKeyArray | None = None,
        hidden: Bool[Array, "B T"] | None = None,
        order: Int[Array, "B T"] | None = None,
        *,
        pixels: UInt8[Array, "B *F height width C"] | None = None,
        added: Float[Array, "B P D"] | None = None,
        raw: bool = False,
        keep: tuple[int, ...] = (),
    ) -> Output:
        """Logits, features and, with a class head, class logits of sequences.

        The sequences are whole, P = T. Of a layout of several parts they may be the beginning of
        which no position sees more, such as the image of `layout.prefixed` and one more token.

        Args:
          tokens: 0 <= token < V of the part, in raster order, anything in a part without tokens;
            unless the objective is bert, the last token of a row (or of its order) is only a
            target.
          variant: index of the start vector of each row; None: `Network.unconditional`.
          key: of dropout; None switches dropout off.
          hidden: True where an input token is hidden, by its place in raster order; None: none is.
          order: a permutation of 0 .. T-1 for each row: position t predicts token order[t] from
            the tokens at order[:t]; None: raster order. Logits are in the order of positions.
          pixels: of the images, for a network with a stem or with `Network.patch`.
          added: to the input of every position, so that gradients of the inputs can be taken.
          raw: features are the layers' inputs h^l instead of the normed inputs n^l.
          keep: layers, 0 .. L, whose features are returned at every position.
        """
        config = self.network.config
        keys = None if key is None else jax.random.split(key, config.layers + 1)
        layout = self.network.layout
        visible = layout.visible[: tokens.shape[1]]
        attend = functools.partial(attention.self_attention, visible=visible)
        if layout.shift:
            known = (tokens if order is None else reorder(tokens, order))[:, :-1]
            unseen = None if hidden is None else hidden[:, :-1]
            x = self.embed(known, variant, order=order, pixels=pixels, hidden=unseen)
        else:
            x = self.embed_masked(tokens, hidden)
        if added is not None:
            x = x + added.astype(x.dtype)
        x = layers.dropout(x, config.dropout, None if keys is None else keys[-1])
        rotation = self.rotation(0, x.shape[1], order)

        def layer(carry, inputs):
            (x, kept), (block, key, slot) = carry, inputs
            after, normed = block(x, attend, key, rotation)
            read = x if raw else normed
            if keep:
                kept = jax.lax.dynamic_update_index_in_dim(kept, read, slot, 0)
            return (after, kept), self._pool(read)

        keys = None if keys is None else keys[:-1]
        kept = slots = None
        if keep:  # layers that are not in `keep` all write to the last index, which is thrown away
            spec = jax.P(None, *sharding.HIDDEN)
            kept = jnp.zeros((len(keep) + 1, *x.shape), x.dtype, out_sharding=spec)
            indices = [keep.index(i) if i in keep else len(keep) for i in range(config.layers + 1)]
            slots = jnp.array(indices[:-1])
        (x, kept), pooled = self.walk(layer, (x, kept), (self.blocks, keys, slots))
        final = layers.rms_norm(x, self.final_norm[...])
        read, pooled_final = x if raw else final, self._pool(final)
        pooled = jnp.concatenate([pooled, (self._pool(x) if raw else pooled_final)[None]])
        if keep:
            kept = jax.lax.dynamic_update_index_in_dim(kept, read, indices[-1], 0)[: len(keep)]
        class_logits = self.classifier(pooled_final) if self.network.classes else None
        logits = self.logits(final) if self.network.several else self.token_logits(final)
        return Output(logits, pooled, class_logits, kept, final)

    def _pool(self, x: Float[Array, "B T D"]) -> Float[Array, "B features"]:
        """See `Network.pool` and `Network.regions`."""
        x, regions = x.astype(layers.accumulator(x)), self.network.regions
        if self.network.pool == regions == 1:
            return jnp.mean(x, axis=1)
        whole = {"out_sharding": sharding.BATCH_FIRST}
        x = jax.sharding.reshard(x, sharding.BATCH_FIRST)
        if regions > 1:
            rows, columns = (side // regions for side in self.network.grid[-2:])
            x = x.reshape(len(x), -1, regions, rows, regions, columns, x.shape[-1], **whole)
            x = x.mean(axis=(1, 3, 5))
        else:
            x = x.reshape(len(x), self.network.pool, -1, x.shape[-1], **whole).mean(axis=2)
        return x.reshape(len(x), -1, **whole)

    def logits(self, final: Float[Array, "B T D"]) -> dict[str, Array]:
        """Logits [B, n, V] of every predicted part, given the output of the final norm."""
        layout, final = self.network.layout, jax.sharding.reshard(final, sharding.BATCH_FIRST)
        parts = [part for part in layout.parts if part.predicted]
        return {p.name: self.token_logits(final[:, layout.slices[p.name]], p) for p in parts}

    def read(self, output: Output) -> Float[Array, "B *F h w C"]:
        """Float32 logits of the classes of every cell of the image or clip; `Network.reading`.

        The cells are read at positions 1 .. N, whose inputs are the image's N tokens. `output` has
        kept the layers that the head reads.
        """
        first, every = self.network.layout.parts[0], self.network.reading.layers
        features = output.kept if every else output.final[None]
        features = jax.sharding.reshard(features, jax.P(None, sharding.BATCH))
        features = jnp.concatenate(list(features[:, :, 1 : first.size + 1]), axis=-1)
        return self.reading(features, first.shape)

    def predict(self, x: Float[Array, "B N D"], part: Part | None = None) -> Float[Array, "B N V"]:
        """Logits of N positions of `part` (the first one), given the stream after all layers."""
        return self.token_logits(layers.rms_norm(x, self.final_norm[...]), part)

    def token_logits(
        self, final: Float[Array, "B N D"], part: Part | None = None
    ) -> Float[Array, "B N V"]:
        """Float32 logits, given the output of the final norm at N positions of a part.

        The part is by default the first one. A `LevelHead`'s are logarithms of probabilities.
        """
        if part in (None, self.network.layout.parts[0]):
            if isinstance(self.head, LevelHead):
                return self.head.log_probabilities(final)
            head = sharding.gather(self.head[...], final.dtype)
        else:
            head = self.parts[part.name].head_table(final.dtype.name)
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


def parameter_count(params: dict) -> int:
    """Number of weights in a nested dict of arrays or of abstract shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
