"""Ridge regression of the class on the features of all layers at once, from streamed moments.

One pass over a split sums up the products of its features and its features by class; from these
sums the regression follows in closed form for any strength. With standardised features Z [N, D] and
one-hot classes Y [N, C] it minimises |Y - Z W - b|^2 + strength * N * |W|^2, as scikit-learn's
`make_pipeline(StandardScaler(), Ridge(alpha=strength * N))` does. Letters: S strengths, L layers
(one more than the network has), D width, C classes, B batch.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from gptv_jax.probe.features import Features
from gptv_jax.train import voting
from gptv_jax.train.step import total

EXACT = jax.lax.Precision.HIGHEST  # float32 products, where a GPU or TPU would use fewer bits
# A feature counts as constant if its variance is a smaller share of its mean square about the
# shift: such a variance is rounding error.
CONSTANT = 1e-6


class Moments(NamedTuple):
    """Float32 sums as exact as float64 ones: shifted, and with compensation for rounding."""

    shift: Float[Array, "L D"]  # the first batch's mean, so that large means do not cost precision
    sums: dict[str, Array]  # over images, of the features minus the shift, see `empty`
    lost: dict[str, Array]  # rounding errors; subtract them from the sums


@functools.partial(jax.jit, static_argnames=("layers", "width", "classes"))
def empty(layers: int, width: int, classes: int) -> Moments:
    """Moments of no image; the large ones are split over fsdp where the width allows it."""
    axis = "fsdp" if width % jax.sharding.get_abstract_mesh().shape["fsdp"] == 0 else None

    def sums() -> dict[str, Array]:
        return {
            "products": jnp.zeros((layers, width, width), out_sharding=jax.P(None, axis, None)),
            "by_class": jnp.zeros((layers, classes, width), out_sharding=jax.P(None, None, axis)),
            "images": jnp.zeros((classes,), out_sharding=jax.P(None)),
        }

    return Moments(jnp.zeros((layers, width), out_sharding=jax.P(None, None)), sums(), sums())


@functools.partial(jax.jit, donate_argnums=0)
def add(moments: Moments, features: Float[Array, "votes L B D"], batch: dict) -> Moments:
    """Adds a batch's first vote, where its "mask" is 1, to the moments, which are donated.

    The batch has a "label" of each row or, in its place, "targets" [B, C].
    """
    features, mask = features[0].astype(jnp.float32), batch["mask"]
    mean = jnp.einsum("lbd,b->ld", features, mask, precision=EXACT, out_sharding=jax.P(None, None))
    mean = mean / jnp.maximum(mask.sum(), 1)
    shift = jnp.where(moments.sums["images"].sum() == 0, mean, moments.shift)
    x = (features - shift[:, None]) * mask[None, :, None]
    targets = batch.get("targets")
    if targets is None:
        targets = jax.nn.one_hot(batch["label"], moments.sums["images"].size)
    targets *= mask[:, None]

    over_images = {
        "products": ("lbd,lbe->lde", x, x),
        "by_class": ("bc,lbd->lcd", targets, x),
        "images": ("bc->c", targets),
    }
    part = {}
    for name, (equation, *operands) in over_images.items():
        spec = jax.typeof(moments.sums[name]).sharding.spec
        part[name] = jnp.einsum(equation, *operands, precision=EXACT, out_sharding=spec)
    # Kahan summation: rounding errors do not add up over the batches of a large data set.
    part = jax.tree.map(jnp.subtract, part, moments.lost)
    sums = jax.tree.map(jnp.add, moments.sums, part)
    lost = jax.tree.map(lambda new, old, p: (new - old) - p, sums, moments.sums, part)
    return Moments(shift, sums, lost)


def solve(
    moments: Moments, strengths: Float[np.ndarray, "S L"], total: int = 1
) -> tuple[np.ndarray, ...]:
    """Weights [S, L, C, D], biases [S, L, C] and shifts [L, D], on the host in float64.

    The scores of class c are `weight[c] @ (x - shift) + bias[c]`. `total` is what the targets of
    each row add up to.
    """
    shift, sums, lost = multihost_utils.process_allgather(moments, tiled=True)
    S, (L, C, D) = len(strengths), sums["by_class"].shape
    images = sums["images"].astype(np.float64) - lost["images"]
    count = images.sum() / total
    share = images / count
    weight, bias = np.zeros((S, L, C, D)), np.zeros((S, L, C))
    for layer in range(L):
        products = (sums["products"][layer].astype(np.float64) - lost["products"][layer]) / count
        by_class = (sums["by_class"][layer].astype(np.float64) - lost["by_class"][layer]) / count
        mean = by_class.sum(axis=0) / total
        covariance = products - np.outer(mean, mean)
        variance, varies = np.diag(covariance), np.diag(products) * CONSTANT
        scale = np.where(variance > varies, 1 / np.sqrt(np.maximum(variance, 1e-300)), 0.0)
        correlation = covariance * np.outer(scale, scale)
        with_class = (by_class - np.outer(share, mean)) * scale
        for s in range(S):
            ridge = correlation + strengths[s, layer] * np.eye(D)
            weight[s, layer] = np.linalg.solve(ridge, with_class.T).T * scale
            bias[s, layer] = share - weight[s, layer] @ mean
    return weight, bias, shift.astype(np.float64)


def replicated(x: np.ndarray) -> Array:
    """A float32 array on every device, of an array that all processes hold."""
    everywhere = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
    return jax.make_array_from_process_local_data(everywhere, x.astype(np.float32))


@jax.jit
def correct(
    solution: tuple, features: Float[Array, "votes L B D"], batch: dict
) -> tuple[Float[Array, "S L"], Float[Array, ""]]:
    """Images classified correctly, by majority vote, and number of images, where the mask is 1."""
    (weight, bias, shift), mask = solution, batch["mask"]
    x = features.astype(jnp.float32) - shift[None, :, None]
    scores = jnp.einsum("vlbd,slcd->vslbc", x, weight, precision=EXACT)
    chosen = voting.majority_class(scores + bias[None, :, :, None])
    right = (chosen == batch["label"][None, None]) * mask[None, None]
    return right.sum(axis=-1), mask.sum()


def tabulate(
    features: Features, classes: int, strengths: Sequence[float], *, test: bool = True
) -> list[dict]:
    """For every layer {"ridge": strength, "ridge_validation_accuracy"}; one pass over each split.

    The strength is the best on validation, among equals the largest. With `test`, a fit to train
    and validation gives "ridge_test_accuracy". Fits are to the first vote alone.
    """
    strengths = np.array(sorted(strengths, reverse=True))
    moments = None
    for x, batch in features("train"):
        moments = add(moments or empty(x.shape[1], x.shape[3], classes), x, batch)

    def accuracies(split: str, solution: tuple, *, fold: bool) -> Float[np.ndarray, "S L"]:
        nonlocal moments
        parts, solution = [], jax.tree.map(replicated, solution)
        for x, batch in features(split):
            parts.append(correct(solution, x, batch))
            moments = add(moments, x, batch) if fold else moments
        right, images = total(parts)
        return right.astype(np.float64) / images

    tried = solve(moments, np.tile(strengths[:, None], len(moments.shift)))
    validation = accuracies("validation", tried, fold=test)
    best = strengths[validation.argmax(axis=0)]  # the first of equals
    columns = {"ridge": best, "ridge_validation_accuracy": validation.max(axis=0)}
    if test:
        [tested] = accuracies("test", solve(moments, best[None]), fold=False)
        columns["ridge_test_accuracy"] = tested
    return [{k: float(v[layer]) for k, v in columns.items()} for layer in range(len(best))]


def summarise(rows: list[dict]) -> dict:
    """The best layer and its accuracies, by the keys of a summary."""
    best = best_layers(rows, 1)[0]
    found = {name: value for name, value in rows[best].items() if name.startswith("ridge_")}
    return {"ridge_best_layer": best, **found}


def best_layers(rows: list[dict], count: int | None) -> list[int]:
    """The layers with the best validation accuracy, in order of depth; None: all of them."""
    ranked = sorted(range(len(rows)), key=lambda i: -rows[i]["ridge_validation_accuracy"])
    return sorted(ranked[:count])
