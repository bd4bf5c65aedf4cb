"""Linear probes: what a linear classifier reads from every layer's frozen features.

Labels are read from the mean over an image's positions, label maps from each position.

Ridge regression, in closed form from one pass over the images, ranks all layers quickly. The best
of them (or all) are then probed by one of the paper's two protocols: L-BFGS logistic regression on
features of unchanged images, or SGD on augmented ones. Two floors are probed in the same way: raw
pixels, and the network with its random initial weights.
"""

import functools
import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epy

from gptv_jax import files, hosts
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.data import sources
from gptv_jax.errors import as_input_error
from gptv_jax.model.gpt import Network
from gptv_jax.probe import features, ridge, sgd
from gptv_jax.probe.features import Features, Kept
from gptv_jax.probe.logistic import draw, fit_probe, preference, with_few_labels
from gptv_jax.runs import accuracy, layers
from gptv_jax.runs.context import Context
from gptv_jax.stages import pretrained
from gptv_jax.tasks import dense_probe
from gptv_jax.tasks.network import network_of
from gptv_jax.train.metrics import Progress
from gptv_jax.train.step import CONFUSION_CLASSES

with epy.lazy_imports():  # heavy, and not needed before pretraining
    from sklearn import metrics

LOG = logging.getLogger(__name__)
RESULTS = ("validation_accuracy", "test_accuracy")
FITS = "fits.json"  # results of an unfinished probe by L-BFGS
KEPT = 2 * 10**9  # bytes of all layers' features up to which one pass over the images is enough


def run_stage(context: Context) -> dict:
    """Probes every layer and the two floors; writes the layers' numbers, returns the best ones."""
    LOG.info("probe loads the pretrained weights.")
    network = network_of(context.config, read=context.config.probe)
    initial = jax.jit(network.init)(jax.random.key(context.config.seed))
    found = pretrained.load(context)
    numbers = _labels(context, network, found.params, initial) if context.classes else {}
    maps = context.task.map_names
    if maps and "segmentation" in context.task.needs:
        if context.images.has_pixels():
            numbers |= _label_maps(context, network, found.params, initial, len(maps))
        else:
            LOG.info("a token cache has no label maps of its images' size: they are not probed.")
    return numbers | found.numbers


def _labels(context: Context, network: Network, trained: dict, initial: dict) -> dict:
    """The summary's numbers of labels; writes probe/layers.json."""
    protocol = {"lbfgs": _by_lbfgs, "sgd": _by_sgd}[context.config.probe.method]
    trained, random, raw, more = protocol(context, network, trained, initial)
    rows = []
    for layer, (result, floor) in enumerate(zip(trained, random, strict=True)):
        floors = {f"random_init_{name}": floor.get(name) for name in RESULTS}
        rows.append({"layer": layer} | dict.fromkeys(RESULTS) | result | floors)
    files.write_json(context.folder.path / "probe" / "layers.json", rows)
    best, floor = _best(trained), _best(random)
    return {
        "best_layer": best,
        **{name: trained[best][name] for name in RESULTS},
        "raw_pixels_test_accuracy": raw["test_accuracy"],
        "random_init_best_layer": floor,
        "random_init_test_accuracy": random[floor]["test_accuracy"],
        **ridge.summarise(trained),
        **more,
    }


def _label_maps(
    context: Context, network: Network, trained: dict, initial: dict, classes: int
) -> dict:
    """The summary's numbers of label maps; writes probe/dense_layers.json."""
    config, codec = context.config.probe, context.codec
    cut = dense_probe.Cut(codec, classes)
    batches, raw = dense_probe.batches(context.data, config, cut, network), config.features == "raw"
    read = {
        "": dense_probe.of_network(network, trained, batches, raw=raw),
        "random_init_": dense_probe.of_network(network, initial, batches, raw=raw),
        "raw_pixels_": dense_probe.of_pixels(codec, batches),
    }
    tables = {}
    for name, features_of in read.items():
        LOG.info("probe reads label maps from every layer: %s.", name or "pretrained weights")
        tables[name] = dense_probe.tabulate(features_of, config.ridge)
    rows, random, [pixels] = tables.values()
    best, floor = (
        max(range(len(each)), key=lambda i: each[i]["validation_miou"]) for each in (rows, random)
    )
    by_layer = [
        {"layer": i, **row, "random_init_test_miou": of_random["test_miou"]}
        for i, (row, of_random) in enumerate(zip(rows, random, strict=True))
    ]
    files.write_json(context.folder.path / "probe" / layers.FILE, by_layer)
    return {
        "dense_best_layer": best,
        **{n: value for n, value in rows[best].items() if n not in ("ridge", "power")},
        "random_init_test_miou": random[floor]["test_miou"],
        "raw_pixels_test_miou": pixels["test_miou"],
        **{f"layer_{i}_test_miou": row["test_miou"] for i, row in enumerate(rows)},
    }


