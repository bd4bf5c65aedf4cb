"""Detection in images of any size, by a trained network."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np

from gptv_jax.api.views import AT_ONCE, Picture, inputs_of, views
from gptv_jax.data import transforms
from gptv_jax.errors import InputError, cut
from gptv_jax.model.gpt import Network
from gptv_jax.tasks.boxes import Detections, vote
from gptv_jax.tasks.detect import Detect, draw
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
    is no image, or `votes` are no such transforms.
    """
    if isinstance(votes, str) or not all(isinstance(entry, str) for entry in votes):
        raise InputError(
            f"votes is {cut(repr(votes), 60)}; it takes a list of texts, as in votes=['flip(1.0)']."
        )
    extra = [[], *(transforms.parse_view(entry) for entry in votes)]
    names = [name for entry in votes for name in entry.split("|")]
    if wrong := [name for name in names if transforms.parse(name).random]:
        raise InputError(f"votes has {', '.join(wrong)}, which is random; flip(1.0) is not.")
    shown, found = views("detect", task.config.data, codec, images, extra), []
    while batch := list(itertools.islice(shown, AT_ONCE)):
        drawn = map(np.asarray, draw(task, network, params, *inputs_of(network, codec, batch)))
        rows = zip(*drawn, batch, strict=False)  # without the padding
        found += [
            task.found(*row, record["view"], tuple(record["original"].tolist()))
            for *row, (_, record) in rows
        ]
    groups = (found[at : at + len(extra)] for at in range(0, len(found), len(extra)))
    return [task.best(vote(group)) for group in groups]
