"""Sampling: new images, test images of which a part is kept, and what surprises in them."""

import itertools
import time

import jax
import numpy as np
from jaxtyping import Bool, UInt8

from gptv_jax.data import pipeline
from gptv_jax.decode import generation, likelihood
from gptv_jax.decode.sampler import Sampler, class_rows
from gptv_jax.runs import pictures
from gptv_jax.runs.run import Run


def run_stage(run: Run) -> dict:
    """Writes pictures to samples/; the summary's numbers.

    New images are in unconditional.png or, of a class-conditional network, in classes.png. Test
    images stand beside what was made of them in completions.png, where the upper rows are kept, and
    in inpainted.png, where all but the middle is; in surprise.png beside the nats of their pixels.
    """
    config, network = run.config.sample, run.network()
    sampler = Sampler.of(config, network, run.pretrained(network))
    key, classes = jax.random.key(run.config.seed), network.config.class_tokens
    rows = class_rows(config.count, classes) if classes else None
    labels = rows.reshape(-1) if classes else None
    count = len(labels) if classes else config.count
    nothing = np.full((count, network.length), generation.UNKNOWN, np.int32)
    sampler.draw(nothing, key, labels)  # compiles
    begin = time.perf_counter()
    tokens = sampler.draw(nothing, key, labels)
    seconds = time.perf_counter() - begin
    new, columns = _shown(run, tokens), rows.shape[1] if classes else None
    _save(run, "classes" if classes else "unconditional", new, columns)
    numbers = {"count": count, "tokens_per_second": tokens.size / seconds}
    if config.completions:
        elements = pipeline.images(run.config.data, "test", run.data.damage_log)
        elements = list(itertools.islice(elements, config.completions))
        test = np.stack([pipeline.to_tokens(run.codec, e["image"]) for e in elements])
        labels = np.array([e["label"] for e in elements], np.int32) if classes else None
        upper = np.arange(network.length) < generation.kept_tokens(network, config.keep)
        known = {"completions": upper, "inpainted": ~_middle(network.grid)}
        for number, (name, mask) in enumerate(known.items(), start=1):
            given = np.where(mask, test, generation.UNKNOWN)
            drawn = sampler.draw(given, jax.random.fold_in(key, number), labels)
            _save_pairs(run, name, _shown(run, test), _shown(run, drawn))
        nats = likelihood.nats(network, sampler.params, test, labels)
        of_pixels = likelihood.by_pixel(nats, network.grid, run.codec.image_shape[:2])
        maps, brightest = pictures.heat_map(of_pixels)
        _save_pairs(run, "surprise", _shown(run, test), maps)
        numbers["surprise_brightest_nats"] = brightest
    return numbers


def _middle(grid: tuple[int, int]) -> Bool[np.ndarray, "T"]:
    """Half of the rows and half of the columns, those in the middle."""
    hidden = np.zeros(grid, bool)
    rows, columns = (slice(size // 4, size - size // 4) for size in grid)
    hidden[rows, columns] = True
    return hidden.reshape(-1)


def _shown(run: Run, tokens: np.ndarray) -> UInt8[np.ndarray, "N H W 3"]:
    return run.codec.picture(run.codec.decode(tokens))


def _save_pairs(run: Run, name: str, left: np.ndarray, right: np.ndarray) -> None:
    """A grid of images, each with another one to its right."""
    pairs = np.stack([left, right], axis=1)
    _save(run, name, pairs.reshape(-1, *pairs.shape[2:]), columns=8)


def _save(run: Run, name: str, images: np.ndarray, columns: int | None) -> None:
    if jax.process_index() == 0:
        grid = pictures.grid(images, columns)
        pictures.save(grid, run.folder / "samples" / f"{name}.png")
