"""What fine-tuning teaches a pretrained network: one file a task, and the only list of tasks."""

import importlib

from gptv_jax import config as config_lib
from gptv_jax.errors import InputError
from gptv_jax.tasks.task import Task

# A class, or the name of a class in the module of the task's name, which is imported when needed.
TASKS: dict[str, str | type[Task]] = {"classify": "Classify", "detect": "Detect"}


def kind(name: str) -> type[Task]:
    """The class of a task; InputError where there is no such task."""
    if name not in TASKS:
        raise InputError(f"config.task.name is {name!r}; it takes one of {', '.join(TASKS)}.")
    found = TASKS[name]
    if isinstance(found, str):
        found = getattr(importlib.import_module(f"{__name__}.{name}"), found)
    return found


def make(
    config: config_lib.Config, classes: tuple[str, ...] = (), object_names: tuple[str, ...] = ()
) -> Task:
    """The task `config.task.name` on data with these names, see `Task`.

    InputError: there is no such task.
    """
    return kind(config.task.name)(config, classes, object_names)
