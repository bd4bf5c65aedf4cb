"""What may change between two starts of a run: settings that no work depends on, and more steps.

A field may change while no stage that reads the field has begun. The number of steps of a training
may grow: the training goes on from its newest checkpoint, and results that belong to the weights
before are moved to the folder `earlier/`.
"""

import dataclasses
import logging
import operator
import pathlib
import shutil
from collections.abc import Iterable
from typing import NamedTuple

from etils import epath

from gptv_jax import checkpoint, files, tokens
from gptv_jax.errors import InputError, list_differences, shorten
from gptv_jax.runs.record import RunFolder, has_finished
from gptv_jax.stages import STAGES
from gptv_jax.train.metrics import MetricWriter

LOG = logging.getLogger(__name__)


class Changes(NamedTuple):
    """What is new since the start that wrote config.json, and what the run folder loses by that."""

    fields: dict[str, list]  # the recorded and the given value, by name such as "train.steps"
    anew: bool  # no stage has begun, so config.json is written anew
    extended: dict[str, int]  # stages that take more steps, and their newest checkpoints' steps
    dropped: list[str]  # stages whose numbers, files and checkpoints go
    aside: str | None  # where numbers and files are moved to; None: they are deleted

    @property
    def again(self) -> set[str]:
        """Stages that run again, though they may have finished."""
        return {*self.extended, *self.dropped}


def begun_stages(folder: RunFolder) -> dict[str, int]:
    """Stages that have left work in the folder, and their newest checkpoints' steps; 0: none.

    The checkpoint before the first step is no work. For process 0.
    """
    if not (folder.path / "config.json").exists():
        return {}
    summary, place = folder.summary(), folder.recorded_checkpoints()
    steps = {
        name: max(map(checkpoint.newest_step, _trainings(place, [name])), default=0)
        for name in STAGES
    }
    partial = {n: stage.partial for n, stage in STAGES.items() if stage.partial}
    written = {name for name, part in partial.items() if (folder.path / part).exists()}
    return {n: s for n, s in steps.items() if s or n in written or has_finished(summary, n)}


def find(folder: RunFolder, data: dict, stages: list[str]) -> Changes:
    """The changes since the last start; for process 0.

    `data` is as for `RunFolder.claim`, and `stages` are the names of the stages to run.

    Raises:
      InputError: a stage that has begun depends on a field that differs (every field that differs
        is listed) or on other data, or a training has taken more steps than are asked for.
    """
    changed, other_data = folder.changed_fields(), folder.changed_data(data)
    begun = begun_stages(folder)
    if not begun:
        anew = bool(changed or other_data)  # of a folder that has config.json
        return Changes(changed, anew, {}, list(STAGES) if anew else [], None)
    trainings = {f"{stage.training}.steps": n for n, stage in STAGES.items() if stage.training}
    extended = {trainings[f]: begun.get(trainings[f], 0) for f in changed if f in trainings}
    extended = {name: step for name, step in extended.items() if step}
    fixed = [f for f in changed if trainings.get(f) not in extended and _readers(f) & {*begun}]
    if fixed:
        before, now = ({f"config.{n}": v[i] for n, v in changed.items()} for i in (0, 1))
        raise InputError(
            f"{folder.path} was made by another configuration: "
            f"{shorten(list_differences(before, now), '; ')}. Take another --workdir, or the "
            "settings of that run."
        )
    if other_data:
        raise InputError(
            f"{folder.path} was made of other data: {other_data}. Take the same data, or another "
            "--workdir."
        )
    for name, step in extended.items():
        field = f"{STAGES[name].training}.steps"
        if changed[field][1] < step:
            raise InputError(
                f"config.{field} is {changed[field][1]}, but the stage {name} in {folder.path} has "
                f"taken {step} steps; take {step} or more, or another --workdir."
            )
        if name not in stages:
            raise InputError(
                f"config.{field} was {changed[field][0]} and is {changed[field][1]} now, but "
                f"--stages leaves the stage {name} out; name {name} as well."
            )
    renewed = dict(extended)
    if "pretrain" in stages and "pretrain" not in begun and folder.config.init_from:
        renewed["pretrain"] = 0  # until now the later stages read the weights of init_from
    late = {name for each in renewed if STAGES[each].feeds_later for name in _after(each)}
    # A stage that has not begun may have left a checkpoint of its step 0.
    left = {_stage_of(each.name) for each in _trainings(folder.recorded_checkpoints(), STAGES)}
    dropped = [n for n in STAGES if n in late or (changed and n in left - {*begun})]
    first = next(iter(renewed), None)
    outdated = bool(extended or late & {*begun})
    aside = f"earlier/{first}-{renewed[first]}" if outdated else None
    return Changes(changed, False, extended, dropped, aside)


