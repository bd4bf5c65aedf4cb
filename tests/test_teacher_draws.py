"""A teacher's draws: their expectation is the teacher's distribution, whatever computes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import generator, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import sharding
from gptv_jax.data.teacher_draws import Draws, Packing
from gptv_jax.decode import teacher_sampling
from gptv_jax.train import objective

SAMPLES = 6
PEAKED = [0.9, 0.05, 0.03, 0.02, 0.0]
FLAT = [0.2] * 5


def counts_of(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    """How often each id was drawn: [..., N] to [..., V]."""
    return (np.asarray(ids)[..., None] == np.arange(vocabulary)).sum(axis=-2)


@pytest.mark.parametrize(
    ("vocabulary", "samples"), [(2, 1), (11, 40), (256, 255), (257, 256), (65536, 300)]
)
def test_draws_are_read_as_they_were_packed(vocabulary, samples):
    drawn = np.sort(generator().integers(vocabulary, size=(9, samples)), axis=-1)
    drawn[0] = vocabulary - 1  # a single id
    packing, draws = Packing(9, vocabulary, samples), Draws.of(drawn)
    field, following = packing.split(draws)
    ((name, kind, shape),) = packing.fields
    stored = field[name].astype(kind)
    assert stored.shape == shape and packing.size(stored) == len(following)
    assert len(following) <= drawn.size * (2 if vocabulary <= 256 and samples < 256 else 4)
    found = packing.join(stored, following)
    ids, counts = found.padded(int(stored.max()))
    assert ids.dtype == np.min_scalar_type(vocabulary - 1)
    assert counts.dtype == np.min_scalar_type(samples)
    for position, row in enumerate(drawn):
        wanted, times = np.unique(row, return_counts=True)
        used = counts[position] > 0
        np.testing.assert_array_equal(ids[position][used], wanted)
        np.testing.assert_array_equal(counts[position][used], times)


@pytest.mark.parametrize("distribution", [PEAKED, FLAT])
@pytest.mark.parametrize("samples", [1, 3, 32])
def test_the_mean_count_is_the_probability_and_a_count_is_off_by_less_than_one(
    distribution, samples
):
    """The mean over a grid of offsets is the integral over them, to the width of the grid."""
    offset = (jnp.arange(4096) + 0.5) / 4096
    probabilities = jnp.broadcast_to(jnp.array(distribution), (4096, 5))
    ids = np.asarray(
        jax.jit(teacher_sampling.systematic, static_argnums=2)(probabilities, offset, samples)
    )
    assert ids.shape == (4096, samples) and (np.diff(ids, axis=-1) >= 0).all()
    counts, expected = counts_of(ids, 5), samples * np.array(distribution)
    np.testing.assert_allclose(counts.mean(axis=0), expected, rtol=0, atol=1 / 4096 + 1e-5)
    assert (np.abs(counts - expected) < 1 + 1e-5).all()
    assert not counts[:, np.array(distribution) == 0].any()


def test_no_id_lies_outside_the_vocabulary():
    """Where rounding leaves the sum of the probabilities below the last point."""
    probabilities = jnp.full((1, 1000), 0.0009)
    ids = teacher_sampling.systematic(
        probabilities, jnp.array([np.nextafter(np.float32(1), 0)]), 500
    )
    assert int(ids.max()) <= 999 and int(ids.min()) >= 0


def draw(networks, params, batch, index, temperature=1.0, labels=None, seed=0):
    made = teacher_sampling.make_draw(tuple(networks), SAMPLES, temperature)
    rows = [None if x is None else sharding.shard_rows(x) for x in (batch["tokens"], labels, index)]
    return np.asarray(made(tuple(params), *rows, jax.random.key(seed)))


@pytest.fixture(scope="module")
def pair():
    """Two networks of different sizes."""
    return tiny_network(), tiny_network(layers=1, width=16)


@pytest.mark.parametrize(("teachers", "temperature"), [(1, 1.0), (1, 2.5), (2, 1.0)])
def test_draws_follow_the_mean_distribution_of_the_teachers(
    pair, teachers, temperature, one_device
):
    """A row of 512 examples of equal tokens, each with random numbers of its own."""
    networks, count = pair[:teachers], 512
    params = [random_params(network, seed) for seed, network in enumerate(networks)]
    one = random_batch(networks[0], size=1)["tokens"]
    batch = {"tokens": np.repeat(one, count, axis=0)}
    index = np.arange(count, dtype=np.int32)
    counts = counts_of(draw(networks, params, batch, index, temperature), networks[0].vocabulary)
    shares = [
        jax.nn.softmax(network.bind(each)(jnp.asarray(one)).logits[0] / temperature)
        for network, each in zip(networks, params, strict=True)
    ]
    expected = SAMPLES * np.mean(shares, axis=0)
    part = expected % 1  # a count is the whole number below its mean, or one more
    error = np.sqrt(part * (1 - part) / count)
    assert (np.abs(counts.mean(axis=0) - expected) < 5 * error + 1e-4).all()
    assert (counts.sum(axis=-1) == SAMPLES).all()


def test_draws_depend_on_the_number_of_the_example_and_the_seed_alone(pair, one_device):
    network, params = pair[0], [random_params(pair[0])]
    batch, index = random_batch(network), np.arange(8, dtype=np.int32)
    found = draw([network], params, batch, index)
    backwards = {"tokens": batch["tokens"][::-1]}
    np.testing.assert_array_equal(draw([network], params, backwards, index[::-1])[::-1], found)
    assert (draw([network], params, batch, index, seed=1) != found).any()
    assert (draw([network], params, batch, index + 8) != found).any()


def test_draws_in_chunks_and_on_a_mesh_are_those_of_one_device(pair, monkeypatch):
    network, index = pair[0], np.arange(8, dtype=np.int32)
    batch, found = random_batch(network), []
    for shape, limit in (((1, 1, 1), 2**27), ((1, 1, 1), 2**9), ((2, 2, 2), 2**7)):
        monkeypatch.setattr(objective, "LOGITS_BYTES", limit)
        teacher_sampling.make_draw.cache_clear()
        mesh = make_mesh(shape)
        with jax.set_mesh(mesh):
            assert (limit == 2**27) == (objective.loss_chunks(network, 8, mesh.shape) == 1)
            found.append(draw([network], [random_params(network)], batch, index))
    teacher_sampling.make_draw.cache_clear()
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_a_class_conditional_teacher_is_told_the_class(one_device):
    network = tiny_network(class_tokens=2)
    params, batch = [random_params(network)], random_batch(network)
    index = np.arange(8, dtype=np.int32)
    first, second, none = (
        draw([network], params, batch, index, labels=np.full(8, label, np.int32))
        for label in range(3)
    )
    assert (first != second).any() and (second != none).any()
    np.testing.assert_array_equal(draw([network], params, batch, index), none)
