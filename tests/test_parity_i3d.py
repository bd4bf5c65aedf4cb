"""I3D on random weights, compared with a network that the test writes in PyTorch.

The test needs torch, which no extra installs; it is skipped without. In a new environment:

    pip install -e '.[test]' torch==2.13.0
    pytest tests/test_parity_i3d.py
"""

import numpy as np
import pytest
import safetensors.numpy
from conftest import random_image
from test_quality_i3d import random_weights

from gptv_jax.quality.features import make_features

torch = pytest.importorskip("torch", reason="torch is not installed")
functional = torch.nn.functional


def same(x, sides, strides, value=0.0):
    """Pads as TensorFlow's SAME does: more behind than in front."""
    pads = []
    for n, side, stride in reversed(list(zip(x.shape[2:], sides, strides, strict=True))):
        short = max((-(-n // stride) - 1) * stride + side - n, 0)
        pads += [short // 2, short - short // 2]
    return functional.pad(x, pads, value=value)


class Network:
    """The layers one after the other, as the paper's figure 3 has them."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = {name: torch.from_numpy(value) for name, value in weights.items()}

    def convolve(self, name: str, x, stride: int = 1):
        kernel, w = self.weights[f"{name}.conv3d.weight"], self.weights
        x = functional.conv3d(same(x, kernel.shape[2:], (stride,) * 3), kernel, stride=stride)
        statistics = (
            w[f"{name}.bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.relu(functional.batch_norm(x, *statistics, eps=1e-3))

    @staticmethod
    def pool(x, sides, strides):
        return functional.max_pool3d(same(x, sides, strides, float("-inf")), sides, strides)

    def mixed(self, name: str, x):
        one = self.convolve(f"{name}.b0", x)
        two = self.convolve(f"{name}.b1b", self.convolve(f"{name}.b1a", x))
        three = self.convolve(f"{name}.b2b", self.convolve(f"{name}.b2a", x))
        four = self.convolve(f"{name}.b3b", self.pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([one, two, three, four], dim=1)

    def __call__(self, x):
        x = self.convolve("Conv3d_1a_7x7", x, stride=2)
        x = self.pool(x, (1, 3, 3), (1, 2, 2))
        x = self.convolve("Conv3d_2c_3x3", self.convolve("Conv3d_2b_1x1", x))
        x = self.pool(x, (1, 3, 3), (1, 2, 2))
        x = self.mixed("Mixed_3c", self.mixed("Mixed_3b", x))
        x = self.pool(x, (3, 3, 3), (2, 2, 2))
        for letter in "bcdef":
            x = self.mixed(f"Mixed_4{letter}", x)
        x = self.pool(x, (2, 2, 2), (2, 2, 2))
        x = self.mixed("Mixed_5c", self.mixed("Mixed_5b", x))
        x = functional.avg_pool3d(x, (2, 7, 7), stride=1)
        kernel, bias = (self.weights[f"logits.conv3d.{n}"] for n in ("weight", "bias"))
        return functional.conv3d(x, kernel, bias)[..., 0, 0].mean(dim=2)


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(9, 224, 224), (16, 32, 48), (17, 256, 240)]
)
def test_mean_logits_agree(frames, height, width, tmp_path):
    weights = random_weights()
    safetensors.numpy.save_file(weights, tmp_path / "i3d.safetensors")
    ours = make_features(str(tmp_path / "i3d.safetensors"), (frames, height, width, 3), "pytorch")
    clips = random_image(2, frames, height, width, 3)
    clips[1] = np.linspace(0, 255, width)[:, None] * [1.0, 0.5, 0.0]  # still, black to orange
    found, _ = ours(clips)
    torch.set_num_threads(2)
    x = torch.from_numpy(clips).reshape(-1, height, width, 3).permute(0, 3, 1, 2).float()
    x = functional.interpolate(x, (224, 224), mode="bilinear", align_corners=False)
    x = (x / 127.5 - 1).reshape(2, frames, 3, 224, 224).transpose(1, 2)
    with torch.no_grad():
        wanted = Network(weights)(x).numpy()
    scale = np.abs(wanted).max()
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1 * scale  # the features depend on the clip
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * scale)
