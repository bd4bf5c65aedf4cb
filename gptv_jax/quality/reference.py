"""Feature statistics of real images, with which generated images are compared."""

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
from gptv_jax.quality.measure import measure

FORMAT = 1
KEPT = 10_000  # feature vectors for precision and recall, as many as ADM's evaluator keeps
VERSIONED = ("gptv_jax", "jax", "numpy", "pillow")  # packages that images and features depend on


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Moments of the features of real images, and a random sample of the features."""

    count: int
    mean: Float64[np.ndarray, "D"]
    covariance: Float64[np.ndarray, "D D"]  # unbiased
    provenance: dict  # JSON: the caller's entries, and count, features (name, hash) and versions
    kept: Float[np.ndarray, "K D"] | None = None  # random sample in random order

    def save(self, path: str | pathlib.Path) -> None:
        """Writes an `.npz` file that `load` reads, atomically and on process 0 alone.

        Raises:
          InputError: the name does not end in .npz, or the file cannot be written.
        """
        path = pathlib.Path(path).absolute()
        if path.suffix != ".npz":
            raise InputError(f"the reference {path} does not end in .npz; name it so.")
        arrays = {"mean": self.mean, "covariance": self.covariance}
        if self.kept is not None:
            arrays["kept"] = self.kept
        buffer = io.BytesIO()
        header = {"format": FORMAT, "count": self.count, "provenance": self.provenance}
        np.savez(buffer, reference=json.dumps(header), **arrays)
        try:
            files.replace(path, buffer.getvalue())
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}).") from error

    def fits(self, extractor: FeatureExtractor) -> bool:
        """Whether the reference was made with this extractor."""
        made = self.provenance["features"]
        return (made["name"], made["hash"]) == (extractor.name, extractor.hash)

    def must_fit(self, extractor: FeatureExtractor) -> None:
        """Raises InputError where the reference was made with another extractor."""
        made = self.provenance["features"]
        if not self.fits(extractor):
            raise InputError(
                f"the reference was made with the features {made['name']} (hash {made['hash']}), "
                f"but the images are to be compared by {extractor.name} (hash {extractor.hash}); "
                "name the reference's features, or make a new reference."
            )


def compute(
    extractor: FeatureExtractor,
    batches: Iterable[UInt8[np.ndarray, "B H W C"]],
    provenance: dict,
    keep: int = KEPT,
) -> Reference:
    """The reference of all images of `batches`, each of which is read once.

    Args:
      extractor: computes the features.
      batches: uint8 images in the data set's range.
      provenance: where the images come from, as JSON: data set, split, transforms with the resize
        filter. Count, features and versions are added.
      keep: largest number of feature vectors to keep for precision and recall; 0 keeps none.

    Raises:
      InputError: there are fewer than two images.
    """
    found = measure(extractor, batches, keep)
    count = found.moments.count
    added = {
        "count": count,
        "features": {"name": extractor.name, "hash": extractor.hash},
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
    }
    covariance, kept = found.moments.covariance, found.kept if keep else None
    return Reference(count, found.moments.mean, covariance, provenance | added, kept)


def load(path: str | pathlib.Path) -> Reference:
    """Reads a file that `Reference.save` wrote.

    Raises:
      InputError: the file is missing, damaged, or of another kind or version.
    """
    path = pathlib.Path(path).absolute()
    if not path.exists():
        raise InputError(f"there is no reference {path}.")
    with as_input_error(f"{path} is no reference of generation quality, or it is damaged"):
        arrays = files.read_arrays(path)
        header = json.loads(str(arrays["reference"]))
        if header["format"] != FORMAT:
            raise InputError(
                f"{path} has format {header['format']}; this version reads format {FORMAT}."
            )
        count, provenance = int(header["count"]), dict(header["provenance"])
        _ = provenance["features"]["name"], provenance["features"]["hash"]
        mean, covariance, kept = arrays["mean"], arrays["covariance"], arrays.get("kept")
    arrays = [mean, covariance] if kept is None else [mean, covariance, kept]
    fits = count > 1 and mean.ndim == 1 and covariance.shape == mean.shape * 2
    fits = fits and (kept is None or kept.shape[1:] == mean.shape)
    if not fits or not all(a.dtype.kind == "f" and np.isfinite(a).all() for a in arrays):
        raise InputError(
            f"{path} is damaged (its arrays are not those of a reference); make a new reference."
        )
    return Reference(count, mean, covariance, provenance, kept)
