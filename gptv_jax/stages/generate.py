"""Generation: many new images as files, and how close they come to real ones.

The stage runs where --stages names it, and then every time. Each batch of tokens is kept on disk:
a run that was stopped, or that asks for more images, draws only the missing batches. The same seed
gives the same images.
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
from gptv_jax.data.cache import TokenCache
from gptv_jax.data.damage import NOT_DAMAGED
from gptv_jax.decode import generation
from gptv_jax.decode.sampler import Sampler, Section, kept_tokens
from gptv_jax.errors import InputError
from gptv_jax.quality import reference as references
from gptv_jax.quality.evaluate import evaluate
from gptv_jax.quality.features import FeatureExtractor, make_features
from gptv_jax.quality.reference import Reference
from gptv_jax.runs import pictures
from gptv_jax.runs.context import Context
from gptv_jax.stages import pretrained
from gptv_jax.train.metrics import Progress

LOG = logging.getLogger(__name__)
READ = 256  # real images whose features are computed at a time


def run_stage(context: Context) -> dict:
    """Writes generated/ and quality.json, and returns the summary's numbers."""
    config, folder = context.config.generate, context.folder.path / "generated"
    shape = context.codec.image_shape
    features = make_features(config.features, shape, config.i3d_resize)
    # Images as the features take them: pictures for people, or in the data set's own range.
    convert = context.codec.picture if features.of_pictures else lambda images: images
    reference = _reference(context, features, convert)
    reference.must_fit(features)
    files.claim(folder, "--workdir")
    labels = None if config.keep else labels_in_turn(context)
    weights = pretrained.load(context)
    drawn = list(draw(context, folder, labels, weights.params))
    if jax.process_index() == 0:
        _write(context, folder, drawn, labels)
    images = (convert(context.codec.decode(tokens)) for tokens in drawn)
    found = evaluate(images, reference, features)
    if warning := found.pop("warning"):
        LOG.warning("%s", warning)
    quality = {"features": features.name, "hash": features.hash, "warning": warning, **found}
    files.write_json(folder / "quality.json", quality | {"reference": reference.provenance})
    # The features' name stands first: without it a distance of pixels passes for the FID.
    named = {"features": features.name, **found, "biased": warning is not None}
    return named | weights.numbers


def _reference(context: Context, features: FeatureExtractor, convert: Callable) -> Reference:
    """Statistics that the config names, or of this run's real images, computed once and kept."""
    config, data = context.config.generate, context.config.data
    if config.reference:
        return references.load(config.reference)
    path = context.folder.path / "generated" / "reference.npz"
    if hosts.from_first(path.exists):
        found = references.load(path)
        if found.fits(features) and found.provenance["split"] == config.split:
            return found
    if isinstance(sources.open_data_set(data), TokenCache):
        raise InputError(
            f"config.data.name={data.name} holds tokens, but generated images are compared with "
            "real images; name saved statistics by config.generate.reference, or run "
            "--stages=generate on the images, in another --workdir with config.init_from."
        )
    LOG.info("reading %s for the reference statistics", config.split)
    elements = pipeline.images(data, config.split, context.images.damage_log)
    provenance = {
        "data": data.name,
        "path": data.path,
        "split": config.split,
        "images": getattr(data, f"{config.split}_split", config.split),
        "transforms": [transforms.written_out(entry) for entry in data.eval_transforms],
        "image_size": data.image_size,
    }
    if data.frames:  # clips of evaluation lie in the middle of their videos
        provenance |= {"frames": data.frames, "frame_stride": data.frame_stride}
    images = (convert(batch["image"]) for batch in pipeline.batched(elements, READ))
    made = references.compute(features, images, provenance)
    made.save(path)
    return made


def labels_in_turn(context: Context) -> Int[np.ndarray, " N"] | None:
    """Every class in turn, or None for a network without classes."""
    classes, count = context.config.model.class_tokens, context.config.generate.count
    return np.arange(count, dtype=np.int32) % classes if classes else None


