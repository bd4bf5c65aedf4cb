"""Learned tokens: a trained encoder gives each square of pixels a code (model/autoencoder.py)."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt8

from gptv_jax import config as config_lib
from gptv_jax import files, hardware, sharding
from gptv_jax.config import fields
from gptv_jax.config.data import ImageSize, height_and_width
from gptv_jax.errors import InputError, as_input_error, list_differences, shorten
from gptv_jax.model import autoencoder, vqgan
from gptv_jax.tokens import foreign
from gptv_jax.tokens.codec import AnyArray, Codec

FILE = "tokenizer.safetensors"  # in a run folder and in a token cache
HEADER = "gptv_jax_tokenizer"  # key of the file's metadata
FORMAT = 1
# Images or frames a device encodes or decodes at a time. The number is fixed, because a program for
# another number may round differently, which turns a value that lies between two codes into another
# token.
CHUNK = 16
CHUNKS_AHEAD = 4  # chunks given to the devices before the first result is fetched


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A trained encoder and decoder with their weights, which `LearnedCodec` applies."""

    config: config_lib.Autoencoder
    params: dict[str, np.ndarray]  # float32, by flat name: "encoder.stem.bias"
    provenance: dict  # JSON that says how the weights were made

    @functools.cached_property
    def hash(self) -> str:
        return files.hash_arrays(self.params)

    def equivalent(self, other: "Tokenizer") -> bool:
        """Whether both tokenizers make the same tokens of every image."""
        return self.hash == other.hash and not self.differing(other.config)

    def differing(self, config: config_lib.Autoencoder) -> list[str]:
        """One phrase for each field whose value differs from this tokenizer's."""
        prefix = "config.tokens.autoencoder."
        return list_differences(fields.flatten(self.config, prefix), fields.flatten(config, prefix))

    def description(self) -> dict:
        """Everything but the weights, as JSON."""
        settings = fields.flatten(self.config)
        return {"format": FORMAT, "autoencoder": settings, "provenance": self.provenance}

    def save(self, path: str | pathlib.Path) -> None:
        arrays = {name: np.ascontiguousarray(array) for name, array in self.params.items()}
        header = json.dumps(self.description())
        files.write_safetensors(arrays, files.user_path(path), {HEADER: header})


def from_description(header: dict, params: dict[str, np.ndarray], where: str) -> Tokenizer:
    """The tokenizer with these weights whose `description()` is `header`."""
    with as_input_error(f"the header of {where} is damaged"):
        if (found := header["format"]) != FORMAT:
            raise InputError(f"{where} is of format {found}; this version reads {FORMAT}.")
        settings = config_lib.recorded(config_lib.Autoencoder, header["autoencoder"], "autoencoder")
        config = fields.from_dict(config_lib.Autoencoder, settings, "autoencoder")
        provenance = dict(header["provenance"])
    return checked(config, params, provenance, where)


def checked(
    config: config_lib.Autoencoder, params: dict[str, np.ndarray], provenance: dict, where: str
) -> Tokenizer:
    """The tokenizer; InputError where weights are missing, left over, misshapen or not finite."""
    with as_input_error(f"the tokenizer in {where} does not fit its settings"):
        _, tree = _abstract(config, params, hardware.devices(local=True)[:1])
    expected = {name: leaf.shape for name, leaf in sharding.by_name(tree).items()}
    wrong = list_differences(expected, {name: array.shape for name, array in params.items()})
    wrong += [f"{name} is not finite" for name, a in params.items() if not np.isfinite(a).all()]
    if wrong:
        raise InputError(f"the tokenizer in {where} does not fit: {shorten(wrong, '; ')}.")
    return Tokenizer(config, params, provenance)


def load(path: str | pathlib.Path) -> Tokenizer:
    """Reads a tokenizer: a file of `Tokenizer.save`, or the run folder that trained it.

    Diffusers' and LlamaGen's tokenizers are read as well, see tokens/foreign.py.
    """
    path = files.user_path(path)
    if path.is_dir():
        if not (path / FILE).exists() and foreign.is_vq_model(path):
            return checked(*foreign.read_vq_model(path), str(path))
        path = path / FILE
    if not path.exists():
        raise InputError(
            f"there is no tokenizer {path}; it takes a run folder whose stage tokenizer has "
            "finished, a file of Tokenizer.save, a folder of diffusers' VQModel, or LlamaGen's "
            "tokenizer as .safetensors."
        )
    params, metadata = files.read_weights(path)
    if foreign.LLAMAGEN in params:
        return checked(*foreign.read_llamagen(params, path), str(path))
    with as_input_error(f"{path} holds no tokenizer"):
        header = json.loads(metadata[HEADER])
    return from_description(header, params, str(path))


