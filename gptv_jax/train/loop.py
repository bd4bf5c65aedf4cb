"""The training loop: one fixed order of events, shared by every stage that takes gradients."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import hosts, sharding
from gptv_jax.checkpoint import Checkpoints, DamagedError
from gptv_jax.errors import InputError
from gptv_jax.train import profiling
from gptv_jax.train.goodput import Sessions
from gptv_jax.train.metrics import MetricWriter, Progress, mfu

LOG = logging.getLogger(__name__)

# What is saved beside the state, before the first step.
FIRST = {
    "position": 0,  # in the data, and the number of steps taken
    "evaluations": [],
    "measured": None,  # the newest step that `measure` was called at
    "events": None,  # that the log held of the training
    "time": 0.0,  # of the save, in seconds since 1970
    "seconds": 0.0,  # that the timed steps took
    "timed": 0,  # how many these are
}


class Fitted(NamedTuple):
    """A finished training."""

    params: dict  # of the best evaluation by accuracy, or else of the last step; or their average
    step: int  # that they are of
    evaluations: list[dict]  # {"step", and what `evaluate` gave}, in order
    tokens_per_second: float | None  # of training steps alone, compilation left out
    sessions: dict[str, float | int | None]  # see `Sessions.numbers`


def fit(
    name: str,
    config: config_lib.Train,
    *,
    length: int,
    flops: int,
    checkpoints: Checkpoints,
    log: MetricWriter,
    initial: Callable[[], dict],
    abstract: dict,
    train_step: Callable,
    batches: Callable[[int], Iterator[dict]],
    evaluate: Callable[[dict], dict[str, float]],
    patience: int = 0,
    measure: Callable[[dict], dict[str, float]] | None = None,
    measure_every: int = 0,
    profiler: profiling.Profiler = profiling.OFF,
) -> Fitted:
    """Trains to the end, from the newest checkpoint where there is one.

    Args:
      name: of the training, in the log.
      config: steps and intervals.
      length: tokens of an image.
      flops: that training needs for one of them, forward and backward, for the MFU.
      checkpoints: open, and left open.
      log: takes the events.
      initial: makes the train state, see `step.state_of`, where there is no checkpoint.
      abstract: that state's shapes and shardings.
      train_step: `(state, batch) -> (state, metrics)`; donates the state.
      batches: `position -> iterator` over this process's share of the batches from there on.
      evaluate: `params -> numbers`; with "accuracy" and "class_nats" among them, the checkpoint
        with the best accuracy, among equals the lowest cross-entropy, is kept, and returned.
      patience: evaluations without a better one after which it stops; 0: never.
      measure: `params -> numbers` that are only logged.
      measure_every: steps between two of them; 0: none.
      profiler: surrounds every step.

    Raises:
      InputError: the loss, a gradient or a weight is no longer finite (names the step), or no
        checkpoint can be read.
      StoppedError: SIGTERM came; the state is saved, without an evaluation that was under way.
    """
    began = time.time()
    restored = checkpoints.restore_latest(abstract)
    state, info = restored or (initial(), FIRST)
    info = FIRST | info  # an older checkpoint lacks some of it
    start = step = info["position"]
    evaluations, clock = list(info["evaluations"]), Clock(info["seconds"], info["timed"])
    measured = info["measured"]
    checkpoints.best = _chosen(evaluations)
    log.rewind(name, step if restored else -1, info["events"])
    sessions = Sessions(log.folder, name, began, step, info["time"])
    if restored:
        told = (name, step, config.steps, *sessions.lost)
        LOG.info("%s continues from step %d of %d; %d steps and %.1f s since were lost.", *told)
    data, pending, stopping = batches(step), None, False
    progress = Progress(name, config.steps, step)

    def settle():
        """Fetches the metrics of the newest step, checks them and logs them where due."""
        nonlocal pending
        if pending is None:
            return
        at, values = pending[0], {k: float(v) for k, v in jax.device_get(pending[1]).items()}
        pending = None
        wrong = {k: v for k, v in values.items() if not math.isfinite(v)}
        if wrong:
            found = ", ".join(f"{k} is {v}" for k, v in wrong.items())
            checkpoints.wait()
            good = max(checkpoints.steps(), default=None)
            raise InputError(
                f"{name} stopped at step {at}: {found}. The last good checkpoint is step "
                f"{good}, in {checkpoints.folder}. A lower optimizer.learning_rate or a "
                "clip_norm is the usual remedy."
            )
        if at % config.log_every == 0 or at == config.steps:
            speed = clock.lap(config.batch_size * length)
            share = mfu(flops, speed["tokens_per_second"])
            values |= {**speed, "mfu": share}
            log.write(name, at, values)
            progress.report(at, values)
            sessions.seen(at)

    def drain():
        """Waits for the newest step; the time is its own."""
        with clock.span(steps=0):
            settle()

    def judge() -> bool:
        """Evaluates and measures where it is due and not done; whether it is the best so far."""
        nonlocal measured
        better = False
        due = step == config.steps or (config.eval_every and step % config.eval_every == 0)
        if due and all(e["step"] != step for e in evaluations):
            drain()
            numbers = evaluate(state[config.weights])
            better = _is_better(evaluations, numbers)
            evaluations.append({"step": step, **numbers})
            checkpoints.best = _chosen(evaluations)
            log.write(name, step, {f"validation_{k}": v for k, v in numbers.items()})
            sessions.seen(step)
        if measure_every and step % measure_every == 0 and measured != step:
            drain()
            log.write(name, step, measure(state[config.weights]))
            measured = step
        return better

    # The order is fixed: evaluate, save, next batch, step, log. What is saved includes the
    # evaluation of the same step, or else, where that was given up in order to stop, it is the
    # first thing that whoever continues does. The position moves only after the save.
    with contextlib.ExitStack() as until_saved:
        while True:
            better = False
            if not stopping:
                try:
                    better = judge()
                except hosts.EvaluationStoppedError:
                    stopping = True
            last = step == config.steps or _exhausted(evaluations, patience)

            if stopping or last or better or step % config.checkpoint_every == 0:
                drain()
                info = {"position": step, "evaluations": evaluations, "measured": measured}
                info |= {"events": log.count(name), "time": time.time(), **clock.saved()}
                checkpoints.save(step, state, info)
                sessions.seen(step)
            if stopping or last:
                checkpoints.wait()
                sessions.seen(step)
            if stopping:
                raise hosts.StoppedError(
                    f"{name} stopped by SIGTERM at step {step}, saved in "
                    f"{time.monotonic() - stop.since:.1f} s; the same command continues"
                )
            if last:
                break

            # Nothing moves between host and device but what is named here. A process's first step
            # compiles, and is not timed.
            timed = clock.span(steps=1) if step > start else contextlib.nullcontext()
            with profiler.step(step + 1, drain), jax.transfer_guard("disallow"), timed:
                with clock.waiting(), jax.profiler.TraceAnnotation("next batch"):
                    local = next(data)
                state, metrics = train_step(state, sharding.global_batch(local))
                step += 1
                settle()  # of the step before, while this one runs
                pending = (step, metrics)
                if step == start + 1:  # until now there was nothing to lose
                    stop = until_saved.enter_context(hosts.deferred_stop())
                stopping = stop.agreed()
            progress.advance()

    progress.close()
    speed = clock.tokens_per_second(config.batch_size * length)
    spent = sessions.numbers(clock.of_steps(step))

    def best() -> int | None:
        held = {*checkpoints.steps(), step}
        return _chosen([e for e in evaluations if e["step"] in held])

    while (chosen := best()) not in (None, step):
        try:
            restored = checkpoints.restore(chosen, {config.weights: abstract[config.weights]})
            return Fitted(restored[0][config.weights], chosen, evaluations, speed, spent)
        except DamagedError as error:
            checkpoints.set_aside(chosen)
            LOG.warning("%s Falling back to step %d.", error, best())
    return Fitted(state[config.weights], step, evaluations, speed, spent)


def totals(eval_step: Callable, params: dict, batches: Iterator[dict]) -> dict[str, np.ndarray]:
    """An evaluation's sums over a whole split, every example once."""
    total = None
    for batch in hosts.until_stop(batches):
        sums = eval_step(params, sharding.global_batch(batch))
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
    return jax.device_get(total)


