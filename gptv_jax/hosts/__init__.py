"""Several processes, usually one a host: how they meet, exchange values, and stop together.

The rest of the package uses the names below; the commands alone use the modules of this folder.
"""

from gptv_jax.hosts.exchange import bytes_of_first, from_all, from_first
from gptv_jax.hosts.stopping import (
    EvaluationStoppedError,
    StoppedError,
    deferred_stop,
    until_stop,
)

__all__ = [
    "EvaluationStoppedError",
    "StoppedError",
    "bytes_of_first",
    "deferred_stop",
    "from_all",
    "from_first",
    "until_stop",
]
