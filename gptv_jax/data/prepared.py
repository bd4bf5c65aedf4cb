"""TFDS data sets that were prepared as ArrayRecord, read without TensorFlow."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.data import label_maps, listing
from gptv_jax.data.clips import Clips, Video, VideoSource
from gptv_jax.data.data_set import DataSet, Source
from gptv_jax.data.orientation import shown_size
from gptv_jax.data.records import Record
from gptv_jax.errors import InputError, cut, first_line, shorten

IMAGE_ID = "image/id"  # the feature with the id of an image in the original files
IMAGES = ("image", "image_left")  # features with the image; Cityscapes calls it image_left
VIDEO = "video"  # the feature with the video, where there are several


class Tfds(DataSet):
    """A TFDS data set that was prepared as ArrayRecord, read without TensorFlow.

    `config.name` may have a configuration, `a/b:1.0.0`. `config.dir` has all prepared sets, or this
    one; None: TFDS's default. `sets` are the other data sets, for messages.

    Label maps are the feature `config.maps`; its names, where `config.map_names` has none.

    Boxes are those of the first feature that is a sequence of dicts with `bbox`, such as `objects`;
    without a `label` in the dicts all objects are of one class.

    With `config.frames`, the examples are the videos of the feature `video`, or of the first one of
    type Video, a sequence of image files; boxes and label maps are not read.
    """

    def __init__(self, config: config_lib.Data, sets: Iterable[str]):
        import tensorflow_datasets as tfds  # takes seconds

        name, folder = config.name, config.dir and str(files.user_place(config.dir))
        self._folder, self._sets, self._limits = folder, sets, config.limits
        try:
            with _videos_as_images(tfds.features.Video):
                if folder and (pathlib.Path(folder) / "dataset_info.json").exists():
                    self._builder = tfds.builder_from_directory(folder)
                else:
                    self._builder = tfds.builder(name, data_dir=folder)
                info = self._builder.info
            if not info.splits:
                raise FileNotFoundError("it is not prepared")
        except Exception as error:  # TFDS raises what its readers do
            raise self._unprepared(name, error) from error
        if info.name != name.partition("/")[0].partition(":")[0]:
            raise InputError(
                f"config.data.dir={folder} holds {info.name}, but config.data.name is {name}."
            )
        videos = [
            name
            for name, each in info.features.items()
            if isinstance(getattr(each, "feature", None), tfds.features.Image)
        ]
        self._image = next((n for n in IMAGES if n in info.features), None)
        self.videos = bool(videos) and (bool(config.frames) or not self._image)
        if self.videos:
            self._image, self._clips = VIDEO if VIDEO in videos else videos[0], Clips.of(config)
        if self._image is None:
            shown = shorten(info.features)
            raise InputError(f"data set {name} has no feature called image; it has: {shown}.")
        self._pictures = [
            n for n, feature in info.features.items() if isinstance(feature, tfds.features.Image)
        ]
        self._decoders = dict.fromkeys((self._image, *self._pictures), tfds.decode.SkipDecoding())
        self._decoders |= dict.fromkeys(videos, _KeepFiles())
        if self.videos and config.maps:
            raise InputError(
                f"config.data.maps={config.maps} is not read beside videos; leave it out, or set "
                "config.data.frames=0 to read images."
            )
        self._maps = config.maps and (config.maps, self._label_table(config))
        self.map_names = self._maps[1].names if self._maps else ()
        self.name = info.name
        labelled = "label" in info.features
        self.classes = getattr(info.features["label"], "num_classes", 0) if labelled else 0
        self.class_names = tuple(info.features["label"].names or ()) if self.classes else ()
        self._objects = None
        for name, feature in info.features.items():
            inner = dict(getattr(getattr(feature, "feature", None), "items", tuple)())
            box_format = getattr(inner.get("bbox"), "bbox_format", None)
            boxes = getattr(box_format, "name", "") == "REL_YXYX"
            if boxes and not self._objects and not self.videos:
                label = inner.get("label")
                self._objects = (name, isinstance(label, tfds.features.ClassLabel))
                self.object_names = tuple(label.names) if self._objects[1] else (name,)
        self.lengths = {split: found.num_examples for split, found in info.splits.items()}

    def _label_table(self, config: config_lib.Data) -> label_maps.LabelTable:
        able = {*self._pictures} - {self._image}
        if config.maps not in able:
            raise InputError(
                f"config.data.maps={config.maps} is no label map of the data set {config.name}; "
                f"its features that may be label maps are: {shorten(sorted(able)) or 'none'}."
            )
        names = getattr(self._builder.info.features[config.maps], "names", None)
        if config.map_names is None and names:
            return label_maps.make_table(tuple(names), config)
        return label_maps.read_table(config)

    def open(self, split: str) -> Source:
        paths = [pathlib.Path(path) for path in self._builder.info.splits[split].filepaths]
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            raise InputError(f"data set {self.name} is incomplete: {missing[0]} does not exist.")
        try:
            data = self._builder.as_data_source(split=split, decoders=self._decoders)
        except NotImplementedError as error:  # prepared as TFRecord
            raise self._unprepared(self.name, error) from error
        where, labelled = f"{self.name}/{split}", bool(self.classes)
        if self.videos:
            return _TfdsVideos(where, data, self._image, labelled, self._clips)
        facts = labelled, self._objects, self._maps, self._limits
        return _TfdsSplit(where, data, self._image, *facts)

    def _unprepared(self, name: str, error: Exception) -> InputError:
        if "/" in name and type(error).__name__ == "DatasetNotFoundError":
            hub = listing.hub_advice(name)
            return InputError(f"config.data.name={name} is no TFDS set; of the Hub, {hub}.")
        where = f" --data_dir={self._folder}" if self._folder else ""
        return InputError(
            f"config.data.name={name} is none of {', '.join(self._sets)} and no prepared TFDS set "
            f"({cut(first_line(error), 60)}); this prepares it: pip install -e '.[prepare]' && "
            f"tfds build {name} --file_format=array_record{where}"
        )


@dataclasses.dataclass(frozen=True)
class _TfdsSplit(Source):
    where: str
    examples: Sequence[dict]  # of which TFDS reads everything together
    image: str  # the feature
    labelled: bool  # whether there are labels
    objects_of: tuple[str, bool] | None  # the feature, and whether its objects have labels
    maps: tuple[str, label_maps.LabelTable] | None  # the feature, and its classes
    limits: config_lib.Limits

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Record:
        example = self.examples[index]
        record = {"encoded": example[self.image]}
        if self.maps:
            name, table = self.maps
            found = table.annotate(record["encoded"], example[name])
            record["encoded"], record["segmentation"] = found
        if self.labelled:
            record["label"] = np.int32(example["label"])
        if self.objects_of:
            name, labelled = self.objects_of
            size, _ = shown_size(record["encoded"], self.limits)
            record |= _objects(size, example[name], labelled)
        return record

    def image_id(self, index: int) -> int | str | None:
        found = self.examples[index].get(IMAGE_ID)
        if isinstance(found, bytes):
            return found.decode()
        return int(found) if isinstance(found, int | np.integer) else found


@dataclasses.dataclass(frozen=True)
class _TfdsVideos(VideoSource):
    where: str
    examples: Sequence[dict]
    feature: str
    labelled: bool
    clips: Clips

    def __len__(self) -> int:
        return len(self.examples)

    def video(self, index: int) -> Video:
        example = self.examples[index]
        frames = example[self.feature]
        label = {"label": np.int32(example["label"])} if self.labelled else {}
        return Video(len(frames), lambda numbers: [frames[n] for n in numbers.tolist()], label)


class _KeepFiles:
    """Like TFDS's SkipDecoding, which cannot be used for sequences without TensorFlow."""

    def setup(self, *, feature) -> None:
        pass

    def decode_batch_example_np(self, files: np.ndarray) -> np.ndarray:
        return files


