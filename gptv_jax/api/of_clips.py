"""The methods of `Model` for networks of clips."""

import math

import jax
import numpy as np
from jaxtyping import UInt8

from gptv_jax import validation
from gptv_jax.data.clips import Clips, places
from gptv_jax.decode.sampler import Section
from gptv_jax.tokens.codec import AnyArray
from gptv_jax.validation import Labels, arguments_by_name


class OfClips:
    """Methods of `Model` for networks that were trained on clips (config.data.frames above 0)."""

    def clips_of(
        self, videos: UInt8[AnyArray, "B N H W C"], clips: int
    ) -> list[UInt8[np.ndarray, "B F H W C"]]:
        """The first, second, ... of `clips` clips of every video, which are evenly spaced."""
        self._with_tokens()
        videos = validation.given_frames(videos, self.codec, whole=False)
        of_model = Clips(self.codec.image_shape[0])
        starts = places(validation.whole(clips, "clips", least=1))
        return [videos[:, of_model.choose(videos.shape[1], place=start)] for start in starts]

    @arguments_by_name
    def continue_clip(
        self,
        frames: UInt8[AnyArray, "B K H W C"],
        n: int,
        seed: int = 0,
        *,
        labels: Labels = None,
        draft: "OfClips | None" = None,
        **drawing: float | int | str | None,
    ) -> UInt8[np.ndarray, "B n H W C"]:
        """The `n` frames that follow the K >= 1 given ones, drawn token by token.

        A clip may get longer than the F frames of training: a window of F frames then moves on
        frame by frame, so that a frame depends on the F - 1 frames before it; of more given frames
        than fit, the last ones count. Where a token stands for several frames (config.tokens.patch
        of three numbers), K must be a multiple of their number, and one more where the first frame
        has tokens of its own (config.tokens.autoencoder.frames). More frames of an equal seed begin
        with the same frames.
        """
        self._with_tokens()
        frames = validation.given_frames(frames, self.codec)
        n = validation.whole(n, "n", least=1)
        key = Section.CONTINUED.key(validation.seed(seed))
        sampler, labels = self._sampler(len(frames), labels, drawing, draft)
        codec, spans = self.codec, self.codec.sides[0]  # frames that each step stands for
        (first, span), of_step = spans[[0, -1]].tolist(), codec.grid[1:]

        def encode(known):
            """The tokens of the first frames of a clip."""
            missing, steps = spans.sum() - known.shape[1], 1 + (known.shape[1] - first) // span
            filled = np.pad(known, ((0, 0), (0, missing), *((0, 0),) * 3), mode="edge")
            return codec.encode(filled)[:, : steps * math.prod(of_step)]

        def decode(tokens):
            return codec.decode(tokens, (tokens.shape[1] // math.prod(of_step), *of_step))

        known = frames[:, -spans.sum() :]
        tokens = encode(known)
        opening = (lambda before: encode(decode(before)[:, -1:])) if first < span else None
        with jax.set_mesh(self.mesh):
            drawn = sampler.continue_clips(tokens, -(-n // span), key, labels, opening)
        after = decode(np.concatenate([tokens, drawn], axis=1))[:, known.shape[1] :]
        return after[:, :n]
