"""Damaged images: another image takes their place, each is logged once, too many stop the run.

An image turns out to be damaged when it is decoded, in any thread or worker process. The example
that replaces it carries the damaged image's number to the process that reads the batches, which
keeps the log. Images that a filter leaves out are replaced and logged alike, but never stop a run.
"""

import json
import logging
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.data.data_set import Source
from gptv_jax.data.filters import DroppedImageError
from gptv_jax.data.images import Decode, Depth
from gptv_jax.data.limits import DamagedImageError
from gptv_jax.data.records import Record, Rng
from gptv_jax.errors import InputError

LOG = logging.getLogger(__name__)
NOT_DAMAGED = np.int32(-1)  # stands for a damaged image's number
DROPPED = 2**30  # is added to the number of an image that a filter leaves out
MIN_IMAGES = 200  # the share of damaged images is taken of at least so many, or of all


class DecodedSource(Source):
    """Decodes the image files of a source; with `decode` None the source holds pixels already.

    The record of the next good image replaces the record of an image that is damaged or that a
    filter leaves out; "damaged" then holds the number of the replaced image, plus `DROPPED` if a
    filter leaves it out.
    """

    def __init__(self, source, decode: Decode | None, filters: Sequence = ()):
        self.source, self.decode, self.filters = source, decode, filters

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, rng: Rng = None, place: float = 0.5) -> Record:
        damaged = NOT_DAMAGED
        for distance in range(len(self)):
            number = (index + distance) % len(self)
            try:
                record = self._checked(number, self.source.read(number, rng, place))
            except (DamagedImageError, OSError) as error:
                if not distance:
                    dropped = isinstance(error, DroppedImageError)
                    damaged = np.int32(index + DROPPED * dropped)
                continue
            return {**record, "damaged": damaged}
        raise InputError(
            f"none of {len(self)} images can be read; the first, {self.name(0)}: {self.reason(0)}."
        )

    def frames(self, index: int) -> Iterator[Record]:
        return (self._checked(index, record) for record in self.source.frames(index))

    def _checked(self, index: int, record: Record) -> Record:
        """The decoded record; DroppedImageError where a filter leaves it out."""
        record = self.decode(record) if self.decode else record
        reasons = (each.reason(index, record, self.source) for each in self.filters)
        if words := next(filter(None, reasons), None):
            raise DroppedImageError(words)
        return record

    def name(self, index: int) -> str:
        return self.source.name(index)

    def image_id(self, index: int) -> int | str | None:
        return self.source.image_id(index)

    def fault(self, index: int, dropped: bool | None = None) -> DamagedImageError | OSError | None:
        """Why the image is not used; None: it could not be read before, and now can.

        `dropped`: whether a filter's reason is looked for, or damage; None: either. A clip of
        training that a filter leaves out may begin at another frame than all clips that are read
        here, and then no reason is found.
        """
        kinds = {False, True} if dropped is None else {dropped}
        errors = self._faults(index)
        return next((e for e in errors if isinstance(e, DroppedImageError) in kinds), None)

    def _faults(self, index: int) -> Iterator[DamagedImageError | OSError]:
        """Why clips are not used that together have all frames of a video; of an image, why not."""
        try:
            for record in self.source.every(index):
                try:
                    self._checked(index, record)
                except (DamagedImageError, OSError) as error:
                    yield error
        except (DamagedImageError, OSError) as error:
            yield error

    def reason(self, index: int) -> str:
        """`fault` in words."""
        return _words(self.fault(index))

    def depth(self, index: int) -> Depth | None:
        """See `Decode.depth`; None also where the file cannot be read, or is an array of pixels."""
        try:
            encoded = self.source[index]["encoded"]
            return self.decode.depth(encoded[0] if isinstance(encoded, list) else encoded)
        except (OSError, KeyError, DamagedImageError):
            return None


class DamageLog:
    """The images that this process has met and not used; the run's `skipped.jsonl` records them.

    Every process writes a file, since each reads its share of the images.
    """

    def __init__(self, config: config_lib.Data, folder: pathlib.Path | None):
        self._config, self._path = config, None  # without a folder, nothing is written
        lines, self._of_others = [], {}
        if folder:
            index = jax.process_index()
            self._path = folder / (f"skipped-{index}.jsonl" if index else "skipped.jsonl")
            if self._path.exists():
                lines = _read_lines(self._path)
                self._path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            others = set(folder.glob("skipped*.jsonl")) - {self._path}
            self._of_others = _dropped(line for path in others for line in _read_lines(path))
        self._dropped = _dropped(lines)
        self._images_before = max((line["looked_at"] for line in lines), default=0)
        self._images_by_split: dict[str, int] = {}  # read by this process

    @property
    def count(self) -> int:
        """Number of damaged images in the file of this process."""
        return len(self._dropped) - sum(self._dropped.values())

    @property
    def names(self) -> list[str]:
        """Sorted names of the damaged images in the files of all processes."""
        return sorted(n for n, dropped in (self._of_others | self._dropped).items() if not dropped)

    @property
    def dropped(self) -> list[str]:
        """As `names`, of the images that a filter leaves out."""
        return sorted(n for n, dropped in (self._of_others | self._dropped).items() if dropped)

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
        for found in sorted({*np.ravel(damaged).tolist()} - {NOT_DAMAGED}):
            dropped, number = found >= DROPPED, found % DROPPED
            name = source.name(number)
            # A video of which a filter left a clip out may yet turn out to be damaged.
            if name in self._dropped and (dropped or not self._dropped[name]):
                continue
            reason = _words(source.fault(number, dropped), dropped)
            if self._config.damaged == "fail" and not dropped:
                raise InputError(
                    f"{name} cannot be read: {reason}. Repair or remove it, or continue without it "
                    "by config.data.damaged=skip."
                )
            self._dropped[name] = dropped
            LOG.log(
                logging.INFO if dropped else logging.WARNING, "%s is left out: %s.", name, reason
            )
            if self._path:
                with self._path.open("a") as file:
                    line = {"name": name, "reason": reason, "looked_at": looked_at}
                    line |= {"dropped": True} if dropped else {}
                    file.write(json.dumps(line) + "\n")
        if self.count == before:
            return
        # A source of clips and images has more than the data set of the clips.
        total = max(sum(sources.open_data_set(self._config).lengths.values()), len(source))
        images = min(max(looked_at, MIN_IMAGES), total)
        if self.count > self._config.max_damaged * images:
            raise InputError(
                f"{self.count} of {images} images cannot be read, more than the share "
                f"config.data.max_damaged={self._config.max_damaged}; they are named above"
                + (f" and in {self._path}." if self._path else ".")
            )


def _words(fault: Exception | None, dropped: bool = False) -> str:
    unknown = "it could not be read before, and now can"
    if dropped:
        unknown = "a filter leaves out one of its clips"
    return getattr(fault, "strerror", None) or str(fault or unknown)


def _dropped(lines: Iterable[dict]) -> dict[str, bool]:
    """For the name of every image, whether a filter left it out; else it was damaged."""
    return {line["name"]: line.get("dropped", False) for line in lines}


def _read_lines(path: pathlib.Path) -> list[dict]:
    lines = path.read_text().splitlines(True)  # a kill may have cut the last one short
    return [json.loads(line) for line in lines if line.endswith("}\n")]
