"""What every task says: its sequence, its examples, its loss, its score and its pictures."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Bool, Int

from gptv_jax import config as config_lib
from gptv_jax.data.records import Record
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import Layout
from gptv_jax.train.step import Metric


@dataclasses.dataclass(frozen=True)
class Task:
    """A task on the images of a configuration; hashable.

    A subclass says at least `layout`, `example` and, to be scored, `metric`. Methods that make
    examples run in Grain's workers, on NumPy arrays; `allowed`, the loss and the metric's step are
    compiled.
    """

    needs: ClassVar[tuple[str, ...]] = ()  # keys that every record must have, such as "label"

    config: config_lib.Config
    classes: tuple[str, ...] = ()  # names of what the task tells apart: of images, or of objects

    def layout(self) -> Layout:
        """The sequence: the part "image", then the parts that the task predicts."""
        raise NotImplementedError

    def network(self) -> Network:
        """The network of `layout`, with a stem where `config.task.image_input` is pixels."""
        raise NotImplementedError

    def example(self, record: Record, rng: np.random.Generator | None = None) -> dict:
        """Maps "targets", "inputs" and "weights" to {part: array [n]}, of a transformed record.

        Targets and inputs are int32, weights float32. Inputs and weights may be left out, see
        `objective.sequence`. Without a generator, in evaluation, nothing is random.
        """
        raise NotImplementedError

    def allowed(
        self, part: str, position: Int[Array, ""], tokens: Int[Array, "B n"]
    ) -> Bool[Array, "B V"] | Bool[Array, "1 V"] | None:
        """Tokens that may be drawn at a position of a part, given the part's tokens before it.

        `tokens` has the tokens of the whole part; those from `position` on mean nothing. None: all.
        """
        return None

    def loss(self, network: Network) -> Callable:
        """`loss(params, frozen, batch, key, step) -> (number, metrics)`, see `train.step`.

        The sum over the predicted parts of each part's weighted nats per position.
        """
        raise NotImplementedError

    def metric(self, network: Network, annotations: Callable[[int], Record]) -> Metric:
        """The score of a split, among its numbers "nats_per_token".

        `annotations(index)` is an example's record without the picture, before any transform.
        """
        raise NotImplementedError

    def views(self) -> tuple[tuple[str, ...], ...]:
        """Transforms after those of evaluation under which the test images are read, one list each.

        Batches carry "view", so a metric can tell the views of one "index" apart, and move what it
        found back into the original image.
        """
        return ((),)

    def show(self, records: Iterable[Record], predictions: list) -> dict[str, np.ndarray]:
        """Pictures of test images with what was predicted, uint8 RGB, by name ("detections")."""
        return {}
