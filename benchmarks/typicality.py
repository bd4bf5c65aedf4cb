"""What typicality tells apart: test images against noise, constants, digits, textures, pictures.

    python -m benchmarks.typicality --run=runs/mine --data=TFDS_FOLDER --pictures=FOLDER

For a run of RGB images, such as CIFAR-10, whose stage typicality has run. A table has the AUROC of
each set against the run's test images, by numbers of an image that are larger for images of another
kind: 0.5 is chance, and below 0.5 the other set passes for more usual than the test images.

- likelihood: nats of the network; of one side, as in "unlikely images are unusual"
- likelihood, two-sided: how far the nats are from the training images' mean (arXiv:1906.02994)
- coder: bits of the lossless coder of `decode/typicality.py`
- difference: nats, in bits, less the coder's bits (Serra et al. 2020, arXiv:1909.11480)
- typicality: what `Model.typicality` gives

Noise, constants and textures are made here; the digits are scikit-learn's, in two random colours;
pictures are the image files of a folder. All but noise and constants go through the run's own
transforms. Nothing is fitted to these sets. The last column is the share that
`classify(images, reject_below=0.01)` rejects.
"""

import argparse
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image
from sklearn import datasets, metrics

import gptv_jax
from gptv_jax.data import pipeline, transforms
from gptv_jax.data.damage import DamageLog
from gptv_jax.data.listing import Listing
from gptv_jax.decode.typicality import code_bits
from gptv_jax.runs import record

SIDE = 32  # pixels of textures before the run's transforms, as CIFAR-10 has
AT_ONCE = 200  # images that the model reads in a batch
REJECT_BELOW = 0.01
TEXTURE = "texture: "  # how the names of their sets begin
Made = list[np.ndarray]  # uint8 [H, W, 3] of any size


def main() -> None:
    """Prints the table and, last, all numbers as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=pathlib.Path, required=True)
    parser.add_argument("--data", help="config.data.dir, where it has moved")
    parser.add_argument("--pictures", type=pathlib.Path, help="folder of image files")
    parser.add_argument("--stage", help="of the weights; default: the latest one")
    parser.add_argument("--count", type=int, default=1000, help="images of each set")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, run = gptv_jax.load(arguments.run, arguments.stage), arguments.run
    usual = test_images(run, arguments.count, arguments.data)
    shape, rng = model.codec.image_shape, np.random.default_rng(arguments.seed)
    sets = made_sets(shape, arguments.count, rng, transformed_by(run))
    if arguments.pictures:
        files = Listing(arguments.pictures).files[: arguments.count]
        opened = (Image.open(arguments.pictures / name).convert("RGB") for name in files)
        opened = map(np.asarray, opened)
        sets["pictures"] = transformed_by(run)(list(opened))
    rows = compare(model, usual, sets)
    print(table(rows))
    print(json.dumps({"run": str(run), "test_images": len(usual), "rows": rows}))


def test_images(run: pathlib.Path, count: int, place: str | None = None) -> np.ndarray:
    """Random test images of the run as its network reads them, uint8 [N, H, W, 3]."""
    data = record.config_of(run).data
    data = dataclasses.replace(data, dir=place) if place else data
    found = pipeline.images(data, "test", DamageLog(data, None), count, seed=1)
    return np.stack([each["image"] for each in found])


def transformed_by(run: pathlib.Path) -> Callable[[Made], np.ndarray]:
    """The run's transforms of evaluation, from images of any size to the network's size."""
    decode, *steps = transforms.with_decode(record.config_of(run).data.eval_transforms, 3)

    def apply(images: Made) -> np.ndarray:
        found = [{"image": decode.pixels(image)} for image in images]
        for step in steps:
            found = [step(each) for each in found]
        return np.stack([each["image"] for each in found])

    return apply


def made_sets(
    shape: tuple[int, ...], count: int, rng: np.random.Generator, transformed: Callable
) -> dict[str, np.ndarray]:
    """Images of other kinds, `count` of each, uint8 [N, *shape]."""
    noise = rng.integers(256, size=(count, *shape), dtype=np.uint8)
    plain = rng.integers(256, size=(count, 1, 1, 3), dtype=np.uint8)
    digits = datasets.load_digits().images / 16
    digits = digits[rng.permutation(len(digits))[:count]]
    sets = {"noise": noise, "constants": np.broadcast_to(plain, noise.shape).copy()}
    sets["digits"] = transformed([coloured(digit, rng) for digit in digits])
    each = -(-count // len(TEXTURES))
    for name, make in TEXTURES.items():
        sets[TEXTURE + name] = transformed([make(rng) for _ in range(each)])
    return sets


def coloured(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ink of 0 to 1, [H, W], as a mixture of two random colours, uint8 [H, W, 3]."""
    paper, colour = rng.integers(256, size=(2, 3))
    return np.rint(paper + ink[..., None] * (colour - paper)).astype(np.uint8)


def places(rng: np.random.Generator, period: float) -> tuple[np.ndarray, np.ndarray]:
    """Two coordinates of every pixel, turned and shifted at random, 1 a period."""
    y, x = np.mgrid[:SIDE, :SIDE] / period
    angle, (dy, dx) = rng.uniform(0, math.pi), rng.random(2)
    cosine, sine = math.cos(angle), math.sin(angle)
    return cosine * y - sine * x + dy, sine * y + cosine * x + dx


