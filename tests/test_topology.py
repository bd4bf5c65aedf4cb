"""Names of topologies, and the devices that they stand for."""

import pytest
from jax.experimental import topologies

from gptv_jax import hardware
from gptv_jax.errors import InputError
from gptv_jax.planning import topology


@pytest.mark.parametrize(
    ("name", "slices", "full", "count"),
    [
        ("v5e:16x16", 1, "v5e:16x16", 256),
        ("v5e:16x16", 4, "v5e:16x16", 1024),
        ("v5e-16", 1, "v5e:4x4", 16),
        ("v5e-8", 1, "v5e:2x4", 8),
        ("v5e-1", 1, "v5e:1x1", 1),
        ("v5p:8x8x8", 1, "v5p:8x8x8", 512),
        ("v5p-128", 1, "v5p:4x4x4", 64),  # TensorCores, two a chip
        ("v5p-512", 1, "v5p:4x8x8", 256),
        ("v5p-8", 1, "v5p:2x2x1", 4),
        ("v4-32", 1, "v4:2x2x4", 16),
        ("v6e:16x16", 1, "v6e:16x16", 256),
        ("tpu7x:4x4x4", 1, "tpu7x:4x4x4", 128),  # two devices a chip
        ("cpu:8", 1, "cpu:8", 8),
        ("gpu:8xh200", 2, "gpu:8xh200", 16),
    ],
)
def test_a_topology_has_its_number_of_devices(name, slices, full, count):
    found = topology.parse(name, slices)
    assert (found.name, found.count, found.per_slice) == (full, count, count // slices)
    assert found.memory_bytes > 0


@pytest.mark.parametrize(
    "name",
    [
        *("", "v5e", "v5e:16", "v5e:4x4x4", "v5e:0x4", "v5e:axb", "v5e-24", "v5p-1", "v9:2x2"),
        *("cpu:0", "cpu:x", "gpu:8xtpu", "gpu:h200", "gpu:0xh200"),
    ],
)
def test_an_unknown_topology_is_refused_with_the_forms_taken(name):
    with pytest.raises(
        InputError, match=r"--topology=.* is not known; it takes .*v5e:16x16.*cpu:8"
    ):
        topology.parse(name)


def test_simulated_devices_are_of_one_machine():
    with pytest.raises(InputError, match="--num_slices is 2, but --topology=cpu:8 is one machine"):
        topology.parse("cpu:8", 2)


def test_a_topology_that_the_compiler_does_not_know_is_refused_in_a_sentence():
    with pytest.raises(InputError, match=r"--topology=v5p:3x3x3 is not known to libtpu"):
        topology.parse("v5p:3x3x3").devices()


def test_without_libtpu_a_sentence_says_what_to_install(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(InputError, match=r"libtpu, which is not installed; pip install"):
        topology.parse("v5e:4x4").devices()


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_devices_are_as_many_and_of_the_kind_that_the_table_says(name, capfd):
    found = topology.parse(name)
    devices = found.devices()
    assert len(devices) == found.count
    assert {hardware.of(device.device_kind) for device in devices} == {found.hardware}
    assert capfd.readouterr().err == ""  # libtpu is kept quiet


def test_slices_are_told_apart():
    devices = topology.parse("v5e:2x2", 2).devices()
    assert [device.slice_index for device in devices] == [0] * 4 + [1] * 4
