"""Linear probe: what a logistic regression reads from every layer's frozen features.

Beside it the same regression on raw pixels and on the network with its initial random weights.
"""

import jax
import numpy as np
import sklearn.linear_model
import sklearn.pipeline
import sklearn.preprocessing
import threadpoolctl
from jax.experimental import multihost_utils
from sklearn.metrics import log_loss

from gptv_jax import config as config_lib
from gptv_jax import files, sharding
from gptv_jax.model.gpt import Network
from gptv_jax.run import Run
from gptv_jax.train.metrics import Progress

SMALL = 50_000_000  # features times images
Split = tuple[np.ndarray, np.ndarray]  # features [N, D] and labels [N]


def run_stage(run: Run) -> dict:
    """Probes every layer and the two floors; writes probe/layers.json, returns the numbers."""
    config, network = run.config, run.network()
    initial = jax.jit(network.init)(jax.random.key(config.seed))
    trained = _probe_layers(run, "probe", network, run.pretrained(network))
    random = _probe_layers(run, "probe of random weights", network, initial)
    pixels = {split: _pixels(run, split) for split in ("train", "validation", "test")}
    raw = fit_probe(config.probe, pixels)

    rows = []
    for layer, (result, floor) in enumerate(zip(trained, random, strict=True)):
        rows.append({
            "layer": layer,
            **result,
            "random_init_validation_accuracy": floor["validation_accuracy"],
            "random_init_test_accuracy": floor["test_accuracy"],
        })  # fmt: skip
    files.write_json(run.folder / "probe" / "layers.json", rows)
    layers = range(len(rows))
    best = max(layers, key=lambda i: preference(trained[i]))
    floor = max(layers, key=lambda i: preference(random[i]))
    return {
        "best_layer": best,
        "validation_accuracy": trained[best]["validation_accuracy"],
        "test_accuracy": trained[best]["test_accuracy"],
        "raw_pixels_test_accuracy": raw["test_accuracy"],
        "random_init_best_layer": floor,
        "random_init_test_accuracy": random[floor]["test_accuracy"],
    }


def fit_probe(config: config_lib.Probe, splits: dict[str, Split]) -> dict:
    """Standardised L-BFGS logistic regression, its strength chosen on validation.

    As in the paper, the validation images are folded back in once the choice is made.

    Args:
      config: the strengths to try, and the bound on iterations.
      splits: features and labels of train, validation and test.

    Returns:
      {"c", "validation_accuracy", "validation_nats", "test_accuracy"} of the strength with the best
      validation accuracy, among equals the lowest validation cross-entropy (nats per image). Both
      are of the fit to train alone, test of the final one.
    """

    def fit(c: float, features: np.ndarray, labels: np.ndarray):
        model = sklearn.linear_model.LogisticRegression(C=c, max_iter=config.max_iterations)
        scaled = sklearn.pipeline.make_pipeline(sklearn.preprocessing.StandardScaler(), model)
        return scaled.fit(features, labels)

    (train, train_labels), (validation, validation_labels) = splits["train"], splits["validation"]
    # On small problems BLAS threads cost far more in waiting than they save.
    threads = 1 if train.size < SMALL else None
    with threadpoolctl.threadpool_limits(threads):
        tried = []
        for c in config.c:
            model = fit(c, train, train_labels)
            # A class that is in none of the training images has probability 0.
            known = model.classes_.astype(int)
            likely = np.zeros((len(validation), max(known.max(), validation_labels.max()) + 1))
            likely[:, known] = model.predict_proba(validation)
            likely /= likely.sum(axis=1, keepdims=True)  # float32 sums are not quite 1
            nats = log_loss(validation_labels, likely, labels=np.arange(likely.shape[1]))
            row = {"c": c, "validation_accuracy": model.score(validation, validation_labels)}
            tried.append(row | {"validation_nats": float(nats)})
        best = max(tried, key=preference)
        both = np.concatenate([train, validation])
        model = fit(best["c"], both, np.concatenate([train_labels, validation_labels]))
        return best | {"test_accuracy": model.score(*splits["test"])}


def preference(row: dict) -> tuple[float, float]:
    """What layers and strengths are chosen by: validation accuracy, then cross-entropy."""
    return row["validation_accuracy"], -row["validation_nats"]


def _probe_layers(run: Run, name: str, network: Network, params: dict) -> list[dict]:
    extracted = {s: _features(run, network, params, s) for s in ("train", "validation", "test")}
    rows, count = [], network.config.layers + 1
    progress = Progress(name, count, unit="layer")
    for layer in range(count):
        splits = {name: (features[layer], labels) for name, (features, labels) in extracted.items()}
        rows.append(fit_probe(run.config.probe, splits))
        progress.advance()
        progress.report(layer + 1, {"validation_accuracy": rows[-1]["validation_accuracy"]})
    progress.close()
    return rows


def _features(run: Run, network: Network, params: dict, split: str) -> Split:
    """Mean-pooled features [L+1, N, D] of a whole split from one pass, and its labels [N]."""
    forward = jax.jit(lambda p, b: network.bind(p)(b["tokens"], b["variant"]).pooled)
    features, labels = [], []
    for batch in _batches(run, split):
        batch = sharding.global_batch(batch)
        pooled = multihost_utils.process_allgather(forward(params, batch), tiled=True)
        mask, label = multihost_utils.process_allgather((batch["mask"], batch["label"]), tiled=True)
        features.append(pooled[:, mask > 0])
        labels.append(label[mask > 0])
    return np.concatenate(features, axis=1), np.concatenate(labels)


def _pixels(run: Run, split: str) -> Split:
    images, labels = [], []
    for batch in _batches(run, split):
        real = batch["mask"] > 0
        images.append(run.codec.decode(batch["tokens"][real]).reshape(real.sum(), -1))
        labels.append(batch["label"][real])
    return np.concatenate(images).astype(np.float32), np.concatenate(labels)


def _batches(run: Run, split: str):
    probe = run.config.probe
    return run.data.evaluation(
        split, probe.batch_size, limit=probe.train_images if split == "train" else None
    )
