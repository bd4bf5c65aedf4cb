"""The paper's probe for small data sets: L-BFGS logistic regression on features in memory."""

import jax.numpy as jnp
import numpy as np
import threadpoolctl
from etils import epy
from jaxtyping import Int

from gptv_jax import config as config_lib
from gptv_jax.errors import InputError
from gptv_jax.probe.features import Split
from gptv_jax.train import voting

with epy.lazy_imports():  # heavy, and not needed before pretraining
    from sklearn import linear_model, metrics, pipeline, preprocessing

SMALL = 50_000_000  # size of a feature matrix below which BLAS uses one thread


def fit_probe(config: config_lib.Probe, splits: dict[str, Split], *, fold: bool = True) -> dict:
    """{"c", "validation_accuracy", "validation_nats", "test_accuracy"} on standardised features.

    "predicted" is the class that the model gives each test image, int [N]. The strength c is the
    best of the fits to train by `preference`. As in the paper, test accuracy is measured on a last
    fit, to train and, with `fold`, validation together. Several votes give several times as many
    features as labels: the class is the one with most votes, and fits are to the first vote.
    """

    def fit(c: float, features: np.ndarray, labels: np.ndarray):
        model = linear_model.LogisticRegression(C=c, max_iter=config.max_iterations)
        scaled = pipeline.make_pipeline(preprocessing.StandardScaler(), model)
        return scaled.fit(features, labels)

    (train, train_labels), (validation, validation_labels) = splits["train"], splits["validation"]
    # On small problems BLAS threads wait for each other far longer than they compute.
    with threadpoolctl.threadpool_limits(1 if train.size < SMALL else None):
        tried = []
        for c in config.c:
            model = fit(c, train, train_labels)
            right = _predict(model, validation, validation_labels) == validation_labels
            row = {"c": c, "validation_accuracy": float(right.mean())}
            tried.append(row | {"validation_nats": _nats(model, validation, validation_labels)})
        best = max(tried, key=preference)
        if fold:
            train = np.concatenate([train, validation[: len(validation_labels)]])
            train_labels = np.concatenate([train_labels, validation_labels])
        model = fit(best["c"], train, train_labels)
        predicted = _predict(model, *splits["test"])
        accuracy = float((predicted == splits["test"][1]).mean())
        return best | {"test_accuracy": accuracy, "predicted": predicted}


def preference(row: dict) -> tuple[float, float]:
    """Key that ranks layers, strengths and rates: validation accuracy, then nats per image."""
    return row["validation_accuracy"], -row["validation_nats"]


def with_few_labels(config: config_lib.Probe, splits: dict[str, Split], seed: int) -> list[dict]:
    """`fit_probe` on a few training images of each class, a row for each random subset.

    The strength is chosen on all of validation, which the final fit leaves out; raises as `draw`.
    """
    (features, labels), rows = splits["train"], []
    for per_class in config.labels_per_class:
        for number in range(config.draws):
            chosen = draw(labels, per_class, np.random.default_rng((seed, per_class, number)))
            few = splits | {"train": (features[chosen], labels[chosen])}
            row = {"labels_per_class": per_class, "draw": number}
            rows.append(row | fit_probe(config, few, fold=False))
            rows[-1].pop("predicted", None)
    return rows


def draw(
    labels: Int[np.ndarray, " N"], per_class: int, rng: np.random.Generator
) -> Int[np.ndarray, " chosen"]:
    """Indices of `per_class` images of every class, sorted; InputError where there are fewer."""
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < per_class:
        raise InputError(
            f"config.probe.labels_per_class has {per_class}, but class {classes[counts.argmin()]} "
            f"has {counts.min()} training images; take at most that many."
        )
    chosen = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in classes]
    return np.sort(np.concatenate(chosen))


def _predict(model, features: np.ndarray, labels: np.ndarray) -> Int[np.ndarray, " N"]:
    """The class that the model gives each image, by the majority of the image's votes."""
    if len(features) == len(labels):
        return model.predict(features)
    logits = model.predict_log_proba(features).reshape(-1, len(labels), len(model.classes_))
    chosen = voting.majority_class(jnp.asarray(logits, jnp.float32))
    return model.classes_[np.asarray(chosen)]


def _nats(model, features: np.ndarray, labels: np.ndarray) -> float:
    # A class that no training image has gets probability 0.
    known = model.classes_.astype(int)
    likely = np.zeros((len(features), max(known.max(), labels.max()) + 1))
    likely[:, known] = model.predict_proba(features)
    likely /= likely.sum(axis=1, keepdims=True)  # float32 sums are not quite 1
    labels = np.tile(labels, len(features) // len(labels))
    return float(metrics.log_loss(labels, likely, labels=np.arange(likely.shape[1])))
