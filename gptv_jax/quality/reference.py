"""Feature statistics of images. The statistics of real images, kept in a file, are a reference.

Generated images are compared with a reference by `evaluate`.
"""

import dataclasses
import importlib.metadata
import io
import json
import pathlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Float64, UInt8

from gptv_jax import files
from gptv_jax.errors import InputError, as_input_error
from gptv_jax.quality.features import FeatureExtractor

FORMAT = 1
KEPT = 10_000  # feature vectors for precision and recall, as many as ADM's evaluator keeps
VERSIONED = ("gptv_jax", "jax", "numpy", "pillow")  # packages that images and features depend on


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of feature vectors, in float64.

    The scatter is the sum over vectors of the outer product of their deviations from the mean.
    """

    count: int
    mean: Float64[np.ndarray, " D"]
    scatter: Float64[np.ndarray, "D D"]

    def plus(self, features: Float[np.ndarray, "B D"]) -> "Moments":
        """Moments that count a batch too, exact (Chan, Golub and LeVeque 1979)."""
        if not np.isfinite(features).all():
            raise ValueError("the features hold values that are not finite.")
        features, count = features.astype(np.float64), self.count + len(features)
        mean = features.mean(axis=0)
        centred, difference = features - mean, mean - self.mean
        between = np.outer(difference, difference) * (self.count * len(features) / count)
        mean = self.mean + difference * (len(features) / count)
        return Moments(count, mean, self.scatter + centred.T @ centred + between)

    @property
    def covariance(self) -> Float64[np.ndarray, "D D"]:
        """The unbiased covariance, divided by count - 1, as in pytorch-fid and ADM's evaluator."""
        if self.count < 2:
            raise InputError("one image has no covariance; give two or more.")
        return self.scatter / (self.count - 1)


def measure(
    extractor: FeatureExtractor, batches: Iterable[UInt8[np.ndarray, "B *F H W C"]], keep: int
) -> tuple[Moments, Float[np.ndarray, "K D"], Float[np.ndarray, "N classes"] | None]:
    """Moments of all images' features, a random sample of features, and class probabilities.

    Every batch is read once, and the images of one batch are held at a time. The sample has up to
    `keep` feature vectors, in random order, so that the first n are a random sample too; the order
    of the images decides which, not the size of the batches. A batch smaller than the largest one
    before is padded, so that the extractor compiles once. Raises InputError where there are no
    images, ValueError where a batch is not uint8 [B, H, W, C], of clips [B, F, H, W, C], or where
    features are not finite.
    """
    moments = Moments(0, np.zeros(extractor.size), np.zeros((extractor.size, extractor.size)))
    probabilities, size = [], 0
    generator, kept, keys = np.random.default_rng(0), [], []
    for images in batches:
        if images.dtype != np.uint8 or images.ndim not in (4, 5) or not len(images):
            given = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"a batch is {given}; it must be uint8 [B, H, W, C], B 1 or more.")
        size = max(size, len(images))
        rest = ((0, 0),) * (images.ndim - 1)
        padded = np.pad(images, ((0, size - len(images)), *rest), mode="edge")
        x, p = (None if y is None else y[: len(images)] for y in extractor(padded))
        moments = moments.plus(x)
        kept.append(x)
        keys.append(generator.random(len(x)))
        if sum(map(len, kept)) > 2 * keep:
            kept, keys = _smallest(kept, keys, keep)
        if p is not None:
            probabilities.append(p)
    if not moments.count:
        raise InputError("there are no images to measure; give one or more.")
    [sample], _ = _smallest(kept, keys, keep)
    return moments, sample, np.concatenate(probabilities) if probabilities else None


