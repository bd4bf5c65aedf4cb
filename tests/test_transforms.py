import collections
import itertools
import subprocess
import sys

import numpy as np
import pytest
from conftest import random_image

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
        "decode(channels=2)",
        "decode(background=300)",
        "resize()",
        "resize(0)",
        "resize(8.5)",
        "resize(8, method='cubic')",
        "resize_short(8, method=[])",
        "random_resize_short(384, 256)",
        "center_crop(0)",
        "random_crop(8, padding=-1)",
        "random_crop(8, padding=0.5)",
        "random_resized_crop(8, area=0.5)",
        "random_resized_crop(8, area=(0.5,))",
        "random_resized_crop(8, area=(0.5, 0.2))",
        "random_resized_crop(8, area=(0.5, 2))",
        "random_resized_crop(8, ratio=(2, 1))",
        "flip(probability=1.5)",
        "brightness(amount=-1)",
        "contrast(amount='much')",
        "normalize(clip=0.5)",
    ],
)
def test_what_is_no_entry_is_an_error_that_names_it_and_the_accepted_ones(entry):
    with pytest.raises(config_lib.InputError) as error:
        transforms.parse(entry)
    assert f"a list of transforms has {entry!r}" in str(error.value)
    assert "shift(pixels=1, keep=0.0)" in str(error.value)


