"""Sampling: new images, and test images whose upper part is kept and the rest drawn anew."""

import itertools
import math
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptv_jax import decode, pictures, sharding
from gptv_jax.data import pipeline
from gptv_jax.run import Run


def run_stage(run: Run) -> dict:
    """Writes samples/unconditional.png and samples/completions.png; the summary's numbers."""
    config, network = run.config.sample, run.network()
    params = run.pretrained(network)
    settings = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}

    def draw(prefix: np.ndarray, key: jax.Array) -> np.ndarray:
        """Continues each row of the prefix [n, P] to int32 [n, T]."""
        ways = math.prod(run.mesh.shape[axis] for axis in sharding.BATCH)
        filled = np.pad(prefix, ((0, -len(prefix) % ways), (0, 0)), mode="edge")
        rows = sharding.from_everywhere(filled)
        tokens = decode.generate(network, params, rows, key, **settings)
        return multihost_utils.process_allgather(tokens, tiled=True)[: len(prefix)]

    key = jax.random.key(run.config.seed)
    nothing = np.zeros((config.count, 0), np.int32)
    draw(nothing, key)  # compiles
    begin = time.perf_counter()
    tokens = draw(nothing, key)
    seconds = time.perf_counter() - begin

    folder = run.folder / "samples"
    codec = run.codec
    grid = pictures.grid(codec.picture(codec.decode(tokens)))
    if jax.process_index() == 0:
        pictures.save(grid, folder / "unconditional.png")

    if config.completions:
        elements = pipeline.images(run.config.data, "test", run.data.ledger)
        images = [e["image"] for e in itertools.islice(elements, config.completions)]
        test = np.stack([pipeline.to_tokens(codec, image) for image in images])
        kept = decode.kept_tokens(network, config.keep)
        completed = draw(test[:, :kept], jax.random.fold_in(key, 1))
        pairs = [codec.picture(codec.decode(tokens)) for tokens in (test, completed)]
        pairs = np.stack(pairs, axis=1)
        if jax.process_index() == 0:
            grid = pictures.grid(pairs.reshape(-1, *pairs.shape[2:]), columns=8)
            pictures.save(grid, folder / "completions.png")
    return {"count": config.count, "tokens_per_second": tokens.size / seconds}
