import jaxtyping
import numpy as np
import pytest
from conftest import generator, random_image, transformed
from PIL import Image

from gptv_jax.data import geometry, transforms
from gptv_jax.errors import InputError
from gptv_jax.tokens import GreyCodec


def test_entries_are_calls_with_literal_arguments():
    assert transforms.parse("shift(pixels=2, keep=0.3)") == geometry.Shift(2, 0.3)
    assert transforms.parse("shift(2)") == geometry.Shift(2)
    assert transforms.parse("shift()") == transforms.parse("shift") == geometry.Shift()
    full = "resize_short(size=256, method='bilinear')"
    assert transforms.written_out("resize_short(256)") == transforms.written_out(full) == full
    assert transforms.written_out("flip") == "flip(probability=0.5)"
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
        "quantize()",
        "quantize(1)",
        "quantize(300)",
        "rotate(0)",
        "rotate(200)",
        "rotate(10, method='lanczos')",
        "random_augment(n=0)",
        "random_augment(magnitude=11)",
        "decode(maximum=0)",
    ],
)
def test_what_is_no_entry_is_an_error_that_names_it_and_the_accepted_ones(entry):
    with pytest.raises(InputError) as error:
        transforms.parse(entry)
    assert f"a list of transforms has {entry!r}" in str(error.value)
    name = entry.partition("(")[0]
    accepted = f"it takes {name}(" if name in transforms.TRANSFORMS else ", flip, shift, "
    assert accepted in str(error.value) and len(str(error.value)) < 290
    assert name != "shift" or "shift(pixels=1, keep=0.0)" in str(error.value)


