"""Generation: many new images as files, and how close they come to real ones.

It runs where --stages names it, and then each time. What is drawn is kept batch by batch, so that a
stopped run goes on with the batch that it was at, and one that is to draw more draws the rest; the
same seed gives the same images.
"""

import io
import logging
import pathlib
import zipfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Int

from gptv_jax import files, hosts
from gptv_jax.data import pipeline, sources, transforms
from gptv_jax.decode import generation
from gptv_jax.decode.sampler import Sampler
from gptv_jax.errors import InputError
from gptv_jax.quality import reference as references
from gptv_jax.quality.evaluate import evaluate
from gptv_jax.quality.features import Features, make_features
from gptv_jax.quality.reference import Reference
from gptv_jax.runs import pictures
from gptv_jax.runs.run import Run
from gptv_jax.train.metrics import Progress

LOG = logging.getLogger(__name__)
BEYOND_SAMPLES = 2**16  # the stage `sample` folds smaller numbers into the same key
READ = 256  # real images that features are made of at a time


def run_stage(run: Run) -> dict:
    """Writes generated/ and quality.json; the summary's numbers."""
    config, folder = run.config.generate, run.folder / "generated"
    features = make_features(config.features, run.codec.image_shape)
    reference = _reference(run, features)
    reference.must_fit(features)
    files.claim(folder, "workdir")
    labels = _labels(run)
    drawn = list(hosts.until_stop(_drawn(run, folder, labels)))
    if jax.process_index() == 0:
        _write(run, folder, drawn, labels)
    seen = _eyes(run, features)
    found = evaluate((seen(run.codec.decode(tokens)) for tokens in drawn), reference, features)
    if warning := found.pop("warning"):
        LOG.warning("%s", warning)
    told = {"features": features.name, "hash": features.hash, "warning": warning, **found}
    files.write_json(folder / "quality.json", told | {"reference": reference.provenance})
    return {**found, "biased": warning is not None}


def _reference(run: Run, features: Features) -> Reference:
    """That which the config names, or of this run's own images, which is kept."""
    config, data = run.config.generate, run.config.data
    if config.reference:
        return references.load(config.reference)
    path = run.folder / "generated" / "reference.npz"
    if hosts.from_first(path.exists):
        found = references.load(path)
        if found.made_of(features) and found.provenance["split"] == config.split:
            return found
    if sources.open_source(data, config.split).stored_as == "tokens":
        raise InputError(
            f"config.data.name={data.name} holds tokens, but generated images are compared with "
            "real ones; name statistics of these by config.generate.reference, or run "
            "--stages=generate on the images, in another --workdir with config.init_from."
        )
    LOG.info("reading %s for the reference statistics", config.split)
    elements = pipeline.images(data, config.split, run.images.damage_log)
    provenance = {
        "data": data.name,
        "path": data.path,
        "split": config.split,
        "images": getattr(data, f"{config.split}_split", config.split),
        "transforms": [transforms.written_out(entry) for entry in data.eval_transforms],
        "image_size": data.image_size,
    }
    seen = _eyes(run, features)
    images = (seen(batch["image"]) for batch in pipeline.batched(elements, READ))
    made = references.compute(features, images, provenance)
    made.save(path)
    return made


def _eyes(run: Run, features: Features) -> Callable:
    """Images as the features expect them: for people, or in the data set's own range."""
    return run.codec.picture if features.of_pictures else lambda images: images


def _labels(run: Run) -> Int[np.ndarray, "N"] | None:
    """All classes alike, in turn; None where the network knows of none."""
    classes, count = run.config.model.class_tokens, run.config.generate.count
    return np.arange(count, dtype=np.int32) % classes if classes else None


def _drawn(
    run: Run, folder: pathlib.Path, labels: Int[np.ndarray, "N"] | None
) -> Iterator[Int[np.ndarray, "B T"]]:
    """All samples batch by batch, those that are on disk from there."""
    config, network = run.config.generate, run.network()
    sampler = Sampler.of(run.config.sample, network, run.pretrained(network))
    key = jax.random.fold_in(jax.random.key(run.config.seed), BEYOND_SAMPLES)
    progress = Progress("generate", config.count, unit="image")
    unknown = np.full((config.batch_size, network.length), generation.UNKNOWN, np.int32)
    for number, first in enumerate(range(0, config.count, config.batch_size)):
        wanted = min(config.batch_size, config.count - first)
        # Of batches of another size the same number has other classes, and another part of the key.
        path = folder / "tokens" / f"{number:05d}_of_{config.batch_size}.npy"
        tokens = _kept(path, (wanted, network.length))
        if tokens is None:
            # Whole batches alone: one program for all of them.
            of_batch = None
            if labels is not None:
                at = np.arange(first, first + config.batch_size) % len(labels)
                of_batch = labels[at]
            tokens = sampler.draw(unknown, jax.random.fold_in(key, number), of_batch)[:wanted]
            if jax.process_index() == 0:
                content = io.BytesIO()
                np.save(content, tokens)
                files.replace(path, content.getvalue())
        for _ in range(wanted):
            progress.advance()
        progress.report(first + wanted, {})
        yield tokens
    progress.close()


def _kept(path: pathlib.Path, shape: tuple[int, int]) -> Int[np.ndarray, "B T"] | None:
    """A batch that process 0 has on disk, where it is of this shape and not damaged."""

    def read() -> list | None:
        try:
            tokens = np.load(path)
        except (OSError, ValueError, EOFError):
            return None
        return tokens.tolist() if tokens.shape == shape else None

    found = hosts.from_first(read)
    return None if found is None else np.array(found, np.int32)


def _write(run: Run, folder: pathlib.Path, drawn: list, labels: np.ndarray | None) -> None:
    """Every image as a PNG, and all of them as arr_0 of samples.npz, labels as arr_1.

    Uint8 [N, H, W, 3], the form that ADM's evaluator reads; written piece by piece, as it may be
    more than fits into memory.
    """
    for before in folder.glob("[0-9]*.png"):  # there may have been more
        before.unlink()
    height, width, _ = run.codec.image_shape
    header = {"descr": "|u1", "fortran_order": False}
    header["shape"] = (sum(map(len, drawn)), height, width, 3)
    temporary, number = folder / "samples.tmp", 0
    with zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for tokens in drawn:
                images = run.codec.picture(run.codec.decode(tokens))
                member.write(np.ascontiguousarray(images).tobytes())
                for image in images:
                    pictures.save(image, folder / f"{number:06d}.png")
                    number += 1
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, labels)
    temporary.replace(folder / "samples.npz")
