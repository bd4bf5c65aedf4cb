"""How usual images are, for a network that gives likelihoods: its nats beside a coder's bits.

Likelihood alone does not say whether an image is of the kind that the network has learned: smooth
images are likely, whatever they show (Nalisnick et al. 2019, arXiv:1810.09136). So three numbers
of an image stand beside each other: the network's mean nats per token, their standard deviation
over the image's tokens, and the bits of a lossless coder that knows no images (Serra et al. 2020,
arXiv:1909.11480). Each counts in both directions: images that are much more likely than any
training image are unusual as well (arXiv:1906.02994). The deviation finds images of flat areas
with hard borders, whose few surprising tokens have the mean of a photograph.

`Calibration.fit` learns from training images how the numbers spread together, and from validation
images how far from that usual images lie. S is the number of statistics of an image.
"""

import dataclasses

import numpy as np
from etils import epy
from jaxtyping import Float, Int, UInt8

from gptv_jax.errors import as_input_error

with epy.lazy_imports():  # slow to import, and every run folder reads this module
    from scipy import special

STATISTICS = ("nats_per_token", "nats_deviation", "bits_per_pixel")
FILE = "typicality/calibration.json"  # in a run folder: a calibration for each stage's weights
LEAST_SPREAD, SMOOTHING = 1e-3, 1e-3  # added to deviations, and to the variances as a share
MOST = 1000  # distances of validation images that a calibration keeps
SYMBOLS = 256  # values of a residual of the coder
PSEUDO = 1 / 16  # counts of every symbol before the coder has seen any


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What usual images are for a network's weights: training images, and validation images."""

    center: tuple[float, ...]  # [S] means of the training images
    precision: tuple[tuple[float, ...], ...]  # [S, S] inverse of their covariance
    distances: tuple[float, ...]  # of validation images from the centre, in ascending order
    step: int | None = None  # training step of the weights; None: the weights were imported

    @classmethod
    def fit(
        cls,
        training: Float[np.ndarray, "N S"],
        validation: Float[np.ndarray, "M S"],
        step: int | None = None,
    ) -> "Calibration":
        """From the statistics of training images and of validation images.

        Of more than `MOST` validation images, evenly spaced distances are kept.
        """
        center, covariance = training.mean(axis=0), np.cov(training, rowvar=False)
        covariance += np.diag(LEAST_SPREAD**2 + SMOOTHING * np.diag(covariance))
        precision = tuple(map(tuple, np.linalg.inv(covariance).tolist()))
        made = cls(tuple(center.tolist()), precision, (), step)
        found = np.sort(made.distance(validation))
        if len(found) > MOST:
            found = found[np.rint(np.linspace(0, len(found) - 1, MOST)).astype(int)]
        return dataclasses.replace(made, distances=tuple(found.tolist()))

    def distance(self, found: Float[np.ndarray, "B S"]) -> Float[np.ndarray, " B"]:
        """Mahalanobis distances from the training images' mean."""
        away = found - np.array(self.center)
        return np.sqrt(np.einsum("bi,ij,bj->b", away, np.array(self.precision), away))

    def typicality(self, found: Float[np.ndarray, "B S"]) -> Float[np.ndarray, " B"]:
        """Float32 shares of the validation images that are less usual, so 0 to 1."""
        nearer = np.searchsorted(self.distances, self.distance(found), side="right")
        return (1 - nearer / len(self.distances)).astype(np.float32)

    def to_json(self) -> dict:
        """All fields, for a file; `from_json` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict, where: str) -> "Calibration":
        """Reads what `to_json` gave; InputError, which names `where`: it is something else."""
        size = len(STATISTICS)
        with as_input_error(f"the typicality in {where} is damaged", advice="; measure it again"):
            names = [each.name for each in dataclasses.fields(cls)]
            center, precision, distances, step = (content[name] for name in names)
            arrays = [np.asarray(each, np.float64) for each in (center, precision, distances)]
            if [each.shape for each in arrays] != [(size,), (size, size), (len(distances),)]:
                raise ValueError(f"there are not {size} statistics")
            if not distances or not all(np.isfinite(each).all() for each in arrays):
                raise ValueError("values are missing, or not finite")
            if type(step) not in (int, type(None)) or (np.diff(arrays[2]) < 0).any():
                raise ValueError("the step or the order of the distances")
            rows = tuple(map(tuple, arrays[1].tolist()))
            return cls(tuple(arrays[0].tolist()), rows, tuple(arrays[2].tolist()), step)


def statistics(
    nats: Float[np.ndarray, "B T"], images: UInt8[np.ndarray, "B *F H W C"]
) -> Float[np.ndarray, "B S"]:
    """What of images is compared, float64: `STATISTICS` in their order.

    `images` are what the tokens stand for, so that tokens that lose detail are compared with the
    coder's bits of what they keep.
    """
    nats, pixels = nats.astype(np.float64), np.prod(images.shape[1:-1])
    return np.stack([nats.mean(axis=1), nats.std(axis=1), code_bits(images) / pixels], axis=1)


def code_bits(images: UInt8[np.ndarray, "B *F H W C"]) -> Float[np.ndarray, " B"]:
    """Float64 bits of each image, or clip, by a small lossless coder.

    A pixel is predicted from its neighbours to the left, above and between them (the median of
    LOCO-I, Weinberger et al. 2000), and what the prediction misses is coded by an adaptive
    arithmetic coder, whose length is known in closed form. Of RGB, red and blue are coded as
    differences from green. The bits of a PNG file would change with the version of zlib,
    and a calibration has to hold on another machine.
    """
    channels = np.moveaxis(images, -1, 0).astype(np.int32)
    if len(channels) == 3:
        red, green, blue = channels
        channels = np.stack([red - green, green, blue - green])
    corner = ((0, 0), (0, 0), *((0, 0),) * (images.ndim - 4), (1, 0), (1, 0))
    around = np.pad(channels, corner)
    left, above, between = around[..., 1:, :-1], around[..., :-1, 1:], around[..., :-1, :-1]
    low, high = np.minimum(left, above), np.maximum(left, above)
    predicted = np.clip(left + above - between, low, high)
    missed = (channels - predicted) % SYMBOLS
    return sum(_adaptive_bits(each.reshape(len(images), -1)) for each in missed)


def _adaptive_bits(symbols: Int[np.ndarray, "B n"]) -> Float[np.ndarray, " B"]:
    """Bits of each row's symbols, coded one after the other by the counts of the symbols before."""
    rows, length = symbols.shape
    offset = np.arange(rows)[:, None] * SYMBOLS
    counts = np.bincount((symbols + offset).reshape(-1), minlength=rows * SYMBOLS)
    counts = counts.reshape(rows, SYMBOLS)
    nats = special.gammaln(length + SYMBOLS * PSEUDO) - special.gammaln(SYMBOLS * PSEUDO)
    nats = nats - (special.gammaln(counts + PSEUDO) - special.gammaln(PSEUDO)).sum(axis=1)
    return nats / np.log(2)
