"""The real command as one of several processes.

python joined.py PORT INDEX COUNT FLAGS...
"""

import runpy
import sys

import jax

from gptv_jax import preemption


def main(port: str, index: str, count: str, *arguments: str) -> None:
    preemption.install()  # before JAX connects, as the command does
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    sys.argv = ["main.py", *arguments]
    runpy.run_module("gptv_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
