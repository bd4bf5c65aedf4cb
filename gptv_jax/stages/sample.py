"""Pictures at the end of a run: new images, completed test images, and surprise by pixel.

Of clips, the continuations of test clips are compared with the true frames as well.
"""

import collections
import itertools
import logging

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import pipeline
from gptv_jax.decode import generation
from gptv_jax.decode.sampler import Sampler, Section, by_pixel, class_rows, kept_tokens
from gptv_jax.quality import clips
from gptv_jax.runs import pictures
from gptv_jax.runs.context import Context
from gptv_jax.stages import pretrained

LOG = logging.getLogger(__name__)
AT_ONCE = 64  # clips that are continued in one batch


def run_stage(context: Context) -> dict:
    """Writes pictures to samples/ and returns the summary's numbers.

    New images are in unconditional.png or, of a class-conditional network, in classes.png. Test
    images stand beside their versions with the lower part drawn anew (completions.png), with the
    middle drawn anew (inpainted.png), and beside the nats of their pixels (surprise.png). Clips
    are shown twice: as film strips (.png) and as animations (.webp).
    """
    config, seed, network = context.config.sample, context.config.seed, context.network()
    codec, folder = context.codec, context.folder.path / "samples"
    found = pretrained.load(context)
    sampler = Sampler(network, found.params, config, pretrained.load_draft(context))
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
    if sampler.draft:
        numbers["tokens_per_pass"] = tokens.size / stopwatch.passes
    if config.completions:
        elements = pipeline.images(context.config.data, "test", context.data.damage_log)
        elements = list(itertools.islice(elements, config.completions))
        test = pipeline.all_tokens(codec, elements)
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
    if network.frames > 1 and config.continuations:
        numbers |= continuations(context, found.params)
    return numbers | found.numbers


def continuations(context: Context, params: dict) -> dict[str, float]:
    """Means over test clips of `clips.scores` by frame, of greedy continuations and of the floors.

    "continued_exact_frame_3" is the share of clips whose third frame is exactly right, where the
    first two are given; "copied_..." and "shifted_..." are the floors of `quality.clips`. The true
    frames are decoded from the clips' tokens.
    """
    config, network, codec = context.config.sample, context.network(), context.codec
    sampler = Sampler(network, params, config_lib.Drawing(temperature=0.0))
    steps, of_step = network.grid[0], network.length // network.grid[0]
    given = min(max(kept_tokens(network, config.keep) // of_step, 1), steps - 1)
    first = int(codec.sides[0][:given].sum())  # frame, from 0, that is drawn
    key, sums = Section.CONTINUED.key(context.config.seed), collections.defaultdict(float)
    elements = pipeline.images(context.config.data, "test", context.data.damage_log)
    elements, count = itertools.islice(elements, config.continuations), 0
    while chunk := list(itertools.islice(elements, AT_ONCE)):
        tokens = pipeline.all_tokens(codec, chunk)
        labels = None
        if network.config.class_tokens:
            labels = np.array([each["label"] for each in chunk], np.int32)
        known = tokens[:, : given * of_step]
        drawn = sampler.continue_clips(known, steps - given, key, labels)
        whole = np.concatenate([known, drawn], axis=1)
        true, made = (codec.picture(codec.decode(each)) for each in (tokens, whole))
        before, after = true[:, :first], true[:, first:]
        ways = {
            "continued": made[:, first:],
            "copied": clips.copied(before, after.shape[1]),
            "shifted": clips.shifted(before, after.shape[1]),
        }
        for way, frames in ways.items():
            for score, values in clips.scores(frames, after).items():
                sums[f"{way}_{score}"] += values.sum(axis=0)
        count += len(chunk)
    return {
        f"{name}_frame_{number}": float(value / count)
        for name, values in sums.items()
        for number, value in enumerate(values, start=first + 1)
    } | {"continued_clips": count}
