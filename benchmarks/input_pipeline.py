"""Speed of the input pipeline: decode, augment and tokenise, or read from a token cache.

Command: python -m benchmarks.input_pipeline --cifar10=DIR --jpegs=FOLDER
             --palette=kmeans_centers.npy [--rounds=3]

DIR is the folder of prepared TFDS sets, FOLDER one of JPEGs. Beside each line, where torch is
installed, a plain PyTorch DataLoader that does the same work: the same files, Pillow, a flip, and
the nearest of 512 colours by `torch.cdist`. They take turns, but not in processes that wait: a
pipeline that waits goes on filling its buffers, so each turn begins one anew.
"""

import argparse
import dataclasses
import itertools
import pathlib
import tempfile
import time

import numpy as np
from absl import flags

from benchmarks import harness
from benchmarks.turns import Measured
from gptv_jax import config as config_lib
from gptv_jax import tokens
from gptv_jax.data import cache, pipeline, sources
from gptv_jax.data.damage import DamageLog
from gptv_jax.data.geometry import ResizeShort
from gptv_jax.data.images import Decode
from gptv_jax.tokens import palette

try:
    import torch
except ImportError:
    torch = None

BATCH = 64
CROP = ("decode()", "resize_short(40)", "random_crop(32)", "flip()")
CENTER = ("decode()", "resize_short(32)", "center_crop(32)")
BUFFERED = 24  # batches that may wait in buffers


def settings(arguments, folder: pathlib.Path) -> dict[str, config_lib.Data]:
    """The data configurations of the three inputs, by name."""
    cifar10 = config_lib.Data(
        name="cifar10",
        dir=arguments.cifar10,
        image_size=32,
        train_transforms=("decode()", "flip()"),
        eval_transforms=("decode()",),
        validation_split="test",
    )
    jpegs = dataclasses.replace(
        cifar10, name="folder", path=arguments.jpegs, train_transforms=CROP, eval_transforms=CENTER
    )
    cached = dataclasses.replace(cifar10, name="tokens", path=str(folder))
    return {"CIFAR-10 (TFDS)": cifar10, "JPEGs": jpegs, "token cache": cached}


def write_cache(config: config_lib.Data, codec, folder: pathlib.Path, count: int) -> None:
    """Writes a token cache of the first `count` training images."""
    part = dataclasses.replace(config, train_split=f"train[:{count}]")

    def examples():
        for element in pipeline.images(part, "train", DamageLog(part, None)):
            tokens_of_image = pipeline.to_tokens(codec, element)
            yield {"tokens": tokens_of_image, "label": element["label"]}

    header = {
        "tokens": dataclasses.asdict(config_lib.Tokens(kind="palette", colors=codec.vocabulary)),
        "image_size": 32,
        "transforms": config.eval_transforms,
        "classes": 10,
    }
    cache.write(folder, codec, {"train": examples()}, header)


class TorchImages:
    """A map-style PyTorch data set that does the work of gptv_jax's pipeline."""

    def __init__(self, config: config_lib.Data, codec):
        self.source = sources.open_source(config, "train")
        self.jpegs = config.name == "folder"
        self.cached = config.name == "tokens"
        self.centers = torch.from_numpy((codec.definition.centers + 1) * 127.5)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        record, flip = self.source[index], torch.rand(()) < 0.5
        if self.cached:
            image = record["tokens"][:, ::-1] if flip else record["tokens"]
            return torch.from_numpy(image.astype(np.int32).reshape(-1))
        record = Decode()(record)
        if self.jpegs:
            record = ResizeShort(40)(record)
        pixels = record["image"]
        if self.jpegs:
            top, left = torch.randint(9, (2,)).tolist()
            pixels = pixels[top : top + 32, left : left + 32]
        pixels = torch.from_numpy((pixels[:, ::-1] if flip else pixels).astype(np.float32))
        return torch.cdist(pixels.reshape(-1, 3), self.centers).argmin(1)


def ours(config: config_lib.Data, codec, workers: int):
    """An endless iterator over batches of gptv_jax's pipeline."""
    return pipeline.Pipeline(dataclasses.replace(config, workers=workers), codec, 0).train(BATCH)


def theirs(config: config_lib.Data, codec, workers: int):
    """An endless iterator over the same batches of a PyTorch DataLoader."""
    images = TorchImages(config, codec)
    # One epoch without end, since each epoch would start its workers anew.
    sampler = torch.utils.data.RandomSampler(images, replacement=True, num_samples=10**9)
    loader = torch.utils.data.DataLoader(
        images,
        BATCH,
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,  # JAX has threads
    )
    return iter(loader)


def measured(batches, seconds: float) -> float:
    """Seconds per batch, after the prefetched batches are used up."""
    for _ in range(BUFFERED):
        next(batches)
    count, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        next(batches)
        count += 1
    return spent / count


def main() -> None:
    """Measures all inputs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar10", required=True)
    parser.add_argument("--jpegs", required=True)
    parser.add_argument("--palette", required=True)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # Grain's workers ask absl's flags
    if torch:
        torch.set_num_threads(1)
    codec = tokens.PaletteCodec(palette.load(arguments.palette), 32)
    with tempfile.TemporaryDirectory() as folder:
        inputs = settings(arguments, pathlib.Path(folder))
        write_cache(inputs["CIFAR-10 (TFDS)"], codec, pathlib.Path(folder), 10_000)
        makers = {"gptv_jax": ours} | ({"PyTorch": theirs} if torch else {})
        kinds = list(itertools.product(inputs, (0, 2), makers))
        seconds = {kind: [] for kind in kinds}
        for _, (name, workers, peer) in itertools.product(range(arguments.rounds), kinds):
            batches = makers[peer](inputs[name], codec, workers)
            seconds[name, workers, peer].append(measured(batches, arguments.seconds))
            del batches  # and with it what it prefetches while another one is measured
    rows = []
    for name, workers in itertools.product(inputs, (0, 2)):
        found = {peer: Measured(tuple(seconds[name, workers, peer])) for peer in makers}
        rows += harness.rows(f"{name}, {workers} workers", found, BATCH, "images", "PyTorch")
    harness.report("input_pipeline", rows)


if __name__ == "__main__":
    main()