def _smallest(rows: list, keys: list, keep: int) -> tuple[list, list]:
    """The `keep` rows with the smallest keys, in the order of the keys."""
    smallest = np.argsort(np.concatenate(keys))[:keep]
    return [np.concatenate(rows)[smallest]], [np.concatenate(keys)[smallest]]


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Moments of the features of real images, and a random sample of the features."""

    count: int
    mean: Float64[np.ndarray, " D"]
    covariance: Float64[np.ndarray, "D D"]  # unbiased
    provenance: dict  # JSON: the caller's entries, and count, features (name, hash) and versions
    kept: Float[np.ndarray, "K D"] | None = None  # random sample in random order

    def save(self, path: str | pathlib.Path) -> None:
        """Writes an `.npz` file that `load` reads, atomically and on process 0 alone."""
        path = files.user_path(path)
        if path.suffix != ".npz":
            raise InputError(f"the reference {path} does not end in .npz; name it so.")
        arrays = {"mean": self.mean, "covariance": self.covariance}
        if self.kept is not None:
            arrays["kept"] = self.kept
        buffer = io.BytesIO()
        header = {"format": FORMAT, "count": self.count, "provenance": self.provenance}
        np.savez(buffer, reference=json.dumps(header), **arrays)
        with as_input_error(f"{path} cannot be written", OSError):
            files.replace(path, buffer.getvalue())

    def fits(self, extractor: FeatureExtractor) -> bool:
        """Whether the reference was made with this extractor."""
        made = self.provenance["features"]
        return (made["name"], made["hash"]) == (extractor.name, extractor.hash)

    def must_fit(self, extractor: FeatureExtractor) -> None:
        """Raises InputError where the reference was made with another extractor."""
        if not self.fits(extractor):
            made = "{name} (hash {hash})".format(**self.provenance["features"])
            raise InputError(
                f"the reference was made with the features {made}, but the images are to be "
                f"compared by {extractor.name} (hash {extractor.hash}); name the reference's "
                "features, or make a new reference."
            )


def compute(
    extractor: FeatureExtractor,
    batches: Iterable[UInt8[np.ndarray, "B *F H W C"]],
    provenance: dict,
    keep: int = KEPT,
) -> Reference:
    """The reference of all images of `batches`, in the data set's range; each batch is read once.

    `provenance` says where the images come from, as JSON: data set, split, transforms with the
    resize filter. Count, features and versions are added. `keep` is the largest number of feature
    vectors to keep for precision and recall; 0 keeps none. Raises InputError where there are fewer
    than two images.
    """
    moments, sample, _ = measure(extractor, batches, keep)
    made = {"count": moments.count, "features": {"name": extractor.name, "hash": extractor.hash}}
    made["versions"] = {name: importlib.metadata.version(name) for name in VERSIONED}
    statistics = moments.count, moments.mean, moments.covariance
    return Reference(*statistics, provenance | made, sample if keep else None)


def load(path: str | pathlib.Path) -> Reference:
    """Reads a file of `Reference.save`; InputError where it is missing, damaged or another one."""
    path = files.user_path(path)
    if not path.exists():
        raise InputError(f"there is no reference {path}.")
    with as_input_error(f"{path} is no reference of generation quality, or it is damaged"):
        arrays = files.read_arrays(path)
        header = json.loads(str(arrays["reference"]))
        if (found := header["format"]) != FORMAT:
            raise InputError(f"{path} has format {found}; this version reads format {FORMAT}.")
        count, provenance = int(header["count"]), dict(header["provenance"])
        features = provenance["features"]
        if not isinstance(features, dict) or not {"name", "hash"} <= features.keys():
            raise ValueError("it does not name its features")
        mean, covariance, kept = arrays["mean"], arrays["covariance"], arrays.get("kept")
    arrays = [mean, covariance] if kept is None else [mean, covariance, kept]
    fits = count > 1 and mean.ndim == 1 and covariance.shape == mean.shape * 2
    fits = fits and (kept is None or kept.shape[1:] == mean.shape)
    if not fits or not all(a.dtype.kind == "f" and np.isfinite(a).all() for a in arrays):
        problem = "its arrays are not those of a reference"
        raise InputError(f"{path} is damaged ({problem}); make a new reference.")
    return Reference(count, mean, covariance, provenance, kept)
