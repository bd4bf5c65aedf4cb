"""Pictures at the end of a run: new images, completed test images, and surprise by pixel."""

import itertools

import jax
import numpy as np
from jaxtyping import Bool, UInt8

from gptv_jax.data import pipeline
from gptv_jax.decode import generation
from gptv_jax.decode.sampler import Sampler, Section, by_pixel, class_rows, kept_tokens
from gptv_jax.runs import pictures
from gptv_jax.runs.context import Context
from gptv_jax.stages import pretrained


def run_stage(context: Context) -> dict:
    """Writes pictures to samples/ and returns the summary's numbers.

    New images are in unconditional.png or, of a class-conditional network, in classes.png. Test
    images stand beside their versions with the lower part drawn anew (completions.png), with the
    middle drawn anew (inpainted.png), and beside the nats of their pixels (surprise.png).
    """
    config, seed, network = context.config.sample, context.config.seed, context.network()
    found = pretrained.load(context, network)
    sampler = Sampler(network, found.params, config)
    classes, count, labels, columns = network.config.class_tokens, config.count, None, None
    if classes:
        rows = class_rows(count, classes)
        count, labels, columns = rows.size, rows.reshape(-1), rows.shape[1]
    key, stopwatch = Section.NEW_IMAGES.key(seed), generation.Stopwatch()
    tokens = sampler.new(count, key, labels, stopwatch=stopwatch)
    _save(context, "classes" if classes else "unconditional", _shown(context, tokens), columns)
    numbers = {"count": count, "tokens_per_second": tokens.size / stopwatch.seconds}
    if config.completions:
        elements = pipeline.images(context.config.data, "test", context.data.damage_log)
        elements = list(itertools.islice(elements, config.completions))
        test = np.stack([pipeline.to_tokens(context.codec, e["image"]) for e in elements])
        labels = np.array([e["label"] for e in elements], np.int32) if classes else None
        upper = np.arange(network.length) < kept_tokens(network, config.keep)
        parts = {
            "completions": (Section.COMPLETIONS, upper),
            "inpainted": (Section.INPAINTED, ~_middle(network.grid)),
        }
        for name, (section, known) in parts.items():
            given = np.where(known, test, generation.UNKNOWN)
            drawn = sampler.draw(given, section.key(seed), labels)
            _save_pairs(context, name, _shown(context, test), _shown(context, drawn))
        spread = by_pixel(sampler.nats(test, labels), context.codec)
        maps, brightest = pictures.heat_map(spread)
        _save_pairs(context, "surprise", _shown(context, test), maps)
        numbers["surprise_brightest_nats"] = brightest
    return numbers | found.numbers


def _middle(grid: tuple[int, int]) -> Bool[np.ndarray, "T"]:
    """Tokens in the middle half of the rows and the middle half of the columns."""
    hidden = np.zeros(grid, bool)
    rows, columns = (slice(size // 4, size - size // 4) for size in grid)
    hidden[rows, columns] = True
    return hidden.reshape(-1)


def _shown(context: Context, tokens: np.ndarray) -> UInt8[np.ndarray, "N H W 3"]:
    return context.codec.picture(context.codec.decode(tokens))


def _save_pairs(context: Context, name: str, left: np.ndarray, right: np.ndarray) -> None:
    """A grid of pictures, each with its partner to the right."""
    pairs = np.stack([left, right], axis=1)
    _save(context, name, pairs.reshape(-1, *pairs.shape[2:]), columns=8)


def _save(context: Context, name: str, images: np.ndarray, columns: int | None) -> None:
    if jax.process_index() == 0:
        grid = pictures.grid(images, columns)
        pictures.save(grid, context.folder.path / "samples" / f"{name}.png")
