"""Runs the stages of a configuration in a run folder, one after the other."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

import jax
from absl import flags
from etils import epy

from gptv_jax import config as config_lib
from gptv_jax import files, hosts
from gptv_jax.config import fields, run_file
from gptv_jax.errors import InputError
from gptv_jax.runs import record
from gptv_jax.runs.context import Context
from gptv_jax.stages import STAGES, reports, setup

with epy.lazy_imports():  # the commands do not need it
    from gptv_jax import api

LOG = logging.getLogger(__name__)


def run_stages(
    config: config_lib.Config, workdir: str, wanted: list[str] | None = None
) -> dict[str, object]:
    """Runs the stages that are wanted and not finished, in order, and unlocks the folder.

    Takes and raises what `setup.open_run` does; returns the summary, on process 0.
    """
    context = setup.open_run(config, workdir, wanted)
    try:
        _run(context)
        return context.folder.summary()
    finally:
        context.log.close()
        context.folder.release()


def _run(context: Context) -> None:
    config, folder, shown = context.config, context.folder, ", ".join(context.stages)
    usual = fields.flatten(config_lib.Config())
    own = {k: v for k, v in fields.flatten(config).items() if v != usual[k]}
    values = "\n".join(f"  {name} = {value}" for name, value in own.items())
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
    line = "%s in %s, on %s; its config.json has all settings, these are not the defaults:\n%s"
    LOG.info(line, shown, folder.path, devices, values)
    reports.write(context)  # a kill may have come before a finished stage was reported
    with jax.set_mesh(context.mesh):
        for name in context.stages:
            if STAGES[name].on_request or not folder.finished(name):
                context.finish(name, STAGES[name].run(context))
                reports.write(context)
            if context.codec is None:  # the stage has trained the tokenizer
                context = setup.with_codec(context)


def train(
    config, workdir: str | os.PathLike, stages: list[str] | None = None
) -> "api.Model | None":
    """Implements `gptv_jax.train`."""
    if isinstance(stages, str):
        raise InputError(f"stages is {stages!r}; it takes a list of names, such as [{stages!r}].")
    if isinstance(config, str | os.PathLike):
        config = run_file.load(os.fspath(config))
    if not isinstance(config, config_lib.Config):
        config = config_lib.resolve(config)
    folder = files.user_path(workdir)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, which a notebook does not parse
    with _shown_log(), hosts.saving_interrupts():
        summary = run_stages(config, str(workdir), stages)
    if record.stages_with_weights(summary):
        return api.load(folder)
    return api.load(config.init_from, palette=config.tokens.palette) if config.init_from else None


@contextlib.contextmanager
def _shown_log() -> Iterator[None]:
    """Shows the package's log, once, where the user's program does not show it."""
    log, handler = logging.getLogger("gptv_jax"), logging.StreamHandler(sys.stderr)
    level, propagate = log.level, log.propagate
    handler.setFormatter(logging.Formatter("%(message)s"))
    # A root handler is no sign that the user has set up logging: absl adds a handler when imported.
    if log.getEffectiveLevel() > logging.INFO and not log.handlers:
        log.addHandler(handler)
        log.propagate = False
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.propagate = propagate
        log.removeHandler(handler)
