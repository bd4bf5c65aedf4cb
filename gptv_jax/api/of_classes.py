"""The methods of `Model` that say what an image shows, and whether it is of a kind they know."""

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from gptv_jax import validation
from gptv_jax.decode.typicality import statistics
from gptv_jax.errors import InputError
from gptv_jax.tokens.codec import AnyArray
from gptv_jax.validation import arguments_by_name

Images = UInt8[AnyArray, "B *F H W C"] | list[Image.Image]


class OfClasses:
    """Methods of `Model` for images that belong to a class, or to none."""

    @arguments_by_name
    def classify(
        self, images: Images, clips: int | None = None, reject_below: float | None = None
    ) -> Float[np.ndarray, "B columns"]:
        """Float32 class probabilities of a fine-tuned model; with bert, means over its masks.

        With `clips`, for a model of clips, images are videos, uint8 [B, N, H, W, C], of any number
        of frames: of each video so many clips are read, evenly spaced, and the probabilities are
        means over them. A clip is of neighbouring frames, so of a run with
        `config.data.frame_stride` above 1 give every so many frames of the video alone. A video
        with fewer frames than a clip repeats its last frame.

        With `reject_below`, images whose `typicality` is below this share are rejected, and the
        result is [B, classes + 1]. The last column is 1 for a rejected image, whose other columns
        are 0, and else 0. So the largest column of a rejected image is no class.
        """
        if not self.network.classes:
            raise InputError(
                "this model has no class head; load a run whose stage finetune has finished the "
                "task classify."
            )
        if clips is None:
            found = self._forward(self._read(images), "classes")
        else:
            each = self.clips_of(images, clips)
            found = np.mean([self._forward(self._read(x), "classes") for x in each], axis=0)
        if reject_below is None:
            return found
        reject_below = validation.share("reject_below", reject_below)
        if clips is not None:
            raise InputError("reject_below takes images of the model's shape; leave clips out.")
        rejected = (self.typicality(images) < reject_below)[:, None]
        return np.concatenate([np.where(rejected, 0, found), rejected], axis=1, dtype=np.float32)

    def typicality(self, images: Images) -> Float[np.ndarray, " B"]:
        """How usual each image is: the share of the validation images that are less usual, 0 to 1.

        An image is compared by its nats and by the bits of a lossless coder, see
        `decode/typicality.py`, with the run's training images. Of images of the training's kind,
        about the share r has a typicality below r; an image of 0 is less usual than all validation
        images. The run's stage `typicality` measures what is usual, for each stage's weights.
        """
        sampler, _ = self._sampler(1, None, {}, draws=False)
        if (known := self._described.typicality) is None:
            run = self._run or "RUN"
            command = f"python -m gptv_jax.main --config={run} --workdir={run} --stages=typicality"
            again = (
                "load it again" if self._run else "save the model again, RUN being its run folder"
            )
            raise InputError(
                f"nobody has measured what is usual for these weights; run {command}, then {again}."
            )
        tokens = self.tokenize(images)
        with jax.set_mesh(self.mesh):
            nats = sampler.nats(tokens)
            return known.typicality(statistics(nats, self.codec.decode(tokens)))
