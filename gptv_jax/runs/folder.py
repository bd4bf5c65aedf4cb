"""An open run folder: whose it is, what it records of the run, and the numbers of finished stages.

Process 0 alone reads and writes these files, and every process does what process 0 decides, so it
does not matter whether the other processes see the same file system.
"""

import dataclasses
import importlib.metadata
import pathlib
import platform
import secrets
import shlex
import sys

import jax
from etils import epath

from gptv_jax import checkpoint, files, hosts
from gptv_jax import config as config_lib
from gptv_jax.config import fields
from gptv_jax.errors import InputError, list_differences
from gptv_jax.runs.record import checkpoint_folder, config_of, has_finished

VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "gptv_jax")


class RunFolder:
    """The folder of a run of one configuration."""

    def __init__(self, config: config_lib.Config, workdir: str):
        """Changes nothing on disk; `claim` does.

        Raises:
          InputError: another configuration made the folder (every field that differs is listed).
        """
        if "://" in workdir:
            raise InputError(
                f"--workdir={workdir} is an address; it takes a folder. Checkpoints alone may lie "
                "elsewhere, by config.checkpoint_dir."
            )
        self.config, self.path = config, pathlib.Path(workdir).absolute()
        hosts.from_first(self._compare)

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

    def finish(self, stage: str, numbers: dict, damaged: int) -> None:
        """Adds a stage's numbers to the summary; on process 0 alone.

        Args:
          stage: its name, which the keys of `numbers` are without.
          numbers: of the stage.
          damaged: images that could not be read so far.
        """
        if jax.process_index() != 0:
            return
        summary = self.summary() | {f"{stage}/{name}": value for name, value in numbers.items()}
        if stage == "pretrain":
            summary["model/params"] = summary.pop("pretrain/params")
        summary["data/skipped"] = damaged
        files.write_json(self.path / "summary.json", summary)

    def _compare(self) -> None:
        """Raises InputError where another configuration made the folder."""
        if not (self.path / "config.json").exists():
            return
        free = {f"config.{name}" for name in fields.free(config_lib.Config)}
        recorded, given = (
            {k: v for k, v in fields.flatten(config, "config.").items() if k not in free}
            for config in (config_of(self.path), self.config)
        )
        differing = list_differences(recorded, given)
        if differing:
            raise InputError(
                f"{self.path} was made by another configuration: {'; '.join(differing)}. Take "
                "another --workdir, or the settings of that run."
            )

    def claim(self, data: dict) -> None:
        """Makes the folder, locks it for this process, and writes config.json; for process 0.

        Args:
          data: number of images by split and the classes, which must stay while the run goes on.

        Raises:
          InputError: the folder cannot be written, another process has it, or it was made of other
            data.
        """
        files.claim(self.path, "--workdir")
        files.lock(self.path, "--workdir", holder=self)
        path, given = self.path / "config.json", self.config.checkpoint_dir
        record, made = files.read_json(path, {}), path.exists()
        if made:
            # The place of the data may change, but not the data.
            for name, now in data.items():
                before = record.get(name, now)
                if before != now:
                    raise InputError(
                        f"{self.path} was made of other data: its {name} were {before}, now they "
                        f"are {now}. Take the same data, or another --workdir."
                    )
        else:
            devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
            record = {"command": command(), "devices": devices, "versions": _versions()}
            record |= data | {"config": fields.flatten(self.config)}
        record.setdefault("id", secrets.token_hex(8))
        self._claim_checkpoints(record["config"].get("checkpoint_dir"), record["id"])
        if not made or record["config"].get("checkpoint_dir") != given:
            record["config"]["checkpoint_dir"] = given
            files.write_json(path, record)

    def _claim_checkpoints(self, before: str | None, run: str) -> None:
        """Marks the place of the checkpoints as this run's.

        Args:
          before: `config.checkpoint_dir` when this run was last started.
          run: the run's identifier.

        Raises:
          InputError: the setting has changed, but the checkpoints have not been moved.
        """
        given, config = self.config.checkpoint_dir, self.config
        now = checkpoint_folder(config, self.path)
        was = checkpoint_folder(dataclasses.replace(config, checkpoint_dir=before), self.path)
        if was != now and checkpoint.found(was):
            raise InputError(
                f"config.checkpoint_dir is {given}, but this run's checkpoints are in {was}; "
                f"move what that holds to {now}, or leave the setting as it was."
            )
        if given:
            checkpoint.claim(now, run, self.path, moved=was != now)


def command() -> str:
    """The command line that started this process."""
    return shlex.join(["python", "-m", "gptv_jax.main", *sys.argv[1:]])


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        versions[name] = importlib.metadata.version(name)
    return versions
