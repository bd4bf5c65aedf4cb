"""Drawing and scoring as stages and users call it: NumPy in and out, any mesh and number of rows.

No two draws share a random key. A token's key is folded from the seed in three steps: `Section`
(what is drawn), number (of the batch, or of the window in outpainting and in the continuation of
clips), and position.
"""

import dataclasses
import enum
import functools
import itertools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.decode import generation, speculative
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.tokens import Codec
from gptv_jax.train import objective


class Section(enum.IntEnum):
    """What is drawn: numbers folded into the key of the seed. Training folds steps, below 2**31."""

    NEW_IMAGES = 2**31
    COMPLETIONS = 2**31 + 1
    INPAINTED = 2**31 + 2
    OUTPAINTED = 2**31 + 3
    GENERATED = 2**31 + 4
    CONTINUED = 2**31 + 5

    def key(self, seed: int) -> PRNGKeyArray:
        return jax.random.fold_in(jax.random.key(seed), int(self))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws tokens from an autoregressive network, and scores tokens, under the mesh of `params`.

    Every process gives and gets whole arrays. The tokens of a row depend on neither the mesh nor
    how many rows follow. A `draft` proposes tokens, see `speculative.py`; the draws are then other
    ones of an equal distribution. InputError: the network reads pixels, or there is guidance that
    the network was not trained for.
    """

    network: Network
    params: dict
    drawing: config_lib.Drawing = generation.DEFAULTS
    draft: speculative.Draft | None = None

    def __post_init__(self):
        if self.network.patch:
            raise InputError(
                "the network reads pixels (config.model.image_input=pixels), so it neither draws "
                "images nor scores tokens; use its features and classes, or another model."
            )
        if self.drawing.guidance != 1:
            check_guidable(self.network.config, f"guidance is {self.drawing.guidance:g}")

    def new(self, count: int, *arguments, **options) -> Int[np.ndarray, "count T"]:
        """As `draw`, where no token is given."""
        unknown = np.full((count, self.network.length), generation.UNKNOWN, np.int32)
        return self.draw(unknown, *arguments, **options)

    def draw(
        self,
        given: Int[np.ndarray, "G T"],
        key: PRNGKeyArray,
        labels: Int[np.ndarray, " G"] | None = None,
        samples: int = 1,
        *,
        number: int = 0,
        stopwatch: generation.Stopwatch | None = None,
    ) -> Int[np.ndarray, "rows T"]:
        """Sequences with the tokens drawn that are `generation.UNKNOWN` in `given`.

        `given` may be the beginning of sequences, of whole rows of the grid.
        `key` is `Section.key(seed)`; `number`, the batch's index, is folded into it. `labels`,
        `samples` and `stopwatch` are explained at `generation.generate`.
        """
        unknown, columns = (given == generation.UNKNOWN).any(axis=0), self.network.grid[-1]
        whole = np.repeat(given, samples, axis=0)
        if not unknown.any():
            return whole
        # Programs begin and end with whole rows of the grid, so that few programs serve all masks.
        rows = np.flatnonzero(unknown.reshape(-1, columns).any(axis=1))
        first, end = rows[0] * columns, (rows[-1] + 1) * columns
        if len(given) % sharding.batch_ways():
            # A row for each sample: to fill the batch up then takes fewer rows.
            labels = None if labels is None else np.repeat(labels, samples)
            given, samples = whole, 1
        given, labels = jax.tree.map(sharding.shard_rows, (given[:, :end], labels))
        key, prefix = jax.random.fold_in(key, number), int(first)
        generate = generation.generate
        if self.draft:
            generate = functools.partial(speculative.generate, self.draft)
        drawn = generate(
            self.network, self.params, given, key, self.drawing, prefix, labels, samples, stopwatch
        )
        drawn = multihost_utils.process_allgather(drawn, tiled=True)[: len(whole)]
        return np.concatenate([drawn, whole[:, end:]], axis=1)

    def outpaint(
        self,
        tokens: Int[np.ndarray, "B T"],
        margins: tuple[int, int, int, int],
        key: PRNGKeyArray,
        labels: Int[np.ndarray, " B"] | None = None,
    ) -> Int[np.ndarray, "B rows columns"]:
        """Grids of tokens with more tokens drawn around them; the given tokens stay as they are.

        The network's window moves over the larger grid, outward from the image, row by row of
        windows, by half the window's side at most, and draws the unknown tokens in raster order.
        `margins` are rows to draw above and below, columns to the left and to the right.
        """
        if self.network.frames:
            raise InputError(
                "this model is of clips, and outpainting takes a model of images; "
                "model.continue_clip(frames, n) draws the frames that follow."
            )
        (rows, columns), (top, bottom, left, right) = self.network.grid, margins
        grid = tokens.reshape(-1, rows, columns)
        around = ((0, 0), (top, bottom), (left, right))
        grid = np.pad(grid, around, constant_values=generation.UNKNOWN)
        starts = window_starts(top, bottom, rows), window_starts(left, right, columns)
        for number, (row, column) in enumerate(itertools.product(*starts)):
            window = grid[:, row : row + rows, column : column + columns]
            given = window.reshape(len(grid), -1)
            window[:] = self.draw(given, key, labels, number=number).reshape(window.shape)
        return grid

    def continue_clips(
        self,
        tokens: Int[np.ndarray, "B N"],
        frames: int,
        key: PRNGKeyArray,
        labels: Int[np.ndarray, " B"] | None = None,
        opening: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Int[np.ndarray, "B M"]:
        """The tokens of the `frames` frames that follow clips; where tokens are of tubes, of tubes.

        `tokens` are of whole frames, one or more, in raster order. The network's window of F frames
        is filled first; then it moves on frame by frame, and a frame depends on the F - 1 frames
        before it. More `frames` leave the tokens of the first ones as they are.

        Where the first frame of a clip has other tokens than later frames, `opening` makes the
        tokens with which a moved window begins, given the tokens up to its first frame.
        """
        if self.network.frames < 2:
            raise InputError(
                "the continuation of a clip takes a network of clips of 2 frames or more; this one "
                f"is of {'one frame' if self.network.frames else 'images'}."
            )
        size = self.network.length // self.network.frames
        first, end = tokens.shape[1], tokens.shape[1] + frames * size
        for number in range(frames):  # of the window
            known = tokens[:, -(self.network.length - size) :]
            beyond = tokens.shape[1] - known.shape[1]
            if opening and beyond:
                first_frame = opening(tokens[:, : beyond + size])
                known = np.concatenate([first_frame, known[:, size:]], axis=1)
            count = min(self.network.length - known.shape[1], end - tokens.shape[1])
            if not count:
                break
            given = np.pad(known, ((0, 0), (0, count)), constant_values=generation.UNKNOWN)
            drawn = self.draw(given, key, labels, number=number)
            tokens = np.concatenate([tokens, drawn[:, known.shape[1] :]], axis=1)
        return tokens[:, first:]

    def nats(
        self, tokens: Int[np.ndarray, "B T"], labels: Int[np.ndarray, " B"] | None = None
    ) -> Float[np.ndarray, "B T"]:
        """Float32 negative log-probability of every token given the tokens before it, in nats."""
        rows = jax.tree.map(sharding.shard_rows, (tokens, labels))
        found = _nats(self.network, self.params, *rows)
        return multihost_utils.process_allgather(found, tiled=True)[: len(tokens)]


def window_starts(before: int, after: int, side: int) -> list[int]:
    """First position of each window of `side` positions, along one axis, in order of drawing.

    The window over the image comes first, then windows after it, then windows before it, each half
    a side further out, until `before` positions before and `after` positions behind are covered.
    """
    step, end = max(side // 2, 1), before + after
    later = [min(start, end) for start in range(before + step, end + step, step)]
    earlier = [max(start, 0) for start in range(before - step, -step, -step)]
    return [before, *later, *earlier]


def check_guidable(config: config_lib.Model, what: str) -> None:
    """Raises InputError, beginning with `what`, where the network was not trained for guidance."""
    if not (config.class_tokens and config.label_dropout):
        raise InputError(
            f"{what}, but guidance needs a network trained with and without classes: "
            f"config.model.class_tokens is {config.class_tokens} and config.model.label_dropout "
            f"{config.label_dropout:g}; train one with both above 0, or set guidance to 1."
        )


def kept_tokens(network: Network, keep: float) -> int:
    """Number of tokens in the first share `keep` of the rows, or of a clip's frames.

    The number is rounded to whole rows or frames.
    """
    count = network.grid[0]
    return round(keep * count) * (network.length // count)


def class_rows(count: int, classes: int) -> Int[np.ndarray, "rows columns"]:
    """Labels of about `count` images, one row for each class, or for about sqrt(count) classes."""
    rows = classes if classes <= count else math.isqrt(count)
    labels = np.arange(rows, dtype=np.int32) * classes // rows
    return np.repeat(labels[:, None], count // rows, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _nats(network, params, tokens, labels) -> jax.Array:
    model = network.bind(params)
    return objective.token_nats(model, model(tokens, labels), tokens)


def by_pixel(nats: Float[np.ndarray, "B T"], codec: Codec) -> Float[np.ndarray, "B *F H W"]:
    """The nats of each token spread evenly over the token's pixels; sums over an image stay."""
    pixels = math.prod(np.ix_(*codec.sides))
    spread = nats.reshape(-1, *codec.grid) / pixels.astype(nats.dtype)
    for axis, side in enumerate(codec.sides, start=1):
        spread = spread.repeat(side, axis=axis)
    return spread
