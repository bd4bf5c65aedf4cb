"""What may change between two starts of a run: settings that no work depends on, and more steps.

A field may change while no stage that reads the field has begun. The number of steps of a training
may grow: the training goes on from its newest checkpoint, and results that belong to the weights
before are moved to folders `earlier/`, in the run folder and beside the checkpoints.
"""

import logging
import os
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from etils import epath

from gptv_jax import checkpoint, files, tokens
from gptv_jax.errors import InputError, list_differences, shorten
from gptv_jax.runs.record import RunFolder, config_of, has_finished
from gptv_jax.stages import STAGES
from gptv_jax.train.metrics import MetricWriter

LOG = logging.getLogger(__name__)
DROPPED = "dropped"  # folder for what is deleted; a kill may leave it, so each start deletes it


class Changes(NamedTuple):
    """What differs from the start that wrote config.json, and which results that makes outdated."""

    fields: dict[str, list]  # the recorded and the given value, by name such as "train.steps"
    anew: bool  # no stage has begun, so config.json is written anew
    extended: dict[str, int]  # stages that take more steps, and their newest checkpoints' steps
    reset: list[str]  # stages that lose their checkpoints as well, and begin at step 0
    moved_to: str  # folder for outdated results, relative to the run folder and the checkpoints
    sentences: list[str]  # what all this means for the run

    @property
    def unfinished(self) -> set[str]:
        """Stages whose results are outdated, so they are not finished any more."""
        return {*self.extended, *self.reset}


def begun_stages(folder: RunFolder) -> dict[str, int]:
    """Stages that have left work in the folder, and their newest checkpoints' steps; 0: none.

    The checkpoint before the first step is no work. For process 0.
    """
    if not (folder.path / "config.json").exists():
        return {}
    summary, place = folder.summary(), folder.recorded_checkpoints()
    found = {}
    for name, stage in STAGES.items():
        step = max(map(checkpoint.newest_step, _trainings(place, [name])), default=0)
        started = stage.partial and (folder.path / stage.partial).exists()
        if step or started or has_finished(summary, name):
            found[name] = step
    return found


def begun_run(workdir: str) -> pathlib.Path | None:
    """The run folder, if it holds work of a stage; for process 0."""
    if "://" in workdir:  # no folder, which `RunFolder` says
        return None
    path = files.user_path(workdir)
    made = os.path.exists(path / "config.json")
    return path if made and begun_stages(RunFolder(config_of(path), workdir)) else None


def find(folder: RunFolder, data: dict, stages: list[str]) -> Changes:
    """The changes since the last start; for process 0.

    `data` is as for `RunFolder.claim`, and `stages` are the names of the stages to run. Raises
    InputError where a stage that has begun depends on fields that differ (all are listed) or on
    other data, or where a training has taken more steps than are asked for.
    """
    if not (folder.path / "config.json").exists():
        return Changes({}, False, {}, [], DROPPED, [])
    changed, other_data = folder.changed_fields(), folder.changed_data(data)
    begun = begun_stages(folder)
    if not begun and (changed or other_data):
        sentence = f"{folder.path} held no work; it takes this configuration."
        return Changes(changed, True, {}, list(STAGES), DROPPED, [sentence])
    trainings = {f"{stage.training}.steps": n for n, stage in STAGES.items() if stage.training}
    extended = {trainings[f]: begun.get(trainings[f], 0) for f in changed if f in trainings}
    extended = {name: step for name, step in extended.items() if step}
    fixed = [f for f in changed if trainings.get(f) not in extended and _readers(f) & {*begun}]
    if fixed:
        before, now = ({f"config.{n}": v[i] for n, v in changed.items()} for i in (0, 1))
        differing = shorten(list_differences(before, now), "; ")
        problem = f"{folder.path} was made by another configuration: {differing}"
        raise InputError(f"{problem}. Take another --workdir, or the settings of that run.")
    if other_data:
        advice = "Take the same data, or another --workdir."
        raise InputError(f"{folder.path} was made of other data: {other_data}. {advice}")
    for name, step in extended.items():
        field = f"{STAGES[name].training}.steps"
        before, now = changed[field]
        if now < step:
            raise InputError(
                f"config.{field} is {now}, but the stage {name} in {folder.path} has taken {step} "
                f"steps; take {step} or more, or another --workdir."
            )
        if name not in stages:
            raise InputError(
                f"config.{field} was {before} and is {now} now, but --stages leaves the stage "
                f"{name} out; name {name} as well."
            )
    names, renewed = list(STAGES), dict(extended)
    if folder.config.init_from and "pretrain" in stages and "pretrain" not in begun:
        renewed["pretrain"] = 0  # until now the later stages read the weights of init_from
    feeding = [names.index(name) for name in renewed if STAGES[name].feeds_later]
    later = names[min(feeding) + 1 :] if feeding else []
    later = [*later, *(name for name in names if STAGES[name].measures in renewed)]
    # A stage that has not begun may have left a checkpoint of its step 0.
    left = {_stage_of(each.name) for each in _trainings(folder.recorded_checkpoints(), STAGES)}
    reset = [n for n in names if n in later or (changed and n in left - {*begun})]
    extended = {name: step for name, step in extended.items() if name not in reset}
    moved_to = next((f"earlier/{name}-{step}" for name, step in renewed.items()), DROPPED)
    sentences = []
    for name, step in extended.items():
        before, now = changed[f"{STAGES[name].training}.steps"]
        goes_on = f"{name} goes on from step {step} to {now}, in place of {before}"
        rate = f"the learning rate follows the schedule of {now} steps from here on, so it may rise"
        sentences.append(f"{goes_on}; {rate}.")
    again = [n for n in reset if n in begun]
    if lost := [n for n in extended if has_finished(folder.summary(), n)] + again:
        sentences.append(
            f"Numbers and files of {', '.join(lost)} are moved to {folder.path / moved_to}."
        )
    if saved := [n for n in again if begun[n]]:
        place = folder.recorded_checkpoints() / moved_to
        sentences.append(f"Checkpoints of {', '.join(saved)} are moved to {place}.")
    for when, among in (("now", True), ("where a later start's --stages allows it", False)):
        if chosen := ", ".join(n for n in again if (n in stages) == among):
            sentences.append(f"To be run again {when}: {chosen}.")
    return Changes(changed, False, extended, reset, moved_to, sentences)


