"""A run folder: whose it is, and what its files say of the run and its finished stages.

Process 0 alone reads and writes these files, and every process does what process 0 decides, so it
does not matter whether the other processes see the same file system.
"""

import dataclasses
import importlib.metadata
import logging
import pathlib
import platform
import secrets
import shlex
import sys
from collections.abc import Callable

import jax
from etils import epath

from gptv_jax import checkpoint, files, hosts
from gptv_jax import config as config_lib
from gptv_jax.config import fields
from gptv_jax.config.run_file import config_of as config_of  # a name of this module for its users
from gptv_jax.decode.typicality import FILE as TYPICALITY
from gptv_jax.decode.typicality import Calibration
from gptv_jax.errors import InputError

LOG = logging.getLogger(__name__)
VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "gptv_jax")


class RunFolder:
    """The open folder of a run of one configuration."""

    def __init__(self, config: config_lib.Config, workdir: str):
        """Changes nothing on disk; `claim` does."""
        if "://" in workdir:
            raise InputError(
                f"--workdir={workdir} is an address; it takes a folder. Checkpoints alone may lie "
                "elsewhere, by config.checkpoint_dir."
            )
        self.config, self.path = config, files.user_path(workdir)
        place = checkpoint_folder(self.config, self.path)
        given = self.config.checkpoint_dir
        checkpoint.check_place(place, "config.checkpoint_dir" if given else "--workdir")
        self.release: Callable[[], None] = lambda: None  # unlocks the folder, once it is claimed

    @property
    def has_checkpoints(self) -> bool:
        """Whether a run in this folder has saved any checkpoint; for process 0."""
        made = (self.path / "config.json").exists()
        return made and checkpoint.found(checkpoint_folder(self.config, self.path))

    def checkpoints(self, training: str) -> epath.Path:
        """The folder of a training's checkpoints."""
        return checkpoint_folder(self.config, self.path) / training

    def summary(self) -> dict:
        """The numbers of the finished stages; for process 0."""
        return files.read_json(self.path / "summary.json", {})

    def finished(self, stage: str) -> bool:
        """Whether the stage has written its numbers, which it does once, at its end."""
        return hosts.from_first(lambda: has_finished(self.summary(), stage))

    def recorded_checkpoints(self) -> epath.Path:
        """Where the checkpoints were when the run was last started; for process 0."""
        return checkpoint_folder(config_of(self.path), self.path)

    def changed_fields(self) -> dict[str, list]:
        """The recorded and the given value of every changed field that is not free.

        For process 0; names are as in "train.steps".
        """
        before, now = fields.flatten(config_of(self.path)), fields.flatten(self.config)
        fixed = [name for name in now if name not in fields.free(config_lib.Config)]
        return {n: [before[n], now[n]] for n in fixed if before[n] != now[n]}

    def changed_data(self, data: dict) -> str:
        """How the data differ from the data that made the folder, or ""; for process 0.

        The place of the data may change, but not the data.
        """
        record = files.read_json(self.path / "config.json", {})
        for name, now in data.items():
            before = record.get(name, now)
            # Older versions recorded the number of classes of a TFDS set, not their names.
            same = len(now) if isinstance(now, list) and isinstance(before, int) else now
            if before != same:
                return f"its {name} were {before}, now they are {now}"
        return ""

    def changed_teachers(self, stage: str, given: dict[str, list]) -> list[str]:
        """The settings by which a stage has other teachers than `keep_teachers` recorded.

        For process 0. A folder of an older version has no record, and takes what is given.
        """
        record = files.read_json(self.path / "config.json", {})
        before = record.get("teachers", {}).get(stage, given)
        return [name for name in given if before.get(name) != given[name]]

    def keep_teachers(self, stage: str, given: dict[str, list]) -> None:
        """Records in config.json what teaches a stage; for process 0 of a folder that is claimed.

        `given` tells, by the settings that name the teachers, which teachers these are.
        """
        path = self.path / "config.json"
        record = files.read_json(path, {})
        taught = record.get("teachers", {})
        if taught.get(stage) != given:
            files.write_json(path, record | {"teachers": taught | {stage: given}})

    def claim(
        self,
        data: dict,
        changed: dict[str, list] | None = None,
        clear: Callable[[], None] | None = None,
        *,
        anew: bool = False,
    ) -> None:
        """Makes the folder, locks it for this process, and writes config.json; for process 0.

        `data`, which config.json keeps, are the number of images by split, the classes and, as
        "found", what `inventory.describe` returns. `changed` is what `changed_fields` returned,
        `clear()` removes what other settings have made, and `anew` says that nothing recorded
        counts. config.json is written after `clear()`: a kill between them leaves a run of the
        recorded configuration that repeats some work.

        InputError: the folder cannot be written, another process has it, or its checkpoints are
        elsewhere than the settings say.
        """
        files.claim(self.path, "--workdir")
        self.release = files.lock(self.path, "--workdir", holder=self)
        path, given = self.path / "config.json", self.config.checkpoint_dir
        record, made = files.read_json(path, {}), path.exists() and not anew
        command = shlex.join(["python", "-m", "gptv_jax.main", *sys.argv[1:]])
        devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
        if made and (began := record.get("devices", devices)) != devices:
            line = "%s began on %s and continues on %s, which may round sums otherwise."
            LOG.info(line, self.path, began, devices)
        if not made:
            versions = {name: importlib.metadata.version(name) for name in VERSIONED}
            record = {
                "command": command,
                "devices": devices,  # with which it began, see hosts/cores.py
                "versions": {"python": platform.python_version()} | versions,
                **data,
                "config": fields.flatten(self.config),
            }
        elif changed:
            history = {"command": record.get("command"), "fields": changed}
            record |= {"changes": [*record.get("changes", ()), history], "command": command}
            record["config"] |= {name: now for name, (_, now) in changed.items()}
        record.setdefault("id", secrets.token_hex(8))
        before = record["config"].get("checkpoint_dir")  # when this run was last started
        now = checkpoint_folder(self.config, self.path)
        was = checkpoint_folder(dataclasses.replace(self.config, checkpoint_dir=before), self.path)
        if was != now and checkpoint.found(was):
            raise InputError(
                f"config.checkpoint_dir is {given}, but this run's checkpoints are in {was}; "
                f"move the content of {was} to {now}, or leave the setting as it was."
            )
        if clear:
            clear()
        if given:
            checkpoint.claim(now, record["id"], self.path, moved=was != now)
        if not made or changed or before != given:
            record["config"]["checkpoint_dir"] = given
            files.write_json(path, record)


