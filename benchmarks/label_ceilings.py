"""What label tokens leave possible: the mean IoU of test label maps as tokens and back.

    python -m benchmarks.label_ceilings --config=configs/segment_camvid.py --data=FOLDER

Each of KINDS is made of the training's label maps. The number is a run's `ceiling_test_miou`: maps
that come back from tokens are moved into the original images, and all pixels of the test split with
a class count. Each line has the tokens of a map, and the number of different tokens.
"""

import argparse
import dataclasses
import json
import runpy

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import pipeline, sources
from gptv_jax.data.damage import DamageLog
from gptv_jax.data.records import plane_to_original
from gptv_jax.tasks import confusion, map_facts

KINDS = {  # by name: fields of config.task.segment
    **{f"cells of {side}": {"labels": "cells", "cell": side} for side in (4, 6, 12, 16)},
    **{f"512 patches of {side}": {"labels": "patches", "cell": side} for side in (12, 16)},
    **{f"512 learned of {side}": {"labels": "learned", "cell": side} for side in (8, 16)},
}


def main() -> None:
    """Prints a line for each kind, then all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", help="config.data.path")
    parser.add_argument("--only", default="", help="part of the names to measure")
    parser.add_argument("--steps", type=int, default=500, help="of the training of learned tokens")
    flags = parser.parse_args()
    settings = runpy.run_path(flags.config)["get_config"]()
    settings.data.path = flags.data or settings.data.path
    config = config_lib.resolve(settings)
    source = sources.open_source(config.data, "test")
    training, test = (
        [*pipeline.images(config.data, split, DamageLog(config.data, None), annotated=True)]
        for split in ("train", "test")
    )
    maps, classes, results = [r["segmentation"] for r in training], len(source.map_names), []
    for name, fields in KINDS.items():
        if flags.only not in name:
            continue
        wanted = dataclasses.replace(
            config.task.segment, write=True, codes=512, steps=flags.steps, **fields
        )
        codec = map_facts.load(map_facts.measure(maps, classes, wanted, config.seed)).codec
        counts = 0
        for index, record in enumerate(test):
            truth = source.annotations(index)["segmentation"]
            found = codec.decode(codec.encode(record["segmentation"][None])[0])[0]
            found = plane_to_original(found, record["view"], truth.shape)
            counts = counts + confusion.count(truth, found, classes)
        scores = confusion.scores(counts)
        row = {"kind": name, "tokens": int(np.prod(codec.grid)), "vocabulary": codec.vocabulary}
        row |= {n: scores[n] for n in ("miou", "pixel_accuracy")}
        results.append(row)
        print("  ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