def evaluate_all(eval_step: Callable, params: dict, batches: Iterator[dict]) -> dict:
    """Means over a whole split, every example once.

    nats_per_token and, with a class head, accuracy and class_nats (per image).
    """
    total = {k: float(v) for k, v in totals(eval_step, params, batches).items()}
    numbers = {"nats_per_token": total["nats_per_token"] / total["images"]}
    if "correct" in total:
        numbers["accuracy"] = total["correct"] / total["images"]
        numbers["class_nats"] = total["class_nats"] / total["images"]
    return numbers


class Clock:
    """Seconds of training steps and how many; compilation, saves and evaluations do not count."""

    def __init__(self, seconds: float, steps: int):
        self.total, self.lap_start = [seconds, steps, 0.0], [seconds, steps, 0.0]
        self._wait = 0.0

    @contextlib.contextmanager
    def span(self, *, steps: int):
        """Counts the time in the `with`, and the steps taken in it."""
        begin, self._wait = time.perf_counter(), 0.0
        yield
        spent = (time.perf_counter() - begin, steps, self._wait)
        self.total = [a + b for a, b in zip(self.total, spent, strict=True)]

    @contextlib.contextmanager
    def waiting(self):
        """Within a span: the share of it that waits for data."""
        begin = time.perf_counter()
        yield
        self._wait += time.perf_counter() - begin

    def lap(self, tokens_per_step: int) -> dict[str, float | None]:
        """Speed and data-wait share since the last lap."""
        seconds, steps, wait = (a - b for a, b in zip(self.total, self.lap_start, strict=True))
        self.lap_start = list(self.total)
        if not steps:
            return {"tokens_per_second": None, "data_wait_share": None}
        speed = steps * tokens_per_step / seconds
        return {"tokens_per_second": speed, "data_wait_share": wait / seconds}

    def tokens_per_second(self, tokens_per_step: int) -> float | None:
        """Over the whole training, whatever number of processes it took."""
        seconds, steps, _ = self.total
        return steps * tokens_per_step / seconds if steps else None

    def of_steps(self, steps: int) -> float | None:
        """What so many steps take, those that were not timed as long as the others."""
        seconds, timed, _ = self.total
        return seconds / timed * steps if timed else None

    def saved(self) -> dict:
        """What a checkpoint keeps."""
        return {"seconds": self.total[0], "timed": self.total[1]}


def _preference(evaluation: dict) -> tuple[float, float]:
    """What the best evaluation is chosen by: accuracy, then cross-entropy of the class."""
    return evaluation["accuracy"], -evaluation["class_nats"]


def _is_better(evaluations: list[dict], numbers: dict) -> bool:
    """Whether an accuracy was measured that is preferred to all before."""
    scored = "accuracy" in numbers
    return scored and all(_preference(numbers) > _preference(e) for e in evaluations)


def _chosen(evaluations: list[dict]) -> int | None:
    """The step of the best evaluation; None where no accuracy was measured."""
    scored = [e for e in evaluations if "accuracy" in e]
    return max(scored, key=_preference)["step"] if scored else None


def _exhausted(evaluations: list[dict], patience: int) -> bool:
    chosen = _chosen(evaluations)
    since = [e for e in evaluations if chosen is not None and e["step"] > chosen]
    return patience > 0 and len(since) >= patience
