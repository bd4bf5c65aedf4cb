"""Weights & Biases: a copy of a run's log there, beside TensorBoard's."""

import importlib.util
import logging
import pathlib

from gptv_jax.errors import InputError, as_input_error

LOG = logging.getLogger(__name__)


def check_installed() -> None:
    """Raises InputError where the library is not installed."""
    if importlib.util.find_spec("wandb") is None:
        problem = "config.wandb names a project of Weights & Biases, whose library is not installed"
        raise InputError(f"{problem}; pip install wandb, or leave config.wandb out.")


class Wandb:
    """A run of Weights & Biases, which a resumed run of this project continues.

    Each stage has an axis `<stage>/step`. Events that a resumed training repeats appear twice, with
    equal numbers.
    """

    def __init__(self, project: str, folder: pathlib.Path, identity: str, settings: dict):
        """Starts or continues the run `identity`; its local files lie in `folder`."""
        import wandb  # takes a second

        advice = "; or set WANDB_MODE=offline, which keeps the events in the run folder"
        with as_input_error(f"config.wandb={project} cannot be used", advice=advice):
            quiet = wandb.Settings(silent=True, console="off")
            place = {"project": project, "id": identity, "name": folder.name, "dir": folder}
            self._run = wandb.init(**place, config=settings, resume="allow", settings=quiet)
        self._stages: set[str] = set()

    def write(self, event: dict) -> None:
        """Sends an event of the log; a failure ends the copy and not the training."""
        stage = event["stage"]
        numbers = {k: v for k, v in event.items() if k not in ("stage", "time") and v is not None}
        try:
            if stage not in self._stages:
                self._stages.add(stage)
                self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._run.log({f"{stage}/{name}": value for name, value in numbers.items()})
        except Exception as error:  # of the network, or of the library's own process
            LOG.warning("Weights & Biases gets no more events: %s", error)
            self.write = lambda event: None

    def finish(self) -> None:
        """Sends what is left; without this call the process does so when it exits."""
        self._run.finish()
