"""What every task says: its sequence, its examples, its loss, its score and its pictures."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from gptv_jax import config as config_lib
from gptv_jax.data.records import Record
from gptv_jax.model import layout
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import Part
from gptv_jax.tasks.network import network_of
from gptv_jax.tokens import Codec
from gptv_jax.train import step
from gptv_jax.train.step import Metric

Records = Callable[[int], Record]  # by the number of an example in its split, before transforms
Batches = Callable[..., Iterator[dict]]  # `(split, limit=None) -> batches`, see Pipeline.evaluation


@dataclasses.dataclass(frozen=True)
class Grammar:
    """`Task.allowed` of a task, equal for equal tasks, so that nothing is compiled anew."""

    task: "Task"

    def __call__(self, part: str, position: int | Int[Array, ""], tokens: Int[Array, "B n"]):
        return self.task.allowed(part, position, tokens)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task on the images of a configuration; hashable.

    A subclass adds what the network predicts after the image. Methods that make examples run in
    Grain's workers, on NumPy arrays; `allowed`, the loss and the metric's step are compiled.
    """

    reads_pixels: ClassVar[bool] = True  # the network may have a stem
    needs: ClassVar[tuple[str, ...]] = ()  # keys that every record must have, such as "label"
    # Numbers of the metric that rank checkpoints, by importance; 1: larger is better, -1: smaller.
    primary: ClassVar[dict[str, int]] = {"nats_per_token": -1}
    # Numbers of the metric that are shown in percent. "accuracy", the share of the images that are
    # right, has a standard error as well.
    shares: ClassVar[tuple[str, ...]] = ("accuracy",)
    unreported: ClassVar[tuple[str, ...]] = ()  # numbers of the metric that are in the log alone
    validated: ClassVar[tuple[str, ...]] = ()  # of the validation split, in the summary as well
    pictures: ClassVar[dict[str, str]] = {}  # what `show` makes: name and caption

    config: config_lib.Config
    # Names of the images' classes in the order of the labels; "0", "1", ... where they have none.
    classes: tuple[str, ...] = ()
    object_names: tuple[str, ...] = ()  # of the classes of objects
    map_names: tuple[str, ...] = ()  # of the classes of label maps
    measured: bytes = b""  # what `measure` found in the training data; b"" before

    def check(self) -> None:
        """Raises InputError where the task cannot be scored; called before a run does any work."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what the task tells apart."""
        return ()

    @property
    def settings(self):
        """`config.task.<name>`; None where the task has no fields."""
        return getattr(self.config.task, self.config.task.name, None)

    @property
    def pixels(self) -> bool:
        """Whether the network reads pixels."""
        return self.config.task.image_input == "pixels" or self.config.tokens.kind == "none"

    @property
    def validation_images(self) -> int | None:
        """Validation images that evaluations during training read, the first ones; None: all."""
        return getattr(self.settings, "validation_images", None) or None

    def parts(self) -> tuple[Part, ...]:
        """What the network predicts after the image."""
        return ()

    def network(self) -> Network:
        """The network of the image, its stem where pixels are read, and the parts."""
        settings, plain = self.config.task, network_of(self.config)
        image = plain.layout.parts[0]
        image = dataclasses.replace(image, predicted=image.vocabulary > 0)
        arranged = layout.prefixed if settings.prefix else layout.causal
        stem = settings.stem if self.pixels else ()
        return dataclasses.replace(plain, layout=arranged(image, *self.parts()), stem=stem)

    def measure(self, records: Callable[[int], Iterable[Record]]) -> bytes:
        """What the task must know of the training data before it is trained, as bytes of a file.

        `records(count)` gives so many training records after the transforms of evaluation, drawn at
        random; clips begin at any frame. The bytes become `Task.measured` and are kept with the
        weights. b"": there is nothing to be known.
        """
        del records
        return b""

    def begin(self, network: Network, params: dict, batches: Batches) -> dict:
        """The weights that training begins with, from weights of which some are new."""
        del network, batches
        return params

    def example(self, record: Record, rng: np.random.Generator | None = None) -> dict:
        """Maps "targets", "inputs" and "weights" to {part: array [n]}, of a transformed record.

        Targets and inputs are int32, weights float32. Inputs and weights may be left out, see
        `objective.sequence`. Without a generator, in evaluation, nothing is random.
        """
        del record, rng
        return {}

    def allowed(
        self, part: str, position: int | Int[Array, ""], tokens: Int[Array, "B n"]
    ) -> Bool[Array, "B V"] | Bool[Array, "1 V"] | None:
        """Tokens that may be drawn at a position of a part, given the part's tokens before it.

        `tokens` has the tokens of the whole part; those from `position` on mean nothing. None: all.
        """
        del part, position, tokens
        return None

    def loss(self, network: Network) -> Callable:
        """`loss(params, frozen, batch, key, step) -> (number, metrics)`, see `train.step`.

        The sum over the predicted parts of the mean weighted nats of a position. A metric is
        called "nats_per_token" only where it is the mean nats of tokens, without weights.
        """
        return step.make_loss(network)

    def metric(self, network: Network, annotations: Records) -> Metric:
        """The score of a split, among its numbers "nats_per_token".

        `annotations` gives records without the picture. Each split has a metric: to compile its
        step once, make the step by a cached function. A sum "images" counts the images read, each
        of `views` by itself.
        """
        del annotations
        return dataclasses.replace(step.make_metric(network), primary=self.primary)

    def test_metric(self, network: Network, annotations: Records) -> Metric:
        """As `metric`, of the test images: it may sum more, for `details`, `bounds` and `show`."""
        return self.metric(network, annotations)

    def whole(
        self,
        network: Network,
        params: dict,
        codec: Codec | None,
        videos: Callable[[int], Iterable[Record]],
    ) -> dict[str, object]:
        """What `details`, `bounds`, `files` and `show` find in `total` beside the metric's sums.

        `videos(limit)` gives the first test videos as `data.whole_videos.records` does. `codec`
        turns the pixels of clips into tokens; None: the network reads pixels alone.
        """
        del network, params, codec, videos
        return {}

    def details(self, total: dict, annotations: Records) -> dict[str, float | None]:
        """Numbers of the test split beside the metric's; `total` are the metric's sums."""
        del total, annotations
        return {}

    def bounds(self, total: dict, annotations: Records) -> dict[str, dict[str, float]]:
        """Floors and ceilings of the metric's numbers on the test split, by name.

        {"ceiling": {"ap": .99}} becomes "finetune/ceiling_test_ap". `total` are the metric's sums.
        """
        del total, annotations
        return {}

    def views(self) -> tuple[tuple[str, ...], ...]:
        """Lists of transforms, after evaluation's own; under each the test images are read once.

        Batches carry "view", so a metric can tell the views of one "index" apart, and move what it
        found back into the original image.
        """
        return ((),)

    def files(self, total: dict, annotations: Records) -> dict[str, object]:
        """What to write into the folder finetune/ as JSON, by file name; of the test split."""
        del total, annotations
        return {}

    def show(self, records: Records, total: dict) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """Pictures of test images with what was predicted, by the names in `pictures`.

        `records` gives the test examples with their pixels before any transform; of a token cache
        with the pixels that its tokens stand for, and with "view"; `total` are the metric's sums.
        """
        del records, total
        return {}
