"""The Frechet distance between Gaussians that are fitted to features (Heusel et al. 2017)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from gptv_jax.errors import InputError
from gptv_jax.quality import host


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of feature vectors, in float64.

    The scatter is the sum over vectors of the outer product of their deviations from the mean.
    """

    count: int
    mean: Float64[np.ndarray, "D"]
    scatter: Float64[np.ndarray, "D D"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "B D"]) -> "Moments":
        """Those of one batch, one vector or more.

        Raises:
          ValueError: no vector, or values that are not finite.
        """
        if not len(features) or not np.isfinite(features).all():
            what = "hold values that are not finite" if len(features) else "are of no image"
            raise ValueError(f"the features {what}.")
        features = features.astype(np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merged(self, other: "Moments") -> "Moments":
        """Those of both together (Chan, Golub and LeVeque 1979): no approximation."""
        count = self.count + other.count
        apart = other.mean - self.mean
        between = np.outer(apart, apart) * (self.count * other.count / count)
        mean = self.mean + apart * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Float64[np.ndarray, "D D"]:
        """The unbiased one, divided by count - 1, as pytorch-fid and ADM's evaluator have it.

        Raises:
          InputError: of one vector.
        """
        if self.count < 2:
            raise InputError("one image has no covariance; give two or more.")
        return self.scatter / (self.count - 1)


def frechet_distance(
    mean: Float64[np.ndarray, "D"],
    covariance: Float64[np.ndarray, "D D"],
    other_mean: Float64[np.ndarray, "D"],
    other_covariance: Float64[np.ndarray, "D D"],
) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), in squared units of the features.

    As published, this is the square of the distance (Dowson and Landau 1982).

    Args:
      mean: m.
      covariance: C, symmetric and positive semidefinite; it may be singular.
      other_mean: m'.
      other_covariance: C'.

    Returns:
      0 or more.
    """
    with host.float64():
        found = float(_distance(mean, covariance, other_mean, other_covariance))
    return max(found, 0.0)  # rounding alone takes the distance of equal moments below 0


@jax.jit
def _distance(mean, covariance, other_mean, other_covariance) -> Float64[Array, ""]:
    # C C' is not symmetric, and its root is ill-conditioned where it is singular. It has the
    # eigenvalues of R'C R', with R and R' the symmetric roots, and those are the squares of the
    # singular values of R R': taken from there, rounding is not magnified by a square root.
    product = _root(covariance) @ _root(other_covariance)
    overlap = jnp.linalg.svd(product, compute_uv=False).sum()
    apart = ((mean - other_mean) ** 2).sum()
    return apart + jnp.trace(covariance) + jnp.trace(other_covariance) - 2 * overlap


def _root(covariance: Float64[Array, "D D"]) -> Float64[Array, "D D"]:
    """The symmetric square root; eigenvalues below rounding are those of directions not there."""
    values, vectors = jnp.linalg.eigh(covariance)
    rounding = len(values) * jnp.finfo(values.dtype).eps * jnp.abs(values).max()
    roots = jnp.sqrt(jnp.where(values > rounding, values, 0))
    return (vectors * roots[None]) @ vectors.T
