"""A student beside its teachers, and beside an equal network that is trained without teachers."""

import logging
from collections.abc import Callable, Iterable

from gptv_jax import hosts
from gptv_jax.checkpoint import newest_step
from gptv_jax.runs.context import Context
from gptv_jax.runs.record import RunFolder
from gptv_jax.stages import pretrained
from gptv_jax.train.loop import Fitted
from gptv_jax.train.step import Metric

LOG = logging.getLogger(__name__)
WAYS = ("equal_steps", "equal_time")  # of training the student without teachers
TEACHER = "teacher_"  # beginning of the teachers' numbers
ALONE = f"pretrain_{WAYS[0]}"  # the training that pretrains the student without teachers


def origin(context: Context) -> str:
    """With which weights fine-tuning without teachers begins; a name of `runs.distilled.ORIGINS`.

    Of a pretraining with teachers that was compared these are the weights of the training `ALONE`,
    which had no teachers. In all other cases they are those that fine-tuning with teachers takes.
    """
    config, path = context.config, context.folder.path
    if config.tokens.kind == "none":
        return "random weights"
    if not hosts.from_first(lambda: pretrained.has_own(config, path)):
        return "init_from"
    if not (config.distill.teacher or config.distill.cached):
        return "pretrain"
    return ALONE if config.distill.compare else "distilled pretrain"


def measure(metric: Metric, splits: dict[str, Callable[[], Iterable]], params: dict) -> dict:
    """{"test_kl": ..., "teacher_test_nats_per_token": ...} of weights, beside the teachers.

    `metric` is `distillation.make_metric`, and `splits` make the batches of every split.
    """
    found = {}
    for split, batches in splits.items():
        for name, value in metric.measure(params, batches()).items():
            whose = TEACHER if name.startswith(TEACHER) else ""
            found[f"{whose}{split}_{name.removeprefix(whose)}"] = value
    return found


def gap_closed(score: str, without: float, taught: float, teacher: float) -> float | None:
    """The share of the gap between the student without teachers and the teacher that is closed.

    Of a score such as "test_accuracy" larger is better, of "test_nats_per_token" smaller. None:
    the teacher is no better than the student without teachers.
    """
    gap = teacher - without
    better = -gap if score.endswith("nats_per_token") else gap
    return (taught - without) / gap if better > 1e-6 else None


def without_teachers(
    folder: RunFolder,
    stage: str,
    distilled: Fitted,
    own: dict,
    steps: int,
    score: str,
    measured: Callable[[dict], dict],
    train: Callable[[str, int], Fitted],
) -> dict[str, float | int | None]:
    """Numbers of the student that learns from the data alone, at equal steps and at equal time.

    At equal time so many steps are asked for as take the seconds of the steps that the `distilled`
    training has taken, by the measured time of a step without teachers, and no fewer than those
    steps. `..._steps` are the steps that each training has taken, of which there may be fewer than
    were asked for (`finetune.patience`), and `..._seconds` their seconds; "steps_taken" and
    "training_seconds" are of the `distilled` training. `gap_closed_at_...` are results of the
    function `gap_closed`.

    Args:
      folder: of the run.
      stage: name of the stage, with which the trainings' names begin.
      distilled: the student's training with teachers.
      own: what `measured` gives of that student.
      steps: that the distilled training was to take, as is the one at equal steps.
      score: a number of `measured`, such as "test_nats_per_token".
      measured: `params -> numbers`, see `measure`.
      train: `(name, steps) -> Fitted`, trains the student without teachers.
    """
    found = {"steps_taken": distilled.taken, "training_seconds": distilled.seconds}
    for way in WAYS:
        name = f"{stage}_{way}"
        LOG.info("%s trains the same network without teachers, %d steps at most.", name, steps)
        fitted = train(name, steps)
        numbers = measured(fitted.params)
        found |= {f"{way}_{n}": v for n, v in numbers.items() if not n.startswith(TEACHER)}
        closed = gap_closed(score, numbers[score], own[score], own[f"{TEACHER}{score}"])
        found |= {f"gap_closed_at_{way}": closed}
        found |= {f"{way}_steps": fitted.taken, f"{way}_seconds": fitted.seconds}
        steps = distilled.taken
        if distilled.seconds and fitted.seconds:
            steps = max(steps, round(distilled.seconds * fitted.taken / fitted.seconds))
        # A run that is given more steps measures its times anew, but cannot take steps back.
        place = folder.checkpoints(f"{stage}_{WAYS[1]}")
        taken = hosts.from_first(lambda place=place: newest_step(place) if place.exists() else 0)
        steps = max(steps, taken)
    return found
