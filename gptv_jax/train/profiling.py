"""A trace of a few training steps, for TensorBoard (xprof) and Perfetto."""

import contextlib
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator

import jax

LOG = logging.getLogger(__name__)


class Profiler:
    """Traces some steps of a training, and leaves the others alone.

    Every process writes two files into `FOLDER/plugins/profile/steps_FIRST_LAST/`, as TensorBoard
    wants it: `process_I.xplane.pb` for TensorBoard and `process_I.perfetto.json.gz` for Perfetto.
    """

    def __init__(self, steps: tuple[int, int] | None = None, folder: pathlib.Path | None = None):
        """Of the first to the last step, both traced; None: of none."""
        self._steps, self._folder = steps, folder
        self._began: int | None = None  # the step that the open trace begins with

    @contextlib.contextmanager
    def step(self, number: int, drain: Callable[[], None]) -> Iterator[None]:
        """Surrounds a step.

        Args:
          number: of the step; the first one is 1.
          drain: waits until no earlier step is under way, so that none is in the trace; called
            again at the end, for the last step to be in it whole.
        """
        first, last = self._steps or (0, 0)
        if first and number > last:
            LOG.info("No trace: steps %d to %d (config.profile.steps) are past.", first, last)
            self._steps = None
        if not first <= number <= last:
            yield
            return
        if self._began is None:
            drain()
            self._start(number)
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if number == last:
            drain()
            self._write(last)

    def _start(self, number: int) -> None:
        self._began = number
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # an event for every Python call would slow the steps
        jax.profiler.start_trace(
            self._scratch, create_perfetto_trace=True, profiler_options=options
        )

    def _write(self, last: int) -> None:
        jax.profiler.stop_trace()
        folder = self._folder / "plugins" / "profile" / f"steps_{self._began}_{last}"
        folder.mkdir(parents=True, exist_ok=True)
        # JAX names files by host, of which processes may share one, and folders by the second.
        for kind, pattern in (
            ("xplane.pb", "*.xplane.pb"),
            ("perfetto.json.gz", "perfetto_trace.json.gz"),
        ):
            (written,) = self._scratch.glob(f"plugins/profile/*/{pattern}")
            written.replace(folder / f"process_{jax.process_index()}.{kind}")
        shutil.rmtree(self._scratch)
        LOG.info("The trace of steps %d to %d is in %s.", self._began, last, folder)
        self._steps = self._began = None

    @property
    def _scratch(self) -> pathlib.Path:
        return self._folder / f"process_{jax.process_index()}.tmp"


OFF = Profiler()
