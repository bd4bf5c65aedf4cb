"""What a Python user calls: a run folder as a model with NumPy in and NumPy out."""

import dataclasses
import functools
import math
import numbers
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from gptv_jax import config as config_lib
from gptv_jax import decode, files, interop, sharding, tokens
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.errors import InputError
from gptv_jax.interop import huggingface, native
from gptv_jax.interop.portable import Portable
from gptv_jax.model.gpt import Network
from gptv_jax.record import checkpoint_folder, config_of, finished_stages
from gptv_jax.run import network_of
from gptv_jax.tokens import palette as palettes
from gptv_jax.train import objective
from gptv_jax.train.objective import cross_entropy

Given = np.ndarray | jax.Array  # what a user may pass
TRAININGS = ("pretrain", "finetune")  # the stages that leave weights


class Model:
    """A trained network with its tokens; made by `load` and its like.

    Images are uint8 [B, H, W, C] in the data set's own range. Work is split over all devices.
    Whatever has the wrong shape, dtype or value raises ValueError.
    """

    def __init__(self, described: Portable, params: dict, mesh: jax.sharding.Mesh):
        """A network with parameters on a mesh; of `described` the arrays are not looked at."""
        self.network, self.codec = described.network, described.codec
        self._described, self._probed = described, described.best_layer
        self._params, self._mesh = params, mesh

    def tokenize(self, images: UInt8[Given, "B H W C"]) -> Int[np.ndarray, "B T"]:
        """Int32 tokens, 0 <= token < V, in raster order."""
        images, wanted = np.asarray(images), self.codec.image_shape
        if images.dtype != np.uint8 or images.shape[1:] != wanted or images.ndim != 4:
            shown = ", ".join(map(str, wanted))
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; they must be uint8 [B, {shown}]."
            )
        if not len(images):
            raise ValueError("the batch is empty; give one image or more.")
        return self.codec.encode(images)

    def detokenize(self, tokens: Int[Given, "B T"]) -> UInt8[np.ndarray, "B H W C"]:
        """The images that the tokens stand for; for a lossless codec the inverse of `tokenize`."""
        return self.codec.decode(self._checked(tokens))

    def logits(self, tokens: Int[Given, "B T"]) -> Float[np.ndarray, "B T V"]:
        """Float32 logits; position t predicts tokens[:, t] from those before it; BERT: from all."""
        return self._forward(self._checked(tokens), "logits")

    def log_likelihood(self, images: UInt8[Given, "B H W C"]) -> Float[np.ndarray, "B"]:
        """Float32 log-probability of each image's tokens, in nats, summed over them."""
        self._must_be_autoregressive("likelihoods")
        return self._forward(self.tokenize(images), "log_likelihood")

    def features(
        self, images: UInt8[Given, "B H W C"], layer: int | None = None
    ) -> Float[np.ndarray, "B D"]:
        """Float32 means over positions of one layer's normed input; BERT: over its masks, too.

        Args:
          images: see the class.
          layer: 0 .. L, L being the output of the final norm; None: the layer that the probe chose,
            on the pretrained weights.
        """
        last = self.network.config.layers
        if layer is None and self._probed is None:
            raise ValueError(f"the probe has not run, so name a layer: 0 to {last}.")
        layer = self._probed if layer is None else layer
        if not _whole(layer) or not 0 <= layer <= last:
            raise ValueError(f"layer is {layer}; this network has the layers 0 to {last}.")
        return self._forward(self.tokenize(images), "pooled")[:, layer]

    def classify(self, images: UInt8[Given, "B H W C"]) -> Float[np.ndarray, "B classes"]:
        """Float32 class probabilities, of a fine-tuned model; BERT: means over its masks."""
        if not self.network.classes:
            raise ValueError(
                "this model has no class head; load a run whose finetune has finished."
            )
        return self._forward(self.tokenize(images), "classes")

    def sample(
        self,
        n: int,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> UInt8[np.ndarray, "n H W C"]:
        """New images, drawn token by token.

        Args:
          n: how many.
          seed: the same seed gives the same images.
          temperature: divides the logits; 0 takes the most likely token.
          top_k: draws among the k most likely tokens; None: all.
          top_p: draws among the most likely tokens that together reach probability p; None: all.
        """
        if not _whole(n) or n < 1:
            raise ValueError(f"n is {n!r}; it takes a whole number, 1 or more.")
        return self._generate(np.zeros((n, 0), np.int32), seed, temperature, top_k, top_p)

    def complete(
        self,
        images: UInt8[Given, "B H W C"],
        keep: float = 0.5,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        samples: int = 1,
    ) -> UInt8[np.ndarray, "rows H W C"]:
        """The first share `keep` of the rows, to the nearest row, and a drawn continuation.

        Args:
          images: see the class.
          keep: from 0 to 1.
          seed: see `sample`, as the next three.
          temperature: divides the logits.
          top_k: draws among the k most likely tokens.
          top_p: draws among the most likely tokens that reach probability p.
          samples: continuations of each image, next to each other; what they keep is read once.
        """
        if not _real(keep) or not 0 <= keep <= 1:
            raise ValueError(f"keep is {keep!r}; it takes a share of the rows, from 0 to 1.")
        if not _whole(samples) or samples < 1:
            raise ValueError(f"samples is {samples!r}; it takes a whole number, 1 or more.")
        kept = self.tokenize(images)[:, : decode.kept_tokens(self.network, keep)]
        return self._generate(kept, seed, temperature, top_k, top_p, samples)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes all of it as one .safetensors file, which `load` takes.

        Args:
          path: of the file; it ends in .safetensors.
        """
        native.write(self.portable(), pathlib.Path(path).absolute())

    def portable(self) -> Portable:
        """The weights as NumPy arrays, with all that is needed to use them."""
        arrays = {name: np.asarray(leaf) for name, leaf in sharding.by_name(self._params).items()}
        return dataclasses.replace(self._described, params=arrays)

    def _must_be_autoregressive(self, what: str) -> None:
        if self.network.config.objective != "autoregressive":
            raise ValueError(f"a model with the objective bert has no {what}.")

    def _generate(self, prefix, seed, temperature, top_k, top_p, samples=1):
        self._must_be_autoregressive("way to draw images")
        if not _whole(seed) or not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed!r}; it takes a whole number from 0, below 2**32.")
        if not _real(temperature) or not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature!r}; it takes 0 or more.")
        if top_k is not None and (not _whole(top_k) or top_k < 1):
            raise ValueError(f"top_k is {top_k!r}; it takes a whole number, 1 or more, or None.")
        if top_p is not None and (not _real(top_p) or not 0 < top_p <= 1):
            raise ValueError(f"top_p is {top_p!r}; it takes more than 0 up to 1, or None.")
        top_k = None if top_k is None else min(top_k, self.network.vocabulary)
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "samples": samples}
        wanted = samples * len(prefix)
        if len(prefix) % self._ways:  # rather more prompts than more samples of each that only fill
            prefix, settings["samples"] = np.repeat(prefix, samples, axis=0), 1
        with jax.set_mesh(self._mesh):
            rows, key = self._rows(prefix), jax.random.key(seed)
            drawn = decode.generate(self.network, self._params, rows, key, **settings)
        return self.codec.decode(np.asarray(drawn)[:wanted])

    def _checked(self, tokens) -> np.ndarray:
        tokens, length = np.asarray(tokens), self.network.length
        if tokens.ndim != 2 or tokens.shape[1] != length or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"tokens are {tokens.dtype} {list(tokens.shape)}; they must be whole numbers "
                f"[B, {length}]."
            )
        vocabulary = self.network.vocabulary
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocabulary):
            raise ValueError(
                f"tokens range from {tokens.min()} to {tokens.max()}; they must lie in 0 to "
                f"{vocabulary - 1}."
            )
        return tokens.astype(np.int32)

    def _forward(self, tokens: np.ndarray, wanted: str) -> np.ndarray:
        with jax.set_mesh(self._mesh):
            result = _forward(self.network, self._params, self._rows(tokens), wanted)
        return np.asarray(result)[: len(tokens)]

    def _rows(self, rows: np.ndarray) -> jax.Array:
        """Rows split over the devices; the last one is repeated where they do not divide."""
        if not len(rows):
            raise ValueError("the batch is empty; give one row or more.")
        fill = -len(rows) % self._ways
        return sharding.from_everywhere(np.pad(rows, ((0, fill), (0, 0)), mode="edge"))

    @property
    def _ways(self) -> int:
        """Parts that rows are split into."""
        return math.prod(self._mesh.shape[axis] for axis in sharding.BATCH)


def _whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _real(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@functools.partial(jax.jit, static_argnames=("network", "wanted"))
def _forward(network: Network, params: dict, tokens: jax.Array, wanted: str) -> jax.Array:
    if network.config.objective == "bert" and wanted != "logits":
        # As in training and in the tests: under masks, whose outputs are averaged.
        batch = {"tokens": tokens, "variant": None, "index": jnp.arange(len(tokens))}
        votes = [objective.evaluated(network, params, batch, v)[0] for v in range(network.votes)]
        if wanted == "pooled":
            return sum(vote.pooled for vote in votes).swapaxes(0, 1) / len(votes)
        return sum(jax.nn.softmax(vote.class_logits, axis=-1) for vote in votes) / len(votes)
    output = network.bind(params)(tokens)
    match wanted:
        case "logits":
            return output.logits
        case "pooled":
            return output.pooled.swapaxes(0, 1)
        case "classes":
            return jax.nn.softmax(output.class_logits, axis=-1)
        case "log_likelihood":
            return -cross_entropy(output.logits, tokens).sum(axis=1)


def load(
    source: str | pathlib.Path,
    stage: str | None = None,
    palette: str | pathlib.Path | None = None,
) -> Model:
    """The model that a run folder holds, or a file or folder of weights.

    Args:
      source: the `--workdir` of a run; a .safetensors file of `Model.save`; or what
        `from_huggingface` and `from_openai` take.
      stage: of a run, "pretrain" or "finetune"; None: the latest of them that has finished.
      palette: file of the colours, for weights that come without them.

    Raises:
      ValueError: neither of these, the stage has not finished, or something there is damaged.
    """
    path = pathlib.Path(source).absolute()
    if not interop.is_portable(path) and path.is_dir():
        return _of_run(path, stage)
    if stage is not None:
        raise InputError(f"stage={stage} is asked for, but {path} is no run folder, with stages.")
    found = interop.read(path, palettes.load(palette) if palette else None)
    mesh = sharding.make_mesh(config_lib.Mesh())
    with jax.set_mesh(mesh):
        return Model(dataclasses.replace(found, params={}), found.on_mesh(), mesh)


def from_huggingface(
    folder: str | pathlib.Path, palette: str | pathlib.Path | None = None
) -> Model:
    """An ImageGPT of `transformers`, from the folder that `save_pretrained` wrote.

    Args:
      folder: with `config.json`, safetensors (in one file or several) and, for the palette,
        `preprocessor_config.json`.
      palette: kmeans_centers.npy, where that is missing.

    Raises:
      ValueError: a tensor is missing, left over or misshapen (all are listed), a bias is not zero,
        or the network is another one than Image GPT.
    """
    return load(folder, palette=palette)


def to_huggingface(model: Model, folder: str | pathlib.Path, task: str = "generation") -> None:
    """Writes a folder from which `transformers` loads the model, without code of ours or pickle.

    Args:
      model: the model.
      folder: made where it is not there.
      task: "generation" for `ImageGPTForCausalImageModeling`, "classification" for
        `ImageGPTForImageClassification`.

    Raises:
      ValueError: the model has what that form cannot express (named).
    """
    if task not in huggingface.ARCHITECTURES:
        shown = ", ".join(huggingface.ARCHITECTURES)
        raise InputError(f"task is {task!r}; it takes one of {shown}.")
    huggingface.write(model.portable(), pathlib.Path(folder).absolute(), task)


def from_openai(prefix: str | pathlib.Path, palette: str | pathlib.Path) -> Model:
    """OpenAI's Image GPT, from the TensorFlow checkpoint; needs the `prepare` extra.

    Args:
      prefix: path of the checkpoint without .index: ".../model.ckpt-1000000".
      palette: its colours, kmeans_centers.npy.

    Raises:
      ValueError: as `from_huggingface`.
    """
    return load(prefix, palette=palette)


def _of_run(folder: pathlib.Path, stage: str | None) -> Model:
    config, summary = config_of(folder), files.read_json(folder / "summary.json", {})
    finished = [s for s in TRAININGS if s in finished_stages(summary)]
    if stage is None and finished:
        stage = finished[-1]
    if stage not in finished:
        shown = ", ".join(finished) or "none"
        raise InputError(
            f"{folder} has no finished stage {stage or 'with weights'}; of those with weights, "
            f"finished: {shown}."
        )
    network = network_of(config, summary.get(f"{stage}/classes", 0))
    step = summary[f"{stage}/steps"]
    described = Portable(
        model=config.model,
        tokens=config.tokens,
        image_size=config.data.image_size,
        params={},
        lexicon=tokens.load_lexicon(config.tokens.kind, folder),
        starts=network.starts,
        classes=network.classes,
        step=step,
        best_layer=summary.get("probe/best_layer"),
    )
    mesh, place = sharding.make_mesh(config_lib.Mesh()), checkpoint_folder(config, folder) / stage
    weights = {"pretrain": config.train, "finetune": config.finetune.train}[stage].weights
    with jax.set_mesh(mesh), Checkpoints(place, read_only=True) as saved:
        state, _ = saved.restore(step, {weights: sharding.abstract(network.init)})
    return Model(described, state[weights], mesh)
