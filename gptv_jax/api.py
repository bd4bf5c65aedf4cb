"""What a Python user calls: trained networks, with NumPy arrays in and NumPy arrays out."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from gptv_jax import config as config_lib
from gptv_jax import sharding, validation, weights
from gptv_jax.decode import generation, likelihood
from gptv_jax.decode.sampler import Sampler
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.tokens import LearnedCodec, learned
from gptv_jax.tokens import palette as palettes
from gptv_jax.tokens.codec import AnyArray
from gptv_jax.train import objective
from gptv_jax.weights import huggingface, native, run_folder
from gptv_jax.weights.file import WeightsFile

Labels = int | np.integer | list[int] | tuple[int, ...] | AnyArray | None  # one, or one each


class Model:
    """A trained network with its tokens; made by `load` and its like.

    Images are uint8 [B, H, W, C] in the data set's own range. Work is split over all devices.
    Labels are classes, 0 <= label < C, of a network with `model.class_tokens`: one for all images
    or one for each; None: the network is told none.
    Whatever has the wrong shape, dtype or value raises ValueError.
    """

    def __init__(self, described: WeightsFile, params: dict, mesh: jax.sharding.Mesh):
        """A network with parameters on a mesh; of `described` the arrays are not looked at."""
        self.network, self.codec = described.network, described.codec
        self._described, self._probed = described, described.best_layer
        self._params, self._mesh = params, mesh

    def tokenize(self, images: UInt8[AnyArray, "B H W C"]) -> Int[np.ndarray, "B T"]:
        """Int32 tokens, 0 <= token < V, in raster order."""
        return self.codec.encode(validation.images(images, self.codec))

    def detokenize(self, tokens: Int[AnyArray, "B T"]) -> UInt8[np.ndarray, "B H W C"]:
        """The images that the tokens stand for; for a lossless codec the inverse of `tokenize`."""
        return self.codec.decode(validation.sequences(tokens, self.network))

    def logits(
        self, tokens: Int[AnyArray, "B T"], labels: Labels = None
    ) -> Float[np.ndarray, "B T V"]:
        """Float32 logits; position t predicts tokens[:, t] from those before it; BERT: from all."""
        return self._forward(validation.sequences(tokens, self.network), "logits", labels)

    def log_likelihood(
        self, images: UInt8[AnyArray, "B H W C"], labels: Labels = None
    ) -> Float[np.ndarray, "B"]:
        """Float32 log-probability of each image's tokens, in nats, summed over them."""
        return -self._nats(images, labels).sum(axis=1)

    def surprise(
        self, images: UInt8[AnyArray, "B H W C"], labels: Labels = None
    ) -> Float[np.ndarray, "B H W"]:
        """Float32 nats by which each pixel surprises the network, which has seen those before it.

        The nats of a token are spread evenly over its pixels: an image's sum is minus its
        `log_likelihood`. `pictures.heat_map` shows them.
        """
        nats, size = self._nats(images, labels), self.codec.image_shape[:2]
        return likelihood.by_pixel(nats, self.codec.grid, size)

    def features(
        self, images: UInt8[AnyArray, "B H W C"], layer: int | None = None
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
        if not validation.is_whole(layer) or not 0 <= layer <= last:
            raise ValueError(f"layer is {layer}; this network has the layers 0 to {last}.")
        return self._forward(self.tokenize(images), "pooled")[:, layer]

    def classify(self, images: UInt8[AnyArray, "B H W C"]) -> Float[np.ndarray, "B classes"]:
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
        label: Labels = None,
        guidance: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_power: float = 1.0,
    ) -> UInt8[np.ndarray, "n H W C"]:
        """New images, drawn token by token.

        Args:
          n: how many.
          seed: the same seed gives the same images.
          temperature: divides the logits; 0 takes the most likely token.
          top_k: draws among the k most likely tokens; None: all.
          top_p: draws among the most likely tokens that together reach probability p; None: all.
          label: see the class.
          guidance: scale of classifier-free guidance, above 1 away from what has no class.
          guidance_schedule: "constant", or "cosine", see `generation.guidance_scales`.
          guidance_power: of cosine.
        """
        n = validation.whole(n, "n", least=1)
        labels = validation.labels(label, n, self.network)
        sampler = self._sampler(
            labels,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
        )
        nothing = np.full((n, self.network.length), generation.UNKNOWN, np.int32)
        with jax.set_mesh(self._mesh):
            return self.codec.decode(sampler.draw(nothing, validation.key(seed), labels))

    def complete(
        self,
        images: UInt8[AnyArray, "B H W C"],
        keep: float = 0.5,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        samples: int = 1,
        mask: Bool[AnyArray, "*B height width"] | None = None,
        labels: Labels = None,
        guidance: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_power: float = 1.0,
    ) -> UInt8[np.ndarray, "rows H W C"]:
        """What is known of images, unchanged but for what the tokens lose, and the rest drawn.

        Each token is drawn in raster order and sees those before it alone, known or drawn.

        Args:
          images: see the class.
          keep: the first share of the rows, to the nearest row, is known; from 0 to 1.
          seed: see `sample`, as the next three.
          temperature: divides the logits.
          top_k: draws among the k most likely tokens.
          top_p: draws among the most likely tokens that reach probability p.
          samples: completions of each image, next to each other; rows that all images know from the
            top are read once for them.
          mask: in place of `keep`, where images are known: True for known pixels, [H, W] or
            [B, H, W], or for known tokens, [rows, columns] of them; a token is known where all its
            pixels are.
          labels: see the class.
          guidance: see `sample`, as the last two.
          guidance_schedule: "constant" or "cosine".
          guidance_power: of cosine.
        """
        keep = validation.settings(keep=keep)["keep"]
        samples = validation.whole(samples, "samples", least=1)
        tokens = self.tokenize(images)
        labels = validation.labels(labels, len(tokens), self.network)
        if mask is None:
            known = np.arange(self.network.length) < generation.kept_tokens(self.network, keep)
        else:
            known = validation.mask(mask, len(tokens), self.codec)
        sampler = self._sampler(
            labels,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
        )
        given = np.where(known, tokens, generation.UNKNOWN)
        with jax.set_mesh(self._mesh):
            return self.codec.decode(sampler.draw(given, validation.key(seed), labels, samples))

    def outpaint(
        self,
        images: UInt8[AnyArray, "B H W C"],
        top: int = 0,
        bottom: int = 0,
        left: int = 0,
        right: int = 0,
        seed: int = 0,
        labels: Labels = None,
        **settings: float | str | None,
    ) -> UInt8[np.ndarray, "B height width C"]:
        """Images beyond their edges, and beyond the size that the network was trained at.

        The network's window moves outward by half its side at most and draws what it finds unknown,
        in raster order. So what is to the right and below is drawn knowing what is there; what is
        to the left knows only the rows above its own, and what is above does not know what is
        below it: there an edge may show. The tokens of the images stay as they are.

        Args:
          images: see the class.
          top: pixels to add above, a multiple of a token's; as the next three.
          bottom: below.
          left: to the left.
          right: to the right.
          seed: see `sample`.
          labels: see the class.
          **settings: those of `sample` that say how tokens are drawn: temperature, top_k, top_p,
            guidance, guidance_schedule, guidance_power.
        """
        margins = validation.margins(self.codec, top=top, bottom=bottom, left=left, right=right)
        tokens = self.tokenize(images)
        labels = validation.labels(labels, len(tokens), self.network)
        sampler = self._sampler(labels, **settings)
        with jax.set_mesh(self._mesh):
            grids = sampler.outpaint(tokens, margins, validation.key(seed), labels)
        return self.codec.decode(grids.reshape(len(grids), -1), grids.shape[1:])

    def save(self, path: str | pathlib.Path) -> None:
        """Writes all of it as one .safetensors file, which `load` takes.

        Args:
          path: of the file; it ends in .safetensors.
        """
        native.write(self.weights_file(), pathlib.Path(path).absolute())

    def weights_file(self) -> WeightsFile:
        """The weights as NumPy arrays, with all that is needed to use them."""
        arrays = {name: np.asarray(leaf) for name, leaf in sharding.by_name(self._params).items()}
        return dataclasses.replace(self._described, params=arrays)

    def _must_be_autoregressive(self, what: str) -> None:
        if self.network.config.objective != "autoregressive":
            raise ValueError(f"a model with the objective bert has no {what}.")

    def _sampler(self, labels: np.ndarray | None, **settings) -> Sampler:
        self._must_be_autoregressive("way to draw images")
        if unknown := set(settings) - Sampler.settings():
            raise TypeError(f"{', '.join(sorted(unknown))}: no setting of how tokens are drawn.")
        sampler = Sampler(self.network, self._params, **validation.settings(**settings))
        if sampler.guidance != 1 and labels is None:
            raise InputError(
                f"guidance is {sampler.guidance:g}, but no class is given to be guided to; give "
                "one, or take guidance 1."
            )
        return sampler

    def _nats(self, images, labels: Labels) -> Float[np.ndarray, "B T"]:
        self._must_be_autoregressive("likelihoods")
        tokens = self.tokenize(images)
        labels = validation.labels(labels, len(tokens), self.network)
        with jax.set_mesh(self._mesh):
            return likelihood.nats(self.network, self._params, tokens, labels)

    def _forward(self, tokens: np.ndarray, wanted: str, labels: Labels = None) -> np.ndarray:
        labels = validation.labels(labels, len(tokens), self.network)
        variant = likelihood.variants(self.network, labels, len(tokens))
        with jax.set_mesh(self._mesh):
            inputs = sharding.filled(tokens), sharding.filled(variant)
            result = _forward(self.network, self._params, *inputs, wanted)
        return np.asarray(result)[: len(tokens)]


