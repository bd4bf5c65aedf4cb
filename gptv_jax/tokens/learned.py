"""Codes of a learned encoder as tokens: one for a square of pixels (see model.autoencoder)."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt8

from gptv_jax import config as config_lib
from gptv_jax import files, sharding
from gptv_jax.config import fields
from gptv_jax.errors import InputError, first_line, list_differences
from gptv_jax.model import autoencoder

FILE = "tokenizer.safetensors"  # in a run folder and in a token cache
HEADER = "gptv_jax_tokenizer"  # the key of the file's metadata
FORMAT = 1
# Images that a device works on at a time, however many there are to do: a program for another
# number may round otherwise, and what lies between two codes would become another token.
PART = 16
UNDER_WAY = 4  # parts that a device is given ahead of what is fetched

Given = np.ndarray | jax.Array  # what a user may pass


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A trained encoder and decoder, and where they come from."""

    config: config_lib.Autoencoder
    params: dict[str, np.ndarray]  # float32, by flat name: "encoder.stem.bias"
    provenance: dict  # what made it, in words and numbers; JSON

    @functools.cached_property
    def hash(self) -> str:
        """Of the weights."""
        return files.hash_arrays(self.params)

    def equivalent(self, other: "Tokenizer") -> bool:
        """Whether tokens mean the same."""
        return self.hash == other.hash and not self.differing(other.config)

    def differing(self, config: config_lib.Autoencoder) -> list[str]:
        """What settings say otherwise than this network, field by field, in words."""
        prefix = "config.tokens.autoencoder."
        return list_differences(fields.flatten(self.config, prefix), fields.flatten(config, prefix))

    def checked(self, where: str) -> "Tokenizer":
        """Itself, where every weight is there, of its shape, and nothing else.

        Raises:
          InputError: lists every weight that is missing, left over or of another shape.
        """
        wanted = {name: leaf.shape for name, leaf in _abstract(self.config).items()}
        given = {name: array.shape for name, array in self.params.items()}
        differing = list_differences(wanted, given)
        differing += [f"{n} is not finite" for n, a in self.params.items() if not _finite(a)]
        if differing:
            raise InputError(f"the tokenizer in {where} does not fit: {'; '.join(differing)}.")
        return self

    def description(self) -> dict:
        """All but the weights, as JSON."""
        return {
            "format": FORMAT,
            "autoencoder": fields.flatten(self.config),
            "provenance": self.provenance,
        }

    def save(self, path: str | pathlib.Path) -> None:
        """Writes a .safetensors file that `load` reads, whole or not at all."""
        arrays = {name: np.ascontiguousarray(array) for name, array in self.params.items()}
        files.write_safetensors(
            arrays, pathlib.Path(path), {HEADER: json.dumps(self.description())}
        )


def from_description(said: dict, params: dict[str, np.ndarray], where: str) -> Tokenizer:
    """The inverse of `Tokenizer.described`, with the weights.

    Raises:
      InputError: something is missing, of another version, or does not fit.
    """
    try:
        if said["format"] != FORMAT:
            raise InputError(f"{where} is of format {said['format']}; this version reads {FORMAT}.")
        settings = config_lib.recorded(config_lib.Autoencoder, said["autoencoder"], "autoencoder")
        config = fields.from_dict(config_lib.Autoencoder, settings, "autoencoder")
        return Tokenizer(config, params, dict(said["provenance"])).checked(where)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the header of {where} is damaged ({first_line(error)}).") from error


def load(path: str | pathlib.Path) -> Tokenizer:
    """A tokenizer from a file of `Tokenizer.save`, or from the run folder that trained it.

    Raises:
      InputError: there is none, or it is damaged.
    """
    path = pathlib.Path(path).absolute()
    if path.is_dir():
        path = path / FILE
    if not path.exists():
        raise InputError(
            f"there is no tokenizer {path}; it takes a run folder whose stage tokenizer has "
            "finished, or a file of Tokenizer.save."
        )
    params, metadata = files.read_weights(path)
    try:
        said = json.loads(metadata[HEADER])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} holds no tokenizer ({first_line(error)}).") from error
    return from_description(said, params, str(path))


