"""A trace of a few training steps, for TensorBoard (xprof) and Perfetto."""

import contextlib
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator

import jax

LOG = logging.getLogger(__name__)


class Profiler:
    """Traces some steps of a training.

    Every process writes two files into `FOLDER/plugins/profile/steps_FIRST_LAST/`, the folder that
    TensorBoard reads: `process_I.xplane.pb` and, for Perfetto, `process_I.perfetto.json.gz`.
    """

    def __init__(self, steps: tuple[int, int] | None = None, folder: pathlib.Path | None = None):
        """Traces the first to the last of `steps`, both included; None: nothing."""
        self._steps, self._folder = steps, folder
        self._began: int | None = None  # first step of the trace that is being recorded

    @contextlib.contextmanager
    def step(self, number: int, drain: Callable[[], None]) -> Iterator[None]:
        """Surrounds a step.

        Args:
          number: of the step; the first one is 1.
          drain: waits until all earlier steps are done. It is called before the first traced step,
            so that none of them is in the trace, and after the last, so that it is there whole.
        """
        first, last = self._steps or (0, 0)
        if first and number > last:
            LOG.info("No trace: steps %d to %d (config.profile.steps) are past.", first, last)
            self._steps = None
        if not first <= number <= last:
            yield
            return
        scratch = self._folder / f"process_{jax.process_index()}.tmp"
        if self._began is None:
            drain()
            self._began = number
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # an event for every Python call would slow the steps
            jax.profiler.start_trace(scratch, create_perfetto_trace=True, profiler_options=options)
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if number == last:
            drain()
            jax.profiler.stop_trace()
            self._collect(scratch, self._folder / "plugins" / "profile")

    def _collect(self, scratch: pathlib.Path, traces: pathlib.Path) -> None:
        folder = traces / f"steps_{self._began}_{self._steps[1]}"
        folder.mkdir(parents=True, exist_ok=True)
        # JAX names its files by host, which processes may share, and its folders by the second.
        for kind, pattern in (
            ("xplane.pb", "*.xplane.pb"),
            ("perfetto.json.gz", "perfetto_trace.json.gz"),
        ):
            (written,) = scratch.glob(f"plugins/profile/*/{pattern}")
            written.replace(folder / f"process_{jax.process_index()}.{kind}")
        shutil.rmtree(scratch)
        LOG.info("The trace of steps %d to %d is in %s.", self._began, self._steps[1], folder)
        self._steps = self._began = None


OFF = Profiler()
