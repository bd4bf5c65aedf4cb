"""The label maps in the rows of a segmentation's metric, and how good they are."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Integer

from gptv_jax.data.records import plane_to_original
from gptv_jax.errors import InputError
from gptv_jax.tasks import confusion, rows
from gptv_jax.tasks.map_facts import Facts
from gptv_jax.tasks.task import Records

SCORES = ("miou", "pixel_accuracy", "mean_class_accuracy", "classes_scored")


@dataclasses.dataclass(frozen=True)
class MapScores:
    """Maps of one kind of each image or clip: read, written, voted, ceiling or prior.

    "ceiling" is the image's own label map as tokens and back, "prior" the most frequent class of
    each pixel in training, "wrong_image" the `first` kind of another image, and "voted" the most
    frequent class of the drawn maps. Where several classes have most votes, the written map's class
    is the voted one, or else that of the first drawn map among them.
    """

    facts: Facts
    classes: int
    first: str

    def map_of(self, total: dict, row: int, kind: str) -> Integer[np.ndarray, "*F h w"]:
        """The map in a row of the metric's sums, of the network's size."""
        if kind == "prior":
            return np.broadcast_to(self.facts.prior, self.facts.frames + self.facts.prior.shape)
        if kind == "read":
            return total["read"][row]
        if kind == "voted":
            maps, votes = self._votes(total, row)  # among equals the first map: the written one
            return np.take_along_axis(maps, votes.argmax(axis=0)[None], axis=0)[0]
        tokens = total["targets" if kind == "ceiling" else kind][row]
        return self.facts.decode(tokens[None])[0]

    def agreement(self, total: dict, row: int) -> Float[np.ndarray, "*F h w"]:
        """Share of the drawn maps that have the most frequent class of each pixel."""
        return self._votes(total, row)[1].max(axis=0) / total["samples"].shape[1]

    def counts(
        self, total: dict, annotations: Records, kinds: Iterable[str]
    ) -> dict[str, Integer[np.ndarray, "C C"]]:
        """The confusion matrix of each kind, int64: true classes are rows.

        Each map is moved into its original image, by the nearest pixel, and compared there; pixels
        without a class do not count. The rows of a `Metric` are counted once.
        """
        known = rows.known(total)
        new = {kind: 0 for kind in kinds if kind not in known}
        other = rows.others(total)
        for index, row in rows.plain(total).items() if new else ():
            truth = annotations(index)["segmentation"]
            for kind in new:
                wrong = kind == "wrong_image"
                shown, way = (other[row], self.first) if wrong else (row, kind)
                found = self.map_of(total, shown, way)
                found = plane_to_original(found, total["view"][row], truth.shape[-2:])
                new[kind] = new[kind] + confusion.count(truth, found, self.classes)
        known |= new
        return {kind: known[kind] for kind in kinds}

    def scores(self, total: dict, annotations: Records, kinds: Iterable[str]) -> dict[str, dict]:
        """`confusion.scores` of each kind; InputError: no pixel of the split has a class."""
        counts = self.counts(total, annotations, kinds)
        scores = {kind: confusion.scores(matrix) for kind, matrix in counts.items()}
        if any(each["miou"] is None for each in scores.values()):
            raise InputError(
                "no pixel of a split's label maps has a class, so there is no mean IoU; take other "
                "images by config.data.validation_split and config.data.test_split."
            )
        return scores

    def report(
        self, total: dict, annotations: Records, ways: Iterable[str], names: Sequence[str]
    ) -> dict[str, object]:
        """Each class's share of the pixels, IoU and accuracy, the confusion matrices; for JSON."""
        counts, scores = (f(total, annotations, ways) for f in (self.counts, self.scores))
        pixels = counts[self.first].sum(axis=1)
        rows = [
            {"name": name, "share": float(pixels[c] / pixels.sum())}
            | {f"{way}_iou": scores[way]["iou_by_class"][c] for way in ways}
            | {f"{way}_accuracy": scores[way]["accuracy_by_class"][c] for way in ways}
            for c, name in enumerate(names)
        ]
        confusions = {way: matrix.tolist() for way, matrix in counts.items()}
        return {"classes": rows, "confusion": confusions}

    def _votes(self, total: dict, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The written map and the drawn maps, and the number of drawn maps with each pixel's class.

        Both have the shape [1 + samples, *F, h, w].
        """
        drawn = self.facts.decode(total["samples"][row])
        maps = np.concatenate([self.map_of(total, row, "written")[None], drawn])
        return maps, np.stack([(drawn == each).sum(axis=0) for each in maps])
