import jax
import numpy as np
import pytest
from conftest import MESHES, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import sharding
from gptv_jax.train import step


@pytest.fixture(scope="module")
def reference():
    return loss_and_gradients((1, 1, 1))


def loss_and_gradients(shape):
    network = tiny_network(classes=5)
    with jax.set_mesh(make_mesh(shape)):
        batch = sharding.global_batch(random_batch(network))
        loss = step.joint_loss(network, 1.0, 1.0)
        gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, None)[0]))
        value, grads = gradient(random_params(network))
        return float(value), jax.device_get(grads)


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_loss_and_gradients_are_those_of_one_device(shape, reference):
    value, grads = loss_and_gradients(shape)
    np.testing.assert_allclose(value, reference[0], rtol=1e-5)
    for path, wanted in jax.tree.leaves_with_path(reference[1]):
        found = grads
        for key in path:
            found = found[key.key]
        scale = np.abs(wanted).max() + 1e-30
        np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-5, err_msg=str(path))
