"""Pictures at the end of a run: new images, completed test images, and surprise by pixel."""

import itertools
import logging

import numpy as np

from gptv_jax.data import pipeline
from gptv_jax.decode import generation
from gptv_jax.decode.sampler import Sampler, Section, by_pixel, class_rows, kept_tokens
from gptv_jax.runs import pictures
from gptv_jax.runs.context import Context
from gptv_jax.stages import pretrained

LOG = logging.getLogger(__name__)


def run_stage(context: Context) -> dict:
    """Writes pictures to samples/ and returns the summary's numbers.

    New images are in unconditional.png or, of a class-conditional network, in classes.png. Test
    images stand beside their versions with the lower part drawn anew (completions.png), with the
    middle drawn anew (inpainted.png), and beside the nats of their pixels (surprise.png).
    """
    config, seed, network = context.config.sample, context.config.seed, context.network()
    codec, folder = context.codec, context.folder.path / "samples"
    found = pretrained.load(context)
    sampler = Sampler(network, found.params, config)
    classes, count, labels, columns = network.config.class_tokens, config.count, None, None
    if classes:
        rows = class_rows(count, classes)
        count, labels, columns = rows.size, rows.reshape(-1), rows.shape[1]
    LOG.info("sample draws %d images, then completes %d test images.", count, config.completions)
    key, stopwatch = Section.NEW_IMAGES.key(seed), generation.Stopwatch()
    tokens = sampler.new(count, key, labels, stopwatch=stopwatch)
    name = "classes" if classes else "unconditional"
    pictures.save_grid(codec.picture(codec.decode(tokens)), folder / f"{name}.png", columns)
    numbers = {"count": count, "tokens_per_second": tokens.size / stopwatch.seconds}
    if config.completions:
        elements = pipeline.images(context.config.data, "test", context.data.damage_log)
        elements = list(itertools.islice(elements, config.completions))
        test = np.stack([pipeline.to_tokens(codec, e) for e in elements])
        shown = codec.picture(codec.decode(test))
        labels = np.array([e["label"] for e in elements], np.int32) if classes else None
        upper = np.arange(network.length) < kept_tokens(network, config.keep)
        middle = np.zeros(network.grid, bool)  # half of the rows and half of the columns
        middle[tuple(slice(size // 4, size - size // 4) for size in network.grid)] = True
        for name, section, known in (
            ("completions", Section.COMPLETIONS, upper),
            ("inpainted", Section.INPAINTED, ~middle.reshape(-1)),
        ):
            given = np.where(known, test, generation.UNKNOWN)
            drawn = codec.decode(sampler.draw(given, section.key(seed), labels))
            pictures.save_pairs(shown, codec.picture(drawn), folder / f"{name}.png")
        maps, brightest = pictures.heat_map(by_pixel(sampler.nats(test, labels), codec))
        pictures.save_pairs(shown, maps, folder / "surprise.png")
        numbers["surprise_brightest_nats"] = brightest
    return numbers | found.numbers