def test_arguments_of_a_wrong_type_are_an_error_where_annotations_are_not_checked():
    """As in a user's process; here beartype would raise in the transform's place."""
    entries = [
        *("resize(8.5)", "resize_short(8.5)", "center_crop(2.5)", "random_crop(8, padding=0.5)"),
        *("shift(1.5)", "random_resized_crop(8, area=(0.5,))", "random_resized_crop(8, ratio=1)"),
        *("decode(background='red')", "decode(background=-1)", "decode(max_pixels='many')"),
    ]
    program = f"""
from gptv_jax.data import transforms
for entry in {entries}:
    try:
        transforms.parse(entry)
        print(entry, "is taken")
    except transforms.config_lib.InputError:
        pass
    except Exception as error:
        print(entry, "raises", type(error).__name__)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("", "")


def test_two_entries_with_variants_are_an_error():
    with pytest.raises(config_lib.InputError, match="only one of them may have variants"):
        transforms.variants(("shift(pixels=1)", "shift(pixels=2)"))


# Shapes, types and randomness, of all of them.

# Entry, and the shape [height, width] that it makes of 20 x 30; None: any.
ENTRIES = {
    "resize(7)": (7, 7),
    "resize(40, method='lanczos')": (40, 40),
    "resize_short(10)": (10, 15),
    "resize_short(40, method='bicubic')": (40, 60),
    "random_resize_short(5, 15)": None,
    "center_crop(9)": (9, 9),
    "random_crop(9)": (9, 9),
    "random_crop(24, padding=4)": (24, 24),
    "random_resized_crop(8)": (8, 8),
    "flip()": (20, 30),
    "shift(pixels=2)": (20, 30),
    "brightness(0.4)": (20, 30),
    "contrast(0.4)": (20, 30),
    "color_balance(0.4)": (20, 30),
    "normalize(clip=0.01)": (20, 30),
}
RANDOM = [entry for entry in ENTRIES if transforms.parse(entry).random]
MOVING = [entry for entry in ENTRIES if not transforms.parse(entry).of_pixels]


def generator(seed=0):
    return np.random.default_rng(seed)


def test_the_lists_above_have_every_transform():
    assert {entry.partition("(")[0] for entry in ENTRIES} == {*transforms.TRANSFORMS} - {"decode"}
    assert {entry.partition("(")[0] for entry in MOVING} == {
        *("center_crop", "random_crop", "flip", "shift")
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("entry", ENTRIES)
def test_images_stay_uint8_of_the_promised_shape_and_the_given_one_is_left_alone(entry, channels):
    step, given = transforms.parse(entry), random_image(20, 30, channels)
    for seed in range(5):
        found = step(given, generator(seed) if step.random else None)
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == channels
        assert found.shape[:2] == (ENTRIES[entry] or found.shape[:2])
    np.testing.assert_array_equal(given, random_image(20, 30, channels))


@pytest.mark.parametrize("entry", RANDOM)
def test_what_is_random_is_a_function_of_the_generator(entry):
    step, given = transforms.parse(entry), random_image(20, 30, 3)
    np.random.seed(0)
    first = [step(given, generator(seed)).tobytes() for seed in range(20)]
    assert [
        transforms.parse(entry)(given, generator(seed)).tobytes() for seed in range(20)
    ] == first
    assert len(set(first)) >= (2 if "flip" in entry else 5)


@pytest.mark.parametrize("entry", MOVING)
def test_what_moves_pixels_acts_on_tokens_as_on_colours(entry):
    step = transforms.parse(entry)
    tokens = generator().integers(5000, size=(20, 30, 1), dtype=np.uint16)
    names = generator(1).permutation(2**16).astype(np.uint16)
    if "shift" in entry:  # which fills with token 0, whatever it means
        names = np.concatenate([[np.uint16(0)], names[names != 0]])
    for seed in range(10):
        found = step(names[tokens], generator(seed))
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, names[step(tokens, generator(seed))])


@pytest.mark.parametrize("entry", RANDOM)
def test_evaluation_takes_nothing_random(entry):
    with pytest.raises(config_lib.InputError, match=r"eval_transforms has .* which is random"):
        transforms.check((), ("decode()", entry))
    transforms.check(("decode()", entry), ("decode()", *sorted(set(ENTRIES) - set(RANDOM))))


# What each one does.


def test_the_short_side_is_drawn_evenly_and_the_long_one_follows():
    step, given, rng = transforms.RandomResizeShort(6, 9), random_image(12, 30, 3), generator()
    shapes = collections.Counter(step(given, rng).shape[:2] for _ in range(400))
    assert set(shapes) == {(6, 15), (7, 18), (8, 20), (9, 22)} and min(shapes.values()) > 60
    assert transforms.ResizeShort(8)(given.swapaxes(0, 1), None).shape == (20, 8, 3)
    assert transforms.ResizeShort(8)(random_image(400, 2, 3), None).shape == (1600, 8, 3)


@pytest.mark.parametrize("entry", ["resize(8)", "resize_short(8)", "random_resize_short(8, 8)"])
@pytest.mark.parametrize("method", transforms.METHODS)
def test_shrinking_averages_instead_of_dropping_pixels(entry, method):
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None]
    found = transforms.parse(entry[:-1] + f", method='{method}')")(board, generator())
    away = np.abs(found.astype(int)[1:-1, 1:-1] - 127).max()
    assert away > 100 if method == "nearest" else away < 10


def test_what_has_the_size_already_is_left_as_it_is():
    given = random_image(8, 8, 3)
    for entry in ("resize(8)", "resize_short(8)", "center_crop(8)", "random_crop(8)"):
        np.testing.assert_array_equal(transforms.parse(entry)(given, generator()), given)


def places(height, width):
    """An image whose pixels tell where they are."""
    return np.stack(np.indices((height, width)), axis=-1).astype(np.uint8)


def test_a_centre_crop_is_the_middle():
    found = transforms.CenterCrop(4)(places(9, 12), None)
    np.testing.assert_array_equal(found, places(9, 12)[2:6, 4:8])


def test_a_random_crop_is_any_place_alike():
    step, rng = transforms.RandomCrop(4), generator()
    crops = [step(places(6, 7), rng) for _ in range(1200)]
    for crop in crops[:50]:
        np.testing.assert_array_equal(crop - crop[0, 0], places(4, 4))
    counts = collections.Counter(tuple(crop[0, 0].tolist()) for crop in crops)
    assert set(counts) == set(itertools.product(range(3), range(4)))
    assert min(counts.values()) > 60  # of 100


def test_a_padded_crop_reflects_without_repeating_the_edge():
    step, given, rng = transforms.RandomCrop(32, padding=4), places(32, 32), generator()
    wide = np.abs(np.arange(-4, 36))
    wide = np.where(wide > 31, 62 - wide, wide)
    corners = set()
    for _ in range(600):
        found = step(given, rng)
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
    with pytest.raises(config_lib.InputError, match=r"crop takes .*resize_short"):
        transforms.parse(entry)(random_image(8, 30, 3), generator())


@pytest.mark.parametrize("ratio", [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("area", [(0.08, 1.0), (0.3, 0.4)])
def test_a_resized_crop_has_its_area_and_ratio(area, ratio):
    step = transforms.RandomResizedCrop(64, area, ratio, method="nearest")
    height, width, found = 200, 250, []
    for seed in range(200):
        crop = step(places(height, width), generator(seed)).astype(float)
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
    step = transforms.RandomResizedCrop(10, area=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_array_equal(step(places(10, 60), generator()), places(10, 60)[:, 25:35])


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_have_their_share(probability):
    step, given, rng = transforms.Flip(probability), random_image(2, 3, 3), generator()
    mirrored = [np.array_equal(step(given, rng), given[:, ::-1]) for _ in range(2000)]
    assert np.mean(mirrored) == pytest.approx(probability, abs=0.04 if probability == 0.3 else 0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "color_balance"])
def test_jitter_of_no_amount_changes_nothing(name, channels):
    given = random_image(6, 7, channels)
    np.testing.assert_array_equal(transforms.parse(f"{name}(0.0)")(given, generator()), given)


def test_jitter_weakens_and_strengthens_what_it_is_called_after():
    given = random_image(16, 16, 3) // 2 + 60
    measures = {
        "brightness": lambda image: image.mean(),
        "contrast": lambda image: image.astype(float).mean(axis=-1).std(),
        "color_balance": lambda image: image.astype(float).std(axis=-1).mean(),
    }
    for name, measure in measures.items():
        step, rng = transforms.parse(f"{name}(amount=0.4)"), generator()
        strengths = [measure(step(given, rng)) / measure(given) for _ in range(300)]
        assert 0.58 <= min(strengths) < 0.65 and 1.3 < max(strengths) <= 1.42, name
        assert np.mean(strengths) == pytest.approx(1, abs=0.05), name


def test_colour_balance_leaves_grey_alone():
    grey = np.repeat(random_image(6, 7, 1), 3, axis=-1)
    np.testing.assert_allclose(
        transforms.ColorBalance(1.0)(grey, generator()).astype(int), grey, atol=1
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize_stretches_to_the_whole_range(channels):
    given = random_image(40, 40, channels) // 3 + 50
    found = transforms.Normalize()(given, None)
    assert (found.min(), found.max()) == (0, 255)
    scaled = (given.astype(float) - given.min()) * (255 / np.ptp(given))
    np.testing.assert_allclose(found, scaled, atol=0.51)
    np.testing.assert_array_equal(transforms.Normalize()(found, None), found)
    clipped = transforms.Normalize(clip=0.1)(given, None)
    assert 0.09 < (clipped == 0).mean() < 0.13 and 0.09 < (clipped == 255).mean() < 0.13
    flat = np.full((4, 4, channels), 7, np.uint8)
    np.testing.assert_array_equal(transforms.Normalize()(flat, None), flat)
