"""The training loop: one fixed order of events, shared by every stage that takes gradients."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from gptv_jax import config as config_lib
from gptv_jax import hosts, sharding
from gptv_jax.checkpoint import Checkpoints, DamagedError
from gptv_jax.errors import InputError, shorten
from gptv_jax.train import metrics

LOG = logging.getLogger(__name__)

# Saved beside the state; these are the values before the first step.
FIRST = {
    "position": 0,  # in the data, which is the number of steps taken
    "evaluations": [],
    "measured": None,  # the newest step at which `measure` was called
    "events": None,  # number of this training's events in the log
    "time": 0.0,  # of the save, in seconds since 1970
    "seconds": 0.0,  # spent in timed steps
    "timed": 0,  # number of timed steps
}


class Fitted(NamedTuple):
    """A finished training."""

    params: dict  # of the best evaluation where there is a ranking, else of the last step
    step: int  # at which `params` were evaluated
    evaluations: list[dict]  # {"step", and what `evaluate` returned}, in order
    tokens_per_second: float | None  # of the training steps alone, without compilation
    sessions: dict[str, float | int | None]  # see `Sessions.numbers`
    taken: int  # number of steps; fewer than asked for where `patience` has ended the training
    seconds: float | None  # of these steps, without compilation, evaluations and saves


def fit(
    name: str,  # of the training, in the log
    config: config_lib.Train,
    *,
    length: int,  # tokens of an image
    flops: int,  # of training on one token, forward and backward, for the MFU
    checkpoints: Checkpoints,  # they stay open
    log: metrics.MetricWriter,
    initial: Callable[[], dict],  # makes the state, see `step.state_of`, without a checkpoint
    abstract: dict,  # shapes and shardings of the train state
    train_step: Callable,  # `(state, batch) -> (state, metrics)`; donates the state
    batches: Callable[[int], Iterator[dict]],  # this process's rows from a position in the data on
    evaluate: Callable[[dict], dict[str, float]],  # `params -> numbers`
    primary: dict[str, int] | None = None,  # the numbers that rank checkpoints, see `Metric`
    patience: int = 0,  # evaluations without a better one until the training stops; 0: never
    measure: Callable[[dict], dict[str, float]] | None = None,  # numbers that are only logged
    measure_every: int = 0,  # steps; 0: never
    profiler: metrics.Profiler | None = None,
) -> Fitted:
    """Trains to the end, from the newest checkpoint where there is one.

    With `primary`, the best checkpoint is kept and its weights are returned.

    InputError: the loss, a gradient or a weight is no longer finite (names the step), or no
    checkpoint can be read. StoppedError: SIGTERM came; the state is saved, without an evaluation
    that was under way.
    """
    began = time.time()
    restored = checkpoints.restore_latest(abstract)
    state, info = restored or (initial(), FIRST)
    info = FIRST | info  # an older version saved fewer entries
    start = step = info["position"]
    evaluations, measured = list(info["evaluations"]), info["measured"]
    clock, profiler = metrics.Clock(info["seconds"], info["timed"]), profiler or metrics.Profiler()
    checkpoints.best = metrics.best_step(evaluations, primary)
    log.rewind(name, step if restored else -1, info["events"])
    sessions = metrics.Sessions(log.folder, name, began, step, info["time"])
    if restored:
        line = "%s continues from step %d of %d; %s%d steps and %.1f s since were lost."
        least = "at least " if sessions.lost_at_least else ""
        LOG.info(line, name, step, config.steps, least, *sessions.lost)
    LOG.info("%s compiles its evaluation and its train step: the first of each take longer.", name)
    data = batches(step)
    pending = stop = None  # `pending`: the newest step and its metrics, until they are logged
    stopping = False
    progress = metrics.Progress(name, config.steps, step)

    if evaluations:
        progress.evaluated(evaluations, primary, quiet=True)

    def settle():
        """Fetches the metrics of the newest step, checks them and logs them where due."""
        nonlocal pending
        if pending is None:
            return
        at, values = pending[0], {k: float(v) for k, v in jax.device_get(pending[1]).items()}
        pending = None
        wrong = [f"{k} is {v}" for k, v in values.items() if not math.isfinite(v)]
        if wrong:
            checkpoints.wait()
            good = max(checkpoints.steps(), default=None)
            raise InputError(
                f"{name} stopped at step {at}: {shorten(wrong)}. The last good checkpoint is step "
                f"{good}, in {checkpoints.folder}. A lower optimizer.learning_rate or a clip_norm"
                f"{', in another --workdir,' if good else ''} is the usual remedy."
            )
        if at % config.log_every == 0 or at == config.steps:
            speed = clock.lap(config.batch_size * length)
            values |= {**speed, "mfu": metrics.mfu(flops, speed["tokens_per_second"])}
            log.write(name, at, values)
            progress.report(at, values)
            sessions.seen(at)

    def drain():
        """Waits for the newest step, and counts the wait as its time."""
        if pending is None:  # a finished training that starts again keeps its seconds
            return
        begin = time.perf_counter()
        settle()
        clock.add(time.perf_counter() - begin)

    def judge() -> bool:
        """Evaluates and measures where due and not yet done.

        Returns True if this step's evaluation is the best so far.
        """
        nonlocal measured
        better = False
        due = step == config.steps or (config.eval_every and step % config.eval_every == 0)
        if due and all(e["step"] != step for e in evaluations):
            drain()
            numbers = evaluate(state[config.weights])
            evaluations.append({"step": step, **numbers})
            checkpoints.best = metrics.best_step(evaluations, primary)
            better = checkpoints.best == step
            log.write(name, step, {f"validation_{k}": v for k, v in numbers.items()})
            progress.evaluated(evaluations, primary)
            sessions.seen(step)
        if measure_every and step % measure_every == 0 and measured != step:
            drain()
            log.write(name, step, measure(state[config.weights]))
            measured = step
        return better

    # The order is fixed: evaluate, save, next batch, step, log. A save includes the evaluation of
    # its step; where the evaluation was given up in order to stop, the run that continues begins
    # with it. The position in the data moves only after the save.
    with contextlib.ExitStack() as until_saved:
        until_saved.callback(progress.close)  # after an interrupt a notebook would show it again
        while True:
            better = False
            if not stopping:
                try:
                    better = judge()
                except hosts.StoppedError:
                    stopping = True
            best = checkpoints.best
            since_best = 0 if best is None else sum(e["step"] > best for e in evaluations)
            last = step == config.steps or 0 < patience <= since_best

            if stopping or last or better or step % config.checkpoint_every == 0:
                drain()
                info = {"position": step, "evaluations": list(evaluations), "measured": measured}
                info |= {"events": log.counts[name], "time": time.time()}
                info |= {"seconds": float(clock.total[0]), "timed": int(clock.total[1])}
                checkpoints.save(step, state, info)
                sessions.seen(step)
            if stopping or last:
                checkpoints.wait()
                sessions.seen(step, ended=True)
                if not stopping:
                    break
                raise hosts.StoppedError(
                    f"{name} stopped by {stop.reason} at step {step}, saved in "
                    f"{time.monotonic() - stop.since:.1f} s; the same command continues"
                )

            # Within the guard only what is named moves between host and device.
            with profiler.step(step + 1, drain), jax.transfer_guard("disallow"):
                begin = time.perf_counter()
                with jax.profiler.TraceAnnotation("next batch"):
                    local = next(data)
                waited = time.perf_counter() - begin
                state, numbers = train_step(state, sharding.global_batch(local))
                step += 1
                settle()  # the metrics of the step before, while this step runs
                pending = (step, numbers)
                if step == start + 1:  # before the first step there is nothing to save
                    stop = until_saved.enter_context(hosts.deferred_stop())
                stopping = stop.agreed()
                if step > start + 1:  # a process's first step compiles
                    clock.add(time.perf_counter() - begin, 1, waited)
            progress.advance()

    seconds, timed, _ = clock.total.tolist()
    speed = timed * config.batch_size * length / seconds if timed else None
    # Steps that were not timed count at the mean of the timed ones.
    took = seconds / timed * step if timed else None
    told = evaluations, speed, sessions.numbers(took), step, took

    def best_left() -> int | None:
        return metrics.best_step(evaluations, primary, {*checkpoints.steps(), step})

    while (chosen := best_left()) not in (None, step):
        try:
            restored = checkpoints.restore(chosen, {config.weights: abstract[config.weights]})
            return Fitted(restored[0][config.weights], chosen, *told)
        except DamagedError as error:
            checkpoints.set_aside(chosen)
            LOG.warning("%s Falling back to step %d.", error, best_left())
    return Fitted(state[config.weights], step, *told)
