"""The dtype in which a run on a CPU computes, where its configuration says bfloat16."""

import dataclasses
import logging
import pathlib

import jax

from gptv_jax import config as config_lib
from gptv_jax import files, hardware, hosts
from gptv_jax.config import run_file
from gptv_jax.stages import changes

LOG = logging.getLogger(__name__)
# Where a train step in bfloat16 was measured to be faster than in float32 (docs/results.md): a CPU
# that multiplies bfloat16 numbers, with a JAX that has such products. JAX 0.10 computes them in
# float32, and the conversions cost time.
FLAG, JAX = "avx512_bf16", (0, 12)


def is_faster(flags: str | None, version: tuple[int, ...]) -> bool:
    """Whether bfloat16 is faster than float32 on a CPU with these flags, in this version of JAX."""
    return FLAG in (flags or "").split() and version >= JAX


def settle_dtype(config: config_lib.Config, folder: pathlib.Path) -> config_lib.Config:
    """The configuration with the dtype that the run in `folder` computes in, which is recorded.

    On a CPU bfloat16 becomes float32 unless bfloat16 is faster or `model.bfloat16_on_cpu` is set. A
    run that has left work keeps its dtype, on whatever devices and with whatever JAX it continues.
    """
    if config.model.dtype != "bfloat16" or config.model.bfloat16_on_cpu:
        return config
    why = hosts.from_first(lambda: _why_float32(folder))
    if not why:
        return config
    LOG.info("The run computes in float32 in place of bfloat16, %s.", why)
    model = dataclasses.replace(config.model, dtype="float32")
    return dataclasses.replace(config, model=model)


def _why_float32(folder: pathlib.Path) -> str:
    """Why the run in the folder computes in float32; "": the run computes in bfloat16."""
    if changes.begun_run(str(folder)):
        on_cpu = files.read_json(folder / "config.json", {}).get("devices", "").endswith(" cpu")
        begun = on_cpu and run_file.config_of(folder).model.dtype == "float32"
        return "as it began" if begun else ""
    if jax.default_backend() != "cpu":
        return ""
    if is_faster(hardware.cpu_flags(), jax.__version_info__):
        return ""
    slower = f"which is not known to be faster on this CPU with jax {jax.__version__}"
    return f"{slower}; --config.model.bfloat16_on_cpu=true keeps bfloat16"
