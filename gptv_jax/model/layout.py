"""What a sequence is made of, and which positions see which: `Part` and `Layout`.

With `shift` 1 the input of position t is token t-1, the input of position 0 a start vector, and
position t predicts token t.
"""

import dataclasses
import functools
import itertools
import math
import operator

import numpy as np
from jaxtyping import Int

from gptv_jax.errors import InputError

MOST_POSITIONS = 2**20  # of a part; masks of more would take gigabytes


@dataclasses.dataclass(frozen=True)
class Part:
    """Neighbouring positions of a sequence with one vocabulary, in raster order of `shape`."""

    name: str  # "image", "boxes", "labels", ...
    vocabulary: int  # 0: the part has no tokens; its input is what the network reads from pixels
    shape: tuple[int, ...]  # (rows, columns), (frames, rows, columns), (objects, tokens) or (n,)
    predicted: bool = True  # the part has a head and a loss
    # Tokens 0 .. bins-1 name heights in the image, bins .. 2 bins - 1 widths, from edge to edge;
    # 0: no token names a place in the image.
    bins: int = 0
    # The input of a position is the sum of the embeddings of the tokens since the beginning of
    # their row of `shape`, such as the tokens of one object, not of one token alone.
    summed: bool = False
    # The part's grid covers the image: the position that predicts a token is given the features of
    # the place of the token's cell, as the position that holds the image there is.
    covers_image: bool = False
    # Levels of each dimension of a token, whose product is the vocabulary: the head predicts them
    # one after the other (model/level_head.py). (): the head predicts the token at once.
    levels: tuple[int, ...] = ()

    def __post_init__(self):
        if self.size > MOST_POSITIONS:
            raise InputError(
                f"the part {self.name} of a sequence has {self.size} positions, {self.shape}; "
                f"{MOST_POSITIONS} are the most: take smaller images, or tokens of more pixels."
            )

    @property
    def size(self) -> int:
        """Number of positions."""
        return math.prod(self.shape)

    @property
    def axes(self) -> tuple[int, int, int]:
        """Frames, rows and columns; an image is a clip of one frame, and (n,) a single row."""
        return (1,) * (3 - len(self.shape)) + self.shape

    @property
    def head_vectors(self) -> int:
        """Number of vectors of the width D among the head's weights."""
        return self.head_products() + sum(itertools.accumulate(self.levels[:-1], operator.mul))

    def head_products(self, whole: bool = False) -> int:
        """Number of products with a position's features for the loss; `whole`: for all logits."""
        found = sum(self.levels) or self.vocabulary
        return sum(itertools.accumulate(self.levels, operator.mul)) or found if whole else found

    @property
    def has_places(self) -> bool:
        """Whether tokens or positions of the part are at places in the image."""
        return self.bins > 0 or self.covers_image


