"""Weights with all that is needed to use them, as NumPy arrays under the network's own names."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float

from gptv_jax import config as config_lib
from gptv_jax import sharding, tokens
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.tokens import Palette, TokenDefinition

# Fields of the model that weights depend on; the others (dropout, dtype, how layers are walked, the
# width that rates are tuned at) are the user's to choose.
SHAPING = (
    *("layers", "width", "heads", "mlp_ratio", "mlp", "qk_norm", "objective"),
    *("learned_positions", "axial_positions", "rotary", "target_positions"),
    "class_tokens",
)


@dataclasses.dataclass(frozen=True, eq=False)
class WeightsFile:
    """A network apart from any run."""

    model: config_lib.Model
    tokens: config_lib.Tokens
    image_size: int  # pixels, height and width
    params: dict[str, np.ndarray]  # float32, by flat name: "blocks.qkv"
    definition: TokenDefinition | None = None  # what the tokens stand for
    starts: int = 1  # start vectors
    classes: int = 0  # of the class head; 0: none
    step: int | None = None  # of the training that the weights are of, where known
    best_layer: int | None = None  # that the probe chose, where it has run

    @property
    def codec(self) -> tokens.Codec:
        """What the tokens mean."""
        return tokens.make_codec(self.tokens, self.image_size, self.definition)

    @property
    def network(self) -> Network:
        """The shape of it all."""
        codec = self.codec
        return Network(self.model, codec.vocabulary, codec.grid, self.starts, self.classes)

    def checked(self, where: str) -> "WeightsFile":
        """Itself, where every weight of the network is there, of its shape, and nothing else.

        Args:
          where: the weights lie, for the message.

        Raises:
          InputError: lists every weight that is missing, left over or of another shape.
        """
        wanted = {
            name: leaf.shape for name, leaf in sharding.by_name(_shapes(self.network)).items()
        }
        given = {name: array.shape for name, array in self.params.items()}
        differing = [f"{name} {shape} is missing" for name, shape in wanted.items()
                     if name not in given]  # fmt: skip
        differing += [f"{name} {shape} is left over" for name, shape in given.items()
                      if name not in wanted]  # fmt: skip
        differing += [
            f"{name} is {given[name]}, the network has {shape}"
            for name, shape in wanted.items()
            if name in given and given[name] != shape
        ]
        differing += [
            f"{name} holds values that are not finite"
            for name, array in self.params.items()
            if not np.isfinite(array).all()
        ]
        if self.best_layer is not None and self.best_layer > self.model.layers:
            differing.append(f"best_layer {self.best_layer} is none of {self.model.layers} layers")
        if differing:
            raise InputError(f"the weights in {where} do not fit: {'; '.join(differing)}.")
        return self

    def headless(self) -> "WeightsFile":
        """Without a class head."""
        params = {n: a for n, a in self.params.items() if not n.startswith("classifier.")}
        return dataclasses.replace(self, params=params, classes=0)

    def on_mesh(self) -> dict:
        """The nested parameters as arrays on the current mesh, each in its sharding."""
        abstract = sharding.abstract(self.network.init)
        leaves, structure = jax.tree.flatten(abstract)
        arrays = [
            jax.make_array_from_callback(leaf.shape, leaf.sharding, self.params[name].__getitem__)
            for name, leaf in zip(sharding.by_name(abstract), leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, arrays)

    def differing(self, config: config_lib.Config, starts: int) -> list[str]:
        """What a configuration says otherwise than these weights, field by field, in words.

        Args:
          config: the configuration.
          starts: start vectors that it asks for.
        """
        pairs = [(f"model.{n}", getattr(config.model, n), getattr(self.model, n)) for n in SHAPING]
        pairs += [
            ("model.start_per_variant (start vectors)", starts, self.starts),
            *config.tokens.pairs(self.tokens),
            ("data.image_size", config.data.image_size, self.image_size),
        ]
        return [f"config.{n} is {now!r}, there {then!r}" for n, now, then in pairs if now != then]


def agreed(named: Palette | None, own: Palette | None, where: str) -> Palette:
    """The palette that the user names, or that lies with the weights.

    Raises:
      InputError: neither is there, or they differ.
    """
    if named is None and own is None:
        raise InputError(
            f"{where} has no colours for its tokens; name the palette (kmeans_centers.npy) as well."
        )
    if named and own and not named.equivalent(own):
        raise InputError(f"the palette that is named is another one than that of {where}.")
    return named or own


def class_head(weight: Float[np.ndarray, "C D"]) -> dict[str, np.ndarray]:
    """The parameters of a class head whose input is not standardised."""
    width = weight.shape[1]
    return {
        "classifier.class_head": weight,
        "classifier.class_center": np.zeros(width, np.float32),
        "classifier.class_scale": np.ones(width, np.float32),
    }


def _shapes(network: Network) -> dict:
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh())):
        return sharding.abstract(network.init)