def _by_lbfgs(context: Context, network: Network, trained: dict, initial: dict) -> tuple:
    """Rows of the trained and the random network's layers, the pixels' row, further numbers."""
    config, batches = context.config.probe, features.batches(context.data, context.config.probe)
    LOG.info("probe reads the pixels of every image.")
    pixels = features.kept(features.of_pixels(context.codec, batches), [0]).taken([0])
    for per_class in config.labels_per_class:  # refuses too many labels before any work
        draw(pixels["train"][1], per_class, np.random.default_rng(context.config.seed))
    images = {split: len(labels) for split, (_, labels) in pixels.items()}
    found = network.config.layers + 1, *images.values()
    LOG.info("probe reads %d layers of %d training, %d validation, %d test images.", *found)
    read = features.of_network(network, trained, batches, raw=config.features == "raw")
    training = np.bincount(pixels["train"][1], minlength=context.classes)
    size = 4 * found[0] * sum(images.values()) * network.pooled_width * network.votes
    first = range(found[0]) if config.refine is None or size <= KEPT else ()
    rows, seen = _layers_by_lbfgs(context, "probe", first, read, training)
    best, more = _best(rows), {f"{split}_images": count for split, count in images.items()}
    window = features.around(best, config.concatenate, len(rows))
    if config.concatenate > 1:
        more |= _concatenated(window, _joined(context, "concatenated", window, read, seen))
    if config.labels_per_class:
        more |= _few_labels(context, seen.taken([best]))

    LOG.info("probe reads the layers of random initial weights, the floor, in the same way.")
    floor = features.of_network(network, initial, batches, raw=config.features == "raw")
    random, seen = _layers_by_lbfgs(context, "probe of random weights", first, floor)
    if config.concatenate > 1:
        joined = _joined(context, "concatenated random weights", window, floor, seen)
        more["concatenated_random_init_test_accuracy"] = joined["test_accuracy"]
    LOG.info("probe fits the raw pixels, the other floor.")
    raw = _once(context, "raw pixels", lambda: fit_probe(config, pixels))
    if jax.process_index() == 0:
        (context.folder.path / "probe" / FITS).unlink()
    return rows, random, raw, more


def _few_labels(context: Context, splits: dict[str, features.Split]) -> dict:
    """The summary's numbers of few labels; writes probe/labels.json."""
    draws, more = with_few_labels(context.config.probe, splits, context.config.seed), {}
    files.write_json(context.folder.path / "probe" / "labels.json", draws)
    for per_class in context.config.probe.labels_per_class:
        found = [d["test_accuracy"] for d in draws if d["labels_per_class"] == per_class]
        name = f"labels_{per_class}_test_accuracy"
        more[name] = float(np.mean(found))
        more[f"{name}_deviation"] = float(np.std(found, ddof=1)) if len(found) > 1 else None
    return more


def _once(context: Context, name: str, fit: Callable[[], dict]) -> dict:
    """The result of `fit()`, kept in a file, so that a probe that continues does not repeat it."""
    path = context.folder.path / "probe" / FITS
    fits = hosts.from_first(lambda: files.read_json(path, {}))
    if name not in fits:
        fits[name] = fit()
        fits[name].pop("predicted")  # too large to keep for every layer
        files.write_json(path, fits)
    return fits[name]


def _joined(context: Context, name: str, window: Sequence[int], read: Features, seen: Kept) -> dict:
    """The result of the layers of the window side by side, read again unless they are in `seen`."""

    def fit() -> dict:
        return fit_probe(context.config.probe, _with_layers(window, read, seen).taken(window))

    return _once(context, name, fit)


def _with_layers(layers: Sequence[int], read: Features, seen: Kept) -> Kept:
    """The features `seen` if the layers are among them, else these layers' features."""
    return seen if set(layers) <= set(seen.layers) else features.kept(read, layers)


