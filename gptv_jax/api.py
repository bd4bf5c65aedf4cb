"""What a Python user calls: trained networks, with NumPy arrays in and NumPy arrays out."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from gptv_jax import config as config_lib
from gptv_jax import files, sharding, validation, weights
from gptv_jax.decode import generation
from gptv_jax.decode.sampler import Sampler, Section, by_pixel, kept_tokens
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.tokens import LearnedCodec, learned
from gptv_jax.tokens import palette as palettes
from gptv_jax.tokens.codec import AnyArray
from gptv_jax.train import objective
from gptv_jax.validation import Labels, arguments_by_name
from gptv_jax.weights import huggingface, native
from gptv_jax.weights.native import WeightsFile

AnyPath = str | pathlib.Path
Images = UInt8[AnyArray, "B H W C"]
Tokens = Int[AnyArray, "B T"]
Setting = float | int | str | None  # of `config.Drawing`


class Model:
    """A trained network with its weights (`params`, on `mesh`) and its tokens, made by `load`.

    Images are uint8 [B, H, W, C] in the data set's own range, NumPy or JAX arrays. Work is split
    over all devices. `labels` are classes, 0 <= label < C, for a network with
    `model.class_tokens`: one class for all images or one for each; None: no class.
    An argument of the wrong shape, dtype or value raises ValueError.
    """

    def __init__(self, described: WeightsFile, params: dict, mesh: jax.sharding.Mesh):
        """`described` says what `params` are; the arrays in `described` are not used."""
        self.network, self.codec = described.network, described.codec
        self.params, self.mesh, self._described = params, mesh, described

    def tokenize(self, images: Images) -> Int[np.ndarray, "B T"]:
        """Int32 tokens, 0 <= token < V, in raster order."""
        return self.codec.encode(validation.images(images, self.codec))

    def detokenize(self, tokens: Tokens) -> UInt8[np.ndarray, "B H W C"]:
        """The images that the tokens stand for; for a lossless codec the inverse of `tokenize`."""
        return self.codec.decode(validation.sequences(tokens, self.network))

    @arguments_by_name
    def logits(self, tokens: Tokens, labels: Labels = None) -> Float[np.ndarray, "B T V"]:
        """Float32 logits; position t predicts tokens[:, t] from the tokens before it.

        With objective=bert it predicts the token from all tokens, as none is masked here.
        """
        return self._forward(validation.sequences(tokens, self.network), "logits", labels)

    @arguments_by_name
    def log_likelihood(self, images: Images, labels: Labels = None) -> Float[np.ndarray, " B"]:
        """Float32 log-probability of each image, in nats: the sum over the image's tokens."""
        return -self._nats(images, labels).sum(axis=1)

    @arguments_by_name
    def surprise(self, images: Images, labels: Labels = None) -> Float[np.ndarray, "B H W"]:
        """Float32 negative log-probability of each pixel given the pixels before it, in nats.

        The nats of a token are spread evenly over the token's pixels, so the sum over an image is
        minus `log_likelihood`. `gptv_jax.runs.pictures.heat_map` shows them as a picture.
        """
        return by_pixel(self._nats(images, labels), self.codec)

    def features(self, images: Images, layer: int | None = None) -> Float[np.ndarray, "B D"]:
        """Float32 means over positions of one layer's normed input.

        With objective=bert they are also averaged over the `votes` masks. `layer` is 0 .. L, where
        L is the output of the final norm; None: the layer that the probe chose, on the pretrained
        weights.
        """
        last, chosen = self.network.config.layers, self._described.best_layer
        if layer is None and chosen is None:
            raise InputError(f"the probe has not run, so name a layer: 0 to {last}.")
        layer = validation.whole(chosen if layer is None else layer, "layer", most=last)
        return self._forward(self.tokenize(images), "pooled")[:, layer]

    def classify(self, images: Images) -> Float[np.ndarray, "B classes"]:
        """Float32 class probabilities of a fine-tuned model; with bert, means over its masks."""
        if not self.network.classes:
            raise InputError(
                "this model has no class head; load a run whose stage finetune has finished."
            )
        return self._forward(self.tokenize(images), "classes")

    @arguments_by_name
    def sample(
        self, n: int, seed: int = 0, *, labels: Labels = None, **drawing: Setting
    ) -> UInt8[np.ndarray, "n H W C"]:
        """`n` new images, drawn token by token; the same seed gives the same images."""
        n, key = validation.whole(n, "n", least=1), Section.NEW_IMAGES.key(validation.seed(seed))
        sampler, labels = self._sampler(n, labels, drawing)
        with jax.set_mesh(self.mesh):
            return self.codec.decode(sampler.new(n, key, labels))

    @arguments_by_name
    def complete(
        self,
        images: Images,
        keep: float = 0.5,
        seed: int = 0,
        *,
        samples: int = 1,
        mask: Bool[AnyArray, "*B height width"] | None = None,
        labels: Labels = None,
        **drawing: Setting,
    ) -> UInt8[np.ndarray, "rows H W C"]:
        """Images whose known part is kept and whose other tokens are drawn, `samples` times each.

        Known is the share `keep` of the rows, from the top and to the nearest row; or what `mask`
        says, True for known pixels, [H, W] or [B, H, W], or for known tokens, [rows, columns] or
        [B, rows, columns]. A token is known where all its pixels are.

        Tokens are drawn in raster order; each depends on the tokens before it alone, known or
        drawn. Known pixels change only as far as the tokens lose detail. Completions of one image
        are next to each other.
        """
        keep = validation.setting("keep", keep)
        samples = validation.whole(samples, "samples", least=1)
        key, tokens = Section.COMPLETIONS.key(validation.seed(seed)), self.tokenize(images)
        sampler, labels = self._sampler(len(tokens), labels, drawing)
        known = np.arange(self.network.length) < kept_tokens(self.network, keep)
        if mask is not None:
            known = validation.mask(mask, len(tokens), self.codec)
        given = np.where(known, tokens, generation.UNKNOWN)
        with jax.set_mesh(self.mesh):
            return self.codec.decode(sampler.draw(given, key, labels, samples))

    @arguments_by_name
    def outpaint(
        self,
        images: Images,
        top: int = 0,
        bottom: int = 0,
        left: int = 0,
        right: int = 0,
        seed: int = 0,
        labels: Labels = None,
        **drawing: Setting,
    ) -> UInt8[np.ndarray, "B height width C"]:
        """Images continued beyond their edges, and beyond the size that the network was trained at.

        `top`, `bottom`, `left` and `right` are pixels to add, multiples of the side of a token. The
        network's window moves outward by half its side at most and draws the unknown tokens in
        raster order. Tokens to the right of an image and below it depend on the image; tokens to
        the left know only the rows above them, and tokens above do not know what is below, so an
        edge may show there. The tokens of the image itself stay.
        """
        margins = validation.margins(self.codec, top=top, bottom=bottom, left=left, right=right)
        key, tokens = Section.OUTPAINTED.key(validation.seed(seed)), self.tokenize(images)
        sampler, labels = self._sampler(len(tokens), labels, drawing)
        with jax.set_mesh(self.mesh):
            grids = sampler.outpaint(tokens, margins, key, labels)
        return self.codec.decode(grids.reshape(len(grids), -1), grids.shape[1:])

    def save(self, path: AnyPath) -> None:
        """Writes a .safetensors file with everything that `load` needs."""
        native.write(self.weights_file(), files.user_path(path))

    def weights_file(self) -> WeightsFile:
        """The weights as NumPy arrays, with everything that is needed to use them."""
        arrays = {name: np.asarray(leaf) for name, leaf in sharding.by_name(self.params).items()}
        return dataclasses.replace(self._described, params=arrays)

    def _sampler(self, rows: int, labels: Labels, drawing: dict, what: str = "draw images"):
        """A sampler with these settings, and a label for each row.

        `what` ends the error message "a model with this objective cannot ...".
        """
        if self.network.config.objective != "autoregressive":
            raise InputError(
                f"a model with the objective {self.network.config.objective} cannot {what}; load "
                "one with the objective autoregressive."
            )
        labels = validation.labels(labels, rows, self.network)
        sampler = Sampler(self.network, self.params, validation.drawing(drawing))
        if sampler.drawing.guidance != 1 and labels is None:
            raise InputError(
                f"guidance is {sampler.drawing.guidance:g}, but no class is given to guide to; "
                "give labels, or leave guidance at 1."
            )
        return sampler, labels

    def _nats(self, images, labels: Labels) -> Float[np.ndarray, "B T"]:
        tokens = self.tokenize(images)
        sampler, labels = self._sampler(len(tokens), labels, {}, "give likelihoods")
        with jax.set_mesh(self.mesh):
            return sampler.nats(tokens, labels)

    def _forward(self, tokens: np.ndarray, output: str, labels: Labels = None) -> np.ndarray:
        labels = validation.labels(labels, len(tokens), self.network)
        with jax.set_mesh(self.mesh):
            inputs = jax.tree.map(sharding.shard_rows, (tokens, labels))
            result = _forward(self.network, self.params, *inputs, output)
        return np.asarray(result)[: len(tokens)]


