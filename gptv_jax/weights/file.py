"""A network's weights as NumPy arrays, with everything that is needed to use them."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float

from gptv_jax import config as config_lib
from gptv_jax import sharding, tokens
from gptv_jax.errors import InputError, list_differences
from gptv_jax.model.gpt import Network
from gptv_jax.tokens import Palette, TokenDefinition

# Fields of config.model that decide what the weights mean. Users may choose the other fields
# (dropout, dtype, scan_layers, base_width, ...) each time they use the weights.
DEFINING_FIELDS = (
    *("layers", "width", "heads", "mlp_ratio", "mlp", "qk_norm", "objective"),
    *("learned_positions", "axial_positions", "rotary", "target_positions", "class_tokens"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class WeightsFile:
    """Weights outside of a run folder, and the settings that they belong to."""

    model: config_lib.Model
    tokens: config_lib.Tokens
    image_size: int  # height and width in pixels
    params: dict[str, np.ndarray]  # float32, by flat name such as "blocks.qkv"
    definition: TokenDefinition | None = None  # what the tokens stand for
    starts: int = 1  # number of start vectors
    classes: int = 0  # number of classes of the class head; 0 without one
    step: int | None = None  # training step of the weights, where known
    best_layer: int | None = None  # the probe's best layer, where the probe has run

    @property
    def codec(self) -> tokens.Codec:
        return tokens.make_codec(self.tokens, self.image_size, self.definition)

    @property
    def network(self) -> Network:
        codec = self.codec
        return Network(self.model, codec.vocabulary, codec.grid, self.starts, self.classes)

    def checked(self, where: str) -> "WeightsFile":
        """Returns the weights, after checking them against the network.

        Raises:
          InputError: lists every weight in `where` that is missing, left over, misshapen or not
            finite.
        """
        with jax.set_mesh(sharding.make_mesh(config_lib.Mesh())):
            expected = sharding.by_name(sharding.abstract(self.network.init))
        faults = list_differences(
            {name: leaf.shape for name, leaf in expected.items()},
            {name: array.shape for name, array in self.params.items()},
        )
        faults += [
            f"{name} holds values that are not finite"
            for name, array in self.params.items()
            if not np.isfinite(array).all()
        ]
        if self.best_layer is not None and self.best_layer > self.model.layers:
            faults.append(f"best_layer {self.best_layer} is none of {self.model.layers} layers")
        if faults:
            raise InputError(f"the weights in {where} do not fit: {'; '.join(faults)}.")
        return self

    def headless(self) -> "WeightsFile":
        """The weights without the class head."""
        params = {n: a for n, a in self.params.items() if not n.startswith("classifier.")}
        return dataclasses.replace(self, params=params, classes=0)

    def on_mesh(self) -> dict:
        """The nested parameters as arrays on the current mesh, sharded as for training."""
        abstract = sharding.abstract(self.network.init)
        leaves, structure = jax.tree.flatten(abstract)
        arrays = [
            jax.make_array_from_callback(leaf.shape, leaf.sharding, self.params[name].__getitem__)
            for name, leaf in zip(sharding.by_name(abstract), leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, arrays)

    def differing(self, config: config_lib.Config, starts: int) -> list[str]:
        """One phrase for every field of `config` that describes another network than the weights.

        Args:
          config: the configuration of a run.
          starts: number of start vectors that `config` asks for.
        """
        pairs = [
            *((f"model.{n}", getattr(config.model, n), getattr(self.model, n))
              for n in DEFINING_FIELDS),
            ("model.start_per_variant (start vectors)", starts, self.starts),
            *config.tokens.pairs(self.tokens),
            ("data.image_size", config.data.image_size, self.image_size),
        ]  # fmt: skip
        expected = {f"config.{name}": stored for name, _, stored in pairs}
        return list_differences(expected, {f"config.{name}": given for name, given, _ in pairs})


def choose_palette(named: Palette | None, stored: Palette | None, where: str) -> Palette:
    """The palette that the user names or that is stored with the weights in `where`.

    Raises:
      InputError: there is neither, or the two differ.
    """
    if named is None and stored is None:
        raise InputError(
            f"{where} has no colours for its tokens; name the palette (kmeans_centers.npy) as well."
        )
    if named and stored and not named.equivalent(stored):
        raise InputError(
            f"the palette that you name differs from the palette in {where}; name none."
        )
    return named or stored


def class_head(weight: Float[np.ndarray, "C D"]) -> dict[str, np.ndarray]:
    """The parameters of a class head that does not standardise its input."""
    width = weight.shape[1]
    return {
        "classifier.class_head": weight,
        "classifier.class_center": np.zeros(width, np.float32),
        "classifier.class_scale": np.ones(width, np.float32),
    }
