"""Are the bits that a model claims the bits that its images need? An arithmetic coder decides.

Test images are written by a range coder (constriction) under the model's probabilities, and read
back token by token from those bits alone. `pip install constriction` beside the project.

    python benchmarks/arithmetic_coding.py --run=runs/digits --images=400
"""

import argparse
import json
import math
import pathlib
import time

import constriction
import numpy as np
import scipy.special

import gptv_jax
from gptv_jax.data import pipeline, sources
from gptv_jax.data.damage import DamageLog
from gptv_jax.runs.record import config_of

BATCH = 64  # images that are coded side by side


def code(model: gptv_jax.Model, tokens: np.ndarray) -> tuple[float, int]:
    """Writes and reads back one batch of sequences, tokens [B, T].

    Returns:
      Bits that the model claims (its negative log2-likelihood), and bits that the code takes.

    Raises:
      AssertionError: the tokens read back differ from the tokens written.
    """
    likely = scipy.special.softmax(model.logits(tokens).astype(np.float64), axis=-1)
    claimed = -np.log2(np.take_along_axis(likely, tokens[..., None], axis=-1)).sum()

    kind = constriction.stream.model.Categorical(perfect=False)
    encoder = constriction.stream.queue.RangeEncoder()
    for position in range(tokens.shape[1]):
        encoder.encode(column(tokens, position), kind, column(likely, position))
    written = encoder.get_compressed()

    # Only what has been read is known; the rest is zeros, which causality keeps from mattering.
    decoder, read = constriction.stream.queue.RangeDecoder(written), np.zeros_like(tokens)
    for position in range(tokens.shape[1]):
        likely = scipy.special.softmax(model.logits(read).astype(np.float64), axis=-1)
        read[:, position] = decoder.decode(kind, column(likely, position))
    np.testing.assert_array_equal(read, tokens)
    return float(claimed), 32 * len(written)


def column(array: np.ndarray, position: int) -> np.ndarray:
    """One position of all rows, as the contiguous array that the coder takes."""
    return np.ascontiguousarray(array[:, position])


def tokens_of(run: str, model: gptv_jax.Model, count: int) -> np.ndarray:
    """Tokens [N, T] of the first test images of a run."""
    data = config_of(pathlib.Path(run)).data
    damage_log = DamageLog(data, None)
    count = min(count, len(sources.open_source(data, "test")))
    elements = zip(range(count), pipeline.images(data, "test", damage_log), strict=False)
    return np.stack([pipeline.to_tokens(model.codec, e) for _, e in elements])


def main() -> None:
    """Codes the images of --run, and prints one table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="run folder with a finished pretraining")
    parser.add_argument("--images", type=int, default=BATCH, help="test images to code")
    arguments = parser.parse_args()
    model = gptv_jax.load(arguments.run, stage="pretrain")
    tokens = tokens_of(arguments.run, model, arguments.images)
    begin, claimed, needed = time.perf_counter(), 0.0, 0
    for start in range(0, len(tokens), BATCH):
        bits = code(model, tokens[start : start + BATCH])
        claimed, needed = claimed + bits[0], needed + bits[1]
    uniform = tokens.size * math.log2(model.network.vocabulary)
    print(f"{len(tokens)} test images, read back without a difference")
    for name, bits in (("uniform", uniform), ("claimed", claimed), ("needed", needed)):
        print(f"{name:>8} {bits:14,.0f} bits {bits / tokens.size:8.4f} a token")
    record = {
        "images": len(tokens),
        "claimed_bits_per_token": claimed / tokens.size,
        "needed_bits_per_token": needed / tokens.size,
        "ratio": needed / claimed,
        "seconds": time.perf_counter() - begin,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
