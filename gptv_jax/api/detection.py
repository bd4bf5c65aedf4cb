"""Detection in images of any size, by a trained network."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptv_jax.api.views import AT_ONCE, Picture, inputs_of, views
from gptv_jax.data import records, transforms
from gptv_jax.decode import answers
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.tasks.boxes import Detections, vote
from gptv_jax.tasks.detect import NAME, Detect
from gptv_jax.tasks.task import Grammar
from gptv_jax.tokens import Codec


def detect(
    task: Detect,
    network: Network,
    params: dict,
    codec: Codec | None,
    images: np.ndarray | jax.Array | Sequence[Picture],
    votes: Sequence[str] = (),
) -> list[Detections]:
    """The objects in each image, which is transformed as in evaluation; under the set mesh.

    `votes` are transforms, of which each gives a further view of every image. InputError: an image
    is no image, or a transform does not fit it.
    """
    extra = [[], *(transforms.parse_view(entry) for entry in votes)]
    names = [name for entry in votes for name in entry.split("|")]
    if wrong := [name for name in names if transforms.parse(name).random]:
        raise InputError(f"votes has {', '.join(wrong)}, which is random; flip(1.0) is not.")
    shown, found = views("detect", task.config.data, codec, images, extra), []
    while batch := list(itertools.islice(shown, AT_ONCE)):
        found += _detect(task, network, params, codec, batch)
    groups = (found[at : at + len(extra)] for at in range(0, len(found), len(extra)))
    return [task.best(vote(group)) for group in groups]


def _detect(
    task, network, params, codec, numbered: list[tuple[int, records.Record]]
) -> list[Detections]:
    """The objects in views, each with the number of its image."""
    *inputs, numbers = inputs_of(network, codec, numbered)
    answered = answers.answer(
        network,
        params,
        *inputs,
        jax.random.key(task.config.seed),
        jax.tree.map(jnp.asarray, task.restriction(network)),
        Grammar(task),
        numbers=numbers,
    )
    places = network.layout.slices[NAME]
    drawn, probabilities = (np.asarray(x)[:, places] for x in answered)
    rows = zip(drawn, probabilities, numbered, strict=False)  # without the padding
    return [
        task.found(*row, record["view"], tuple(record["original"].tolist()))
        for *row, (_, record) in rows
    ]