def gratings(rng: np.random.Generator) -> np.ndarray:
    """A sine wave."""
    along, _ = places(rng, rng.uniform(6, 16))
    return coloured(0.5 + 0.5 * np.sin(2 * math.pi * along), rng)


def checks(rng: np.random.Generator) -> np.ndarray:
    """A turned checkerboard."""
    along, across = places(rng, rng.uniform(4, 10))
    return coloured((np.floor(along) + np.floor(across)) % 2, rng)


def dots(rng: np.random.Generator) -> np.ndarray:
    """Round dots on a turned grid."""
    along, across = places(rng, rng.uniform(6, 12))
    away = np.hypot(along % 1 - 0.5, across % 1 - 0.5)
    return coloured((away < rng.uniform(0.2, 0.4)).astype(float), rng)


def bricks(rng: np.random.Generator) -> np.ndarray:
    """A wall of bricks, each of another brightness, with joints."""
    y, x = np.mgrid[:SIDE, :SIDE] + rng.integers(16, size=2)[:, None, None]
    height = rng.integers(5, 9)
    row = y // height
    column = (x + row % 2 * height) // (2 * height)
    joint = (y % height == 0) | ((x + row % 2 * height) % (2 * height) == 0)
    tone = rng.uniform(0.6, 1, size=(SIDE, SIDE))[row, column]
    return coloured(np.where(joint, 0, tone), rng)


def rings(rng: np.random.Generator) -> np.ndarray:
    """Circles around a random point."""
    y, x = np.mgrid[:SIDE, :SIDE] - rng.uniform(0, SIDE, size=2)[:, None, None]
    return coloured(np.hypot(y, x) / rng.uniform(4, 10) % 1, rng)


def plaid(rng: np.random.Generator) -> np.ndarray:
    """Two sets of stripes of several tones, woven."""
    along, across = places(rng, 1)
    tones = rng.random((2, 4))
    width = rng.uniform(2, 6, size=2)
    rows, columns = (
        tone[np.floor(at / w).astype(int) % 4]
        for tone, at, w in zip(tones, (along, across), width, strict=True)
    )
    return coloured((rows + columns) / 2, rng)


def cells(rng: np.random.Generator) -> np.ndarray:
    """Voronoi cells, each of a random colour."""
    y, x = np.mgrid[:SIDE, :SIDE]
    count = rng.integers(8, 25)
    centres = rng.uniform(0, SIDE, size=(2, count, 1, 1))
    nearest = np.hypot(y - centres[0], x - centres[1]).argmin(axis=0)
    return rng.integers(256, size=(count, 3), dtype=np.uint8)[nearest]


def marble(rng: np.random.Generator) -> np.ndarray:
    """A sine wave that noise of the spectrum 1/f bends."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE))
    frequency[0, 0] = np.inf
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIDE, SIDE))) / frequency).real
    along, _ = places(rng, rng.uniform(6, 16))
    return coloured(0.5 + 0.5 * np.sin(2 * math.pi * (along + noise / noise.std())), rng)


TEXTURES = {f.__name__: f for f in (gratings, checks, dots, bricks, cells, marble, rings, plaid)}


def measures(model: gptv_jax.Model, images: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers of each image, [N]; all but "typicality" are larger for unusual images."""
    found = []
    for first in range(0, len(images), AT_ONCE):
        batch = images[first : first + AT_ONCE]
        bits = code_bits(model.detokenize(model.tokenize(batch)))
        found.append((-model.log_likelihood(batch), bits, model.typicality(batch)))
    nats, bits, typicality = map(np.concatenate, zip(*found, strict=True))
    return {
        "likelihood": nats,
        "coder": bits,
        "difference": nats / math.log(2) - bits,
        "typicality": typicality,
    }


def compare(
    model: gptv_jax.Model, usual: np.ndarray, sets: dict[str, np.ndarray]
) -> list[dict[str, float | str]]:
    """A row for each set: means of its numbers, and the AUROC against the usual images.

    All textures are a set as well.
    """
    center = model.weights_file().typicality.center[0] * model.network.length

    def all_of(images: np.ndarray) -> dict[str, np.ndarray]:
        found = measures(model, images)
        found["likelihood, two-sided"] = np.abs(found["likelihood"] - center)
        return found

    found = {name: all_of(images) for name, images in {"test images": usual, **sets}.items()}
    if textures := [each for name, each in found.items() if name.startswith(TEXTURE)]:
        joined = {kind: np.concatenate([each[kind] for each in textures]) for kind in textures[0]}
        found["all textures"] = joined
    own, rows = found["test images"], []
    for name, other in found.items():
        row = {"set": name, "images": len(other["coder"])}
        row |= {"nats": float(other["likelihood"].mean()), "bits": float(other["coder"].mean())}
        for kind in ("likelihood", "likelihood, two-sided", "coder", "difference", "typicality"):
            sign = -1 if kind == "typicality" else 1
            scores = sign * np.concatenate([own[kind], other[kind]])
            truth = np.repeat([0, 1], [len(own[kind]), len(other[kind])])
            row[kind] = float(metrics.roc_auc_score(truth, scores))
        row["rejected"] = float((other["typicality"] < REJECT_BELOW).mean())
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        own = (
            v if isinstance(v, str | int) else f"{v:.{1 if v > 10 else 3}f}" for v in row.values()
        )
        lines.append([*map(str, own)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