def load(
    source: str | pathlib.Path,
    stage: str | None = None,
    palette: str | pathlib.Path | None = None,
) -> Model:
    """The model in a run folder, or in a file or folder of weights.

    Args:
      source: the `--workdir` of a run; a .safetensors file of `Model.save`; or what
        `from_huggingface` and `from_openai` take.
      stage: "pretrain" or "finetune" of a run; None: the latest of the two that has finished.
      palette: kmeans_centers.npy, for weights that come without the colours of their tokens.

    Raises:
      ValueError: there is no such run or file, the stage has not finished, or a file is damaged.
    """
    path, mesh = pathlib.Path(source).absolute(), sharding.make_mesh(config_lib.Mesh())
    with jax.set_mesh(mesh):
        if path.is_dir() and not weights.is_weights_path(path):
            return Model(*run_folder.read(path, stage), mesh)
        if stage is not None:
            raise InputError(f"stage={stage} is given, but {path} is no run folder.")
        found = weights.read(path, palettes.load(palette) if palette else None)
        return Model(dataclasses.replace(found, params={}), found.on_mesh(), mesh)


def from_huggingface(
    folder: str | pathlib.Path, palette: str | pathlib.Path | None = None
) -> Model:
    """An ImageGPT of `transformers`, from the folder that `save_pretrained` wrote.

    Args:
      folder: with `config.json`, safetensors (in one file or several) and, for the palette,
        `preprocessor_config.json`.
      palette: kmeans_centers.npy, where `preprocessor_config.json` is missing.

    Raises:
      ValueError: a tensor is missing, left over or of another shape (all are listed), a bias is not
        zero, or the network is another one than Image GPT.
    """
    return load(folder, palette=palette)


