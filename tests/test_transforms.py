import itertools

import numpy as np
import pytest

from gptv_jax import config as config_lib
from gptv_jax.data import transforms


def grey_image(side=8):
    return np.random.default_rng(0).integers(1, 17, (side, side, 1), dtype=np.uint8)


def moved(image, down, right):
    """The image moved, with zeros where nothing came from."""
    out = np.zeros_like(image)
    for y, x in np.ndindex(image.shape[:2]):
        if 0 <= y + down < len(image) and 0 <= x + right < image.shape[1]:
            out[y + down, x + right] = image[y, x]
    return out


@pytest.mark.parametrize("pixels", [1, 2])
def test_every_variant_is_its_own_shift_filled_with_zeros(pixels):
    shift, given = transforms.Shift(pixels), grey_image()
    side = 2 * pixels + 1
    assert shift.variants == side**2
    rng, shifts = np.random.default_rng(0), {}
    for _ in range(400):
        variant = shift.draw(rng)
        # Raster order of the square of shifts, counted from its middle and round its end.
        down, right = np.array(divmod((variant + side**2 // 2) % side**2, side)) - pixels
        np.testing.assert_array_equal(shift.variant(given, variant), moved(given, down, right))
        shifts[variant] = (int(down), int(right))
    square = set(itertools.product(range(-pixels, pixels + 1), repeat=2))
    assert set(shifts) == set(range(side**2)) and set(shifts.values()) == square
    assert shifts[0] == (0, 0)
    assert given.min() > 0  # the input is left as it was


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_shift_keeps_its_share_and_draws_the_rest_evenly(keep):
    shift, rng, count = transforms.Shift(1, keep), np.random.default_rng(0), 3000
    variants = np.bincount([shift.draw(rng) for _ in range(count)], minlength=9)
    wanted = np.full(9, (1 - keep) / 9)
    wanted[0] += keep
    np.testing.assert_allclose(variants / count, wanted, atol=0.02 if keep < 1 else 0)


def test_entries_are_calls_with_literal_arguments():
    assert transforms.parse("shift(pixels=2, keep=0.3)") == transforms.Shift(2, 0.3)
    assert transforms.parse("shift(2)") == transforms.Shift(2)
    assert transforms.parse("shift()") == transforms.parse("shift") == transforms.Shift()
    assert transforms.variants(()) == 1
    assert transforms.variants(("shift(pixels=2)",)) == 25


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "shift(",
        "mirror()",
        "mirror",
        "1 + 1",
        "shift; shift",
        "os.system('true')",
        "shift(pixels=0)",
        "shift(pixels='1')",
        "shift(keep=1.5)",
        "shift(keep=-0.1)",
        "shift(keep=print())",
        "shift(amount=1)",
        "shift(1, 0.5, 3)",
        "shift(1, pixels=1)",
        "shift(*[1])",
        "shift(**{'pixels': 1})",
    ],
)
def test_what_is_no_entry_is_an_error_that_names_it_and_the_accepted_ones(entry):
    with pytest.raises(config_lib.InputError) as error:
        transforms.parse(entry)
    assert f"a list of transforms has {entry!r}" in str(error.value)
    assert "shift(pixels=1, keep=0.0)" in str(error.value)


def test_two_entries_with_variants_are_an_error():
    with pytest.raises(config_lib.InputError, match="only one of them may have variants"):
        transforms.variants(("shift(pixels=1)", "shift(pixels=2)"))
