"""Classifies image files with a fine-tuned run, or finds objects: a line of JSON for each file.

python -m gptv_jax.predict --run=runs/mine photo.jpg
python -m gptv_jax.predict --run=runs/mine FOLDER --top=3 --out=predictions.jsonl

Files become pixels by the run's own transforms of evaluation (config.data.eval_transforms), so the
command takes a run folder: a .safetensors file does not have the transforms. Memory does not grow
with the files. A line has the most likely class or object first:

{"file": ..., "classes": [{"name": ..., "probability": ...}, ...]}  # config.task.name=classify
{"file": ..., "objects": [{"name": ..., "score": ..., "box": [y0, x0, y1, x1]}, ...]}  # detect
{"file": ..., "error": ...}  # of a file that cannot be read

Boxes lie in the pixels of the upright image.
"""

from __future__ import annotations  # which name classes that are not imported yet

import contextlib
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import IO

import numpy as np
import tqdm
from absl import flags
from etils import epy

from gptv_jax import command, files
from gptv_jax.errors import InputError, as_input_error, first_line

with epy.lazy_imports():  # see `command`
    from gptv_jax import api, weights
    from gptv_jax.data import images as images_lib
    from gptv_jax.data import limits, listing, records, transforms
    from gptv_jax.runs import record as record_lib
    from gptv_jax.train import metrics

RUN = flags.DEFINE_string("run", None, "Run folder whose stage finetune has finished.")
OUT = flags.DEFINE_string(
    "out", None, "File to write the lines to, in place of an earlier one; default: to the terminal."
)
TOP = flags.DEFINE_integer(
    "top", 5, "Number of classes in a line, the most likely ones; 0: all classes.", lower_bound=0
)
THRESHOLD = flags.DEFINE_float(
    "threshold", 0.0, "Objects of a lower score are left out.", lower_bound=0, upper_bound=1
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 64, "Images that the network reads at a time.", lower_bound=1
)
LOG = logging.getLogger("gptv_jax.predict")
LOG_EVERY = 1024  # images between two lines of the log


def main(names: list[str]) -> None:
    """Reads, predicts and writes; `names` are the files and folders that the user gives."""
    if not names:
        raise InputError("no image is named; give files or folders after the flags.")
    if "://" in RUN.value or weights.is_weights_path(RUN.value):
        problem = f"--run={RUN.value} holds weights without the transforms of their images"
        raise InputError(f"{problem}; name the run folder that they come from.")
    run = files.user_path(RUN.value)
    steps, task = reading_steps(run), record_lib.config_of(run).task.name
    answers = {
        "classify": lambda model, images: classified(model, images, TOP.value or None),
        "detect": lambda model, images: detected(model, images, THRESHOLD.value),
    }
    if task not in answers:
        raise InputError(
            f"--run={RUN.value} has config.task.name={task}, whose answer is no line of text; the "
            f"command takes {' or '.join(answers)}. In Python, gptv_jax.load(run) has its methods."
        )
    if record_lib.config_of(run).data.frames:
        raise InputError(
            f"--run={RUN.value} has clips (config.data.frames), and the command reads images; in "
            "Python, gptv_jax.load(run).classify(clips) takes uint8 [B, F, H, W, C]."
        )
    model = api.load(run, stage="finetune")
    paths = image_files(names)
    failed: list[str] = []
    progress = metrics.Progress("predict", len(paths), unit="image")
    with _opened(OUT.value) as out, contextlib.closing(progress):
        lines = predictions(model, steps, paths, BATCH_SIZE.value, answers[task])
        for done, line in enumerate(lines, start=1):
            if "error" in line:
                failed.append(f"{line['file']}: {line['error']}")
                LOG.warning("%s cannot be read: %s.", line["file"], line["error"])
            tqdm.tqdm.write(json.dumps(line), file=out)  # beside the bar on a terminal
            progress.advance(1)
            if done % LOG_EVERY == 0:
                progress.report(done, {})
    if len(failed) == len(paths):
        raise InputError(f"none of {len(paths)} images can be read; the first, {failed[0]}.")
    LOG.info("%d images are read, %d cannot be read.", len(paths) - len(failed), len(failed))


