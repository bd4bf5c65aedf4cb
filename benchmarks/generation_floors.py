"""Sets to compare generated images with: test images, restored images, random codes.

    python -m benchmarks.generation_floors --run=runs/codes --data=TFDS_FOLDER

For a run of configs/tokenizer_cifar10.py: sets of images are compared with the training images, as
--stages=generate compares what it draws. Test images are the best that can be hoped for; test
images that the tokenizer restored are the best that it allows; and images whose codes are drawn
independently of each other are what a network must surpass.
"""

import json
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags, logging

import gptv_jax
from gptv_jax.quality import reference
from gptv_jax.quality.evaluate import evaluate
from gptv_jax.quality.features import PIXELS, make_features

RUN = flags.DEFINE_string("run", None, "A finished run folder.", required=True)
DATA = flags.DEFINE_string("data", None, "TFDS's data_dir, with cifar10.", required=True)
COUNT = flags.DEFINE_integer("count", 2000, "Images of each set.")
CODED = 5000  # training images whose codes are counted
BATCH = 256
SHOWN = ("frechet_distance", "precision", "recall")


def main(_):
    """Prints a line for each set of images and kind of features, then all numbers as JSON."""
    logging.set_verbosity(logging.ERROR)  # libraries log a great deal
    train, test = read("train[:98%]"), read("test")[: COUNT.value]
    tokenizer = gptv_jax.load_tokenizer(RUN.value)
    codes = tokenizer.encode(train[:CODED])
    drawn = np.random.default_rng(0).choice(codes.reshape(-1), (len(test), codes.shape[1]))
    sets = {
        "test images": test,
        "the same restored": tokenizer.decode(tokenizer.encode(test)),
        "codes one by one": tokenizer.decode(drawn),
    }
    results = []
    for spec in (PIXELS, RUN.value):
        features = make_features(spec, train.shape[1:])
        real = reference.compute(features, batches(train), {"data": "cifar10"})
        for name, images in sets.items():
            found = evaluate(batches(images), real, features)
            results.append({"features": features.name, "set": name} | {k: found[k] for k in SHOWN})
            print("  ".join(f"{value:.4g}" if k in SHOWN else value
                            for k, value in results[-1].items()))  # fmt: skip
    print(json.dumps(results))


def read(split: str) -> np.ndarray:
    """All images of a split, uint8 [N, 32, 32, 3]."""
    source = tfds.data_source("cifar10", split=split, data_dir=DATA.value, try_gcs=False)
    return np.stack([np.asarray(example["image"]) for example in source])


def batches(images: np.ndarray) -> Iterator[np.ndarray]:
    """Batches of the images in order; the last batch may be smaller."""
    return (images[first : first + BATCH] for first in range(0, len(images), BATCH))


if __name__ == "__main__":
    app.run(main)
