"""What each transform of geometry does; test_transforms.py has what holds for all of them."""

import collections
import itertools

import numpy as np
import pytest
from conftest import generator, random_image, transformed

from gptv_jax.data import geometry, transforms
from gptv_jax.errors import InputError


def grey_image(side=8):
    return generator().integers(1, 17, (side, side, 1), dtype=np.uint8)


def moved(image, down, right):
    """The image moved, with zeros where nothing came from."""
    out = np.zeros_like(image)
    for y, x in np.ndindex(image.shape[:2]):
        if 0 <= y + down < len(image) and 0 <= x + right < image.shape[1]:
            out[y + down, x + right] = image[y, x]
    return out


@pytest.mark.parametrize("pixels", [1, 2])
def test_every_variant_is_its_own_shift_filled_with_zeros(pixels):
    shift, given = geometry.Shift(pixels), grey_image()
    side = 2 * pixels + 1
    assert shift.variants == side**2
    rng, shifts = generator(), {}
    for _ in range(400):
        variant = shift.draw(rng)
        # Raster order of the square of shifts, counted from its middle and round its end.
        down, right = np.array(divmod((variant + side**2 // 2) % side**2, side)) - pixels
        np.testing.assert_array_equal(
            shift.variant({"image": given}, variant)["image"], moved(given, down, right)
        )
        shifts[variant] = (int(down), int(right))
    square = set(itertools.product(range(-pixels, pixels + 1), repeat=2))
    assert set(shifts) == set(range(side**2)) and set(shifts.values()) == square
    assert shifts[0] == (0, 0)
    assert given.min() > 0  # the input is left as it was


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_shift_keeps_its_share_and_draws_the_rest_evenly(keep):
    shift, rng, count = geometry.Shift(1, keep), generator(), 3000
    variants = np.bincount([shift.draw(rng) for _ in range(count)], minlength=9)
    wanted = np.full(9, (1 - keep) / 9)
    wanted[0] += keep
    np.testing.assert_allclose(variants / count, wanted, atol=0.02 if keep < 1 else 0)


def test_the_short_side_is_drawn_evenly_and_the_long_one_follows():
    step, given, rng = geometry.RandomResizeShort(6, 9), random_image(12, 30, 3), generator()
    shapes = collections.Counter(transformed(step, given, rng).shape[:2] for _ in range(400))
    assert set(shapes) == {(6, 15), (7, 18), (8, 20), (9, 22)} and min(shapes.values()) > 60
    assert transformed(geometry.ResizeShort(8), given.swapaxes(0, 1)).shape == (20, 8, 3)
    assert transformed(geometry.ResizeShort(8), random_image(400, 2, 3)).shape == (1600, 8, 3)


@pytest.mark.parametrize("entry", ["resize(8)", "resize_short(8)", "random_resize_short(8, 8)"])
@pytest.mark.parametrize("method", geometry.METHODS)
def test_shrinking_averages_instead_of_dropping_pixels(entry, method):
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None]
    found = transformed(transforms.parse(entry[:-1] + f", method='{method}')"), board, generator())
    away = np.abs(found.astype(int)[1:-1, 1:-1] - 127).max()
    assert away > 100 if method == "nearest" else away < 10


def test_what_has_the_size_already_is_left_as_it_is():
    given = random_image(8, 8, 3)
    for entry in ("resize(8)", "resize_short(8)", "center_crop(8)", "random_crop(8)"):
        np.testing.assert_array_equal(
            transformed(transforms.parse(entry), given, generator()), given
        )


def places(height, width):
    """An image whose pixels tell where they are."""
    return np.stack(np.indices((height, width)), axis=-1).astype(np.uint8)


def test_a_centre_crop_is_the_middle():
    found = transformed(geometry.CenterCrop(4), places(9, 12))
    np.testing.assert_array_equal(found, places(9, 12)[2:6, 4:8])


def test_a_random_crop_is_any_place_alike():
    step, rng = geometry.RandomCrop(4), generator()
    crops = [transformed(step, places(6, 7), rng) for _ in range(1200)]
    for crop in crops[:50]:
        np.testing.assert_array_equal(crop - crop[0, 0], places(4, 4))
    counts = collections.Counter(tuple(crop[0, 0].tolist()) for crop in crops)
    assert set(counts) == set(itertools.product(range(3), range(4)))
    assert min(counts.values()) > 60  # of 100


def test_a_padded_crop_reflects_without_repeating_the_edge():
    step, given, rng = geometry.RandomCrop(32, padding=4), places(32, 32), generator()
    wide = np.abs(np.arange(-4, 36))
    wide = np.where(wide > 31, 62 - wide, wide)
    corners = set()
    for _ in range(600):
        found = transformed(step, given, rng)
        for axis, line in ((0, found[:, 0, 0]), (1, found[0, :, 1])):
            starts = [s for s in range(9) if (wide[s : s + 32] == line).all()]
            assert len(starts) == 1, axis
            corners.add((axis, starts[0]))
        np.testing.assert_array_equal(found[..., 0], found[:, :1, 0].repeat(32, axis=1))
    assert corners == set(itertools.product(range(2), range(9)))


@pytest.mark.parametrize(
    "entry", ["center_crop(9)", "random_crop(9)", "random_crop(13, padding=2)"]
)
def test_a_crop_larger_than_the_image_is_an_error_that_says_what_to_do(entry):
    with pytest.raises(InputError, match=r"crop takes .*resize_short"):
        transformed(transforms.parse(entry), random_image(8, 30, 3), generator())


@pytest.mark.parametrize("ratio", [(1.0, 1.0), (0.5, 2.0), (1.5, 2.0)])
@pytest.mark.parametrize("area", [(0.08, 1.0), (0.3, 0.4)])
def test_a_resized_crop_has_its_area_and_ratio(area, ratio):
    step = geometry.RandomResizedCrop(64, area, ratio, method="nearest")
    height, width, found = 200, 250, []
    for seed in range(200):
        crop = transformed(step, places(height, width), generator(seed)).astype(float)
        first, last = crop[0, 0], crop[-1, -1]
        h, w = (last - first) * 64 / 63  # nearest takes the middles
        found.append((h * w / (height * width), w / h, *first))
    areas, ratios, tops, lefts = np.array(found).T
    assert area[0] * 0.93 < areas.min() and areas.max() < area[1] * 1.07
    assert ratio[0] * 0.93 < ratios.min() and ratios.max() < ratio[1] * 1.07
    assert np.ptp(areas) > 0.6 * min(np.ptp(area), 0.7)
    assert np.ptp(np.log(ratios)) >= 0.8 * np.ptp(np.log(ratio))
    assert np.ptp(tops) > 50 and np.ptp(lefts) > 50


def test_where_no_crop_fits_the_middle_square_is_taken():
    step = geometry.RandomResizedCrop(10, area=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_array_equal(
        transformed(step, places(10, 60), generator()), places(10, 60)[:, 25:35]
    )


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_have_their_share(probability):
    step, given, rng = geometry.Flip(probability), random_image(2, 3, 3), generator()
    mirrored = [np.array_equal(transformed(step, given, rng), given[:, ::-1]) for _ in range(2000)]
    assert np.mean(mirrored) == pytest.approx(probability, abs=0.04 if probability == 0.3 else 0)
