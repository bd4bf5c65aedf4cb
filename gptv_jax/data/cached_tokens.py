"""What a run can do with the tokens of a cache: transforms, and a teacher's draws."""

import functools
import logging

from gptv_jax import config as config_lib
from gptv_jax.data import sources, transforms
from gptv_jax.data.cache import TokenCache
from gptv_jax.data.teacher_draws import SAMPLES, Taught
from gptv_jax.errors import InputError

LOG = logging.getLogger(__name__)


def taught_by(config: config_lib.Data) -> Taught:
    """How a teacher's draws in the token cache were made.

    InputError: there are none, or training moves the tokens, so that the teacher saw other images.
    """
    data_set = sources.open_data_set(config)
    if not (found := getattr(data_set, "taught", None)):
        raise InputError(
            f"config.distill.cached=True reads the draws of a teacher, but config.data.name="
            f"{config.name} has none; make a token cache by gptv_jax.prepare --teacher=RUN."
        )
    entries = config.train_transforms
    applied = entries[len(entries) - len(steps_of(config, entries)) :]
    if moved := [entry for entry in applied if entry not in config.eval_transforms]:
        raise InputError(
            "config.distill.cached=True takes images as the teacher saw them, but "
            f"config.data.train_transforms has {', '.join(moved)}; leave these transforms out."
        )
    return found


def most_distinct(config: config_lib.Data) -> int:
    """The most distinct ids of a position, for a plan; SAMPLES where there is no cache yet."""
    try:
        return taught_by(config).distinct
    except InputError:
        return SAMPLES


def takes(config: config_lib.Data, entry: str) -> bool:
    """Whether the data can be transformed so: a token cache not where pixels are needed.

    Tokens of several pixels cannot be transformed: moving a token does not mirror its pixels.
    """
    data_set = sources.open_data_set(config)
    if not isinstance(data_set, TokenCache):
        return True
    one_pixel = data_set.tokens.cell == (1, 1, 1)
    return one_pixel and not transforms.parse(entry).needs_pixels


@functools.cache
def steps_of(config: config_lib.Data, entries: tuple[str, ...]) -> list[transforms.Transform]:
    """The transforms after the last one that needs pixels; warns of the transforms before."""
    steps = [transforms.parse(entry) for entry in entries]
    on_pixels = [i for i, entry in enumerate(entries) if not takes(config, entry)]
    first = max(on_pixels, default=-1) + 1
    left_out = [entry for entry in entries[:first] if entry not in config.eval_transforms]
    if left_out:
        LOG.warning(
            "left out: %s, which needs pixels, and a token cache has none; the cache was made "
            "with %s.",
            ", ".join(left_out),
            ", ".join(config.eval_transforms),
        )
    return steps[first:]
