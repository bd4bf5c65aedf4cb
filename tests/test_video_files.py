"""Video files become folders of frames, which training reads; damaged files are named."""

import json
import shutil
import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
from conftest import encoded, random_image
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax.data import sources, video_files
from gptv_jax.data.images import DamagedImageError
from gptv_jax.data.video_files import Settings, read_frames, resample
from gptv_jax.errors import InputError

av = pytest.importorskip("av")

HEIGHT, WIDTH = 32, 48
WHOLE = Settings(rate=0.0, short_side=0)


def write(path, count=12, rate=6, codec="mpeg4", size=(HEIGHT, WIDTH), times=None, **options):
    """A video whose frame k is grey of 20 k, with a red mark in the corner at the top left."""
    turn, ratio = options.pop("turn", 0), options.pop("ratio", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.bit_rate = 2_000_000
        if ratio:
            stream.codec_context.sample_aspect_ratio = ratio
        if turn:
            stream.set_display_rotation(turn)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(count):
            pixels = np.full((*size, 3), 20 * k, np.uint8)
            pixels[: size[0] // 2, : size[1] // 2] = (255, 0, 0)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(pictures) -> list[int]:
    """Of frames of `write`, the number of every frame, by the pixels opposite to the mark."""
    return [round(np.asarray(p)[-4:, -4:].mean() / 20) for p in pictures]


def corner(picture) -> tuple[bool, bool]:
    """Whether the red mark is at the bottom, and whether it is at the right."""
    red = np.asarray(picture).astype(int)
    y, x = np.nonzero((red[..., 0] > 150) & (red[..., 1] < 100))
    return bool(y.mean() > red.shape[0] / 2), bool(x.mean() > red.shape[1] / 2)


def converted(folder, out, settings=WHOLE) -> dict[str, video_files.Written]:
    found = video_files.convert(folder, video_files.find(folder), out, settings)
    return {each.file: each for each in found}


@pytest.mark.parametrize(
    ("ending", "codec"),
    [
        ("mp4", "libx264"),
        ("mkv", "libx264"),
        ("webm", "libvpx"),
        ("avi", "mpeg4"),
        ("ts", "mpeg2video"),
        ("mov", "mpeg4"),
        ("flv", "flv"),
        ("wmv", "wmv2"),
    ],
)
def test_every_frame_of_every_usual_container_is_read_in_order(tmp_path, ending, codec):
    rate = 25 if codec == "mpeg2video" else 6
    file = write(tmp_path / f"a.{ending}", codec=codec, rate=rate)
    pictures = list(read_frames(file, WHOLE))
    assert numbers(pictures) == list(range(12))
    assert {p.size for p in pictures} == {(WIDTH, HEIGHT)} and {p.mode for p in pictures} == {"RGB"}
    assert corner(pictures[3]) == (False, False)


def test_frames_are_taken_at_a_constant_rate_by_their_times(tmp_path):
    times = [0, 100, 200, 1000, 1100, 1200]
    file = write(tmp_path / "a.mkv", count=6, codec="libx264", times=times)
    # At 0, .1, .2, ... seconds; frame 2 stands still from .2 to 1.
    taken = numbers(read_frames(file, Settings(rate=10.0)))
    assert taken[:13] == [0, 1] + [2] * 8 + [3, 4, 5]
    assert numbers(read_frames(file, Settings(rate=5.0)))[:7] == [0, 2, 2, 2, 2, 3, 5]
    steady = write(tmp_path / "b.mp4", count=12, rate=6, codec="libx264")
    assert numbers(read_frames(steady, Settings(rate=3.0))) == [0, 2, 4, 6, 8, 10]
    assert numbers(read_frames(steady, Settings(rate=12.0))) == [k for k in range(12) for _ in "ab"]


@pytest.mark.parametrize("rate", [1, 7, 24, 25, 30, 60])
def test_rounded_times_lose_and_repeat_no_frame(rate):
    tick = Fraction(1, 1000)
    ticks = [round(1000 * k / rate) for k in range(200)]
    frames = [(t * tick, t * tick + Fraction(1, rate), k) for k, t in enumerate(ticks)]
    assert list(resample(frames, Fraction(rate), tick)) == list(range(200))
    assert list(resample(frames, Fraction(rate), tick / 90)) == list(range(200))  # copied to MP4
    assert list(resample(frames[5:6], Fraction(rate), tick)) == [5]
    assert list(resample([], Fraction(rate), tick)) == []


@pytest.mark.parametrize(("turn", "place"), [(90, (1, 0)), (180, (1, 1)), (-90, (0, 1))])
def test_rotation_is_carried_out(tmp_path, turn, place):
    file = write(tmp_path / "a.mp4", turn=turn)
    first = next(read_frames(file, WHOLE))
    assert first.size == ((HEIGHT, WIDTH) if turn % 180 else (WIDTH, HEIGHT))
    assert corner(first) == (bool(place[0]), bool(place[1]))


def test_pixels_become_square_and_the_shorter_side_is_as_named(tmp_path):
    wide = write(tmp_path / "a.mp4", ratio=Fraction(2, 1))
    assert next(read_frames(wide, WHOLE)).size == (2 * WIDTH, HEIGHT)
    assert next(read_frames(wide, Settings(short_side=16))).size == (48, 16)
    assert next(read_frames(wide, Settings(short_side=999))).size == (2 * WIDTH, HEIGHT)


def test_splits_and_classes_are_kept_and_the_frames_are_a_data_set(tmp_path):
    for split, kind, name in [
        ("train", "walk", "a"),
        ("train", "walk", "b"),
        ("train", "run", "a"),
        ("train", "run", "c"),
        ("test", "walk", "d"),
        ("test", "run", "e"),
    ]:
        write(tmp_path / "videos" / split / kind / f"{name}.mp4")
    write(tmp_path / "videos/train/walk/a.avi")  # a name that another video has
    write(tmp_path / "videos/train/walk.mp4")  # a name that a folder of videos has
    (tmp_path / "videos/train/walk/poster.jpg").write_bytes(b"no video")
    found = converted(tmp_path / "videos", tmp_path / "out", Settings(rate=0.0, form="png"))
    assert found.pop("train/walk.mp4").folder == "train/walk.mp4"
    shutil.rmtree(tmp_path / "out/train/walk.mp4")
    assert len(found) == 7 and all(w.frames == 12 and w.reason is None for w in found.values())
    assert found["train/walk/a.avi"].folder == "train/walk/a.avi"
    data = config_lib.Data(name="folder", path=str(tmp_path / "out"), frames=4)
    sources.open_data_set.cache_clear()
    source = sources.open_source(data, "train")
    assert len(source) == 5 and source.class_names == ("run", "walk")
    assert len(sources.open_source(data, "test")) == 2
    clip = [
        np.asarray(Image.open(tmp_path / "out/test/run/e" / f"{k:06}.png")) for k in range(1, 13)
    ]
    assert numbers(clip) == list(range(12))


def test_what_is_written_stays_and_what_was_begun_is_made_anew(tmp_path):
    write(tmp_path / "videos/a.mp4")
    write(tmp_path / "videos/b.mp4")
    converted(tmp_path / "videos", tmp_path / "out")
    (tmp_path / "out/b").rename(tmp_path / "out/.b.part")
    (tmp_path / "out/.b.part/000099.jpg").write_bytes(b"")
    before = (tmp_path / "out/a/000001.jpg").stat().st_mtime_ns
    assert [w.frames for w in converted(tmp_path / "videos", tmp_path / "out").values()] == [12, 12]
    assert (tmp_path / "out/a/000001.jpg").stat().st_mtime_ns == before
    assert not (tmp_path / "out/.b.part").exists()
    assert len(list((tmp_path / "out/b").iterdir())) == 12


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("max_seconds", 1.5),
        ("max_frames", 11),
        ("max_pixels", HEIGHT * WIDTH - 1),
        ("max_streams", 0),
    ],
)
def test_every_limit_leaves_a_file_out_and_the_reason_names_the_limit(tmp_path, limit, value):
    file = write(tmp_path / "a.mp4")
    with pytest.raises(DamagedImageError, match=f"more than --{limit}={value:g}"):
        list(read_frames(file, Settings(**{"rate": 0.0, limit: value})))


