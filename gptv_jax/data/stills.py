"""Single images among the clips of pretraining: an image is a clip of one frame."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.data import sources
from gptv_jax.data.damage import NOT_DAMAGED, DecodedSource
from gptv_jax.data.records import Record
from gptv_jax.errors import InputError


def images_of(config: config_lib.Data) -> tuple[config_lib.Data, str, tuple[str, ...]]:
    """Data set, split and transforms of the folder `config.stills`, whose labels are not read.

    InputError: there is no such folder.
    """
    if not files.user_path(config.stills).exists():
        raise InputError(f"config.data.stills={config.stills} does not exist.")
    kept = {n: getattr(config, n) for n in ("image_size", "damaged", "max_damaged", "limits")}
    data = config_lib.Data(name="folder", path=config.stills, labels=False, **kept)
    return data, "train", config.still_transforms or config.train_transforms


@dataclasses.dataclass(frozen=True)
class Stills:
    """Draws images that take the place of clips, and names damaged images and damaged clips.

    The number of a damaged image follows the numbers of the clips.
    """

    images: object  # the examples of `images_of`, see `pipeline.open_examples`
    clips: object  # the source of the clips
    config: config_lib.Data  # of the clips

    @functools.cached_property
    def label(self) -> np.int32:
        """The label of an image without a class: the first number after the classes of clips."""
        return np.int32(sources.open_source(self.config, "train").classes)

    def draw(self, rng: np.random.Generator, clip: Callable[[], Record]) -> Record:
        """A clip's record, or an image's record with the image in all frames and "still" true."""
        if rng.random() >= self.config.still_share:
            return {"damaged": NOT_DAMAGED, "still": np.False_} | clip()
        record = self.images.record(int(rng.integers(len(self.images.source))), rng)
        record["image"] = np.repeat(record["image"][None], self.config.frames, axis=0)
        if self.label:
            record["label"] = self.label
        if record["damaged"] != NOT_DAMAGED:
            record["damaged"] += np.int32(len(self.clips))
        return record | {"still": np.True_}

    def __len__(self) -> int:
        return len(self.clips) + len(self.images.source)

    def name(self, index: int) -> str:
        """The name of a clip or of an image, in messages."""
        source, number = self._locate(index)
        return source.name(number)

    def fault(self, index: int) -> Exception | None:
        """Why a clip or an image is not used, see `DecodedSource.fault`."""
        source, number = self._locate(index)
        return source.fault(number)

    def _locate(self, index: int) -> tuple[DecodedSource, int]:
        beyond = index - len(self.clips)
        return (self.clips, index) if beyond < 0 else (self.images.source, beyond)