def clear(folder: RunFolder, changes: Changes) -> None:
    """Tells what changes, and moves outdated results away, numbers first; for process 0.

    A kill at any point leaves a folder in which the stages that have lost numbers run again.
    """
    for sentence in changes.sentences:
        LOG.info("%s", sentence)
    if not changes.unfinished:
        return
    path, place, summary = epath.Path(folder.path), folder.recorded_checkpoints(), folder.summary()
    # The number of parameters is that of the weights of the stage pretrain.
    gone = [f"{n}/" for n in changes.unfinished] + ["model/"] * ("pretrain" in changes.unfinished)
    kept = {name: value for name, value in summary.items() if not name.startswith(tuple(gone))}
    if kept != summary:
        files.write_json(folder.path / changes.moved_to / "summary.json", summary)
        files.write_json(folder.path / "summary.json", kept)
    written = [file for name in changes.unfinished for file in STAGES[name].files]
    if changes.anew:
        written += [name for name, _ in tokens.DEFINITIONS.values()]
    for name in written:
        _move(path / name, path / changes.moved_to / name)
    # A checkpoint that is half deleted would be taken for a damaged one, so it is moved first.
    for each in _trainings(place, changes.reset):
        _move(each, place / changes.moved_to / each.name)
    for each in (path, place):
        (each / DROPPED).rmtree(missing_ok=True)
    log, sessions = MetricWriter(folder.path), files.read_json(folder.path / "sessions.json", {})
    for name in {event["stage"] for event in log.read()} | {*sessions}:
        if _stage_of(name) in changes.reset:
            log.rewind(name, -1)
            sessions.pop(name, None)
        elif name in sessions and kept != summary and _stage_of(name) in changes.extended:
            sessions[name][-1]["extended"] = True
    if (path / "sessions.json").exists():
        files.write_json(folder.path / "sessions.json", sessions)


def _readers(field: str) -> set[str]:
    section = field.split(".")[0]
    return {n for n, stage in STAGES.items() if section in stage.sections} or {*STAGES}


def _stage_of(training: str) -> str:
    """The stage of a training: "finetune" of "finetune_scratch"."""
    return training.split("_")[0]


def _trainings(place: epath.Path, stages: Iterable[str]) -> list[epath.Path]:
    """The folders that hold checkpoints of the trainings of `stages`."""
    found = place.iterdir() if place.exists() else ()
    return [folder for folder in found if _stage_of(folder.name) in stages]


def _move(path: epath.Path, target: epath.Path) -> None:
    """Moves a file or folder, if it is there, to a path that may be taken already."""
    if path.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            target.rmtree()
        path.rename(target)
