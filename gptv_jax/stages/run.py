"""Runs the stages of a configuration in a run folder, one after the other."""

import logging

import jax

from gptv_jax import config as config_lib
from gptv_jax.config import fields
from gptv_jax.runs.context import Context
from gptv_jax.stages import STAGES, reports, setup

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
