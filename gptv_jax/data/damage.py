"""Images that cannot be read: another one in their place, each named once, too many stop the run.

A damaged image is found where it is decoded, in whatever thread or process that happens. All that
travels from there is its number, with the example that stands in for it; the process that reads
the batches keeps the record.
"""

import json
import logging
import pathlib

import jax
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.data.images import DamagedImageError, Decode
from gptv_jax.errors import InputError

LOG = logging.getLogger(__name__)
SOUND = -1  # in place of a damaged image's number
ENOUGH = 200  # images after which a share of damaged ones can be judged


class Decoded:
    """A source of pixels from one of encoded images.

    For a damaged image it gives the next sound one, and in "damaged" the number of the first.
    """

    def __init__(self, source, decode: Decode):
        self.source, self.decode, self.stored_as = source, decode, source.stored_as

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        for distance in range(len(self)):
            try:
                example = self._decoded((index + distance) % len(self))
            except (DamagedImageError, OSError):
                continue
            return {**example, "damaged": np.int32(index if distance else SOUND)}
        raise InputError(
            f"none of {len(self)} images can be read; the first, {self.name(0)}: {self.reason(0)}."
        )

    def name(self, index: int) -> str:
        """What to call example `index` in a message."""
        return self.source.name(index)

    def reason(self, index: int) -> str:
        """Why example `index` cannot be read."""
        try:
            self._decoded(index)
        except DamagedImageError as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)
        return "it could not be read before, and now can"

    def _decoded(self, index: int) -> dict:
        example = self.source[index]
        return {**example, "image": self.decode(example["image"])}


class DamageLog:
    """The damaged images that a process has met, in the run's `skipped.jsonl`."""

    def __init__(self, config: config_lib.Data, folder: pathlib.Path | None):
        """Goes on from what the file holds already.

        Args:
          config: the policy and the limit.
          folder: of the run; None: nothing is written.
        """
        self._config = config
        # Every process has its own, as each meets the images of its share.
        index = jax.process_index()
        name = f"skipped-{index}.jsonl" if index else "skipped.jsonl"
        self._path = folder / name if folder else None
        lines = self._lines()
        self._met = {line["name"] for line in lines}
        others = folder.glob("skipped*.jsonl") if folder else ()
        self._elsewhere = {
            line["name"] for path in others if path != self._path for line in _whole(path)
        }
        self._before = max((line["looked_at"] for line in lines), default=0)  # in earlier processes
        self._drawn: dict[str, int] = {}  # images looked at, by split

    @property
    def count(self) -> int:
        """Different images met by this process."""
        return len(self._met)

    @property
    def names(self) -> list[str]:
        """Of all images met, those in the files of other processes among them, in order."""
        return sorted(self._met | self._elsewhere)

    def enter(self, split: str, source: Decoded, indices: np.ndarray, drawn: int) -> None:
        """Names the damaged ones among `indices` that are new.

        Args:
          split: that they are of.
          source: the same.
          indices: numbers of images, `SOUND` for those that are not damaged.
          drawn: images that this process has drawn from the source so far.

        Raises:
          InputError: there is one and the policy is "fail", or there are more than the limit.
        """
        self._drawn[split] = max(min(drawn, len(source)), self._drawn.get(split, 0))
        damaged = sorted(set(indices.tolist()) - {SOUND})
        new = [index for index in damaged if source.name(index) not in self._met]
        for index in new:
            self._name(source.name(index), source.reason(index))
        if new:
            self._judge()

    def _name(self, name: str, reason: str) -> None:
        if self._config.damaged == "fail":
            raise InputError(
                f"{name} cannot be read: {reason}. Mend or remove it, or go on without it with "
                "config.data.damaged=skip."
            )
        self._met.add(name)
        LOG.warning("%s is left out: %s.", name, reason)
        if self._path:
            with self._path.open("a") as file:
                line = {"name": name, "reason": reason, "looked_at": self._looked_at()}
                file.write(json.dumps(line) + "\n")

    def _looked_at(self) -> int:
        """Different images, all splits together."""
        return max(sum(self._drawn.values()), self._before)

    def _judge(self) -> None:
        """Raises where the share of damaged images is above the limit.

        A few early ones say nothing yet, so the share is of ENOUGH images at least, or of all.
        """
        everything = sum(sources.open_data_set(self._config).lengths.values())
        looked_at = min(max(self._looked_at(), ENOUGH), everything)
        if self.count > self._config.max_damaged * looked_at:
            raise InputError(
                f"{self.count} of {looked_at} images cannot be read, more than the share "
                f"config.data.max_damaged={self._config.max_damaged}; they are named above"
                + (f" and in {self._path}." if self._path else ".")
            )

    def _lines(self) -> list[dict]:
        """What the file holds; a last line that a kill cut short is taken away."""
        if not self._path or not self._path.exists():
            return []
        lines = _whole(self._path)
        self._path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return lines


def _whole(path: pathlib.Path) -> list[dict]:
    """The lines of a file that are whole."""
    lines = path.read_text().splitlines(True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]