@contextlib.contextmanager
def _videos_as_images(video: type) -> Iterator[None]:
    """Within the `with`, features.json's Video becomes the sequence of images that TFDS stores.

    `video` is TFDS's class, which asks TensorFlow for the type of the pixels.
    """
    import tensorflow_datasets as tfds

    def sequence(value) -> tfds.features.Sequence:
        if isinstance(value, dict):  # of older releases of TFDS
            shape, form = value["shape"], value["encoding_format"]
        else:
            shape = [None if n < 0 else n for n in value.shape.dimensions]
            form = value.encoding_format or None
        image = tfds.features.Image(shape=tuple(shape[1:]) or None, encoding_format=form)
        return tfds.features.Sequence(image, length=shape[0] if shape else None)

    usual = video.__dict__["from_json_content"]
    video.from_json_content = staticmethod(sequence)
    try:
        yield
    finally:
        video.from_json_content = usual


def _objects(size: tuple[int, int], found: dict[str, list | np.ndarray], labelled: bool) -> Record:
    """The boxes of an image of `size` in pixels, of y0, x0, y1, x1 as shares of height and width.

    Boxes are clipped to the image; those without area or without a class are left out.
    """
    sides = np.array(size * 2, np.float32)
    boxes = np.reshape(found["bbox"], (-1, 4)).clip(0, 1) * sides
    none = np.zeros(len(boxes), np.int32)
    labels = np.asarray(found["label"] if labelled else none, np.int32)
    kept = (boxes[:, :2] < boxes[:, 2:]).all(1) & (labels >= 0)
    area = np.asarray(found.get("area", none))
    area = np.where(area > 0, area, (boxes[:, 2:] - boxes[:, :2]).prod(1))
    return {
        "boxes": boxes[kept].astype(np.float32),
        "box_labels": labels[kept],
        "crowd": np.asarray(found.get("is_crowd", none), bool)[kept],
        "area": area[kept].astype(np.float32),
    }
