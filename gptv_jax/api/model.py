"""`Model`, a trained network that takes NumPy arrays and gives NumPy arrays."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from gptv_jax import files, sharding, validation
from gptv_jax.api.forward import network_output, of_regions
from gptv_jax.api.of_classes import Images, OfClasses
from gptv_jax.api.of_clips import OfClips
from gptv_jax.api.of_tasks import OfTasks
from gptv_jax.decode import generation
from gptv_jax.decode.sampler import Sampler, Section, by_pixel, kept_tokens
from gptv_jax.decode.speculative import Draft, check_draft
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.tokens.codec import AnyArray
from gptv_jax.validation import Labels, arguments_by_name
from gptv_jax.weights import hub, native
from gptv_jax.weights.native import WeightsFile

LOG = logging.getLogger(__name__)
AnyPath = str | pathlib.Path
Tokens = Int[AnyArray, "B T"]
Setting = float | int | str | None  # of `config.Drawing`


class Model(OfClasses, OfClips, OfTasks):
    """A trained network with its weights (`params`, on `mesh`) and its tokens, made by `load`.

    Images are uint8 [B, H, W, C] in the data set's own range, NumPy or JAX arrays, or a list of
    Pillow images of the model's size and mode; of a model of clips they are uint8
    [B, F, H, W, C] wherever [B, H, W, C] is said. Work is split over all devices. `labels` are
    classes, 0 <= label < C, or names of `classes`, for a network with `model.class_tokens`: one
    class for all images or one for each; None: no class.
    An argument of the wrong shape, dtype or value raises ValueError.
    """

    def __init__(
        self,
        described: WeightsFile,
        params: dict,
        mesh: jax.sharding.Mesh,
        run: pathlib.Path | None = None,
        read_pretrained: Callable[[], tuple[WeightsFile, dict]] | None = None,
    ):
        """`described` says what `params` are; the arrays in `described` are not used.

        `run` is the run folder that the weights come from. `read_pretrained` reads the weights that
        draw images, where they are other weights than `params`; it is called when first needed.
        """
        self.network, self.codec = described.network, described.codec
        self.params, self.mesh, self._described = params, mesh, described
        self._run, self._read_pretrained, self._drawing = run, read_pretrained, None

    def __repr__(self) -> str:
        model, found, codec = self.network.config, self._described, self.codec
        grid = " x ".join(map(str, self.network.grid))
        noun = "clips" if self.network.frames else "images"
        sizes = (leaf.size for leaf in jax.tree.leaves(self.params))
        kind = {"grey": "grey levels", "palette": "colours", "learned": "learned codes"}
        parts = [
            f"{model.layers} layers, width {model.width}, {sum(sizes):,} parameters",
            f"{grid} tokens of {codec.vocabulary} {kind[found.tokens.kind]}"
            if codec
            else f"{grid} positions of pixels",
            *([f"{'x'.join(map(str, codec.image_shape))} {noun}"] if codec else []),
            *([f"task {found.task.name}"] if found.task else []),
            *([f"objective {model.objective}"] * (model.objective != "autoregressive")),
            *([f"{len(self.classes)} classes"] * bool(self.classes)),
            *([f"step {found.step}"] * (found.step is not None)),
        ]
        return f"Model({'; '.join(parts)})"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of the labels; "0", "1", ... where they have no names.

        Empty for a model that has no class head and takes no labels.
        """
        count = self.network.classes or self.network.config.class_tokens
        return (self._described.class_names or tuple(map(str, range(count)))) if count else ()

    def tokenize(self, images: Images) -> Int[np.ndarray, "B T"]:
        """Int32 tokens, 0 <= token < V, in raster order."""
        self._with_tokens()
        return self.codec.encode(validation.images(images, self.codec))

    def detokenize(self, tokens: Tokens) -> UInt8[np.ndarray, "B *F H W C"]:
        """The images that the tokens stand for; for a lossless codec the inverse of `tokenize`."""
        self._with_tokens()
        return self.codec.decode(validation.sequences(tokens, self.network))

    @arguments_by_name
    def logits(self, tokens: Tokens, labels: Labels = None) -> Float[np.ndarray, "B T V"]:
        """Float32 logits; position t predicts tokens[:, t] from the tokens before it.

        With objective=bert it predicts the token from all tokens, as none is masked here.
        """
        self._of_images(self.network, predicts=True)
        batch = {"tokens": validation.sequences(tokens, self.network)}
        return self._forward(batch, "logits", labels)

    @arguments_by_name
    def log_likelihood(self, images: Images, labels: Labels = None) -> Float[np.ndarray, " B"]:
        """Float32 log-probability of each image, in nats: the sum over the image's tokens."""
        return -self._nats(images, labels).sum(axis=1)

    @arguments_by_name
    def surprise(self, images: Images, labels: Labels = None) -> Float[np.ndarray, "B *F H W"]:
        """Float32 negative log-probability of each pixel given the pixels before it, in nats.

        The nats of a token are spread evenly over the token's pixels, so the sum over an image is
        minus `log_likelihood`. `gptv_jax.runs.pictures.heat_map` shows them as a picture.
        """
        return by_pixel(self._nats(images, labels), self.codec)

    def features(
        self, images: Images, layer: int | None = None, regions: int = 1
    ) -> Float[np.ndarray, "B pooled"]:
        """Float32 means over positions of one layer's normed input, [B, D].

        With objective=bert they are also averaged over the `votes` masks. `layer` is 0 .. L, where
        L is the output of the final norm; None: the layer that the probe chose, on the pretrained
        weights. `regions` above 1 gives the means over `regions` x `regions` equal parts of an
        image side by side, [B, D * regions**2], row by row: the features of one layer that a probe
        with config.probe.regions reads.
        """
        batch, last = self._read(images), self.network.config.layers
        chosen = self._described.best_layer
        if layer is None and chosen is None:
            raise InputError(f"the probe has not run, so name a layer: 0 to {last}.")
        layer = validation.whole(chosen if layer is None else layer, "layer", most=last)
        read = of_regions(self.network, self.params, validation.regions(regions, self.network))
        return self._forward(batch, "pooled", read=read)[:, layer]

    @arguments_by_name
    def sample(
        self,
        n: int,
        seed: int = 0,
        *,
        labels: Labels = None,
        draft: "Model | None" = None,
        **drawing: Setting,
    ) -> UInt8[np.ndarray, "n *F H W C"]:
        """`n` new images, drawn token by token; a seed always gives equal images.

        With a `draft`, a smaller model of equal tokens, sampling is speculative here and wherever
        images are drawn: the draft proposes tokens and this model checks several at once. That is
        faster where the draft is much smaller and proposes well. The images are other ones, but
        distributed as without it.

        A model that was loaded from a run without naming a stage draws images, here and in
        `complete` and `outpaint`, with the pretrained weights.
        """
        n, key = validation.whole(n, "n", least=1), Section.NEW_IMAGES.key(validation.seed(seed))
        sampler, labels = self._sampler(n, labels, drawing, draft)
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
        draft: "Model | None" = None,
        **drawing: Setting,
    ) -> UInt8[np.ndarray, "rows *F H W C"]:
        """Images whose known part is kept and whose other tokens are drawn, `samples` times each.

        Known is the share `keep` of the rows, from the top and to the nearest row (of clips: the
        first frames); or what `mask` says, True for known pixels, [H, W] or [B, H, W], or for known
        tokens, [rows, columns] or [B, rows, columns], of clips with an axis of frames before the
        rows. A token is known where all its pixels are.

        Tokens are drawn in raster order; each depends on the tokens before it alone, known or
        drawn. Known pixels change only as far as the tokens lose detail. Completions of one image
        are next to each other.
        """
        keep = validation.setting("keep", keep)
        samples = validation.whole(samples, "samples", least=1)
        key, tokens = Section.COMPLETIONS.key(validation.seed(seed)), self.tokenize(images)
        sampler, labels = self._sampler(len(tokens), labels, drawing, draft)
        known = np.arange(sampler.network.length) < kept_tokens(sampler.network, keep)
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
        *,
        draft: "Model | None" = None,
        **drawing: Setting,
    ) -> UInt8[np.ndarray, "B height width C"]:
        """Images continued beyond their edges, and beyond the size that the network was trained at.

        `top`, `bottom`, `left` and `right` are pixels to add, multiples of the side of a token. The
        network's window moves outward by half its side at most and draws the unknown tokens in
        raster order. Tokens to the right of an image and below it depend on the image; tokens to
        the left know only the rows above them, and tokens above do not know what is below, so an
        edge may show there. The tokens of the image itself stay.
        """
        key, tokens = Section.OUTPAINTED.key(validation.seed(seed)), self.tokenize(images)
        margins = validation.margins(self.codec, top=top, bottom=bottom, left=left, right=right)
        sampler, labels = self._sampler(len(tokens), labels, drawing, draft)
        with jax.set_mesh(self.mesh):
            grids = sampler.outpaint(tokens, margins, key, labels)
        return self.codec.decode(grids.reshape(len(grids), -1), grids.shape[1:])

    def save(self, path: AnyPath) -> None:
        """Writes a .safetensors file with everything that `load` needs."""
        native.write(self.weights_file(), files.user_path(path))

    def push_to_hub(self, name: str, private: bool | None = None) -> str:
        """Uploads the model to the Hugging Face Hub as `name`, "user/model"; returns its address.

        The repository gets gptv_jax.safetensors, which `load("hf://user/model")` reads; the files
        that `transformers` reads, where its ImageGPT can express the model; and a model card with
        the run's numbers, unless the repository has a README.md. `private`: whether a new
        repository is private; None: as the account has it. Needs the `hub` extra and a login
        (`hf auth login`).
        """
        return hub.push(self.weights_file(), name, repr(self), self._run, private)

    def weights_file(self) -> WeightsFile:
        """The weights as NumPy arrays, with everything that is needed to use them."""
        arrays = {name: np.asarray(leaf) for name, leaf in sharding.by_name(self.params).items()}
        return dataclasses.replace(self._described, params=arrays)

    def _with_tokens(self) -> None:
        """InputError where the network reads images as pixels alone."""
        if self.codec is None:
            name = self._described.task.name
            method = f"model.{name}(images)" if hasattr(type(self), name) else f"the task {name}"
            raise InputError(
                "this model reads pixels and has no image tokens (config.tokens.kind=none), so it "
                f"neither draws images nor gives likelihoods or features; it takes {method} alone."
            )

    def _of_images(self, network: Network, predicts: bool = False) -> None:
        """InputError where the network reads more than images, or `predicts` and it does not."""
        self._with_tokens()
        if predicts and network.patch:
            raise InputError(
                "this model reads pixels (config.model.image_input=pixels), so it neither draws "
                "images nor gives logits or likelihoods; use its features and classes."
            )
        if predicts and not network.several and not network.predicts_images:
            raise InputError(
                "these weights read whole frames or images (config.finetune.attention) and predict "
                'no tokens; load the run with stage="pretrain" to draw or for likelihoods.'
            )
        if network.several:
            raise InputError(
                f"this model was made for {self._described.task.name}, so only the method of this "
                'task reads images with these weights; load the run with stage="pretrain" for '
                "other methods."
            )

    def _for_drawing(self) -> tuple[Network, dict]:
        """The network and the weights that draw images."""
        if self._read_pretrained is None:
            return self.network, self.params
        if self._drawing is None:
            try:
                with jax.set_mesh(self.mesh):
                    described, params = self._read_pretrained()
                self._drawing = described.network, params
                LOG.info("images are drawn with the pretrained weights of %s.", self._run)
            except InputError as error:
                self._drawing = self.network, self.params
                LOG.warning("images are drawn with the fine-tuned weights: %s", error)
        return self._drawing

    def _sampler(self, rows: int, labels: Labels, drawing: dict, draft=None, draws: bool = True):
        """A sampler with these settings, that draws images or gives likelihoods; and the labels."""
        self._with_tokens()
        what = "draw images" if draws else "give likelihoods"
        if self.network.config.objective != "autoregressive":
            raise InputError(
                f"a model with the objective {self.network.config.objective} cannot {what}; load "
                "one with the objective autoregressive."
            )
        labels = validation.labels(labels, rows, self.network, self.classes)
        network, params = self._for_drawing() if draws else (self.network, self.params)
        self._of_images(network, predicts=True)
        if draft is not None:
            draft = self._checked_draft(draft, network)
        sampler = Sampler(network, params, validation.drawing(drawing), draft)
        if sampler.drawing.guidance != 1 and labels is None:
            raise InputError(
                f"guidance is {sampler.drawing.guidance:g}, but no class is given to guide to; "
                "give labels, or leave guidance at 1."
            )
        return sampler, labels

    def _checked_draft(self, draft: "Model", network: Network) -> Draft:
        """The network of a model that proposes tokens for `network`; InputError: it cannot."""
        if not isinstance(draft, Model):
            raise InputError(f"draft is of type {type(draft).__name__}; give a model, as of load.")
        own, _ = draft._sampler(1, None, {})
        check_draft(own.network, draft.codec, network, self.codec)
        return Draft(own.network, own.params)

    def _nats(self, images, labels: Labels) -> Float[np.ndarray, "B T"]:
        tokens = self.tokenize(images)
        sampler, labels = self._sampler(len(tokens), labels, {}, draws=False)
        with jax.set_mesh(self.mesh):
            return sampler.nats(tokens, labels)

    def _read(self, images: Images) -> dict[str, np.ndarray]:
        """What the network reads of images: "tokens", and "image" where it reads pixels."""
        batch = {"tokens": self.tokenize(images)}
        pixels = {"image": validation.images(images, self.codec)} if self.network.patch else {}
        return batch | pixels

    def _forward(self, batch: dict, output: str, labels: Labels = None, read=()) -> np.ndarray:
        self._of_images(self.network)
        count = len(batch["tokens"])
        labels = validation.labels(labels, count, self.network, self.classes)
        with jax.set_mesh(self.mesh):
            inputs = jax.tree.map(sharding.shard_rows, (batch, labels))
            network, params = read or (self.network, self.params)
            result = network_output(network, params, *inputs, output)
        return np.asarray(result)[:count]
