"""The training loop: one fixed order of events, shared by every stage that takes gradients."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.checkpoint import Checkpoints, DamagedError
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.train import profiling
from gptv_jax.train.metrics import MetricWriter, Progress, mfu

LOG = logging.getLogger(__name__)


class Fitted(NamedTuple):
    """A finished training."""

    params: dict  # of the best evaluation by accuracy, or else of the last step
    step: int  # that they are of
    evaluations: list[dict]  # {"step", and what `evaluate` gave}, in order
    tokens_per_second: float | None  # of training steps alone, compilation left out


def fit(
    name: str,
    config: config_lib.Train,
    network: Network,
    *,
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
    forward_only: bool = False,
    profiler: profiling.Profiler = profiling.OFF,
) -> Fitted:
    """Trains to the end, from the newest checkpoint where there is one.

    Args:
      name: of the training, in the log.
      config: steps and intervals.
      network: what is trained.
      checkpoints: open, and left open.
      log: takes the events.
      initial: makes the train state {step, params, opt} where there is no checkpoint.
      abstract: that state's shapes and shardings.
      train_step: `(state, batch) -> (state, metrics)`; donates the state.
      batches: `position -> iterator` over this process's share of the batches from there on.
      evaluate: `params -> numbers`; with "accuracy" and "class_nats" among them, the checkpoint
        with the best accuracy, among equals the lowest cross-entropy, is kept, and returned.
      patience: evaluations without a better one after which it stops; 0: never.
      measure: `params -> numbers` that are only logged.
      measure_every: steps between two of them; 0: none.
      forward_only: gradients do not go through the network, which its MFU is to count.
      profiler: surrounds every step.

    Raises:
      InputError: the loss, a gradient or a weight is no longer finite (names the step), or no
        checkpoint can be read.
    """
    restored = checkpoints.restore_latest(abstract)
    if restored:
        state, info = restored
    else:
        state, info = initial(), {"position": 0, "seconds": 0.0, "timed": 0, "evaluations": []}
    start = step = info["position"]
    evaluations, clock = list(info["evaluations"]), Clock(info["seconds"], info["timed"])
    checkpoints.best = _chosen(evaluations)
    log.rewind(name, step if restored else -1)
    if restored:
        LOG.info("%s continues from step %d of %d.", name, step, config.steps)
    data, pending = batches(step), None
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
            speed = clock.lap(config.batch_size * network.length)
            share = mfu(network, speed["tokens_per_second"], forward_only=forward_only)
            values |= {**speed, "mfu": share}
            log.write(name, at, values)
            progress.report(at, values)

    def drain():
        """Waits for the newest step; the time is its own."""
        with clock.span(steps=0):
            settle()

    # The order is fixed: evaluate, save, next batch, step, log. What is saved includes the
    # evaluation of the same step, and the position moves only after the save.
    while True:
        last = step == config.steps
        fresh = step > start or not restored  # a restored step was evaluated before its save
        better = False
        if fresh and (last or (config.eval_every and step % config.eval_every == 0)):
            with clock.span(steps=0):
                settle()
            numbers = evaluate(state["params"])
            better = _is_better(evaluations, numbers)
            evaluations.append({"step": step, **numbers})
            checkpoints.best = _chosen(evaluations)
            log.write(name, step, {f"validation_{k}": v for k, v in numbers.items()})
        if fresh and measure_every and step % measure_every == 0:
            with clock.span(steps=0):
                settle()
            log.write(name, step, measure(state["params"]))
        last = last or _exhausted(evaluations, patience)

        if fresh and (last or better or step % config.checkpoint_every == 0):
            with clock.span(steps=0):
                settle()
            info = {"position": step, "evaluations": evaluations, **clock.saved()}
            checkpoints.save(step, state, info)
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
        progress.advance()

    progress.close()
    checkpoints.wait()
    speed = clock.tokens_per_second(config.batch_size * network.length)

    def best() -> int | None:
        held = {*checkpoints.steps(), step}
        return _chosen([e for e in evaluations if e["step"] in held])

    while (chosen := best()) not in (None, step):
        try:
            restored = checkpoints.restore(chosen, {"params": abstract["params"]})
            return Fitted(restored[0]["params"], chosen, evaluations, speed)
        except DamagedError as error:
            checkpoints.set_aside(chosen)
            LOG.warning("%s Falling back to step %d.", error, best())
    return Fitted(state["params"], step, evaluations, speed)


def evaluate_all(eval_step: Callable, params: dict, batches: Iterator[dict]) -> dict:
    """Means over a whole split, every example once.

    nats_per_token and, with a class head, accuracy and class_nats (per image).
    """
    total = None
    for batch in batches:
        sums = eval_step(params, sharding.global_batch(batch))
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
    total = {k: float(v) for k, v in jax.device_get(total).items()}
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