@pytest.mark.parametrize(
    "entry",
    [
        *("resize(8.5)", "resize_short(8.5)", "center_crop(2.5)", "random_crop(8, padding=0.5)"),
        *("shift(1.5)", "random_resized_crop(8, area=(0.5,))", "random_resized_crop(8, ratio=1)"),
        *("decode(background='red')", "decode(background=-1)", "decode(max_pixels='many')"),
    ],
)
def test_arguments_of_a_wrong_type_are_an_error_where_annotations_are_not_checked(
    entry, monkeypatch
):
    """As in a user's process; elsewhere in the tests beartype would raise first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match="a list of transforms has"):
        transforms.parse(entry)


def test_two_entries_with_variants_are_an_error():
    with pytest.raises(InputError, match="only one of them may have variants"):
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
    "random_scale()": (20, 30),
    "random_scale((0.5, 2.0), size=8, fill=9)": (8, 8),
    "flip()": (20, 30),
    "flip_vertical()": (20, 30),
    "shift(pixels=2)": (20, 30),
    "brightness(0.4)": (20, 30),
    "contrast(0.4)": (20, 30),
    "color_balance(0.4)": (20, 30),
    "normalize(clip=0.01)": (20, 30),
    "quantize(17)": (20, 30),
    "rotate(30)": (20, 30),
    "random_augment(n=3, magnitude=8)": (20, 30),
    "corrupt('noise', 3)": (20, 30),
    "corrupt('shift', 2)": (20, 30),
}
RANDOM = [entry for entry in ENTRIES if transforms.parse(entry).random]
MOVING = [entry for entry in ENTRIES if not transforms.parse(entry).needs_pixels]


def test_the_lists_above_have_every_transform():
    assert {entry.partition("(")[0] for entry in ENTRIES} == {*transforms.TRANSFORMS} - {"decode"}
    assert {entry.partition("(")[0] for entry in MOVING} == {
        *("center_crop", "random_crop", "flip", "flip_vertical", "shift")
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("entry", ENTRIES)
def test_images_stay_uint8_of_the_promised_shape_and_the_given_one_is_left_alone(entry, channels):
    step, given = transforms.parse(entry), random_image(20, 30, channels)
    for seed in range(5):
        found = transformed(step, given, generator(seed) if step.random else None)
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == channels
        assert found.shape[:2] == (ENTRIES[entry] or found.shape[:2])
    np.testing.assert_array_equal(given, random_image(20, 30, channels))


@pytest.mark.parametrize("entry", RANDOM)
def test_what_is_random_is_a_function_of_the_generator(entry):
    step, given = transforms.parse(entry), random_image(20, 30, 3)
    np.random.seed(0)

    def made(step):
        return [transformed(step, given, generator(seed)).tobytes() for seed in range(20)]

    first = made(step)
    assert made(transforms.parse(entry)) == first
    assert len(set(first)) >= (2 if "flip" in entry else 5)


@pytest.mark.parametrize("entry", MOVING)
def test_what_moves_pixels_acts_on_tokens_as_on_colours(entry):
    step = transforms.parse(entry)
    tokens = generator().integers(5000, size=(20, 30), dtype=np.uint16)
    names = generator(1).permutation(2**16).astype(np.uint16)
    if "shift" in entry:  # which fills with token 0, whatever it means
        names = np.concatenate([[np.uint16(0)], names[names != 0]])
    for seed in range(10):
        found = step({"tokens": names[tokens]}, generator(seed))["tokens"]
        assert found.dtype == np.uint16
        moved = step({"tokens": tokens}, generator(seed))["tokens"]
        np.testing.assert_array_equal(found, names[moved])


@pytest.mark.parametrize("entry", RANDOM)
def test_evaluation_takes_nothing_random(entry):
    with pytest.raises(InputError, match=r"eval_transforms has .* which is random"):
        transforms.check((), ("decode()", entry))
    transforms.check(("decode()", entry), ("decode()", *sorted(set(ENTRIES) - set(RANDOM))))


# Values.


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_grey_levels_are_spread_evenly_and_shown_in_the_right_brightness(levels):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    found = transformed(transforms.parse(f"quantize({levels})"), values)
    assert set(found.flat) == set(range(levels))
    codec = GreyCodec(levels, 16)
    shown = codec.picture(codec.decode(codec.encode(found[None])))[0]
    # No level is nearer to a value than its own.
    difference = np.abs(shown.astype(int) - values)
    assert difference.max() <= np.ceil(127.5 / (levels - 1))
    assert shown[0, 0, 0] == 0 and shown[15, 15, 0] == 255


def test_a_rotation_is_within_its_degrees_both_ways_and_fills_the_corners():
    rotate = transforms.parse("rotate(45, fill=7, method='nearest')")
    image = np.full((41, 41, 3), 200, np.uint8)
    image[:20, 20] = 100  # a hand that points up
    angles = []
    for seed in range(60):
        found = transformed(rotate, image, generator(seed))
        assert found[20, 20, 0] == 200 and set(np.unique(found)) <= {7, 100, 200}
        y, x = np.argwhere(found[..., 0] == 100).mean(axis=0) - 20
        angles.append(np.degrees(np.arctan2(-x, -y)))
    assert -46 < min(angles) < -35 and 35 < max(angles) < 46 and abs(np.mean(angles)) < 12


def test_random_augment_has_the_operations_and_ranges_of_the_paper():
    """Each operation at full strength, against its definition in AutoAugment's table 6."""
    image = random_image(30, 40, 3)
    picture, white = Image.fromarray(image), (255,) * 3

    def apply(name, strength, given=picture):
        return np.asarray(transforms.OPERATIONS[name](given, strength, white)).astype(int)

    assert len(transforms.OPERATIONS) == 14
    for name in transforms.OPERATIONS:
        changing = name in ("auto_contrast", "equalize")
        assert changing or (apply(name, 0.0) == image).all()
    np.testing.assert_array_equal(apply("solarize", 1.0), 255 - image)
    solarized = np.where(image >= 128, 255 - image.astype(int), image)
    np.testing.assert_array_equal(apply("solarize", -0.5), solarized)
    np.testing.assert_array_equal(apply("posterize", 1.0), image & 0b11110000)
    for sign in (-1, 1):
        scaled = (image * (1 + 0.9 * sign)).clip(0, 255)
        np.testing.assert_allclose(apply("brightness", sign), scaled, atol=1)
        grey = np.asarray(picture.convert("L")).astype(float)[..., None]
        coloured = (grey + (image - grey) * (1 + 0.9 * sign)).clip(0, 255)
        np.testing.assert_allclose(apply("color", sign), coloured, atol=2)
        contrasted = (grey.mean() + (image - grey.mean()) * (1 + 0.9 * sign)).clip(0, 255)
        np.testing.assert_allclose(apply("contrast", sign), contrasted, atol=2)
    moved = apply("translate_x", 1.0)  # by 150/331 of the width, 18 of 40 pixels
    np.testing.assert_array_equal(moved[:, :22], image[:, 18:])
    assert (moved[:, 22:] == 255).all()
    moved = apply("translate_y", -1.0)  # 14 of 30 pixels
    np.testing.assert_array_equal(moved[14:], image[:16])
    upright = np.zeros((41, 41), np.uint8)
    upright[:, 20] = 255
    for name, line in (("shear_x", upright), ("shear_y", upright.T), ("rotate", upright)):
        found = np.asarray(transforms.OPERATIONS[name](Image.fromarray(line), 1.0, 0))
        y, x = np.nonzero(found if name != "shear_y" else found.T)
        slope = abs(np.polyfit(y, x, 1)[0])
        assert slope == pytest.approx(np.tan(np.radians(30)) if name == "rotate" else 0.3, abs=0.03)


def test_random_augment_draws_every_operation_and_combines_n_of_them():
    image = random_image(16, 16, 3)
    picture = Image.fromarray(image)
    single = {
        np.asarray(operation(picture, sign * 0.6, (128,) * 3)).tobytes()
        for operation in transforms.OPERATIONS.values()
        for sign in (-1, 1)
    }
    once = transforms.parse("random_augment(n=1, magnitude=6)")
    assert {transformed(once, image, generator(seed)).tobytes() for seed in range(400)} == single
    several = transforms.parse("random_augment(n=4, magnitude=6)")
    assert (
        not {transformed(several, image, generator(seed)).tobytes() for seed in range(20)} <= single
    )
