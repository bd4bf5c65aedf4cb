"""A student beside its teachers, and beside an equal network that is trained without teachers."""

import logging
from collections.abc import Callable, Iterable

from gptv_jax import hosts
from gptv_jax.checkpoint import newest_step
from gptv_jax.runs.context import Context
from gptv_jax.train.loop import Fitted
from gptv_jax.train.step import Metric

LOG = logging.getLogger(__name__)
WAYS = ("equal_steps", "equal_time")  # of training the student without teachers
TEACHER = "teacher_"  # beginning of the teachers' numbers


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
    context: Context,
    stage: str,
    distilled: Fitted,
    own: dict,
    steps: int,
    score: str,
    measured: Callable[[dict], dict],
    train: Callable[[str, int], Fitted],
) -> dict[str, float | int | None]:
    """Numbers of the student that learns from the data alone, at equal steps and at equal time.

    `equal_time_steps` are as many steps as take the time of the `distilled` training's steps, by
    the measured tokens a second of both, and no fewer than `steps`. `gap_closed_at_...`
    are results of the function `gap_closed`.

    Args:
      context: of the run.
      stage: name of the stage, with which the trainings' names begin.
      distilled: the student's training with teachers.
      own: what `measured` gives of that student.
      steps: that it was to take.
      score: a number of `measured`, such as "test_nats_per_token".
      measured: `params -> numbers`, see `measure`.
      train: `(name, steps) -> Fitted`, trains the student without teachers.
    """
    found = {}
    for way in WAYS:
        name = f"{stage}_{way}"
        LOG.info("%s trains the same network without teachers, %d steps.", name, steps)
        fitted = train(name, steps)
        numbers = measured(fitted.params)
        found |= {f"{way}_{n}": v for n, v in numbers.items() if not n.startswith(TEACHER)}
        closed = gap_closed(score, numbers[score], own[score], own[f"{TEACHER}{score}"])
        found |= {f"gap_closed_at_{way}": closed, f"{way}_steps": steps}
        rates = distilled.tokens_per_second, fitted.tokens_per_second
        if all(rates):
            steps = max(steps, round(steps * rates[1] / rates[0]))
        # A run that is given more steps measures its times anew, but cannot take steps back.
        place = context.folder.checkpoints(f"{stage}_{WAYS[1]}")
        taken = hosts.from_first(lambda place=place: newest_step(place) if place.exists() else 0)
        steps = max(steps, taken)
    return found