def draw(
    context: Context, folder: pathlib.Path, labels: Int[np.ndarray, " N"] | None, params: dict
) -> Iterator[Int[np.ndarray, "B T"]]:
    """All tokens batch by batch; a batch that `folder` has is read, and a new one is kept there.

    The classes are `labels`; where the beginnings of test images are given, those images' classes.
    """
    config, network = context.config.generate, context.network()
    sampler = Sampler(network, params, context.config.sample, pretrained.load_draft(context))
    key, size = Section.GENERATED.key(context.config.seed), config.batch_size
    progress = Progress("generate", config.count, unit="image")
    for number, first in enumerate(range(0, config.count, size)):
        wanted = min(size, config.count - first)
        # With another batch size a number has other classes, and the tokens depend on other keys.
        path = folder / "tokens" / f"{number:05d}_of_{size}.npy"
        tokens = _kept(path, (wanted, network.length))
        if tokens is None:
            # Always whole batches, so that one program serves them all.
            rows = np.arange(first, first + size)
            classes = None if labels is None else labels.take(rows, mode="wrap")
            known = np.full((size, network.length), generation.UNKNOWN, np.int32)
            if config.keep:
                known, classes = _beginnings(context, rows)
            tokens = sampler.draw(known, key, classes, number=number)[:wanted]
            content = io.BytesIO()
            np.save(content, tokens)
            files.replace(path, content.getvalue())
        progress.advance(wanted)
        progress.report(first + wanted, {})
        yield tokens
    progress.close()


def _beginnings(
    context: Context, rows: Int[np.ndarray, " B"]
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"] | None]:
    """Tokens [B, T] of test images, all but the first ones unknown, and the classes [B] or None.

    `rows` are the numbers of a whole batch; after the last test image the first one comes again.
    """
    config, network = context.config, context.network()
    test = pipeline.open_examples(config.data, "test", config.data.eval_transforms)
    records = [test.record(row % len(test.source)) for row in rows.tolist()]
    damaged = np.array([each.get("damaged", NOT_DAMAGED) for each in records])
    context.images.damage_log.record("test", test.source, damaged, int(rows[0]) // len(rows) + 1)
    known = np.arange(network.length) < kept_tokens(network, config.generate.keep)
    tokens = np.where(known, pipeline.all_tokens(context.codec, records), generation.UNKNOWN)
    if not network.config.class_tokens:
        return tokens, None
    return tokens, np.array([each["label"] for each in records], np.int32)


def _kept(path: pathlib.Path, shape: tuple[int, int]) -> Int[np.ndarray, "B T"] | None:
    """A batch on the disk of process 0, where it has this shape and is not damaged."""

    def read() -> np.ndarray | None:
        try:
            tokens = np.load(path)
        except (OSError, ValueError, EOFError):
            return None
        return tokens.astype(np.int32) if tokens.shape == shape else None

    return hosts.from_first(read)


def _write(context: Context, folder: pathlib.Path, drawn: list, labels: np.ndarray | None) -> None:
    """Writes every image as a PNG, and all images as arr_0 of samples.npz with labels as arr_1.

    arr_0 is uint8 [N, H, W, 3], as ADM's evaluator reads it, and is written batch by batch because
    all images may not fit into memory. Clips are [N, F, H, W, 3], and each is an animation, WebP.
    """
    for before in folder.glob("[0-9]*.[pw]*"):  # an earlier call may have written more images
        before.unlink()
    shape = (sum(map(len, drawn)), *context.codec.image_shape[:-1], 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}

    def write(target: pathlib.Path) -> None:
        number = 0
        with zipfile.ZipFile(target, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for tokens in drawn:
                    images = context.codec.picture(context.codec.decode(tokens))
                    member.write(np.ascontiguousarray(images).tobytes())
                    for image in images:
                        save = pictures.save if image.ndim == 3 else pictures.save_animation
                        save(image, folder / f"{number:06d}.png")
                        number += 1
            if labels is not None:
                with archive.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, labels)

    files.replace(folder / "samples.npz", write)
