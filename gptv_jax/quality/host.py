"""JAX in float64 on the host, whatever devices the process computes on."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np

from gptv_jax.errors import InputError, first_line


def cpu() -> jax.Device:
    """The process's own CPU, the first where it was made several devices.

    Raises:
      InputError: JAX was told to leave the CPU out.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise InputError(
            f"generation quality is computed in float64 on the CPU, which JAX does not have here "
            f"({first_line(error)}); add it to JAX_PLATFORMS, as in JAX_PLATFORMS=cuda,cpu."
        ) from error


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Within it, in this thread, JAX computes in float64 on the process's own CPU.

    TPUs have no float64 in hardware, and a mesh that is set would spread the work over its devices.

    Raises:
      InputError: see `cpu`.
    """
    mesh = jax.sharding.Mesh(np.array([cpu()]), ("host",))
    with jax.enable_x64(True), jax.set_mesh(mesh):
        yield
