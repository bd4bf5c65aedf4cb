"""Weights of LPIPS in the form of the authors' package, for `model.lpips`."""

import pathlib

from gptv_jax import files
from gptv_jax.model.lpips import Weights, shapes
from gptv_jax.weights.strict_reader import StrictReader


def load(path: str | pathlib.Path) -> Weights:
    """Reads the state dict of `lpips.LPIPS(net="vgg")` from a .safetensors file.

    Raises:
      InputError: a tensor is missing, left over or misshapen; all faults are listed.
    """
    path = pathlib.Path(path).absolute()
    arrays, _ = files.read_safetensors(path)
    # The state dict holds the linear layers twice, and constants that `model.lpips` has.
    ignored = ("lins.", "scaling_layer.")
    reader = StrictReader.of_arrays({n: a for n, a in arrays.items() if not n.startswith(ignored)})
    weights = {name: reader.take(name, shape) for name, shape in shapes().items()}
    reader.close(path, "LPIPS with VGG-16")
    return weights
