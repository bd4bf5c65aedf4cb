"""Label maps of images of any size, by a trained network."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Integer

from gptv_jax.api.views import AT_ONCE, Picture, inputs_of, views
from gptv_jax.data import records
from gptv_jax.model.gpt import Network
from gptv_jax.tasks.segment import Segment, classes_read, written
from gptv_jax.tokens import Codec


def segment(
    task: Segment,
    network: Network,
    params: dict,
    codec: Codec | None,
    images: np.ndarray | jax.Array | Sequence[Picture],
    way: str,
) -> list[Integer[np.ndarray, "H W"]]:
    """The class of every pixel of each image, "read" or "written", under the set mesh.

    InputError: an image is no image.
    """
    key, found = jax.random.key(task.config.seed), []
    numbered = views("segment", task.config.data, codec, images)
    while batch := list(itertools.islice(numbered, AT_ONCE)):
        *inputs, numbers = inputs_of(network, codec, batch)
        if way == "read":
            planes = np.asarray(classes_read(task, network, params, *inputs))
        else:
            drawn, _ = written(task, network, params, *inputs, key, numbers)
            planes = task.facts.codec.decode(np.asarray(drawn))
        for plane, (_, record) in zip(planes, batch, strict=False):  # without the padding
            shape = tuple(record["original"].tolist())
            found.append(records.plane_to_original(plane, record["view"], shape).astype(np.int32))
    return found