class LearnedCodec(Codec):
    """The token of a square of pixels is its code; local devices share the images of a batch.

    Of clips of `frames` frames, the first frame has tokens of its own, and each later token stands
    for the square in `config.frames` frames.
    """

    on_devices = True

    def __init__(self, tokenizer: Tokenizer, size: ImageSize, frames: int = 0):
        self.definition, config, pixels = tokenizer, tokenizer.config, height_and_width(size)
        clip = (frames,) * (frames > 0)
        self.vocabulary, self.image_shape = config.vocabulary, (*clip, *pixels, config.channels)
        steps = (-(-n // config.frames) for n in clip)
        self.grid = (*steps, *(n // config.downsample for n in pixels))

    @property
    def sides(self) -> tuple[Int[np.ndarray, " positions"], ...]:
        *clip, rows, columns = super().sides
        spans = (np.where(np.arange(len(each)), self.definition.config.frames, 1) for each in clip)
        return (*spans, rows, columns)

    def encode(self, images: UInt8[AnyArray, "B *F H W C"]) -> Int[np.ndarray, "B T"]:
        """Int32 tokens, whatever the other images of the batch and the devices are."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            shown = ", ".join(map(str, self.image_shape))
            raise InputError(
                f"images are {images.dtype} {list(images.shape)}; this tokenizer takes uint8 "
                f"[B, {shown}]."
            )
        codes = self._in_chunks(images, decoding=False)
        return codes.reshape(len(images), math.prod(self.grid))

    def decode(
        self, tokens: Int[AnyArray, "B N"], grid: tuple[int, ...] | None = None
    ) -> UInt8[np.ndarray, "B *F H W C"]:
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
        codes = tokens.reshape(-1, *(grid or self.grid)).astype(np.int32)
        return self._in_chunks(codes, decoding=True)

    def _in_chunks(self, rows: np.ndarray, decoding: bool) -> np.ndarray:
        """Encodes or decodes the rows in chunks, all of one shape."""
        mesh, params = self._placed
        spec = NamedSharding(mesh, sharding.BATCH_FIRST)
        frames = math.prod(self.image_shape[:-3])
        size, pending, fetched = max(CHUNK // frames, 1) * mesh.size, [], []
        with jax.set_mesh(mesh):
            for first in range(0, max(len(rows), 1), size):
                chunk = rows[first : first + size]
                filled = np.pad(chunk, ((0, size - len(chunk)), *((0, 0),) * (rows.ndim - 1)))
                batch = jax.device_put(filled, spec)
                pending.append(_apply(self.definition.config, decoding, params, batch))
                if len(pending) > CHUNKS_AHEAD:
                    fetched.append(jax.device_get(pending.pop(0)))
            fetched += jax.device_get(pending)
        return np.concatenate(fetched)[: len(rows)]

    @functools.cached_property
    def _placed(self) -> tuple[jax.sharding.Mesh, dict]:
        return place(self.definition.config, self.definition.params, jax.local_devices())


# Without this option XLA keeps more digits than bfloat16 has between some operations, and between
# other operations on several devices than on one.
@functools.partial(
    jax.jit, static_argnums=(0, 1), compiler_options={"xla_allow_excess_precision": False}
)
def _apply(config: config_lib.Autoencoder, decoding: bool, params: dict, rows: Array) -> Array:
    """Images or clips of grids of codes (`decoding`), or codes of images or clips."""
    model = vqgan.Vqgan(config, params) if config.groups else autoencoder.bind(config, params)
    if decoding:
        return to_pixels(model.decode(rows))
    found = model.encode(from_pixels(rows))
    return found if config.groups else found.codes


def from_pixels(images: UInt8[Array, "*any"]) -> Float[Array, "*any"]:
    """Scales 0..255 to float32 from -1 to 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_pixels(images: Float[Array, "*any"]) -> UInt8[Array, "*any"]:
    """Scales -1..1 to 0..255, and clips what lies beyond."""
    return jnp.clip(jnp.rint((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def place(
    config: config_lib.Autoencoder, params: dict[str, np.ndarray], devices: list
) -> tuple[jax.sharding.Mesh, dict]:
    """A mesh of the devices, and the weights, a copy on each device."""
    mesh, tree = _abstract(config, params, devices)
    leaves = [params[name] for name in sharding.by_name(tree)]
    copies = jax.device_put(leaves, NamedSharding(mesh, P()))
    return mesh, jax.tree.unflatten(jax.tree.structure(tree), copies)


def _abstract(
    config: config_lib.Autoencoder, params: dict[str, np.ndarray], devices: list
) -> tuple[jax.sharding.Mesh, dict]:
    """A mesh of the devices, and the tree of weights as shapes without values."""
    mesh = sharding.make_mesh(config_lib.Mesh(), devices)
    with jax.set_mesh(mesh):
        if config.groups:
            return mesh, vqgan.shapes(config, params)
        return mesh, jax.eval_shape(lambda: autoencoder.init(config, jax.random.key(0)))
