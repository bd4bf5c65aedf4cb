"""Video files of odd names and places, late frames, and files that are cut between their frames."""

import json
import os
import struct

import pytest

av = pytest.importorskip("av")

from test_video_files import WHOLE, converted, numbers, write  # noqa: E402

from gptv_jax.data import video_files  # noqa: E402
from gptv_jax.data.images import DamagedImageError  # noqa: E402
from gptv_jax.data.mp4_boxes import is_cut  # noqa: E402
from gptv_jax.data.video_files import Settings, name_folders, read_frames  # noqa: E402
from gptv_jax.errors import InputError  # noqa: E402

OWN_FILES = {video_files.SETTINGS_FILE, video_files.SKIPPED_FILE}


def frames_of(file, settings: Settings = WHOLE) -> list[int]:
    return numbers(read_frames(file, settings))


@pytest.mark.parametrize(
    "names",
    [
        ("a.mp4", "a.mkv", "a.mp4.mov"),
        ("a.mp4", "a.mp4.mov", "a.mp4.mov.avi"),
        ("frames.json.mp4", "skipped.jsonl.mp4", "b.mp4"),
        ("x" * 251 + ".mp4", "x" * 251 + ".mov", "y" * 251 + ".mp4"),
        ("b/c.mp4", "b.mp4", "b.avi"),
    ],
)
def test_every_video_has_a_folder_whatever_the_files_are_called(tmp_path, names):
    for count, name in enumerate(names, start=2):
        write(tmp_path / "videos" / name, count=count, codec="mpeg4")
    out = tmp_path / "out"
    out.mkdir()
    for name in OWN_FILES:
        (out / name).write_text("{}")
    for _ in range(2):  # what is written is found again
        found = converted(tmp_path / "videos", out)
        for count, name in enumerate(names, start=2):
            assert found[name].reason is None and found[name].frames == count
            assert len(list((out / found[name].folder).iterdir())) == count
    assert len({each.folder for each in found.values()}) == 3
    assert all((out / name).read_text() == "{}" for name in OWN_FILES)


def test_a_folder_has_the_name_of_the_file_without_its_ending_where_that_is_free():
    assert name_folders(["a.mp4", "b/c.d.mkv", "e.avi", "e.mp4"]) == [
        "a",
        "b/c.d",
        "e.avi",
        "e.mp4",
    ]


@pytest.mark.parametrize("place", ["pipe", "file", "link", "folder"])
def test_one_file_that_cannot_be_read_or_written_is_named_and_others_are_read(tmp_path, place):
    write(tmp_path / "videos/b.mp4")
    odd = tmp_path / "videos/a.mp4"
    if place == "pipe":
        os.mkfifo(odd)
    elif place == "link":
        odd.symlink_to(tmp_path / "nowhere.mp4")
    else:
        write(odd)
        (tmp_path / "out").mkdir()
        if place == "file":  # at the place of the folder of frames
            (tmp_path / "out/a").write_text("no folder")
        else:  # of a name that is too long with all folders above
            odd.rename(write(tmp_path / "videos/c/a.mp4"))
            (tmp_path / "out/c").write_text("no folder")
    found = converted(tmp_path / "videos", tmp_path / "out")
    reason = found.pop(next(name for name in found if name.endswith("a.mp4"))).reason
    assert {"pipe": "no regular file", "link": "No such file"}.get(
        place, "cannot be made"
    ) in reason
    assert found["b.mp4"].frames == 12


def test_a_full_disk_is_no_damage_of_a_file(tmp_path, monkeypatch):
    write(tmp_path / "videos/a.mp4")

    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(OSError, match="No space left"):
        converted(tmp_path / "videos", tmp_path / "out")


@pytest.mark.parametrize(
    ("ending", "codec"),
    [("mkv", "libx264"), ("webm", "libvpx"), ("mp4", "libx264"), ("mov", "mpeg4"), ("flv", "flv")],
)
@pytest.mark.parametrize("start", [1000, 60_000])
def test_a_video_whose_frames_begin_late_is_whole(tmp_path, ending, codec, start):
    times = [start + round(1000 * k / 6) for k in range(12)]
    file = write(tmp_path / f"a.{ending}", codec=codec, times=times)
    settings = Settings(rate=6.0, short_side=0, max_seconds=10.0)
    assert frames_of(file, settings)[:12] == list(range(12))
    if ending in ("mkv", "webm"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) * 8 // 10])
        with pytest.raises(DamagedImageError, match=r"of 2\.00 seconds"):
            frames_of(file, settings)