class LearnedTokens:
    """Token = code of a square of pixels, in raster order; work is split over local devices."""

    lossless = False
    on_devices = True

    def __init__(self, tokenizer: Tokenizer, size: int):
        """A codec for square images of `size` pixels, a multiple of the pixels a side of a code."""
        self.definition, self.size = tokenizer, size
        config = tokenizer.config
        self.vocabulary = config.vocabulary
        self.grid = (size // config.downsample,) * 2
        self.image_shape = (size, size, config.channels)

    @property
    def similarity_order(self) -> Int[np.ndarray, "V"]:
        """The codes as they are: of some dimensions neighbours look alike."""
        return np.arange(self.vocabulary)

    def encode(self, images: UInt8[Given, "B H W C"]) -> Int[np.ndarray, "B T"]:
        """Int32 tokens, the same for an image whatever others it comes with, on any devices.

        Raises:
          InputError: images of another type or shape.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            shown = ", ".join(map(str, self.image_shape))
            raise InputError(
                f"images are {images.dtype} {list(images.shape)}; this tokenizer takes uint8 "
                f"[B, {shown}]."
            )
        return self._in_parts(_encode, images).reshape(len(images), math.prod(self.grid))

    def decode(
        self, tokens: Int[Given, "B T"], grid: tuple[int, int] | None = None
    ) -> UInt8[np.ndarray, "B H W C"]:
        """Images of codes, 0 to 255.

        Args:
          tokens: in raster order.
          grid: rows and columns, of a picture of another size; None: those of the codec.

        Raises:
          InputError: tokens of another type, number or range.
        """
        tokens, length = np.asarray(tokens), math.prod(grid or self.grid)
        if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or tokens.shape[1] != length:
            raise InputError(
                f"tokens are {tokens.dtype} {list(tokens.shape)}; they must be whole numbers "
                f"[B, {length}]."
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocabulary:
            raise InputError(
                f"tokens range from {tokens.min()} to {tokens.max()}; they must lie in 0 to "
                f"{self.vocabulary - 1}."
            )
        return self._in_parts(_decode, tokens.reshape(-1, *(grid or self.grid)).astype(np.int32))

    def picture(self, images: UInt8[np.ndarray, "B H W C"]) -> UInt8[np.ndarray, "B H W 3"]:
        """The same in three channels."""
        return np.broadcast_to(images, (*images.shape[:3], 3))

    def _in_parts(self, function: Callable, rows: np.ndarray) -> np.ndarray:
        """What a function makes of rows, in programs of one shape."""
        mesh, params = self._placed
        spec = NamedSharding(mesh, sharding.BATCH_FIRST)
        size, made, fetched = PART * mesh.size, [], []
        with jax.set_mesh(mesh):
            for first in range(0, max(len(rows), 1), size):
                part = rows[first : first + size]
                filled = np.pad(part, ((0, size - len(part)), *((0, 0),) * (rows.ndim - 1)))
                made.append(function(self.definition.config, params, jax.device_put(filled, spec)))
                if len(made) > UNDER_WAY:
                    fetched.append(jax.device_get(made.pop(0)))
            fetched += jax.device_get(made)
        return np.concatenate(fetched)[: len(rows)]

    @functools.cached_property
    def _placed(self) -> tuple[jax.sharding.Mesh, dict]:
        """This process's devices, and the weights, whole on each of them."""
        mesh = sharding.make_mesh(config_lib.Mesh(), jax.local_devices())
        with jax.set_mesh(mesh):
            tree = jax.eval_shape(
                lambda: autoencoder.init(self.definition.config, jax.random.key(0))
            )
        leaves = [self.definition.params[name] for name in sharding.by_name(tree)]
        whole = jax.device_put(leaves, NamedSharding(mesh, P()))
        return mesh, jax.tree.unflatten(jax.tree.structure(tree), whole)


# XLA may keep more digits than bfloat16 has from one operation to the next, and for several devices
# it does so elsewhere than for one.
_exactly = functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_allow_excess_precision": False}
)


@_exactly
def _encode(
    config: config_lib.Autoencoder, params: dict, images: UInt8[Array, "B H W C"]
) -> Int[Array, "B h w"]:
    return autoencoder.bind(config, params).encode(from_pixels(images)).codes


@_exactly
def _decode(
    config: config_lib.Autoencoder, params: dict, codes: Int[Array, "B h w"]
) -> UInt8[Array, "B H W C"]:
    return to_pixels(autoencoder.bind(config, params).decode(codes))


def from_pixels(images: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Float32 from -1 to 1, of 0 to 255."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_pixels(images: Float[Array, "B H W C"]) -> UInt8[Array, "B H W C"]:
    """0 to 255; what lies outside of -1 to 1 is cut."""
    return jnp.clip(jnp.rint((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def _abstract(config: config_lib.Autoencoder) -> dict:
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh(), jax.local_devices()[:1])):
        return sharding.by_name(sharding.abstract(lambda key: autoencoder.init(config, key)))


def _finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())
