"""Inception on random weights, compared with the network of pytorch-fid, which computes the FID.

The test needs pytorch-fid, which no extra installs; it is skipped without. In a new environment:

    pip install -e '.[test]' torch==2.13.0 torchvision==0.28.0 pytorch-fid
    pytest tests/test_parity_inception.py
"""

import numpy as np
import pytest
import safetensors.numpy
from conftest import random_image
from test_quality_inception import random_weights

from gptv_jax.quality.features import make_features

torch = pytest.importorskip("torch", reason="torch is not installed")
fid = pytest.importorskip("pytorch_fid.inception", reason="pytorch-fid is not installed")


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def theirs(weights):
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        # pytorch-fid loads the state dict strictly, which checks every name and shape.
        patch.setattr(fid, "load_state_dict_from_url", lambda *_, **__: state)
        return fid.InceptionV3().eval()


@pytest.fixture(scope="module")
def ours(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    safetensors.numpy.save_file(weights, path)
    return make_features(str(path), (299, 299, 3))


@pytest.mark.parametrize("height, width", [(299, 299), (32, 48), (320, 400)])
def test_features_and_probabilities_agree(height, width, theirs, ours, weights):
    images = random_image(2, height, width, 3)
    images[1] = np.linspace(0, 255, width)[:, None] * [1.0, 0.5, 0.0]  # from black to orange
    features, probabilities = ours(images)
    with torch.no_grad():
        [wanted] = theirs(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    wanted = wanted[:, :, 0, 0].numpy()
    assert (
        np.abs(wanted[0] - wanted[1]).max() > 0.1 * np.abs(wanted).max()
    )  # the features depend on the image
    np.testing.assert_allclose(features, wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())
    unbiased = torch.softmax(torch.from_numpy(wanted @ weights["fc.weight"].T), dim=1).numpy()
    assert unbiased.max() > 0.002  # there are 1,008 classes
    np.testing.assert_allclose(probabilities, unbiased, rtol=1e-4)