def clear(folder: RunFolder, changes: Changes) -> None:
    """Takes what belongs to other weights out of the folder, numbers first; for process 0.

    A kill at any point leaves a folder in which the stages that have lost numbers run again.
    """
    if not changes.again:
        return
    path, summary = folder.path, folder.summary()
    # The number of parameters is that of the weights of the stage pretrain.
    gone = tuple(f"{n}/" for n in changes.again) + ("model/",) * ("pretrain" in changes.again)
    kept = {name: value for name, value in summary.items() if not name.startswith(gone)}
    if kept != summary:
        if changes.aside:
            files.write_json(path / changes.aside / "summary.json", summary)
        files.write_json(path / "summary.json", kept)
    trash = path / "dropped"
    written = [file for name in changes.again for file in STAGES[name].files]
    if changes.anew:
        written += [name for name, _ in tokens.DEFINITIONS.values()]
    for name in written:
        _move(path / name, (path / changes.aside if changes.aside else trash) / name)
    # A checkpoint that is half deleted would be taken for a damaged one, so it is moved first.
    place = folder.recorded_checkpoints()
    for each in _trainings(place, changes.dropped):
        _move(each, place / "dropped" / each.name)
    for each in (epath.Path(trash), place / "dropped"):
        each.rmtree(missing_ok=True)
    log, sessions = MetricWriter(path), files.read_json(path / "sessions.json", {})
    for name in {event["stage"] for event in log.read()} | {*sessions}:
        if _stage_of(name) in changes.dropped:
            log.rewind(name, -1)
            sessions.pop(name, None)
        elif name in sessions and kept != summary and _stage_of(name) in changes.extended:
            sessions[name][-1]["extended"] = True
    if (path / "sessions.json").exists():
        files.write_json(path / "sessions.json", sessions)


def tell(folder: RunFolder, changes: Changes) -> None:
    """Logs what the changes mean for the run."""
    if changes.anew:
        LOG.info("%s held no work; it takes this configuration.", folder.path)
    for name, step in changes.extended.items():
        before, now = changes.fields[f"{STAGES[name].training}.steps"]
        rates = [_rate(folder.config, name, steps, step) for steps in (before, now)]
        LOG.info(
            "%s goes on from step %d to %d, in place of %d; the learning rate at step %d was %.3g "
            "and is now %.3g.",
            *(name, step, now, before, step, *rates),
        )
    if changes.aside and changes.dropped:
        line = "Results of the weights before are in %s now; the later stages run again."
        LOG.info(line, folder.path / changes.aside)


def _after(stage: str) -> list[str]:
    """The later stages."""
    names = list(STAGES)
    return names[names.index(stage) + 1 :]


def _readers(field: str) -> set[str]:
    """The stages that read a field of the configuration."""
    section = field.split(".")[0]
    return {n for n, stage in STAGES.items() if section in stage.sections} or {*STAGES}


def _rate(config, stage: str, steps: int, step: int) -> float:
    """The learning rate of a stage's training of so many steps, after `step` steps."""
    if stage == "probe":
        from gptv_jax.probe import sgd

        settings = dataclasses.replace(config.probe.sgd, steps=steps)
        return float(sgd.make_optimizer(settings)[1](step))
    from gptv_jax.train import optimizer

    train = operator.attrgetter(STAGES[stage].training)(config)
    return float(optimizer.make_optimizer(train.optimizer, steps)[1](step))


def _stage_of(training: str) -> str:
    """The stage of a training: "finetune" of "finetune_scratch"."""
    return training.split("_")[0]


def _trainings(place: epath.Path, stages: Iterable[str]) -> list[epath.Path]:
    """The folders with checkpoints of these stages' trainings."""
    found = place.iterdir() if place.exists() else ()
    return [folder for folder in found if _stage_of(folder.name) in stages]


def _move(path: pathlib.Path | epath.Path, target: pathlib.Path | epath.Path) -> None:
    """Moves a file or folder, if it is there, to a path that may be taken already."""
    if not path.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    path.rename(target)
