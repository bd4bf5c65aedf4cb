"""LPIPS compared with the authors' package: trained linear layers on a random VGG-16.

The test needs lpips and torchvision, which no extra installs, and is skipped without them. In a new
environment:

    pip install -e '.[test]' torch==2.13.0 torchvision==0.28.0 lpips
    pytest tests/test_parity_lpips.py
"""

import pathlib
import re
import warnings

import jax
import numpy as np
import pytest
from conftest import generator

from gptv_jax.model import lpips as ours
from gptv_jax.weights.strict_reader import load_lpips

torch = pytest.importorskip("torch", reason="torch is not installed")
lpips = pytest.importorskip("lpips", reason="lpips is not installed")

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "tokenizer.md"


@pytest.fixture(scope="module")
def theirs():
    """The authors' network; biases and features of the random VGG are as large as trained ones."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    with warnings.catch_warnings(action="ignore"):  # torchvision warns of how lpips calls it
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    with torch.no_grad():
        for weight in network.net.parameters():
            spread = 0.1 if weight.ndim == 1 else (2 / weight[0].numel()) ** 0.5
            torch.nn.init.normal_(weight, std=spread)
    return network


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory):
    """Weights that are converted by the code in the docs, word for word."""
    [code] = re.findall(r"```python\n(import lpips.*?)```", DOCS.read_text(), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("weights"))
        patch.setattr(lpips, "LPIPS", lambda net: {"vgg": theirs}[net])  # avoids the download
        exec(code, {})
        return load_lpips("lpips_vgg.safetensors")


@pytest.mark.parametrize("height, width", [(16, 16), (64, 48), (37, 50)])
def test_distances_agree(height, width, theirs, weights):
    rng = generator(height)
    one = rng.uniform(-1, 1, (3, height, width, 3)).astype(np.float32)
    other = rng.uniform(-1, 1, one.shape).astype(np.float32)
    other[1] = 0.98 * one[1] + 0.02 * other[1]  # nearly the same
    one[2], other[2] = -1, np.linspace(-1, 1, width, dtype=np.float32)[:, None]
    with torch.no_grad():
        pairs = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (one, other))
        wanted = theirs(*pairs).numpy().ravel()
    assert 0 < wanted[1] < wanted[0] / 10
    np.testing.assert_allclose(jax.jit(ours.distance)(weights, one, other), wanted, rtol=1e-4)