def reading_steps(run: pathlib.Path) -> list[images_lib.Transform]:
    """The transforms that turn the bytes of an image file into what the run's network reads."""
    config = record_lib.config_of(run)
    channels = {"grey": 1, "learned": config.tokens.autoencoder.channels}
    channels = channels.get(config.tokens.kind, 3)
    decode, *steps = transforms.with_decode(config.data.eval_transforms, channels)
    return [decode.within(config.data.limits), *steps]


def image_files(names: list[str]) -> list[pathlib.Path]:
    """The named files, and all image files in and below the named folders."""
    found = []
    for name in names:
        path = files.user_path(name)
        if not path.exists():
            raise InputError(f"there is no file or folder {name}.")
        inside = [path / each for each in listing.Listing(path).files] if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{name} holds no image file that the installed Pillow reads.")
        found += inside
    return found


def classified(model: api.Model, images: list[np.ndarray], top: int | None = None) -> list[dict]:
    """The `top` most likely classes of each image, of the model's size."""
    names, lines = model.classes, []
    for row in model.classify(np.stack(images)):
        ranked = np.argsort(-row, kind="stable")[:top]
        classes = [{"name": names[c], "probability": float(row[c])} for c in ranked]
        lines.append({"classes": classes})
    return lines


def detected(model: api.Model, images: list[records.Record], threshold: float = 0.0) -> list[dict]:
    """The objects of each image, of any size, whose record has its pixels."""
    lines = []
    for found in model.detect(images, threshold):
        rows = zip(*(array.tolist() for array in found[:3]), strict=True)
        objects = [{"name": model.objects[c], "score": s, "box": box} for box, c, s in rows]
        lines.append({"objects": objects})
    return lines


def predictions(
    model: api.Model,
    steps: list[images_lib.Transform],
    paths: list[pathlib.Path],
    batch_size: int,
    answer: Callable[[api.Model, list], list[dict]] = classified,
) -> Iterator[dict]:
    """A line for each file, in the order of the files, with what `answer` says or an "error"."""
    # A task's own method takes images of any size, and transforms them itself.
    shape = model.codec.image_shape if model.network.classes else None

    def read(path: pathlib.Path) -> np.ndarray | records.Record | str:
        """The pixels of a file, or why it cannot be read."""
        try:
            record = original = steps[0]({"encoded": limits.read(path, steps[0].limits)})
            for step in steps[1:]:
                record = step(record)
            image = record["image"]
            if shape is None:
                return original
            if image.shape != shape:
                given, taken = (" x ".join(map(str, each)) for each in (image.shape, shape))
                problem = f"it is {given} after the run's transforms, but the model takes {taken}"
                return f"{problem}; resize it"
            if not model.codec.on_devices:  # such codecs have tokens for every pixel
                model.codec.encode(image[None])
        except (ValueError, OSError) as error:  # of the file, of a transform or of the codec
            return getattr(error, "strerror", None) or first_line(error).rstrip(".")
        return image

    with futures.ThreadPoolExecutor() as pool:
        ahead = pool.map(read, paths[:batch_size])
        for start in range(0, len(paths), batch_size):
            images = list(ahead)
            # The next batch is decoded while the network reads this one.
            ahead = pool.map(read, paths[start + batch_size :][:batch_size])
            batch = [image for image in images if not isinstance(image, str)]
            if shape:  # all batches have one size, so the network is compiled once
                batch += [np.zeros(shape, np.uint8)] * (batch_size - len(batch))
            lines = iter(answer(model, batch) if batch else ())
            for path, image in zip(paths[start:], images, strict=False):
                line = {"error": image} if isinstance(image, str) else next(lines)
                yield {"file": str(path), **line}


@contextlib.contextmanager
def _opened(out: str | None) -> Iterator[IO[str]]:
    """The file of --out, open to be written, or the standard output."""
    if out is None:
        yield sys.stdout
        return
    with (
        as_input_error(f"--out={out} cannot be written", OSError),
        files.user_path(out).open("w", buffering=1) as file,
    ):
        yield file


if __name__ == "__main__":
    flags.mark_flag_as_required("run")
    command.run(main, [api, transforms], takes_names=True)
