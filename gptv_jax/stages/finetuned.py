"""Fine-tuned networks that are measured on the test images of a run."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gptv_jax import config as config_lib
from gptv_jax import hosts, sharding, tasks, weights
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.config import rules
from gptv_jax.data import trial
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.errors import InputError, shorten
from gptv_jax.model.gpt import Network
from gptv_jax.runs import record
from gptv_jax.runs.context import Context
from gptv_jax.runs.record import RunFolder, has_finished
from gptv_jax.tasks.task import Task
from gptv_jax.tokens import Codec, Palette
from gptv_jax.weights import native
from gptv_jax.weights.native import WeightsFile


@dataclasses.dataclass(frozen=True)
class FineTuned:
    """A fine-tuned network, its weights, and how the network reads a run's images."""

    source: str  # where the weights come from
    step: int | None  # of the training, where known
    task: Task
    network: Network
    params: dict
    data: Pipeline
    settings: config_lib.Finetune  # of the run that measures: the batch size and the clips

    def batches(
        self, limit: int | None, entries: Sequence[str] = (), clips: int = 1
    ) -> Iterator[dict]:
        """The first `limit` test images, with `entries` in place of the transforms if given."""
        return self.data.evaluation(
            "test",
            self.settings.train.batch_size,
            limit,
            example=self.task.example if self.task.parts() else None,
            pixels=self.task.pixels,
            clips=clips,
            entries=tuple(entries),
        )


class Described(NamedTuple):
    """Weights that `config.robustness.compare` names, and what is read with them."""

    weights: WeightsFile
    task: Task
    data: config_lib.Data
    params: dict  # {} where the weights were not read


def own(context: Context) -> FineTuned:
    """The weights that the stage finetune of this run has kept."""
    config, folder = context.config, context.folder
    path = folder.path / tasks.MEASURED
    measured = hosts.from_first(lambda: path.read_bytes() if path.exists() else b"")
    task = dataclasses.replace(context.task, measured=measured)
    network, part = task.network(), record.trained_part(config, "finetune")
    step = hosts.from_first(lambda: folder.summary()["finetune/steps"])
    with Checkpoints(folder.checkpoints("finetune"), read_only=True) as saved:
        state, _ = saved.restore(step, {part: sharding.abstract(network.init)})
    source = str(folder.path)
    return FineTuned(source, step, task, network, state[part], context.data, config.finetune)


def compared(context: Context) -> FineTuned:
    """The weights that `config.robustness.compare` names; errors as of `check`."""
    config = context.config
    found = _described(config, context.task, context.codec, with_params=True)
    data = dataclasses.replace(context.images, config=found.data, codec=found.weights.codec)
    network, source = found.weights.network, str(config.robustness.compare)
    step = found.weights.step
    return FineTuned(source, step, found.task, network, found.params, data, config.finetune)


def check(
    config: config_lib.Config, task: Task, folder: RunFolder, stages: Sequence[str], codec=None
) -> None:
    """Checks before any work that a run has fine-tuned weights or a probe to measure; process 0.

    InputError: neither fine-tuning nor the probe, of classification by L-BFGS, has finished or is
    among the stages; the attack has too few passes; what `config.robustness.compare` names is not
    fine-tuned, or for another task, for other classes or for images that this run's cannot become.
    """
    done = {s for s in ("finetune", "probe") if s in stages or has_finished(folder.summary(), s)}
    probes = config.task.name == "classify" and config.probe.method == "lbfgs"
    probes = probes and config.model.objective != "bert" and not config.robustness.compare
    if "finetune" not in done and not (probes and "probe" in done):
        raise InputError(
            f"--stages has robustness, which measures the fine-tuned network, but {folder.path} "
            "has no finished fine-tuning; name finetune in --stages as well."
        )
    tokens, calls = config.robustness.attack_tokens, config.robustness.attack_calls
    # The image as it is, then for every token a gradient and at least one candidate.
    if tokens and calls < 1 + 2 * tokens:
        reason = f"config.robustness.attack_tokens={tokens} takes {1 + 2 * tokens} passes or more"
        rules.refuse(config, "robustness.attack_calls", f"{reason}; take more, or attack_tokens=0")
    if config.robustness.compare:
        found = _described(config, task, codec, with_params=False)
        size = (found.data.frames,) * (found.data.frames > 0) + found.data.size
        own = found.weights.codec
        shape = own.image_shape if own else size
        trial.try_out(found.data, own, shape, found.data.eval_transforms)


def _described(
    config: config_lib.Config, task: Task, codec: Codec | None, with_params: bool
) -> Described:
    name = f"config.robustness.compare={config.robustness.compare}"
    path = weights.locate(config.robustness.compare, f"{name} does not exist")
    data, params = config.data, {}
    if weights.is_weights_path(path):
        definition = codec and codec.definition
        palette = definition if isinstance(definition, Palette) else None
        found = weights.read(path, palette)
        params = found.on_mesh() if with_params else {}
        entries = found.eval_transforms
        if not entries and found.image_size != data.image_size:
            raise InputError(
                f"{name} reads images of config.data.image_size={found.image_size}, and does not "
                f"say how images become that, while this run's have {data.image_size}; name the "
                "run folder."
            )
        data = dataclasses.replace(data, eval_transforms=entries or data.eval_transforms)
    else:
        found, params = native.read_run(path, "finetune", with_params)
        made_by = record.config_of(path).data
        data = dataclasses.replace(
            data, eval_transforms=made_by.eval_transforms, frame_stride=made_by.frame_stride
        )
    data = dataclasses.replace(data, image_size=found.image_size, frames=found.frames)
    _must_fit(name, found, task)
    if of_task := found.learned_task:
        changed = dataclasses.replace(of_task.config, data=data, seed=config.seed)
        made = dataclasses.replace(of_task, config=changed)
    else:
        changed = dataclasses.replace(config, data=data, tokens=found.tokens, model=found.model)
        made = dataclasses.replace(task, config=changed)
    # Arrays that are on the devices already are not kept on the host as well.
    return Described(dataclasses.replace(found, params={}), made, data, params)


def _must_fit(name: str, found: WeightsFile, task: Task) -> None:
    """InputError where the weights are not fine-tuned for this task and these classes."""
    wanted = task.config.task.name
    kind = found.task.name if found.task else "classify" if found.classes else None
    if kind != wanted:
        held = f"is fine-tuned for config.task.name={kind}" if kind else "is not fine-tuned"
        raise InputError(f"{name} {held}, but this run's task is {wanted}; name weights for it.")
    known = {"classify": found.class_names, "detect": found.object_names}
    names = known.get(kind, found.map_names)
    count = found.classes if kind == "classify" else len(names)
    given = task.names
    numbered = given == tuple(map(str, range(len(given))))
    if count != len(given) or (names and not numbered and tuple(names) != given):
        theirs = shorten(names, room=60) if names else f"{count} classes"
        raise InputError(
            f"{name} tells apart {theirs}, but this run's classes are {shorten(given, room=60)}; "
            "name weights for these."
        )