def load(source: AnyPath, stage: str | None = None, palette: AnyPath | None = None) -> Model:
    """The model in a run folder, or in a file or folder of weights.

    Args:
      source: the `--workdir` of a run; a .safetensors file of `Model.save`; or what
        `from_huggingface` and `from_openai` take.
      stage: "pretrain" or "finetune" of a run; None: the latest of the two that has finished.
      palette: kmeans_centers.npy, for weights that come without the colours of their tokens.

    Raises:
      ValueError: there is no such run or file, the stage has not finished, or a file is damaged.
    """
    path, mesh = files.user_path(source), sharding.make_mesh(config_lib.Mesh())
    with jax.set_mesh(mesh):
        if path.is_dir() and not weights.is_weights_path(path):
            return Model(*native.read_run(path, stage), mesh)
        if stage is not None:
            raise InputError(f"stage={stage} is given, but {path} is no run folder.")
        found = weights.read(path, palettes.load(palette) if palette else None)
        return Model(dataclasses.replace(found, params={}), found.on_mesh(), mesh)


def from_huggingface(folder: AnyPath, palette: AnyPath | None = None) -> Model:
    """An ImageGPT of `transformers`, from a folder that `save_pretrained` wrote.

    The folder has `config.json`, safetensors and, unless `palette` names a kmeans_centers.npy,
    `preprocessor_config.json`. ValueError lists the tensors that do not fit.
    """
    return load(folder, palette=palette)