def _layers_by_lbfgs(
    context: Context, name: str, first: Sequence[int], read: Features, training=None
) -> tuple[list[dict], Kept]:
    """A row for every layer, and the kept features of at least the refined layers.

    The first pass over the images keeps the layers `first`; a second pass is made where these are
    not all refined layers. With `training`, the training images of each class, confusion.json gets
    the best layer's matrix.
    """
    config, seen = context.config.probe, Kept(read, first)
    rows = _table(name, seen, context)
    layers = ridge.best_layers(rows, config.refine)
    seen = _with_layers(layers, read, seen)
    counted = training is not None and context.classes <= CONFUSION_CLASSES

    def fit(layer: int) -> dict:
        splits = seen.taken([layer])
        row = fit_probe(config, splits)
        # Each layer that is better than all before replaces the file; the row is kept afterwards.
        if counted and all(preference(row) > preference(rows[i]) for i in layers if i < layer):
            every = np.arange(context.classes)
            matrix = metrics.confusion_matrix(splits["test"][1], row["predicted"], labels=every)
            _write_confusion(context, layer, matrix, training)
        return row

    progress = Progress(name, len(layers), unit="layer")
    for done, layer in enumerate(layers, start=1):
        rows[layer] |= _once(context, f"{name}, layer {layer}", functools.partial(fit, layer))
        progress.advance()
        progress.report(done, {"validation_accuracy": rows[layer]["validation_accuracy"]})
    progress.close()
    return rows, seen


def _by_sgd(context: Context, network: Network, trained: dict, initial: dict) -> tuple:
    """As `_by_lbfgs`; the floors are probed by ridge regression, which needs no training."""
    config, batches = context.config.probe, features.batches(context.data, context.config.probe)
    path = context.folder.path / "probe" / "ridge.json"
    # The tables choose the heads, so a run that continues must find the same tables.
    tables = hosts.from_first(lambda: files.read_json(path, {}))
    if not tables:
        for name, params in (("probe", trained), ("probe of random weights", initial)):
            LOG.info("%s reads every layer of all images, for ridge regression.", name)
            read = features.of_network(network, params, batches, raw=config.features == "raw")
            tables[name] = _table(name, read, context)
        pixels = features.of_pixels(context.codec, batches)
        tables["probe of raw pixels"] = _table("probe of raw pixels", pixels, context)
        files.write_json(path, tables)
    with as_input_error(f"{path} is damaged", advice="; delete it"):
        rows, random, [raw] = tables.values()
        for row in (*random, raw):  # the ridge regression's results, as there is no other probe
            row |= {name: row[f"ridge_{name}"] for name in RESULTS} | {"validation_nats": 0.0}

    groups = [(layer,) for layer in ridge.best_layers(rows, config.refine)]
    [middle] = ridge.best_layers(rows, 1)
    window = features.around(middle, config.concatenate, len(rows))
    heads = sgd.Heads(network, config, context.classes, tuple(dict.fromkeys([*groups, window])))
    with Checkpoints(context.folder.checkpoints("probe")) as checkpoints:
        chosen = sgd.fit(
            heads,
            trained,
            checkpoints=checkpoints,
            log=context.log,
            training=lambda position: context.data.train(
                config.sgd.batch_size, position, config.sgd.train_transforms
            ),
            evaluation=batches,
            seed=context.config.seed,
        )
    for group in groups:
        rows[group[0]] |= chosen[group]
    best, more = _best(rows), accuracy.images(context.config.data)
    if matrix := rows[best].pop("confusion"):  # None where there are too many classes
        training = sources.open_source(context.config.data, "train").label_counts()
        _write_confusion(context, best, np.array(matrix), training)
    more |= _concatenated(window, chosen[window]) if config.concatenate > 1 else {}
    return rows, random, raw, more


def _write_confusion(context: Context, layer: int, matrix: np.ndarray, training) -> None:
    folder, names = context.folder.path / "probe", context.task.classes
    accuracy.write(folder, matrix, names, training, split="test", layer=layer)


def _table(name: str, read: Features, context: Context) -> list[dict]:
    rows = ridge.tabulate(read, context.classes, context.config.probe.ridge)
    layer, accuracy, _ = ridge.summarise(rows).values()
    LOG.info("%s: ridge reads %.4f of validation from layer %d.", name, accuracy, layer)
    return rows


def _concatenated(window: tuple[int, ...], row: dict) -> dict:
    named = {"first_layer": window[0], "last_layer": window[-1]} | {k: row[k] for k in RESULTS}
    return {f"concatenated_{name}": value for name, value in named.items()}


def _best(rows: list[dict]) -> int:
    refined = [i for i, row in enumerate(rows) if "validation_accuracy" in row]
    return max(refined, key=lambda i: preference(rows[i]))
