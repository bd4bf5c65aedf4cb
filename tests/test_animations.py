"""Animations are videos of a constant rate; truncated ones and gaps between frames are named."""

import io
import struct
import zlib

import pytest
from conftest import generator, make_folder
from PIL import Image
from test_videos import animation, by_name, frames, numbers, opened, settings, values

from gptv_jax.data import sources
from gptv_jax.data.animations import REPEATS, timeline
from gptv_jax.data.images import DamagedImageError
from gptv_jax.data.limits import DEFAULT
from gptv_jax.data.videos import find_gap

FORMS = ("GIF", "WEBP", "PNG")
ENDINGS = {"GIF": "gif", "WEBP": "webp", "PNG": "apng"}


def shown(durations, form: str = "GIF") -> list[int]:
    """The frames that are shown of an animation with these durations, in milliseconds."""
    encoded = animation(range(len(durations)), form, duration=durations)
    return timeline(encoded, DEFAULT).tolist()


@pytest.mark.parametrize("form", FORMS)
def test_a_frame_is_repeated_as_often_as_its_duration_has_the_shortest_one(tmp_path, form):
    name, durations = f"v.{ENDINGS[form]}", [100, 100, 500, 100]
    content = animation(range(4), form, duration=durations)
    steady = animation(range(4), form, duration=100)
    make_folder(tmp_path, {name: content, f"steady.{ENDINGS[form]}": steady})
    source = opened(tmp_path, frames=8)
    at = by_name(source)
    assert numbers(source, at[name]) == [0, 1, 2, 2, 2, 2, 2, 3]
    assert numbers(source, at[f"steady.{ENDINGS[form]}"]) == [0, 1, 2, 3, 3, 3, 3, 3]
    data_set = sources.open_data_set(settings(tmp_path, frames=8))
    (note,) = [n for n in data_set.notes if "unequal durations" in n]
    assert "1 animation" in note and name in note and "steady" not in note
    (note,) = [n for n in data_set.notes if "last frame" in n]
    assert "steady" in note and name not in note  # 8 frames are as many as a clip has
    clips = {tuple(numbers(opened(tmp_path), at[name], generator(k))) for k in range(60)}
    assert clips == {(0, 1, 2), (1, 2, 2), (2, 2, 2), (2, 2, 3)}


def test_equal_frames_that_a_gif_file_has_merged_are_frames_of_a_clip(tmp_path):
    content = animation([0, 0, 0, 20], duration=100)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 2
    source = opened(make_folder(tmp_path, {"v.gif": content}), frames=4)
    assert numbers(source, 0) == [0, 0, 0, 20]


@pytest.mark.parametrize("form", FORMS)
def test_rounded_short_and_absent_durations_repeat_no_frame(form):
    assert shown([30, 30, 40] * 5, form) == list(range(15))  # 30 frames a second in GIF's units
    assert shown([100] * 12 + [20], form) == list(range(13))
    assert shown([0] * 5, form) == list(range(5)) == shown([0, 100, 10, 100, 100], form)


def test_a_still_is_bounded():
    assert shown([20, 600_000, 20]) == [0] + [1] * REPEATS + [2]


def test_the_default_image_of_an_apng_file_is_no_frame(tmp_path):
    first, *rest = map(Image.fromarray, values([25, 1, 2, 3]))
    with io.BytesIO() as file:
        first.save(file, "PNG", save_all=True, append_images=rest, default_image=True, duration=100)
        content = file.getvalue()
    make_folder(tmp_path, {"a.apng": content, "b.apng": animation([25, 1, 2, 3], "PNG")})
    source = opened(tmp_path, frames=4)
    at = by_name(source)
    assert numbers(source, at["a.apng"]) == [1, 2, 3, 3]
    assert numbers(source, at["b.apng"]) == [25, 1, 2, 3]


@pytest.mark.parametrize("form", FORMS)
def test_an_animation_that_is_cut_anywhere_is_damaged(form):
    whole = animation(range(12), form, duration=100)
    assert timeline(whole, DEFAULT).tolist() == list(range(12))
    for size in range(len(whole)):
        with pytest.raises(DamagedImageError):
            timeline(whole[:size], DEFAULT)


def test_a_file_with_fewer_frames_than_it_states_is_damaged():
    whole = bytearray(animation(range(3), "PNG"))
    at = whole.index(b"acTL")
    whole[at + 4 : at + 8] = struct.pack(">I", 5)
    whole[at + 12 : at + 16] = struct.pack(">I", zlib.crc32(whole[at : at + 12]))
    with pytest.raises(DamagedImageError, match="3 frames of 5"):
        timeline(bytes(whole), DEFAULT)


def test_frames_that_are_missing_between_others_are_noted(tmp_path):
    files = frames("gap", [1, 2, 3, 7, 8, 20], "{:04}.png") | frames("whole", range(3, 9))
    files |= frames("every_fifth", range(0, 25, 5)) | frames("two", [1, 9])
    data_set = sources.open_data_set(settings(make_folder(tmp_path, files)))
    (note,) = [n for n in data_set.notes if "gaps" in n]
    assert "1 folder of" in note and "gap (0003.png to 0007.png)" in note
    assert not any(name in note for name in ("whole", "every_fifth", "two"))
    source = opened(tmp_path, frames=6)
    assert numbers(source, by_name(source)["gap"]) == [1, 2, 3, 7, 8, 20]


@pytest.mark.parametrize(
    ("names", "gap"),
    [
        (["s1_1.jpg", "s1_2.jpg", "s1_3.jpg", "s1_9.jpg"], ["s1_3.jpg", "s1_9.jpg"]),
        (["100.jpg", "133.jpg", "167.jpg", "200.jpg"], None),  # times, in milliseconds
        ([f"{n}.jpg" for n in (100, 133, 200, 267, 900)], None),  # no step that most steps have
        (["1_1.jpg", "1_2.jpg", "2_1.jpg", "2_2.jpg"], None),  # two numbers
        (["a.jpg", "b.jpg", "c.jpg", "e.jpg"], None),
        ([f"{10**30 + k}.jpg" for k in (0, 1, 2, 4)], [f"{10**30 + 2}.jpg", f"{10**30 + 4}.jpg"]),
    ],
)
def test_a_gap_is_a_step_of_twice_the_usual_one_of_one_number(names, gap):
    assert find_gap(names) == gap
