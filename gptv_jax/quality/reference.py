"""Statistics of the real images that generated ones are compared with, and where they come from."""

import dataclasses
import importlib.metadata
import io
import json
import pathlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Float64, UInt8

from gptv_jax import files
from gptv_jax.errors import InputError
from gptv_jax.quality.features import Features
from gptv_jax.quality.measure import measure

FORMAT = 1
KEPT = 10_000  # feature vectors, as ADM's evaluator has them for precision and recall
VERSIONED = ("gptv_jax", "jax", "numpy", "pillow")  # what images and features went through


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Moments of features of real images, and some of the features."""

    count: int
    mean: Float64[np.ndarray, "D"]
    covariance: Float64[np.ndarray, "D D"]  # the unbiased one
    provenance: dict  # JSON: the caller's words, and count, features (name, hash) and versions
    kept: Float[np.ndarray, "K D"] | None = None  # in random order; for precision and recall

    def save(self, path: str | pathlib.Path) -> None:
        """Writes an `.npz` file that `load` reads, whole or not at all; on process 0 alone.

        Raises:
          InputError: it cannot be written.
        """
        path = pathlib.Path(path).absolute()
        if path.suffix != ".npz":
            raise InputError(f"the reference {path} does not end in .npz; name it so.")
        arrays = {"mean": self.mean, "covariance": self.covariance}
        if self.kept is not None:
            arrays["kept"] = self.kept
        buffer = io.BytesIO()
        said = {"format": FORMAT, "count": self.count, "provenance": self.provenance}
        np.savez(buffer, reference=json.dumps(said), **arrays)
        try:
            files.replace(path, buffer.getvalue())
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}).") from error

    def made_of(self, features: Features) -> bool:
        """Whether it was made with these features."""
        made = self.provenance["features"]
        return (made["name"], made["hash"]) == (features.name, features.hash)

    def must_fit(self, features: Features) -> None:
        """Refuses features other than those that the reference was made with.

        Raises:
          InputError: names both.
        """
        made = self.provenance["features"]
        if not self.made_of(features):
            raise InputError(
                f"the reference was made with the features {made['name']} (hash {made['hash']}), "
                f"but these are {features.name} (hash {features.hash}); take those, or make the "
                "reference anew."
            )


def compute(
    features: Features,
    batches: Iterable[UInt8[np.ndarray, "B H W C"]],
    provenance: dict,
    keep: int = KEPT,
) -> Reference:
    """Reads all images of a data set once.

    Args:
      features: that images are compared by.
      batches: uint8 images in the data set's own range.
      provenance: where the images come from, in JSON: data set, split, transforms with the resize
        filter. What is known here is added: count, features, versions.
      keep: feature vectors to keep at most, for precision and recall; 0: none.

    Raises:
      InputError: fewer than two images.
    """
    found = measure(features, batches, keep)
    count = found.moments.count
    added = {
        "count": count,
        "features": {"name": features.name, "hash": features.hash},
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
    }
    covariance, kept = found.moments.covariance, found.kept if keep else None
    return Reference(count, found.moments.mean, covariance, provenance | added, kept)


def load(path: str | pathlib.Path) -> Reference:
    """A reference from the file of `Reference.save`.

    Raises:
      InputError: no such file, or it is none of ours, or damaged.
    """
    path = pathlib.Path(path).absolute()
    if not path.exists():
        raise InputError(f"there is no reference {path}.")
    try:
        arrays = files.read_arrays(path)
        said = json.loads(str(arrays["reference"]))
        if said["format"] != FORMAT:
            raise InputError(f"{path} is of format {said['format']}; this version reads {FORMAT}.")
        count, provenance = int(said["count"]), dict(said["provenance"])
        _ = provenance["features"]["name"], provenance["features"]["hash"]
        mean, covariance, kept = arrays["mean"], arrays["covariance"], arrays.get("kept")
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no reference of generation quality, or damaged ({error})."
        ) from error
    arrays = [mean, covariance] if kept is None else [mean, covariance, kept]
    fits = count > 1 and mean.ndim == 1 and covariance.shape == mean.shape * 2
    fits = fits and (kept is None or kept.shape[1:] == mean.shape)
    if not fits or not all(a.dtype.kind == "f" and np.isfinite(a).all() for a in arrays):
        raise InputError(f"{path} is damaged (its arrays are not those of one); make it anew.")
    return Reference(count, mean, covariance, provenance, kept)
