"""The report's part of what the network draws."""

import math

from gptv_jax.decode.sampler import class_rows
from gptv_jax.runs import frames


def sample(results) -> tuple[str, str]:
    """Content of the report, of the `runs.results.Results`: the pictures of samples/; no tile."""
    config, classes = results.config.sample, results.config.model.class_tokens
    rows, known, images, before = results.config.grid[0], "upper {} of {} rows", "images", ""
    if results.config.data.frames:
        step = "frames" if results.config.tokens.cell[0] == 1 else "steps in time"
        known, images, before = f"first {{}} of {{}} {step}", "clips", "of earlier frames, or "
    drawn = f"drawn at temperature {config.temperature:g}"
    if config.guidance != 1:
        drawn += f", {config.guidance_schedule} guidance {config.guidance:g}"
    shown = class_rows(config.count, classes)[:, 0].tolist() if classes else ()
    brightest = results.summary.get("sample/surprise_brightest_nats", math.nan)
    captions = {
        "unconditional": f"New {images}, {drawn}.",
        "classes": f"New {images}, {drawn}; each row shows one class: "
        f"{', '.join(map(results.class_name, shown))}.",
        "completions": f"Test {images}, each followed by its completion: the "
        f"{known.format(round(config.keep * rows), rows)} of tokens are given, the rest is drawn.",
        "inpainted": f"Test {images}, each followed by a copy whose middle is drawn anew; a drawn "
        f"token depends only on tokens {before}above it and to its left.",
        "surprise": f"Test {images}, each followed by the nats of its pixels, given the pixels "
        f"before them: black is 0, the brightest colour {brightest:.2f}.",
    }
    content = "".join(results.picture(*named) for named in captions.items())
    return content + frames.continuations(results.numbers("sample")), ""