def to_huggingface(model: Model, folder: str | pathlib.Path, task: str = "generation") -> None:
    """Writes a folder from which `transformers` loads the model, without this package or pickle.

    Args:
      model: the model to write.
      folder: is made where it does not exist.
      task: "generation" for `ImageGPTForCausalImageModeling`, "classification" for
        `ImageGPTForImageClassification`.

    Raises:
      ValueError: the model has a part that ImageGPT does not have (the part is named).
    """
    if task not in huggingface.ARCHITECTURES:
        shown = ", ".join(huggingface.ARCHITECTURES)
        raise InputError(f"task is {task!r}; it takes one of {shown}.")
    huggingface.write(model.weights_file(), pathlib.Path(folder).absolute(), task)


def from_openai(prefix: str | pathlib.Path, palette: str | pathlib.Path) -> Model:
    """OpenAI's Image GPT, from the TensorFlow checkpoint; needs the `prepare` extra.

    Args:
      prefix: path of the checkpoint without .index: ".../model.ckpt-1000000".
      palette: the colours of the tokens, kmeans_centers.npy.

    Raises:
      ValueError: as `from_huggingface`.
    """
    return load(prefix, palette=palette)


def load_tokenizer(source: str | pathlib.Path, image_size: int | None = None) -> LearnedCodec:
    """A learned encoder and decoder of images, without a network that reads the codes.

    Args:
      source: a run folder whose stage `tokenizer` has finished, or a file of `Tokenizer.save`.
      image_size: height and width in pixels; None: the size of the training images.

    Raises:
      ValueError: there is no tokenizer, it is damaged, or its grid does not divide the size.
    """
    tokenizer = learned.load(source)
    size = tokenizer.provenance["image_size"] if image_size is None else image_size
    return LearnedCodec(tokenizer, validation.tokenizer_size(size, tokenizer.config.downsample))


@functools.partial(jax.jit, static_argnames=("network", "wanted"))
def _forward(
    network: Network, params: dict, tokens: jax.Array, variant: jax.Array, wanted: str
) -> jax.Array:
    if network.config.objective == "bert" and wanted != "logits":
        # As in training and in the tests: under masks, whose outputs are averaged.
        batch = {"tokens": tokens, "variant": None, "index": jnp.arange(len(tokens))}
        votes = [
            objective.evaluate_batch(network, params, batch, v)[0] for v in range(network.votes)
        ]
        if wanted == "pooled":
            return sum(vote.pooled for vote in votes).swapaxes(0, 1) / len(votes)
        return sum(jax.nn.softmax(vote.class_logits, axis=-1) for vote in votes) / len(votes)
    output = network.bind(params)(tokens, variant)
    match wanted:
        case "logits":
            return output.logits
        case "pooled":
            return output.pooled.swapaxes(0, 1)
        case "classes":
            return jax.nn.softmax(output.class_logits, axis=-1)
