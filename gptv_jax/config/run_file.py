"""The configuration that a text names: a run folder, its config.json, or a file in Python."""

import pathlib
import runpy

import ml_collections

from gptv_jax import config, files
from gptv_jax.config import fields
from gptv_jax.errors import InputError, first_line


def load(given: str) -> ml_collections.ConfigDict:
    """The configuration, for overrides to change.

    `given` is the folder of a run, a run's config.json or a copy of it, or FILE or FILE:ARGUMENT of
    a file whose `get_config` returns the configuration.
    """
    place = files.user_path(given)
    if place.is_dir():
        return fields.to_dict(config_of(place))
    if place.suffix == ".json" and place.is_file():
        return fields.to_dict(_recorded(place))
    name, *argument = given.split(":", 1)
    file = files.user_path(name)
    if not file.is_file():
        problem = f"{name} is a folder, which takes no argument after a colon"
        problem = problem if file.is_dir() else f"there is no file {file}"
        raise InputError(f"config={given}: {problem}.")
    try:
        settings = runpy.run_path(str(file))["get_config"](*argument)
        if not isinstance(settings, ml_collections.ConfigDict):
            raise TypeError(f"get_config returned {type(settings).__name__}, no ConfigDict")
        return settings
    except Exception as error:  # of the user's file
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        reason = first_line(error).rstrip(".")
        raise InputError(f"config={given} cannot be loaded: {kind}{reason}.") from error


def config_of(folder: pathlib.Path) -> config.Config:
    """The configuration that made a run folder; fields that did not exist then have defaults."""
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{folder} is not a run folder: it has no config.json.")
    return _recorded(path)


def _recorded(path: pathlib.Path) -> config.Config:
    record = files.read_json(path, {})
    if not isinstance(record.get("config"), dict):
        raise InputError(f"{path} holds no configuration of a run; restore it.")
    return config.resolve(config.recorded(config.Config, record["config"]))
