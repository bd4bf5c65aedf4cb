"""The draws of teachers for a token cache: which teachers may draw, and the draws of every example.

While `gptv_jax.prepare` runs, the draws of every `PART` examples are a file in the cache's folder.
The command that continues reads these files where they are of equal tokens, teachers and settings.
"""

import dataclasses
import io
import json
import logging
import pathlib
import zlib
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files, sharding, tokens, weights
from gptv_jax.data import cached_tokens
from gptv_jax.data.cache import DRAWN
from gptv_jax.data.teacher_draws import DRAWS, Draws, Taught
from gptv_jax.decode import teacher_sampling
from gptv_jax.decode.teacher_sampling import Teacher
from gptv_jax.errors import InputError, shorten
from gptv_jax.stages.pretrained import palette_of
from gptv_jax.tasks.network import network_of
from gptv_jax.tokens import Codec
from gptv_jax.tokens.differences import token_differences
from gptv_jax.weights.native import WeightsFile

LOG = logging.getLogger(__name__)
ROWS = 64  # images of a forward pass, whatever the batch size of a training
PART = 4 * ROWS  # examples of a file


def load(
    names: tuple[str, ...], config: config_lib.Config, codec: Codec | None, classes: int
) -> tuple[list[Teacher], Codec]:
    """The teachers on the current mesh, and the codec of their tokens.

    `classes` is the number of classes of the data. The codec is None where its palette or tokenizer
    is still to be made; then the teachers' is taken.

    InputError: there is no such teacher, the mesh does not divide it, or its tokens are other ones
    than the data's; the message lists the differences.
    """
    teachers = []
    for name in names:
        named = f"--teacher={name}"
        path = weights.locate(name, f"{named} does not exist")
        # The cache's palette is for formats that have none.
        stored = weights.is_weights_path(path) and weights.read_definition(path)
        palette = None if stored else palette_of(codec)
        found, _ = weights.read_stage(path, "pretrain", palette, with_params=False)
        codec = _fitting(found, config, codec, classes, named)
        given = dataclasses.replace(config, model=found.model)
        sharding.check(given, jax.sharding.get_mesh(), ("model",))
        _, params = weights.read_stage(path, "pretrain", palette)
        teachers.append(Teacher(found.network, params))
    return teachers, codec


def _fitting(
    found: WeightsFile,
    config: config_lib.Config,
    codec: Codec | None,
    classes: int,
    name: str,
) -> Codec:
    """The codec, by default the teacher's; InputError: the teacher predicts other tokens."""
    plain = dataclasses.replace(config, model=config_lib.Model())  # any network of these tokens
    kinds = found.tokens.kind, config.tokens.kind
    differing = token_differences(found.network, found.codec, network_of(plain), codec, kinds)
    differing += ["parts after the image"] * found.network.several
    if (told := found.model.class_tokens) not in (0, classes):
        differing.append(f"{told} class tokens for data with {classes or 'no'} classes")
    if differing:
        raise InputError(
            f"{name} has {shorten(differing)}; a teacher takes the tokens and classes of the cache."
        )
    return codec or tokens.codec_of(config, found.definition)


def check(config: config_lib.Config) -> None:
    """Checks before any work that the token cache of `config.data` has what a student reads."""
    taught = cached_tokens.taught_by(config.data)
    if taught.temperature != config.distill.temperature:
        raise InputError(
            f"config.distill.temperature is {config.distill.temperature:g}, but the teachers of "
            f"{config.data.path} drew at {taught.temperature:g}; take this, or make another cache."
        )


def describe(
    names: tuple[str, ...],
    teachers: list[Teacher],
    samples: int,
    temperature: float,
    seed: int,
) -> Taught:
    """What the cache records of the draws."""
    digests = tuple(sharding.hash_params(each.params) for each in teachers)
    return Taught(names, digests, samples, temperature, seed)


@dataclasses.dataclass
class Drawer:
    """Draws for the examples of a token cache in `folder`, on the current mesh."""

    teachers: list[Teacher]
    taught: Taught
    folder: pathlib.Path
    rows: int = ROWS
    drawn: int = 0  # examples so far
    found: int = 0  # of these, the examples whose draws were in files

    def add(self, split: str, examples: Iterable[dict]) -> Iterator[dict]:
        """The examples of a split, from the first on, each with its draws."""
        examples, first = iter(examples), 0
        while part := [each for _, each in zip(range(PART), examples, strict=False)]:
            for example, draws in zip(part, self._part(split, first, part), strict=True):
                yield example | {DRAWS: draws}
            first += len(part)

    def _part(self, split: str, first: int, part: list[dict]) -> list[Draws]:
        """The draws of successive examples, from their file if there is one."""
        path = self.folder / f"{DRAWN.removesuffix('*')}{split}-{first}.npz"
        named = ("tokens", "label") if "label" in part[0] else ("tokens",)
        given = {name: np.stack([each[name] for each in part]) for name in named}
        settings = dataclasses.asdict(self.taught) | {"names": (), "split": split, "first": first}
        identity = f"{files.hash_arrays(given)} {json.dumps(settings)}"
        self.drawn += len(part)
        if path.exists():
            arrays = files.read_arrays(path)
            if str(arrays["identity"]) == identity:
                self.found += len(part)
                return _separate(**{name: arrays[name] for name in ("distinct", "ids", "counts")})
        made = self._draw(split, first, **given)
        names = ("distinct", "ids", "counts")
        whole = {name: np.concatenate([getattr(each, name) for each in made]) for name in names}
        whole["distinct"] = np.stack([each.distinct for each in made])
        content = io.BytesIO()
        np.savez_compressed(content, identity=np.array(identity), **whole)
        files.replace(path, content.getvalue())
        return made

    def _draw(self, split: str, first: int, tokens, label=None) -> list[Draws]:
        networks = tuple(each.network for each in self.teachers)
        draw = teacher_sampling.make_draw(networks, self.taught.samples, self.taught.temperature)
        params = tuple(each.params for each in self.teachers)
        # Of the name alone, so that a split's draws do not depend on the other splits.
        number = zlib.crc32(split.encode()) % 2**31
        key = jax.random.fold_in(jax.random.key(self.taught.seed), number)
        index, made = np.arange(first, first + len(tokens), dtype=np.int32), []
        if label is not None and (classes := max(net.config.class_tokens for net in networks)):
            # An image without a label has the start vector of no class.
            label = np.where((label >= 0) & (label < classes), label, classes).astype(np.int32)
        for begin in range(0, len(tokens), self.rows):
            rows = slice(begin, begin + self.rows)
            given = [tokens[rows], None if label is None else label[rows], index[rows]]
            count = len(given[0])
            # Of always equally many rows, so that the program and its rounding are always equal.
            full = [x if x is None else np.resize(x, (self.rows, *x.shape[1:])) for x in given]
            ids = draw(params, *(x if x is None else sharding.shard_rows(x) for x in full), key)
            made += map(Draws.of, np.asarray(ids)[:count])
        return made


def _separate(distinct: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> list[Draws]:
    """The draws of each example, from the draws of all examples one after the other."""
    ends = np.cumsum(distinct.sum(axis=1))[:-1]
    each = distinct, np.split(ids, ends), np.split(counts, ends)
    return [Draws(*of_example) for of_example in zip(*each, strict=True)]
