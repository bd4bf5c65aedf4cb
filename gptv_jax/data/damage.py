"""Damaged images: another image takes their place, each is logged once, too many stop the run.

An image turns out to be damaged when it is decoded, in any thread or worker process. The example
that replaces it carries the damaged image's number to the process that reads the batches, which
keeps the log.
"""

import json
import logging
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.data.data_set import Source
from gptv_jax.data.images import DamagedImageError, Decode, Depth
from gptv_jax.data.records import Record
from gptv_jax.errors import InputError

LOG = logging.getLogger(__name__)
NOT_DAMAGED = np.int32(-1)  # stands for a damaged image's number
MIN_IMAGES = 200  # the share of damaged images is taken of at least so many, or of all


class DecodedSource(Source):
    """A source of pixels on top of a source of image files.

    The record of the next good image replaces the record of a damaged image; "damaged" holds the
    number of the damaged image.
    """

    def __init__(self, source, decode: Decode):
        self.source, self.decode = source, decode

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, rng: np.random.Generator | None = None) -> Record:
        for distance in range(len(self)):
            try:
                record = self.decode(self.source.read((index + distance) % len(self), rng))
            except (DamagedImageError, OSError):
                continue
            return {**record, "damaged": np.int32(index) if distance else NOT_DAMAGED}
        raise InputError(
            f"none of {len(self)} images can be read; the first, {self.name(0)}: {self.reason(0)}."
        )

    def frames(self, index: int) -> Iterator[Record]:
        return map(self.decode, self.source.frames(index))

    def name(self, index: int) -> str:
        return self.source.name(index)

    def image_id(self, index: int) -> int | str | None:
        return self.source.image_id(index)

    def reason(self, index: int) -> str:
        try:
            for record in self.source.every(index):
                self.decode(record)
        except (DamagedImageError, OSError) as error:
            return getattr(error, "strerror", None) or str(error)
        return "it could not be read before, and now can"

    def depth(self, index: int) -> Depth | None:
        """See `Decode.depth`; None also where the file cannot be read, or is an array of pixels."""
        try:
            encoded = self.source[index]["encoded"]
            return self.decode.depth(encoded[0] if isinstance(encoded, list) else encoded)
        except (OSError, KeyError, DamagedImageError):
            return None


class DamageLog:
    """The damaged images that this process has met; the run's `skipped.jsonl` records them.

    Every process writes a file, since each reads its share of the images.
    """

    def __init__(self, config: config_lib.Data, folder: pathlib.Path | None):
        self._config, self._path = config, None  # without a folder, nothing is written
        lines, self._of_others = [], set()
        if folder:
            index = jax.process_index()
            self._path = folder / (f"skipped-{index}.jsonl" if index else "skipped.jsonl")
            if self._path.exists():
                lines = _read_lines(self._path)
                self._path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            others = set(folder.glob("skipped*.jsonl")) - {self._path}
            self._of_others = {line["name"] for path in others for line in _read_lines(path)}
        self._names = {line["name"] for line in lines}
        self._images_before = max((line["looked_at"] for line in lines), default=0)
        self._images_by_split: dict[str, int] = {}  # read by this process

    @property
    def count(self) -> int:
        return len(self._names)

    @property
    def names(self) -> list[str]:
        """Sorted names of the damaged images in the files of all processes."""
        return sorted(self._names | self._of_others)

    def record(self, split: str, source, damaged: np.ndarray | np.generic, batches: int) -> None:
        """Logs the images of a batch that are newly damaged: `DecodedSource` numbers them.

        `batches` counts the batches of this size that this process has read from the source so far.
        Raises InputError where the policy is "fail", or too large a share of images is damaged.
        """
        read = min(batches * np.size(damaged), len(source))
        self._images_by_split[split] = max(read, self._images_by_split.get(split, 0))
        # Over all splits and earlier processes of the run.
        looked_at = max(sum(self._images_by_split.values()), self._images_before)
        before = self.count
        for number in sorted({*np.ravel(damaged).tolist()} - {NOT_DAMAGED}):
            if (name := source.name(number)) in self._names:
                continue
            reason = source.reason(number)
            if self._config.damaged == "fail":
                raise InputError(
                    f"{name} cannot be read: {reason}. Repair or remove it, or continue without it "
                    "by config.data.damaged=skip."
                )
            self._names.add(name)
            LOG.warning("%s is left out: %s.", name, reason)
            if self._path:
                with self._path.open("a") as file:
                    line = {"name": name, "reason": reason, "looked_at": looked_at}
                    file.write(json.dumps(line) + "\n")
        if self.count == before:
            return
        total = sum(sources.open_data_set(self._config).lengths.values())
        images = min(max(looked_at, MIN_IMAGES), total)
        if self.count > self._config.max_damaged * images:
            raise InputError(
                f"{self.count} of {images} images cannot be read, more than the share "
                f"config.data.max_damaged={self._config.max_damaged}; they are named above"
                + (f" and in {self._path}." if self._path else ".")
            )


def _read_lines(path: pathlib.Path) -> list[dict]:
    lines = path.read_text().splitlines(True)  # a kill may have cut the last one short
    return [json.loads(line) for line in lines if line.endswith("}\n")]
