"""What each transform of colour does; test_transforms.py has what holds for all of them."""

import numpy as np
import pytest
from conftest import generator, random_image, transformed

from gptv_jax.data import transforms


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "color_balance"])
def test_jitter_of_no_amount_changes_nothing(name, channels):
    given = random_image(6, 7, channels)
    np.testing.assert_array_equal(
        transformed(transforms.parse(f"{name}(0.0)"), given, generator()), given
    )


def test_jitter_weakens_and_strengthens_what_it_is_called_after():
    given = random_image(16, 16, 3) // 2 + 60
    measures = {
        "brightness": lambda image: image.mean(),
        "contrast": lambda image: image.astype(float).mean(axis=-1).std(),
        "color_balance": lambda image: image.astype(float).std(axis=-1).mean(),
    }
    for name, measure in measures.items():
        step, rng = transforms.parse(f"{name}(amount=0.4)"), generator()
        strengths = [measure(transformed(step, given, rng)) / measure(given) for _ in range(300)]
        assert 0.58 <= min(strengths) < 0.65 and 1.3 < max(strengths) <= 1.42, name
        assert np.mean(strengths) == pytest.approx(1, abs=0.05), name


def test_colour_balance_leaves_grey_alone():
    grey = np.repeat(random_image(6, 7, 1), 3, axis=-1)
    np.testing.assert_allclose(
        transformed(transforms.ColorBalance(1.0), grey, generator()).astype(int), grey, atol=1
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize_stretches_to_the_whole_range(channels):
    given = random_image(40, 40, channels) // 3 + 50
    found = transformed(transforms.Normalize(), given)
    assert (found.min(), found.max()) == (0, 255)
    scaled = (given.astype(float) - given.min()) * (255 / np.ptp(given))
    np.testing.assert_allclose(found, scaled, atol=0.51)
    np.testing.assert_array_equal(transformed(transforms.Normalize(), found), found)
    clipped = transformed(transforms.Normalize(clip=0.1), given)
    assert 0.09 < (clipped == 0).mean() < 0.13 and 0.09 < (clipped == 255).mean() < 0.13
    flat = np.full((4, 4, channels), 7, np.uint8)
    np.testing.assert_array_equal(transformed(transforms.Normalize(), flat), flat)
