"""What a teacher drew at every position of an image, as a token cache keeps it.

At each position the teacher's distribution of the next token stands as N drawn ids: the distinct
ids, and how often each was drawn. The share of an id among the N draws has the teacher's
probability as its mean, so that the cross-entropy against these shares is, on average, the
cross-entropy against the whole distribution. The K most likely ids with their probabilities are
not: whatever stands below the K-th is lost, and a student of such targets is too sure.
"""

import dataclasses

import numpy as np
from jaxtyping import Integer

DRAWS = "teacher_draws"  # key of a record
DISTINCT = "teacher_distinct"  # field of the cache's records, see `Packing`
# N by default, and at most: counts take two bytes at most.
SAMPLES, MOST_SAMPLES = 32, 2**16 - 1


@dataclasses.dataclass(frozen=True)
class Taught:
    """How the draws of a token cache were made; its header's "teacher"."""

    names: tuple[str, ...]  # run folders or files of the teachers; several: of their mean
    digests: tuple[str, ...]  # of each teacher's weights, see `files.hash_arrays`
    samples: int  # N, draws at every position
    temperature: float  # that divides the teacher's logits
    seed: int
    distinct: int = 0  # K, the most distinct ids of a position; 0: not counted yet


@dataclasses.dataclass(frozen=True)
class Draws:
    """The distinct ids drawn at the T positions of an image, position after position."""

    distinct: Integer[np.ndarray, " T"]  # number of distinct ids of each position
    ids: Integer[np.ndarray, " M"]  # unsigned, ascending at each position
    counts: Integer[np.ndarray, " M"]  # unsigned; at each position they add up to N

    @classmethod
    def of(cls, drawn: Integer[np.ndarray, "T N"]) -> "Draws":
        """The draws of every position, which are in ascending order."""
        first = np.ones(drawn.shape, bool)
        first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        counts = np.diff(np.flatnonzero(first), append=drawn.size)
        return cls(first.sum(axis=1), drawn[first], counts)

    def padded(self, width: int) -> tuple[Integer[np.ndarray, "T K"], Integer[np.ndarray, "T K"]]:
        """Ids and counts of K = `width` places a position; in places beyond, both are 0."""
        used = np.arange(width) < self.distinct[:, None]
        ids, counts = (np.zeros(used.shape, each.dtype) for each in (self.ids, self.counts))
        ids[used], counts[used] = self.ids, self.counts
        return ids, counts


@dataclasses.dataclass(frozen=True)
class Packing:
    """The bytes of an image's draws in a token cache, in the smallest types that fit.

    The record's field `DISTINCT` has the number of distinct ids of each position. The ids of all
    positions follow the record's fields, then the counts.
    """

    length: int  # T
    vocabulary: int  # V
    samples: int  # N

    @property
    def types(self) -> tuple[np.dtype, np.dtype, np.dtype]:
        """Of the numbers of distinct ids, of the ids, and of their counts."""
        largest = min(self.vocabulary, self.samples), self.vocabulary - 1, self.samples
        return tuple(np.min_scalar_type(each).newbyteorder("<") for each in largest)

    @property
    def fields(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, type and shape of the record's field."""
        return [(DISTINCT, self.types[0].str, (self.length,))]

    def split(self, draws: Draws) -> tuple[dict[str, np.ndarray], bytes]:
        """The record's field, and the bytes that follow the record's fields."""
        _, of_ids, of_counts = self.types
        following = draws.ids.astype(of_ids).tobytes() + draws.counts.astype(of_counts).tobytes()
        return {DISTINCT: draws.distinct}, following

    def size(self, distinct: Integer[np.ndarray, " T"]) -> int:
        """Number of bytes that follow the record's fields."""
        return int(distinct.sum()) * sum(each.itemsize for each in self.types[1:])

    def join(self, distinct: Integer[np.ndarray, " T"], following: bytes) -> Draws:
        """The draws of `split`."""
        total, (_, of_ids, of_counts) = int(distinct.sum()), self.types
        ids = np.frombuffer(following, of_ids, total)
        return Draws(distinct, ids, np.frombuffer(following, of_counts, total, ids.nbytes))