@dataclasses.dataclass(frozen=True)
class Layout:
    """The parts of a sequence, and the attention mask; hashable.

    Position t sees the inputs of positions 0 .. visible[t] - 1. The numbers never fall.

    ValueError: the numbers fall, do not reach from 1 to T, or let a predicted position see its own
    target.
    """

    parts: tuple[Part, ...]
    visible: tuple[int, ...]  # T numbers
    # 1: position 0 reads the start vector, and each later position t reads token t - 1. 0: position
    # t reads token t, which training masks (BERT).
    shift: int = 1

    def __post_init__(self):
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise ValueError(f"two parts of a layout have one name: {', '.join(names)}.")
        for part in self.parts:
            if part.vocabulary < max(part.predicted, 2 * part.bins):
                raise ValueError(f"{part} has too few tokens.")
            if part.levels and math.prod(part.levels) != part.vocabulary:
                raise ValueError(f"the product of the levels of {part} is not its vocabulary.")
        visible, length = np.array(self.visible), self.length
        if visible.shape != (length,) or length == 0:
            raise ValueError(f"the layout has {length} positions, but {visible.size} masks.")
        t = np.arange(length)
        wrong = (visible < t + 1) | (visible > length) | (np.diff(visible, prepend=0) < 0)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ValueError(
                f"visible[{at}] is {visible[at]}; the numbers must never fall, and take "
                f"{at + 1} to {length} there."
            )
        # The last input that t sees is token visible[t] - 1 - shift, which must be before token t.
        leaks = self.predicted & (visible > t + self.shift) & (self.shift > 0)
        if leaks.any():
            at = int(np.argmax(leaks))
            raise ValueError(
                f"position {at} of the layout predicts token {at} and would see it: visible[{at}] "
                f"is {visible[at]}, where at most {at + self.shift} is possible."
            )

    @property
    def length(self) -> int:
        """T, the number of positions."""
        return sum(part.size for part in self.parts)

    @functools.cached_property
    def slices(self) -> dict[str, slice]:
        """The positions of every part, by name."""
        ends = np.cumsum([0, *(part.size for part in self.parts)]).tolist()
        return {part.name: slice(ends[i], ends[i + 1]) for i, part in enumerate(self.parts)}

    def part_at(self, position: int) -> Part:
        """The part that a position belongs to."""
        return next(part for part in self.parts if position < self.slices[part.name].stop)

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """Whether a position predicts its token, bool [T]."""
        return np.repeat([p.predicted for p in self.parts], [p.size for p in self.parts])

    def check_drawable(self, prefix: int, length: int) -> None:
        """Checks that the tokens after a prefix can be drawn one by one, up to `length` tokens.

        InputError: a position from `prefix` on does not see exactly the positions up to itself, or
        the prefix ends within the first of several parts.
        """
        if self.visible[prefix:length] != causal_mask(length)[prefix:]:
            raise InputError(
                f"positions {prefix} to {length - 1} of the layout are to be drawn, which takes a "
                "layout where each of them sees the positions up to itself and no later one."
            )
        if len(self.parts) > 1 and prefix < (first := self.parts[0].size):
            raise InputError(
                f"the first {prefix} tokens are given, but of a sequence of several parts the "
                f"first part must be: {first} tokens."
            )

    def coordinates(self) -> Int[np.ndarray, "T 3"]:
        """Frame, row and column of every position, for rotary phases.

        The parts lie below each other: a part's first row follows the last row of the part before.
        """
        found, below = [], 0
        for part in self.parts:
            own = np.stack([axis.ravel() for axis in np.indices(part.axes)], axis=1)
            found.append(own + np.array([0, below, 0]))
            below += part.axes[1]
        return np.concatenate(found)


def causal_mask(length: int) -> tuple[int, ...]:
    """`visible` where every position sees itself and all positions before it, and no other ones."""
    return tuple(range(1, length + 1))


def full_mask(length: int) -> tuple[int, ...]:
    """`visible` where every position sees every position."""
    return (length,) * length


def causal(*parts: Part) -> Layout:
    """Every position sees itself and all positions before it."""
    return Layout(parts, causal_mask(sum(part.size for part in parts)))


def bidirectional(part: Part) -> Layout:
    """Every position sees every position, and its input is its own token (BERT)."""
    return Layout((part,), full_mask(part.size), shift=0)


def by_frames(clip: Part) -> Layout:
    """Every position sees its whole frame and all frames before it; no token is predicted.

    With N tokens a frame, positions 1 .. N hold the first frame, positions N + 1 .. 2 N the second.
    """
    size, T = math.prod(clip.axes[1:]), clip.size
    ends = (max(-(-t // size), 1) * size + 1 for t in range(T))
    return Layout((dataclasses.replace(clip, predicted=False),), tuple(min(e, T) for e in ends))


def of_images(
    vocabulary: int,
    grid: tuple[int, ...],
    objective: str = "autoregressive",
    attention: str = "causal",
    levels: tuple[int, ...] = (),
) -> Layout:
    """The layout of images or clips alone, with `config.Model.objective`.

    `levels` are those of `Part`.

    The attention is "causal", for pretraining, or for features alone: "frames" of clips, see
    `by_frames`, or "whole", where every position sees every position.
    """
    predicted = vocabulary > 0 and attention == "causal"
    image = Part("image", vocabulary, tuple(grid), predicted=predicted, levels=levels)
    if attention == "frames":
        return by_frames(image)
    if attention == "whole":
        return Layout((image,), full_mask(image.size))
    return bidirectional(image) if objective == "bert" else causal(image)


def prefixed(prefix: Part, *parts: Part) -> Layout:
    """Start vector and prefix see each other; later positions see themselves and all before them.

    The prefix is read and not predicted. Its last token is the input of the position that predicts
    the first token after the prefix.
    """
    prefix = dataclasses.replace(prefix, predicted=False)
    length = sum(part.size for part in (prefix, *parts))
    return Layout((prefix, *parts), tuple(max(t + 1, prefix.size + 1) for t in range(length)))
