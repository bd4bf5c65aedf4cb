import io

import numpy as np
from PIL import Image

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


def test_a_matrix_shows_classes_of_any_name():
    names = [r"$\nothing{$", "a long name that is cut", "图片", r"\frac{"]
    made = pictures.confusion(np.diag([3, 0, 12, 1]), names)
    with Image.open(io.BytesIO(made)) as picture:
        shown = np.asarray(picture.convert("RGBA"))
    assert min(shown.shape[:2]) > 300
    blue, light = (np.array(rgb) for rgb in ((8, 48, 107), (247, 251, 255)))  # shares 1 and 0
    counts = [int((shown[..., :3] == colour).all(axis=-1).sum()) for colour in (blue, light)]
    assert 4 < counts[1] / counts[0] < 5  # three cells of 16 are full, and the others empty