def fragmented(path, count=24):
    return write(path, count=count, codec="mjpeg", movflags="frag_keyframe+empty_moov")


def test_a_fragmented_file_that_ends_within_a_fragment_is_cut_short(tmp_path):
    whole = fragmented(tmp_path / "a.mp4", count=12).read_bytes()
    assert whole.count(b"moof") > 6 and frames_of(tmp_path / "a.mp4") == list(range(12))
    ends, at = [], 0  # of the boxes
    while at < len(whole):
        at += struct.unpack_from(">I", whole, at)[0]
        ends.append(at)
    cut, file = 0, tmp_path / "cut.mp4"
    for k in range(4, 40):
        size = len(whole) * k // 40
        file.write_bytes(whole[:size])
        with file.open("rb") as opened:
            first = whole.index(b"moof") + 4
            assert is_cut(opened) == (size not in ends and size >= first)
        if size not in ends:
            cut += 1
            with pytest.raises(DamagedImageError):
                frames_of(file)
    assert cut > 20
    file.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DamagedImageError, match=r"cut short within a fragment \(see --min_share"):
        frames_of(file)


def test_a_share_of_zero_takes_the_fragments_that_there_are(tmp_path):
    file = write(tmp_path / "a.mp4", count=12, movflags="frag_keyframe+empty_moov", codec="libx264")
    content = file.read_bytes()
    at = content.index(b"mfra") - 4  # behind the fragments
    file.write_bytes(content[: at + 12])
    with pytest.raises(DamagedImageError, match="within a fragment"):
        frames_of(file)
    assert frames_of(file, Settings(rate=0.0, short_side=0, min_share=0.0)) == list(range(12))


def test_boxes_that_are_none_and_many_boxes_end_the_search(tmp_path):
    box = struct.pack(">I4s", 8, b"moof")
    large = struct.pack(">I4sQ", 1, b"mdat", 24) + bytes(8)
    for content, cut in (
        (b"", False),
        (box * 3, False),
        (box + large, False),
        (box + large[:-1], True),
        (large[:-1], False),  # no fragments
        (box + struct.pack(">I4s", 0, b"mdat") + bytes(99), False),  # up to the end of the file
        (box + struct.pack(">I4s", 3, b"mdat") + bytes(99), False),
        (box + b"\0\0\0", True),
        (box * 150_000 + b"\0", False),
    ):
        (tmp_path / "a").write_bytes(content)
        with (tmp_path / "a").open("rb") as file:
            assert is_cut(file) == cut


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate": float("nan")}, "--rate is nan; it takes 0, or 0.001 to 1000"),
        ({"rate": float("inf")}, "--rate is inf"),
        ({"rate": 1e-7}, "--rate is 1e-07"),
        ({"rate": -1.0}, "--rate is -1"),
        ({"min_share": 2.0}, "--min_share is 2; it takes 0 to 1"),
        ({"min_share": float("nan")}, "--min_share is nan"),
        ({"max_seconds": 0.0}, "--max_seconds is 0; it takes a number above 0"),
    ],
)
def test_settings_by_which_no_video_could_be_read_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        Settings(**changes)


def test_the_slowest_and_the_fastest_rate_are_taken(tmp_path):
    file = write(tmp_path / "a.mp4", count=2)
    assert frames_of(file, Settings(rate=0.001, short_side=0)) == [0]
    fast = frames_of(file, Settings(rate=1000.0, short_side=0))
    assert 300 < len(fast) < 350 and sorted(fast) == fast and {*fast} == {0, 1}


@pytest.mark.process
def test_the_command_names_what_it_leaves_out_and_ends_in_one_sentence(command, tmp_path):
    write(tmp_path / "videos/a.mp4")
    os.mkfifo(tmp_path / "videos/pipe.mp4")
    arguments = [f"--videos={tmp_path / 'videos'}", f"--out={tmp_path / 'out'}"]
    ended = command("prepare", *arguments)
    assert ended.code == 0, ended.errors[-2000:]
    (line,) = (tmp_path / "out" / video_files.SKIPPED_FILE).read_text().splitlines()
    assert json.loads(line)["reason"] == "it is no regular file"
    ended = command("prepare", *arguments, "--rate=nan")
    assert ended.code == 1 and "--rate is nan" in ended.errors
    assert "Traceback" not in ended.errors
