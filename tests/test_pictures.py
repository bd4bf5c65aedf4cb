import numpy as np

from gptv_jax.runs import pictures


def test_a_heat_map_is_the_brighter_the_more_on_one_scale_for_all_images():
    nats = np.array([[[0.0, 0.5], [1.0, 2.0]], [[2.0, 3.0], [3.5, 4.0]]], np.float32)
    maps, brightest = pictures.heat_map(nats)
    assert brightest == 4.0 and maps.dtype == np.uint8 and maps.shape == (2, 2, 2, 3)
    order = np.argsort(nats, axis=None, kind="stable")
    luminance = (maps @ np.array([0.299, 0.587, 0.114])).reshape(-1)[order]
    assert (np.diff(luminance) >= 0).all() and luminance[0] < 10 and luminance[-1] > 240
    np.testing.assert_array_equal(maps[0, 1, 1], maps[1, 0, 0])  # 2 nats, in either image
    alone, brightest = pictures.heat_map(nats[:1])
    assert brightest == 2.0 and (alone[0, 1, 1] == maps[1, 1, 1]).all()


def test_nothing_surprising_is_black():
    maps, brightest = pictures.heat_map(np.zeros((1, 2, 2), np.float32))
    assert brightest == 0 and maps.max() < 10
