"""Reading examples and batches ahead of their use, in threads or in worker processes."""

import math
import multiprocessing
import os
import signal
import threading

import grain

from gptv_jax import config as config_lib
from gptv_jax.data.damage import DecodedSource

# The most batches, and the most bytes of pixels in these batches, that each process reads ahead.
READ_AHEAD, READ_BYTES = 16, 2**30


def batches_ahead(config: config_lib.Data, rows: int) -> int:
    """Batches of `rows` RGB images, or clips, that a process reads ahead: 2 to `READ_AHEAD`."""
    pixels = 3 * max(config.frames, 1) * math.prod(config.size)
    return min(max(READ_BYTES // (rows * pixels), 2), READ_AHEAD)


def read_ahead(
    data: grain.MapDataset, source, workers: int, ahead: int = READ_AHEAD
) -> grain.IterDataset:
    """Reads `ahead` elements of `data` ahead, in each of `workers` processes; 0: in this one."""
    # Image files are decoded without Python's global lock; tokens are unpacked with it.
    threads = min(os.cpu_count(), ahead) if isinstance(source, DecodedSource) else 1
    read = data.to_iter_dataset(grain.ReadOptions(threads, ahead))
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers)
        read = read.mp_prefetch(options, worker_init_fn=_end_with_parent)
    return read


def _end_with_parent(*_) -> None:
    """Makes a worker end when its parent process ends, and not before.

    A scheduler's SIGTERM may reach the workers while the parent still takes a last training step.
    """

    def wait_for_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=wait_for_parent, daemon=True).start()
