"""Turns video files into folders of frames, by PyAV; training reads the frames alone."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import os
import pathlib
import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from gptv_jax.config.data import Limits
from gptv_jax.data.limits import DamagedImageError, as_damaged, check_size
from gptv_jax.data.listing import VIDEO_ENDINGS, Listing
from gptv_jax.data.mp4_boxes import is_cut
from gptv_jax.errors import InputError

if TYPE_CHECKING:
    import av

# Containers that are read. Others, such as playlists, may name files and addresses to be read.
FORMATS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg"
FRAME = "{:06d}"  # name of a frame's file, counted from 1
# Files beside the folders of frames: the settings that made the frames, and what is left out.
SETTINGS_FILE, SKIPPED_FILE = "frames.json", "skipped.jsonl"
# Errors of a path that cannot be a folder: it is too long, a file stands at it, or the file system
# does not take its letters.
UNUSABLE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which frames of a video file are written, and which files are left out."""

    rate: float = 8.0  # frames a second, whatever the rate of the file; 0: its mean rate
    short_side: int = 128  # pixels of a frame's shorter side; 0, or a smaller video: unchanged
    form: str = "jpg"  # of the frames' files: jpg (quality 95) or png (lossless)
    max_seconds: float = 600.0  # a longer video is left out
    max_frames: int = 50_000  # a video of more frames is left out
    max_pixels: int = 2**24  # height times width, above which a video is left out
    max_streams: int = 32  # a file of more streams (video, sound, subtitles) is left out
    # A file whose frames end before this share of the duration that it states is left out, as it
    # has been cut short; so is a fragmented MP4 file that ends within a fragment. 0: neither. (What
    # a transport stream, .ts, states is found in its own last packets.)
    min_share: float = 0.9

    def __post_init__(self):
        """Raises InputError where no file could be read so."""
        for name, fits, taken in (
            ("rate", self.rate == 0 or 0.001 <= self.rate <= 1000, "0, or 0.001 to 1000"),
            ("min_share", 0 <= self.min_share <= 1, "0 to 1"),
            ("max_seconds", self.max_seconds > 0, "a number above 0"),
        ):
            if not fits:
                raise InputError(f"--{name} is {getattr(self, name):g}; it takes {taken}.")

    def check_size(self, width: int, height: int) -> None:
        """Raises DamagedImageError where frames of this size would be no images of a folder."""
        _check("pixels", width * height, "max_pixels", self)
        check_size(width, height, Limits(max_pixels=self.max_pixels))


class Written(NamedTuple):
    """What became of a video file."""

    file: str  # below the folder of videos
    folder: str  # of the frames, below the folder of frames
    frames: int  # how many were written; 0: none
    reason: str | None  # why the file is left out; None: the frames are written


def find(videos: pathlib.Path) -> list[str]:
    """Sorted paths of the video files below a folder; InputError where there is none."""
    found = Listing(videos, taken=VIDEO_ENDINGS).files
    if not found:
        endings = ", ".join(VIDEO_ENDINGS)
        raise InputError(f"{videos} has no video file; their endings are {endings}.")
    return found


def convert(
    videos: pathlib.Path, files: list[str], out: pathlib.Path, settings: Settings
) -> Iterator[Written]:
    """Writes a folder of frames for each of `files`, paths relative to the folder `videos`.

    The path of a folder of frames below `out` is the file's path, so folders of splits and classes
    are kept. An existing folder of frames is kept; a folder appears when all its frames are
    written. Yields what became of each file, in order.
    Raises InputError where PyAV is not installed.
    """
    _import_av()
    targets = name_folders(files)

    def one(file: str, target: str) -> Written:
        try:
            return Written(file, target, _write(videos / file, out / target, settings), None)
        except DamagedImageError as error:
            return Written(file, target, 0, str(error))

    # Files are decoded and encoded without Python's global lock.
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    try:
        yield from pool.map(one, files, targets)
    finally:
        pool.shutdown(cancel_futures=True)


