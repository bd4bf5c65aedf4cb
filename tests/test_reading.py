"""How frozen features are read: regions of an image, and positions that see the whole image."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import MODERN, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.config import rules
from gptv_jax.errors import InputError
from gptv_jax.model.layout import of_images
from gptv_jax.probe import features
from gptv_jax.tasks.network import network_of
from gptv_jax.train import objective

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2, 2)], ids=str)
def test_pooled_features_of_regions_are_means_over_their_places(mesh):
    network = dataclasses.replace(tiny_network(), regions=2)
    with jax.set_mesh(make_mesh(mesh)):
        params, batch = random_params(network), sharding.global_batch(random_batch(network))
        run = jax.jit(lambda p: objective.evaluate_batch(network, p, batch, keep=(0, 1, 2))[0])
        output = jax.device_get(run(params))
        assert features.read(network, params, batch, raw=False, votes=1).shape == (1, 3, 8, 128)
    kept = output.kept.reshape(3, 8, 4, 4, 32)
    means = [kept[:, :, r : r + 2, c : c + 2].mean(axis=(2, 3)) for r in (0, 2) for c in (0, 2)]
    np.testing.assert_allclose(output.pooled, np.concatenate(means, axis=-1), atol=1e-6)


@pytest.mark.parametrize("changes", [{}, MODERN], ids=["igpt", "rotary"])
def test_a_network_that_reads_whole_images_sees_every_token_everywhere(changes):
    network = tiny_network(**changes)
    layout = of_images(11, (4, 4), attention="whole")
    network = dataclasses.replace(network, layout=layout)
    assert not network.predicts_images and layout.visible == (16,) * 16
    params, tokens = random_params(network), random_batch(network)["tokens"]
    final = jax.jit(lambda tokens: network.bind(params)(tokens).final)
    before = final(tokens)
    for place in range(16):
        other = np.where(np.arange(16) == place, (tokens + 1) % 11, tokens)
        moved = np.abs(final(other) - before).max(axis=-1) > 0
        assert moved.all() if place < 15 else not moved.any()  # the last one is a target alone


def test_the_configuration_names_regions_and_attention():
    probe = config_lib.Probe(regions=2, attention="whole")
    network = network_of(config_lib.Config(probe=probe), read=probe)
    assert network.regions == 2 and network.pooled_width == 4 * network.config.width
    assert set(network.layout.visible) == {network.length}
    assert network_of(config_lib.Config(probe=probe)).regions == 1


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("probe", {"probe.regions": 3}, "does not divide the 8 x 8 tokens"),
        ("probe", {"probe.regions": 2, "probe.pooling": "frames", "data.frames": 2}, "no regions"),
        ("probe", {"probe.attention": "whole", "model.objective": "bert"}, "sees all others"),
        ("finetune", {"finetune.attention": "whole"}, "so take 0"),
        ("finetune", {"finetune.attention": "whole", "task.name": "detect"}, "for classes alone"),
    ],
)
def test_readings_that_do_not_go_together_are_refused(section, changes, words):
    settings = config_lib.default()
    settings.update_from_flattened_dict(changes)
    config = config_lib.fields.from_dict(config_lib.Config, settings, "config")
    with pytest.raises(InputError, match=words):
        rules.SECTIONS[section](config)
