"""Weights of LPIPS, of its authors' package, for `model.lpips`."""

import pathlib

from gptv_jax import files
from gptv_jax.model.lpips import Weights, shapes
from gptv_jax.weights.strict_reader import StrictReader


def load(path: str | pathlib.Path) -> Weights:
    """The weights of `lpips.LPIPS(net="vgg")`, from its state dict as a .safetensors file.

    Raises:
      InputError: a tensor is missing, left over or misshapen; all are listed.
    """
    path = pathlib.Path(path).absolute()
    arrays, _ = files.read_safetensors(path)
    # Theirs hold the same linear layers a second time, and the shift and scale of `model.lpips`.
    known = {n: a for n, a in arrays.items() if not n.startswith(("lins.", "scaling_layer."))}
    account = StrictReader.of_arrays(known)
    found = {name: account.take(name, shape) for name, shape in shapes().items()}
    account.close(path, "LPIPS with VGG-16")
    return found
