"""Clips of a camera that pans and zooms over the images of a folder, made on the fly."""

import dataclasses

import numpy as np
from jaxtyping import Float
from PIL import Image

from gptv_jax import config as config_lib
from gptv_jax.data.clips import Clips
from gptv_jax.data.data_set import DataSet, Source
from gptv_jax.data.folder import ImageFolder
from gptv_jax.data.images import Decode
from gptv_jax.data.records import EncodedClip, Record, Rng, to_array, to_picture

# The window's rows and columns a frame of each motion, and whether the window shrinks or grows.
MOTIONS = {
    "pan_left": (0, -1, 0),
    "pan_right": (0, 1, 0),
    "pan_up": (-1, 0, 0),
    "pan_down": (1, 0, 0),
    "zoom_in": (0, 0, -1),
    "zoom_out": (0, 0, 1),
}
SPEEDS = 1.0, 2.0  # pixels a frame, the least and the most
LARGEST = 0.7, 1.0  # the window's side: shares of the largest window that stays in the image


class CameraMotions(DataSet):
    """Every image of a folder, `config.path`, in six clips, one of each of `MOTIONS`.

    A window moves over the image, or shrinks or grows, and each frame is the window resized to
    `config.image_size`. A clip's number is 6 x the image's number + the motion, the label; speed,
    size and place are drawn by the generator in training, and by the clip's number in evaluation.
    A pan has `SPEEDS` pixels a frame; in a zoom, the window's side changes by so many pixels.
    Splits are those of `ImageFolder`; classes of the images are left out. The end of an expression
    such as `train[:90%]` may divide the clips of one image.
    """

    videos = True
    classes, class_names = len(MOTIONS), tuple(MOTIONS)

    def __init__(self, config: config_lib.Data):
        images = ImageFolder(dataclasses.replace(config, labels=False, labels_file=None))
        self.notes, self.left_out = images.notes, images.left_out
        self.other_names, size, clips = images.other_names, config.size, Clips.of(config)
        self.splits = {n: CameraClips(n, each, size, clips) for n, each in images.splits.items()}


class CameraClips(Source):
    """The clips of a split, see `CameraMotions`."""

    def __init__(self, split: str, images: Source, size: tuple[int, int], clips: Clips):
        self.where, self.images, self.size, self.clips = split, images, size, clips
        self.labels = np.tile(np.arange(len(MOTIONS), dtype=np.int32), len(images))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, rng: Rng = None, place: float = 0.5) -> Record:
        del place  # a clip is all that there is
        rng, label = rng or np.random.default_rng(index), self.labels[index]
        encoded = self.images[index // len(MOTIONS)]["encoded"]
        speed, *places = rng.uniform([SPEEDS[0], LARGEST[0], 0, 0], [SPEEDS[1], LARGEST[1], 1, 1])
        motion = np.array(tuple(MOTIONS.values())[label]) * speed
        times = np.arange(self.clips.frames) * self.clips.stride
        return {"encoded": Windows(encoded, self.size, motion, times, *places), "label": label}

    def name(self, index: int) -> str:
        return self.images.name(index // len(MOTIONS))


@dataclasses.dataclass(frozen=True)
class Windows(EncodedClip):
    """An image through a window that moves."""

    encoded: bytes
    size: tuple[int, int]  # height and width of the frames in pixels
    motion: Float[np.ndarray, " 3"]  # pixels of a frame: rows, columns, and change of the side
    times: np.ndarray  # of the frames
    share: float  # the window's side, of the largest window that stays in the image
    row: float  # place of the window in the room that the motion leaves it: 0 top, 1 bottom
    column: float

    def boxes(self, height: int, width: int) -> Float[np.ndarray, "F 4"]:
        """y0, x0, y1, x1 of the window in each frame, in pixels of an image of this size."""
        # In pixels of the first frame, whose window has its centre at 0, 0.
        centre = np.outer(self.times, self.motion[:2])
        growth = (1 + abs(self.motion[2]) / min(self.size)) ** np.sign(self.motion[2])
        half = np.outer(growth**self.times, self.size) / 2
        low, high = (centre - half).min(axis=0), (centre + half).max(axis=0)
        scale = self.share * ((height, width) / (high - low)).min()  # pixels of the image
        origin = ((height, width) - (high - low) * scale) * (self.row, self.column) - low * scale
        ends = np.stack([centre - half, centre + half], axis=1) * scale + origin
        return ends.clip(0, (height, width)).reshape(-1, 4)  # rounding may lead outside

    def decoded(self, decode: Decode) -> list[np.ndarray]:
        pixels = decode.pixels(self.encoded)
        picture, size, method = to_picture(pixels), self.size[::-1], Image.Resampling.BILINEAR
        boxes = self.boxes(*pixels.shape[:2])[:, [1, 0, 3, 2]].tolist()
        frames = (picture.resize(size, method, box=tuple(box)) for box in boxes)
        return [to_array(frame, pixels.shape[-1]) for frame in frames]
