"""Folders of videos as data sets: folders of frames, GIF, WebP and APNG files.

Files such as MP4 are not read in training: gptv_jax.prepare turns them into folders of frames.
"""

import contextlib
import itertools
import os
import pathlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import limits
from gptv_jax.data.animations import timeline
from gptv_jax.data.clips import Clips, Video, VideoSource, natural
from gptv_jax.data.folder import FolderSplit, ImageFolder
from gptv_jax.data.images import Animation
from gptv_jax.data.limits import DamagedImageError
from gptv_jax.errors import counted, shorten

ANIMATED = (".gif", ".apng")  # endings of files that are videos, wherever they lie
# Endings of files that may be videos or frames, and their formats, which says Pillow. (A JPEG file
# with several pictures has the views of a stereo camera, or a thumbnail.)
EITHER = (".webp", ".png", ".avif", ".avifs", ".tif", ".tiff")
FORMATS = ("WEBP", "PNG", "AVIF", "TIFF")
COUNTED = 128  # animations of a split, from all over, whose frames are looked at at the start


class VideoFolder(ImageFolder):
    """All videos below a folder, `config.path`: folders of frames, and files with animations.

    A folder of image files is a video, whose frames are the files in the order of their names,
    where numbers count by their value. Files that end in .gif or .apng are videos themselves, and
    so are all WebP, PNG, AVIF and TIFF files of a folder whose first such file is an animation. The
    frames of an animation are taken at a constant rate, see `animations.timeline`.
    Splits and classes are found as `ImageFolder` finds those of images, with videos as examples.
    """

    videos = True
    noun = "video"

    def __init__(self, config: config_lib.Data):
        self._clips = Clips.of(config)
        self._frames: dict[pathlib.Path, list[str]] = {}  # of folders of frames, names of files
        super().__init__(config)

    def _examples(self, folder: pathlib.Path, files: list[str]) -> list[str]:
        """The videos below a folder, as paths relative to the folder."""
        inside: dict[str, list[str]] = {}
        for file in files:
            inside.setdefault(os.path.dirname(file), []).append(file)
        # Folders with frames in folders below.
        above = {parent for name in inside for parent in pathlib.PurePath(name).parents}
        found, stray, gaps = [], [], []
        for name, members in inside.items():
            animations = [each for each in members if each.lower().endswith(ANIMATED)]
            frames = [each for each in members if each not in {*animations}]
            if _animated(folder, frames, self.limits):
                animations, frames = members, []
            if pathlib.PurePath(name) in above or len(frames) <= len(animations):
                found += animations
                stray += frames
            else:
                found.append(name)
                stray += animations  # previews of the video
                names = sorted(map(os.path.basename, frames), key=natural)
                self._frames[folder / name] = names
                if pair := find_gap(names):
                    gaps.append(f"{name} ({' to '.join(pair)})")
        if gaps:
            self.notes.append(
                f"{counted(len(gaps), 'folder')} of frames with gaps in the numbers of the frames, "
                f"which are read as if there were none: {shorten(gaps)}"
            )
        if stray:
            beside = f"{folder} has images beside videos, which are left out"
            self.notes.append(f"{beside}: {shorten(stray)}")
        return found

    def _split(
        self, folder: pathlib.Path, videos: list[str], labels: np.ndarray | None
    ) -> "_FolderVideos":
        found = _FolderVideos(folder, videos, labels)
        found.clips, found.limits = self._clips, self.limits
        found.files = [self._frames.get(folder / v) for v in videos]
        lengths = {v: len(names) for v, names in zip(videos, found.files, strict=True) if names}
        animations, uneven = [video for video in videos if video not in lengths], []
        for video in animations[:: -(-len(animations) // COUNTED) or 1]:
            with contextlib.suppress(DamagedImageError, OSError):
                encoded = limits.read(folder / video, self.limits)
                shown = timeline(encoded, self.limits)
                lengths[video] = len(shown)
                uneven += [video] * (len(set(shown.tolist())) < len(shown))
        if uneven:
            self.notes.append(
                f"{counted(len(uneven), 'animation')} with frames of unequal durations, of which "
                f"longer ones are repeated: {shorten(uneven)}"
            )
        self.notes += self._clips.short(lengths.items())
        return found


class _FolderVideos(VideoSource, FolderSplit):
    """The videos `images` below the folder `where`; `files` has the frames of each folder."""

    files: list[list[str] | None]

    def video(self, index: int) -> Video:
        path, names, known = self.where / self.images[index], self.files[index], self.known(index)
        if names:

            def read(numbers: np.ndarray) -> list[bytes]:
                found = {
                    n: limits.read(path / names[n], self.limits) for n in set(numbers.tolist())
                }
                return [found[n] for n in numbers.tolist()]

            return Video(len(names), read, known)
        encoded = limits.read(path, self.limits)
        shown = timeline(encoded, self.limits)
        return Video(len(shown), lambda n: Animation(encoded, tuple(shown[n].tolist())), known)


def _animated(folder: pathlib.Path, files: list[str], given: config_lib.Limits) -> bool:
    """Whether the first file that Pillow can open has several frames."""
    for file in files:
        if file.lower().endswith(EITHER):
            with contextlib.suppress(DamagedImageError, OSError):  # decoding finds the reason
                encoded = limits.read(folder / file, given)
                with limits.opened(encoded, given) as image:
                    return image.format in FORMATS and getattr(image, "n_frames", 1) > 1
    return False


def find_gap(names: Sequence[str]) -> Sequence[str] | None:
    """Two names of frames, one behind the other, between which frames are missing; None: no gap.

    The names, in the order of their numbers, differ by one number, as `shot1_0001.jpg` and
    `shot1_0002.jpg` do. A gap is a step of the number of at least twice the usual one, which most
    steps have: every tenth frame of a video has no gap.
    """
    if len(names) < 3:
        return None
    keys = [natural(name) for name in names]
    varying = [k for k, parts in enumerate(zip(*keys, strict=False)) if len(set(parts)) > 1]
    if len(varying) != 1 or varying[0] % 2 == 0 or len(set(map(len, keys))) > 1:
        return None
    steps = [b[varying[0]] - a[varying[0]] for a, b in itertools.pairwise(keys)]
    usual, count = Counter(steps).most_common(1)[0]
    if 2 * count <= len(steps) or not usual:
        return None
    return next((names[k : k + 2] for k, step in enumerate(steps) if step >= 2 * usual), None)