def test_nothing_but_the_file_is_read(tmp_path):
    """Playlists and lists of files name other files, and addresses."""
    write(tmp_path / "a.mp4")
    write(tmp_path / "a.ts", codec="mpeg2video", rate=25)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.mp4").write_text(playlist)
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    for name in ("list.mp4", "concat.mp4"):
        with pytest.raises(DamagedImageError, match="no video that is read"):
            list(read_frames(tmp_path / name, WHOLE))


def odd_files(folder) -> dict[str, bytes]:
    """Damaged files of every kind, by name; those that must be left out begin with x."""
    made = {
        ending: write(folder / f"whole.{ending}", codec=codec, **options).read_bytes()
        for ending, codec, options in (
            ("mp4", "libx264", {}),
            ("mov", "libx264", {"movflags": "+faststart"}),
            ("mkv", "libx264", {}),
            ("webm", "libvpx", {}),
            ("avi", "mpeg4", {}),
        )
    }
    files = {}
    for ending, whole in made.items():
        for i in range(10):
            files[f"x_cut{i}.{ending}"] = whole[: len(whole) * i // 12]
        for i in range(8):
            at = len(whole) * (2 * i + 1) // 16
            files[f"flip{i}.{ending}"] = whole[:at] + bytes(8) + whole[at + 8 :]
        for i in range(3):
            start = len(whole) * (i + 1) // 5
            files[f"hole{i}.{ending}"] = whole[:start] + whole[start + len(whole) // 8 :]
    mp4, sizes = made["mp4"], []
    for value in (b"\0\0\0\0", b"\xff\xff\xff\xff"):  # boxes of no size, and of 4 GiB
        for box in (b"moov", b"mdat", b"stsz", b"stts"):
            at = mp4.index(box)
            files[f"{box.decode()}{len(sizes)}.mp4"] = mp4[: at - 4] + value + mp4[at:]
            sizes.append(at)
    at = mp4.index(b"avc1") + 4 + 24  # height and width of the pictures, and of the file's header
    files["huge.mp4"] = mp4[:at] + struct.pack(">HH", 65535, 65535) + mp4[at + 4 :]
    # The decoder of Motion JPEG makes a picture of what there is.
    file = write(folder / "end.mov", codec="mjpeg", movflags="+faststart")
    files["x_end.mov"] = file.read_bytes()[:-30]
    files["x_text.mp4"] = b"no video\n" * 100
    files["x_png.mp4"] = encoded(random_image(HEIGHT, WIDTH, 3))
    files["mkv.mp4"] = made["mkv"]  # a wrong ending does no harm
    files["one.mp4"] = write(folder / "one.mp4", count=1).read_bytes()
    return files


def test_a_hundred_damaged_files_are_read_or_named_and_never_end_the_preparation(tmp_path):
    files = odd_files(tmp_path / "made")
    assert len(files) >= 110
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, content in files.items():
        (videos / name).write_bytes(content)
    found = converted(videos, tmp_path / "out")
    assert set(found) == set(files)
    for name, written in found.items():
        folder = tmp_path / "out" / written.folder
        assert (written.reason is None) == (written.frames > 0) == folder.exists(), name
        assert written.reason is None or written.reason.strip(), name
        assert "NoneType" not in (written.reason or ""), name
        if name.startswith("x_"):
            assert written.reason, name
        for frame in folder.iterdir() if written.frames else ():
            with Image.open(frame) as picture:
                assert picture.size == (WIDTH, HEIGHT)
    assert found["mkv.mp4"].frames == 12 and found["one.mp4"].frames == 1
    assert not list((tmp_path / "out").glob(".*"))


def test_frames_of_another_size_within_a_video_get_the_size_of_the_first(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=6)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
        container.start_encoding()
        for k in range(6):  # the picture of a camera that is turned, and of a larger one
            shape = [(HEIGHT, WIDTH), (WIDTH, HEIGHT), (2 * HEIGHT, 2 * WIDTH)][k // 2]
            packet = av.Packet(encoded(np.full((*shape, 3), 20 * k, np.uint8), "JPEG"))
            packet.stream, packet.time_base = stream, Fraction(1, 6)
            packet.pts = packet.dts = k
            container.mux(packet)
    pictures = list(read_frames(tmp_path / "a.avi", WHOLE))
    assert {p.size for p in pictures} == {(WIDTH, HEIGHT)} and numbers(pictures) == list(range(6))
    with pytest.raises(DamagedImageError, match="max_pixels=1536"):
        list(read_frames(tmp_path / "a.avi", Settings(max_pixels=HEIGHT * WIDTH)))


def test_without_pyav_one_sentence_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install 'gptv_jax\[video\]', or pip install av"):
        list(video_files.convert(tmp_path, ["a.mp4"], tmp_path, WHOLE))


@pytest.mark.process
def test_the_command_writes_frames_and_the_list_of_what_it_left_out(command, tmp_path):
    write(tmp_path / "videos/a/1.mp4")
    write(tmp_path / "videos/b/2.mkv", codec="libx264")
    (tmp_path / "videos/b/3.mp4").write_bytes(b"no video")
    arguments = [f"--videos={tmp_path / 'videos'}", f"--out={tmp_path / 'out'}"]
    for _ in range(2):  # the same command again finds all frames written
        ended = command("prepare", *arguments, "--rate=3", "--short_side=16")
        assert ended.code == 0, ended.errors[-2000:]
        summary = json.loads(ended.output)
        assert summary | {"folder": ""} == {"folder": "", "videos": 2, "frames": 12, "skipped": 1}
        (line,) = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
        assert json.loads(line)["name"].endswith("b/3.mp4") and "3.mp4 is left out" in ended.errors
    ended = command("prepare", *arguments, "--rate=4", "--short_side=16")
    assert ended.code == 1 and "rate is 3.0, expected 4.0" in ended.errors
    ended = command("prepare", f"--videos={tmp_path / 'out'}", f"--out={tmp_path / 'new'}")
    assert ended.code == 1 and "no video file" in ended.errors
    assert not (tmp_path / "new").exists()
