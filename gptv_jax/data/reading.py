"""Reading ahead by Grain's threads and worker processes, and padding of the last batch."""

import multiprocessing
import os
import signal
import threading

import grain
import numpy as np

from gptv_jax.data.damage import NOT_DAMAGED


class PaddedSource:
    """The first `limit` examples of a source, padded to a whole number of batches.

    "mask" is 0 for padding and for examples that replace a damaged image; "index" is the number of
    the example.
    """

    def __init__(self, source, batch_size: int, limit: int | None):
        self.source = source
        self.examples = len(source) if limit is None else min(limit, len(source))
        self.length = -(-self.examples // batch_size) * batch_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        padding = index >= self.examples
        element = self.source[0 if padding else index]
        counts = not padding and element.get("damaged", NOT_DAMAGED) == NOT_DAMAGED
        return {**element, "mask": np.float32(counts), "index": np.int32(index)}


def read_ahead(data: grain.MapDataset, source, workers: int) -> grain.IterDataset:
    """Reads the elements of `data`, which come from `source`, ahead of their use.

    `workers` is the number of processes; 0: threads of this process.
    """
    # Image files are decoded without Python's global lock; tokens are unpacked with it.
    threads = min(os.cpu_count(), 16) if source.stored_as == "encoded" else 1
    read = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16))
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers)
        read = read.mp_prefetch(options, worker_init_fn=_end_with_parent)
    return read


def _end_with_parent(*_) -> None:
    """Makes a worker end when its parent process ends, and not before.

    A scheduler's SIGTERM may reach the workers while the parent still takes a last training step.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
