"""What it costs to probe every layer: one pass with ridge moments beside a plain forward pass.

Command:   python benchmarks/probe_features.py
One core:  taskset -c 0 python benchmarks/probe_features.py

The three take turns in one process on the same batch, so that whatever else the machine does meets
all of them:
    last    the forward pass to the features of the last layer, which is the ratio's denominator;
    logits  the forward pass to the token logits;
    probe   features of every layer, added to the moments of the ridge regression.
The bar is a ratio of at most 1.3. Prints the medians as a table, and the same as one JSON line.
"""

import importlib.util
import json
import os
import pathlib
import statistics
import time

import jax
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model.gpt import Network
from gptv_jax.probe import features, ridge

CASES = [("digits", None, 128), ("cifar10", "tiny", 64), ("cifar10", "10m", 8)]  # and images
CLASSES, ROUNDS, BAR = 10, 9, 1.3


def load(name: str, argument: str | None) -> config_lib.Config:
    """A file of configs/, in float32, which is what a CPU computes in."""
    path = pathlib.Path(__file__).parent.parent / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = module.get_config(argument) if argument else module.get_config()
    if jax.default_backend() == "cpu":
        settings.model.dtype = "float32"
    return config_lib.resolve(settings)


def passes(network: Network, size: int) -> dict:
    """The three, each a call that returns when its result is there."""
    rng = np.random.default_rng(0)
    batch = sharding.global_batch({
        "tokens": rng.integers(network.vocabulary, size=(size, network.length), dtype=np.int32),
        "variant": np.zeros(size, np.int32),
        "label": rng.integers(CLASSES, size=size, dtype=np.int32),
        "mask": np.ones(size, np.float32),
    })  # fmt: skip
    params = jax.jit(network.init)(jax.random.key(0))
    c = network.config
    moments = ridge.empty(c.layers + 1, c.width, CLASSES)

    @jax.jit
    def last(params, batch):
        return network.bind(params)(batch["tokens"], batch["variant"]).pooled[-1]

    @jax.jit
    def logits(params, batch):
        return network.bind(params)(batch["tokens"], batch["variant"]).logits

    def probe():
        nonlocal moments
        read = features.read(network, params, batch, raw=False, votes=1)
        moments = ridge.add(moments, read, batch)
        return moments

    return {
        "last": lambda: jax.block_until_ready(last(params, batch)),
        "logits": lambda: jax.block_until_ready(logits(params, batch)),
        "probe": lambda: jax.block_until_ready(probe()),
    }


def seconds(functions: dict) -> dict[str, float]:
    """Median time of each function, all of them called once a round, after one that compiles."""
    times = {name: [] for name in functions}
    for round_ in range(ROUNDS + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def main():
    """Measures every case."""
    rows = []
    print(
        f"{'network':30}{'images':>7}{'last ms':>10}{'logits ms':>11}{'probe ms':>10}{'ratio':>8}"
    )
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh())):
        for name, argument, size in CASES:
            config = load(name, argument)
            vocabulary = config.tokens.levels if name == "digits" else config.tokens.colors
            grid = (config.data.image_size,) * 2
            found = seconds(passes(Network(config.model, vocabulary, grid), size))
            c = config.model
            row = {"network": f"{name} {argument or ''} L{c.layers} D{c.width}", "images": size}
            row |= {f"{key}_ms": round(1e3 * s, 1) for key, s in found.items()}
            row["ratio"] = round(found["probe"] / found["last"], 3)
            rows.append(row)
            print("{:30}{:7}{:10.1f}{:11.1f}{:10.1f}{:8.3f}".format(*row.values()), flush=True)
    result = {
        "benchmark": "probe_features",
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "bar": BAR,
        "passed": all(row["ratio"] <= BAR for row in rows),
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
