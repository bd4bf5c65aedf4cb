"""Reading ahead: Grain's threads and worker processes, and what fills a last batch."""

import multiprocessing
import os
import signal
import threading

import grain
import numpy as np

from gptv_jax.data.damage import SOUND


class Padded:
    """A source of a whole number of batches; what does not count has mask 0."""

    def __init__(self, source, batch_size: int, limit: int | None):
        self.source = source
        self.real = len(source) if limit is None else min(limit, len(source))
        self.length = -(-self.real // batch_size) * batch_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        real = index < self.real
        element = self.source[index if real else 0]
        counts = real and element.get("damaged", SOUND) == SOUND
        return {**element, "mask": np.float32(counts), "index": np.int32(index)}


def read_by(data: grain.MapDataset, source, workers: int) -> grain.IterDataset:
    """The elements of a data set, read ahead by threads or by Grain's worker processes.

    Args:
      data: what is read.
      source: that it comes from.
      workers: processes; 0: threads of this one.
    """
    # Decoding gives Python's lock away, unpacking tokens does not.
    threads = min(os.cpu_count(), 16) if source.stored_as == "encoded" else 1
    read = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16))
    if workers:
        read = read.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_bind_to_parent
        )
    return read


def _bind_to_parent(*_) -> None:
    """A worker ends with the process that it reads for, however that ends, and not before it.

    A scheduler's SIGTERM may go to the workers too, while a training still takes a last step.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
