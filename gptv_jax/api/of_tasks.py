"""The methods of `Model` that answer with what a task taught the network."""

from collections.abc import Sequence

import jax
import numpy as np

from gptv_jax import validation
from gptv_jax.api.views import Picture, batches
from gptv_jax.data import records, transforms
from gptv_jax.errors import InputError, cut
from gptv_jax.tasks.boxes import Detections, vote
from gptv_jax.tasks.detect import Detect, draw
from gptv_jax.tasks.segment import Segment, classes_read, written
from gptv_jax.tokens.codec import AnyArray


class OfTasks:
    """Methods of `Model` for networks that were fine-tuned for a task."""

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of the classes of objects, in the order of the labels that `detect` gives."""
        return self._described.object_names

    def detect(
        self,
        images: AnyArray | Sequence[Picture],
        threshold: float = 0.0,
        votes: Sequence[str] | None = None,
    ) -> list[Detections]:
        """The objects in each image, in the image's own pixels, the most likely first.

        Images are Pillow images or uint8 arrays [H, W, C] of any sizes; they are transformed as
        the test images were, and resized to the size of the network's images. Objects of a score
        below `threshold` are left out. `votes` are transforms such as "flip(1.0)", under which
        each image is read as well; the objects of all views vote. None: as in the test. Where the
        network has learned masks, `np.asarray(found.masks)` is bool [n, H, W], and
        `found.masks[0]` is the first object's.
        """
        task = self._described.learned_task
        if not isinstance(task, Detect):
            raise InputError(
                "this model does not detect objects; load a run with config.task.name=detect whose "
                "stage finetune has finished."
            )
        threshold = validation.share("threshold", threshold)
        votes = task.settings.votes if votes is None else votes
        if isinstance(votes, str) or not all(isinstance(entry, str) for entry in votes):
            given = cut(repr(votes), 60)
            raise InputError(f"votes is {given}; it takes a list of texts, as in ['flip(1.0)'].")
        extra, found = [[], *(transforms.parse_view(entry) for entry in votes)], []
        names = [name for entry in votes for name in entry.split("|")]
        if wrong := [name for name in names if transforms.parse(name).random]:
            raise InputError(f"votes has {', '.join(wrong)}, which is random; flip(1.0) is not.")
        with jax.set_mesh(self.mesh):
            model = self.network, self.codec
            for inputs, shown in batches("detect", task.config.data, *model, images, extra):
                drawn = map(np.asarray, draw(task, self.network, self.params, *inputs))
                for *row, record in zip(*drawn, shown, strict=False):  # without the padding
                    size = tuple(record["original"].tolist())
                    found.append(task.found(*row, record["view"], size))
        by_image = (found[at : at + len(extra)] for at in range(0, len(found), len(extra)))
        best = [task.best(vote(views)) for views in by_image]
        return [each.take(each.scores >= threshold) for each in best]

    @property
    def map_classes(self) -> tuple[str, ...]:
        """Names of the classes of label maps, in the order of the numbers that `segment` gives."""
        return self._described.map_names

    def segment(
        self, images: AnyArray | Sequence[Picture], by: str | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """The class of every pixel, int32, at each image's own size.

        Of an array of images the result is an array [B, H, W], of a list a list of arrays [H, W].
        Images are Pillow images or uint8 arrays [H, W, C] of any sizes; they are transformed as
        the test images were. `by` is "read", all pixels at once, or "written", token by token, the
        most likely one each time; None: "read" where the network has learned both.
        """
        task = self._described.learned_task
        if not isinstance(task, Segment):
            raise InputError(
                "this model has no label maps; load a run with config.task.name=segment whose "
                "stage finetune has finished."
            )
        way = task.ways[0] if by is None else by
        if way not in task.ways:
            raise InputError(f"by is {by!r}; this model takes {' or '.join(task.ways)}.")
        key, found = jax.random.key(task.config.seed), []
        network, model = self.network, (task, self.network, self.params)
        with jax.set_mesh(self.mesh):
            for inputs, shown in batches("segment", task.config.data, network, self.codec, images):
                *pictures, numbers = inputs
                if way == "read":
                    planes = np.asarray(classes_read(*model, *pictures))
                else:
                    tokens, _ = written(*model, *pictures, key, numbers)
                    planes = task.facts.codec.decode(np.asarray(tokens))
                for plane, record in zip(planes, shown, strict=False):  # without the padding
                    size = tuple(record["original"].tolist())
                    plane = records.plane_to_original(plane, record["view"], size)
                    found.append(plane.astype(np.int32))
        if not hasattr(images, "ndim"):
            return found
        return np.stack(found) if found else np.zeros((0, *images.shape[1:3]), np.int32)
