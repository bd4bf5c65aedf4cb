"""Rotary positions: attention's scores know of the way between two places, and of nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODERN, generator, tiny_network

from gptv_jax.model import layers

pytestmark = pytest.mark.usefixtures("one_device")
ROWS, COLUMNS, K = 3, 5, 8


def phases(places, columns: int = COLUMNS):
    row, column = jnp.divmod(jnp.asarray(places), columns)
    axes = jnp.stack([jnp.zeros_like(row), row, column], axis=-1)
    return layers.phases(axes.astype(jnp.float32), K)


def scores(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Of one query and one key, at each of these pairs of places."""
    q, k = (generator(seed).normal(size=(1, 1, 1, K)).astype(np.float32) for seed in (1, 2))
    q, k = (
        layers.rotate(jnp.tile(x, (1, len(places), 1, 1)), phases(places))
        for x, places in ((q, queries), (k, keys))
    )
    return np.asarray((q * k).sum(axis=-1)).ravel()


def test_scores_are_the_same_for_the_same_way_and_differ_between_ways():
    queries, keys = (p.ravel() for p in np.meshgrid(*[np.arange(-1, ROWS * COLUMNS)] * 2))
    ways = zip(*np.subtract(divmod(queries, COLUMNS), divmod(keys, COLUMNS)), strict=True)
    by_way = {}
    for way, score in zip(ways, scores(queries, keys), strict=True):
        by_way.setdefault(tuple(map(int, way)), []).append(score)
    # On the grid, and between its last row and the start vector's place before it, both ways.
    assert len(by_way) == (2 * ROWS - 1) * (2 * COLUMNS - 1) + 2 * COLUMNS
    means = []
    for found in by_way.values():
        np.testing.assert_allclose(found, found[0], atol=1e-5)
        means.append(np.mean(found))
    assert np.diff(np.sort(means)).min() > 1e-5  # no two ways look the same


@pytest.mark.parametrize(("objective", "before"), [("autoregressive", 1), ("bert", 0)])
def test_a_key_turns_with_the_place_of_the_token_that_its_position_holds(objective, before):
    recipe = {"objective": objective, "rotary": True}
    model = jax.eval_shape(tiny_network(**recipe).init, jax.random.key(0))
    network = tiny_network(**recipe)
    found = network.bind(model).rotation(3, 6)
    for turned, first in ((found.queries, 3), (found.keys, 3 - before)):
        wanted = phases(jnp.arange(first, first + 6), columns=4)
        np.testing.assert_array_equal(turned, wanted)
    off = tiny_network(**MODERN | {"rotary": False})
    params = jax.eval_shape(off.init, jax.random.key(0))
    assert off.bind(params).rotation(0, 16) is None


def test_angles_are_those_of_llama_gen():
    """For four channels a row: 1 and 1/100 of a radian a place; of bfloat16 the turn is float32."""
    found = phases(jnp.arange(15))
    angles = np.arctan2(found[1], found[0])
    np.testing.assert_allclose(angles[7], [1, 0.01, 2, 0.02], rtol=1e-5)
    x = jnp.asarray(generator().normal(size=(1, 15, 2, K)), jnp.bfloat16)
    exact = layers.rotate(x.astype(jnp.float32), found)
    np.testing.assert_array_equal(layers.rotate(x, found), exact.astype(jnp.bfloat16))