def to_huggingface(model: Model, folder: AnyPath, task: str = "generation") -> None:
    """Writes a folder from which `transformers` loads the model, without this package or pickle.

    The task "generation" is for `ImageGPTForCausalImageModeling`, "classification" for
    `ImageGPTForImageClassification`. ValueError names parts of the model that ImageGPT lacks.
    """
    if task not in huggingface.ARCHITECTURES:
        raise InputError(f"task is {task!r}; it takes {' or '.join(huggingface.ARCHITECTURES)}.")
    huggingface.write(model.weights_file(), files.user_path(folder), task)


def from_openai(prefix: AnyPath, palette: AnyPath) -> Model:
    """OpenAI's Image GPT, from the TensorFlow checkpoint; needs the `prepare` extra.

    `prefix` is the path without .index, ".../model.ckpt-1000000"; `palette` names
    kmeans_centers.npy. ValueError lists the variables that do not fit.
    """
    return load(prefix, palette=palette)


def load_tokenizer(source: AnyPath, image_size: int | None = None) -> LearnedCodec:
    """A learned encoder and decoder of images, without a network that reads the codes.

    `source` is a run folder whose stage `tokenizer` has finished, or a file of `Tokenizer.save`;
    `image_size` is height and width in pixels; None: the size of the training images.
    """
    tokenizer = learned.load(source)
    size = tokenizer.provenance["image_size"] if image_size is None else image_size
    side = tokenizer.config.downsample
    return LearnedCodec(tokenizer, validation.whole(size, "image_size", least=1, side=side))


@functools.partial(jax.jit, static_argnames=("network", "output"))
def _forward(
    network: Network, params: dict, tokens: jax.Array, labels: jax.Array | None, output: str
) -> jax.Array:
    """One output of the network: "logits", "pooled" features [B, L+1, D] or "classes"."""
    if output == "logits":
        return network.bind(params)(tokens, labels).logits
    if network.config.objective == "bert":  # sees images under masks, as in training
        batch = {"tokens": tokens, "variant": None, "index": jnp.arange(len(tokens))}
        each = (objective.evaluate_batch(network, params, batch, v) for v in range(network.votes))
        votes = [found for found, _ in each]
    else:
        votes = [network.bind(params)(tokens, labels)]
    if output == "pooled":
        return sum(vote.pooled for vote in votes).swapaxes(0, 1) / len(votes)
    return sum(jax.nn.softmax(vote.class_logits, axis=-1) for vote in votes) / len(votes)