def name_folders(files: list[str]) -> list[str]:
    """The folder of frames of each video file; all folders differ.

    A folder has the name of the file without its ending, unless two files would have that name, or
    a folder of videos, a video file or a file of the preparation has the name; it then has the
    whole name of the file.
    """
    stems = [os.path.splitext(file)[0] for file in files]
    parents = {str(folder) for file in files for folder in pathlib.PurePath(file).parents}
    taken = {*files, *parents, SETTINGS_FILE, SKIPPED_FILE}
    counts = Counter(stems)
    return [
        file if counts[stem] > 1 or stem in taken else stem
        for file, stem in zip(files, stems, strict=True)
    ]


def _import_av():
    try:
        import av
    except ImportError as error:
        raise InputError(
            "video files are read by PyAV, which is not installed: pip install 'gptv_jax[video]', "
            "or pip install av."
        ) from error
    return av


def _write(file: pathlib.Path, folder: pathlib.Path, settings: Settings) -> int:
    """Writes the frames of a file unless the folder is there; returns their number."""
    if folder.is_dir():
        return sum(1 for _ in folder.iterdir())
    part = folder.with_name(f".{folder.name}.part")
    if len(os.fsencode(part.name)) > 255:  # which many file systems do not take
        part = folder.with_name(f".{hashlib.sha256(os.fsencode(folder.name)).hexdigest()}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a command that was ended
    with _usable():
        part.mkdir(parents=True)
    try:
        count = 0
        for count, frame in enumerate(read_frames(file, settings), start=1):
            frame.save(part / f"{FRAME.format(count)}.{settings.form}", quality=95)
        with _usable():
            part.rename(folder)
        return count
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _usable() -> Iterator[None]:
    """Within the `with`, an error of the path of a folder becomes a DamagedImageError."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        problem = f"its folder of frames cannot be made: {error.strerror}"
        raise DamagedImageError(problem) from error


def read_frames(file: pathlib.Path, settings: Settings) -> Iterator[Image.Image]:
    """The frames of a video file, RGB, upright, with square pixels, at a constant rate.

    Raises DamagedImageError where the file cannot be read, is cut short, has no frame, or is beyond
    a limit of the settings; frames may have come before.
    """
    av = _import_av()
    options = {"format_whitelist": FORMATS}
    with as_damaged(), contextlib.ExitStack() as stack:
        # Reading a pipe or a device may never end.
        if not stat.S_ISREG(file.stat().st_mode):
            raise DamagedImageError("it is no regular file")
        with as_damaged("damaged, or no video that is read: "):
            data = stack.enter_context(file.open("rb"))
            container = stack.enter_context(av.open(data, options=options))
        stream = _stream(container, settings)
        if settings.min_share and "mp4" in container.format.name.split(","):
            with file.open("rb") as again:
                if is_cut(again):
                    raise DamagedImageError("it is cut short within a fragment (see --min_share)")
        rate = Fraction(settings.rate).limit_denominator(10**6) or _ratio(stream.average_rate)
        if not rate:
            raise DamagedImageError("its frame rate is unknown; name one by --rate")
        size = None
        shown = resample(_timed(container, stream, settings), rate, _ratio(stream.time_base))
        for count, frame in enumerate(shown, start=1):
            _check("frames", count, "max_frames", settings)
            picture = _upright(frame, _ratio(stream.sample_aspect_ratio), settings)
            size = size or _size(picture, settings.short_side)  # later frames may have another
            yield picture.resize(size, Image.Resampling.BILINEAR)


def resample(
    frames: Iterable[tuple[Fraction, Fraction, object]], rate: Fraction, tick: Fraction
) -> Iterator[object]:
    """At every multiple of 1 / rate seconds after the first frame, the frame that is shown then.

    `frames` are the times, in seconds, at which a frame appears and ends, and the frame; times are
    rounded to ticks.
    """
    due = shown = None
    # Files of finer ticks have times that a container before had rounded to milliseconds. A tick of
    # an AVI file is a whole frame.
    tick = min(max(tick, Fraction(1, 1000)), 1 / (4 * rate))
    for start, end, frame in frames:
        due = start if due is None else due
        while shown is not None and due < start - tick:
            yield shown
            due += 1 / rate
        shown, last = frame, max(end, start + 2 * tick)
    while shown is not None and due < last - tick:
        yield shown
        due += 1 / rate


def _stream(container: "av.container.InputContainer", settings: Settings):
    """The first stream of moving pictures."""
    _check("streams", len(container.streams), "max_streams", settings)
    cover = _import_av().stream.Disposition.attached_pic  # a picture beside music
    stream = next((s for s in container.streams.video if not s.disposition & cover), None)
    if stream is None:
        raise DamagedImageError("it has no video stream")
    if (context := stream.codec_context) is None:
        raise DamagedImageError("the codec of its video stream is unknown, or its header damaged")
    settings.check_size(context.width, context.height)
    _check("seconds", _duration(container, stream) or 0, "max_seconds", settings)
    return stream


def _check(what: str, found: int | Fraction, limit: str, settings: Settings) -> None:
    if found > getattr(settings, limit):
        shown = f"{float(found):g} {what}, more than --{limit}={getattr(settings, limit):g}"
        raise DamagedImageError(f"it has {shown}")


def _duration(container, stream) -> Fraction | None:
    """Seconds that the file states for the stream; None: it states none."""
    if "matroska" not in container.format.name.split(","):
        return _stated(container, stream)
    # Some programs count the duration from 0 on, wherever the frames begin.
    stated = _stated(container, stream)
    start = (stream.start_time or 0) * _ratio(stream.time_base)
    return stated - start if stated and stated > start > 0 else stated


def _stated(container, stream) -> Fraction | None:
    if stream.duration:
        return stream.duration * _ratio(stream.time_base)
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(Fraction, match.groups())
        return 3600 * hours + 60 * minutes + seconds
    if container.duration and len(container.streams) == 1:
        return Fraction(container.duration, 10**6)
    return None


def _timed(container, stream, settings: Settings) -> Iterator[tuple[Fraction, Fraction, object]]:
    """Every frame with the times at which it appears and ends; checks that the file is whole."""
    first = start = end = None
    usual = 1 / (_ratio(stream.average_rate) or Fraction(25))  # seconds of a frame that states none
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DamagedImageError("it is cut short, or a part of it is damaged")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise DamagedImageError("a frame of it is damaged")
            settings.check_size(frame.width, frame.height)
            tick = _ratio(frame.time_base)
            known = frame.pts is not None and tick
            time = frame.pts * tick if known else (end or Fraction(0))
            start = time if start is None else max(start, time)  # time never goes back
            first = start if first is None else first
            end = start + ((frame.duration or 0) * tick or usual)
            _check("seconds", start - first, "max_seconds", settings)
            yield start, end, frame
    if first is None:
        raise DamagedImageError("it has no frame")
    stated = _duration(container, stream)
    if stated and end - first < settings.min_share * stated - usual:
        seconds = f"{float(end - first):.2f} of {float(stated):.2f} seconds"
        raise DamagedImageError(f"it is cut short: frames end after {seconds} (see --min_share)")


def _ratio(found) -> Fraction:
    """A ratio of PyAV, whose releases have several types for ratios; 0: it is unknown."""
    return Fraction(found.numerator, found.denominator) if found else Fraction(0)


def _upright(frame: "av.VideoFrame", ratio: Fraction, settings: Settings) -> Image.Image:
    """The frame with square pixels, rotated by the angle in the file."""
    picture = frame.to_image()
    if ratio and ratio != 1:
        width = max(1, round(picture.width * ratio))
        settings.check_size(width, picture.height)
        picture = picture.resize((width, picture.height), Image.Resampling.BILINEAR)
    turn = round(frame.rotation / 90) % 4  # quarters, counterclockwise
    turns = Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270
    return picture.transpose(turns[turn - 1]) if turn else picture


def _size(picture: Image.Image, short_side: int) -> tuple[int, int]:
    short = min(picture.size)
    if not short_side or short <= short_side:
        return picture.size
    return tuple(max(1, round(side * short_side / short)) for side in picture.size)