def checkpoint_folder(config: config_lib.Config, folder: pathlib.Path) -> epath.Path:
    """Where the checkpoints of a run folder with this configuration are."""
    given = config.checkpoint_dir
    return files.user_place(given) if given else epath.Path(folder / "checkpoints")


def has_finished(summary: dict, stage: str) -> bool:
    """Whether a run's summary has numbers of the stage."""
    return any(name.startswith(f"{stage}/") for name in summary)


def stages_with_weights(summary: dict) -> list[str]:
    """Finished stages that trained the network; the latest last."""
    return [stage for stage in ("pretrain", "finetune") if f"{stage}/steps" in summary]


def trained_part(config: config_lib.Config, stage: str) -> str:
    """The part of a stage's checkpoints that holds its weights, "params" or "ema".

    The settings of pretraining are `config.train`, of another stage `config.<stage>.train`.
    """
    return getattr(config, stage, config).train.weights


def typicality(folder: pathlib.Path, stage: str, step: int | None) -> Calibration | None:
    """What the run has measured to be usual for a stage's weights of this step; None: nothing.

    The step of weights that the run was given, by `init_from`, is None.
    """
    path = folder / TYPICALITY
    if (content := files.read_json(path, {}).get(stage)) is None:
        return None
    found = Calibration.from_json(content, str(path))
    return found if found.step == step else None
