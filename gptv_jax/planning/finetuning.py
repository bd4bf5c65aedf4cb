"""Fine-tuning, as a stage runs it and as the planner sees it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptv_jax import config as config_lib
from gptv_jax import tasks
from gptv_jax.data import sources
from gptv_jax.errors import InputError
from gptv_jax.model.gpt import Network
from gptv_jax.planning.training import Pretraining
from gptv_jax.train import distillation


@dataclasses.dataclass(frozen=True)
class Finetuning(Pretraining):
    """The training of a task's network."""

    names: int | None = None  # classes that the task tells apart; None: those of the data
    given: tasks.Task | None = None  # the task, with what it has measured
    from_scratch: bool = False  # without pretrained weights

    section, sections = "finetune.train", ("model", "finetune")
    stage = "finetune"

    @functools.cached_property
    def task(self) -> tasks.Task:
        """The task on the data's classes; InputError where these are unknown."""
        if self.given is not None:
            return self.given
        if self.names is not None:
            known = tuple(map(str, range(self.names)))
            return tasks.make(self.config, known, known, known)
        try:
            data = sources.open_data_set(self.config.data)
        except InputError as error:
            raise InputError(f"{error} Without the data, give --classes=NUMBER.") from error
        classes = data.class_names or tuple(map(str, range(data.classes)))
        maps = tuple(getattr(data, "map_names", ()))
        return tasks.make(self.config, tuple(classes), tuple(data.object_names), maps)

    @functools.cached_property
    def network(self) -> Network:
        return self.task.network()

    @property
    def layer_decay(self) -> float:
        return 1.0 if self.from_scratch else self.config.finetune.layer_decay

    @property
    def distill(self) -> config_lib.Matching:
        return self.config.finetune.distill

    @property
    def loss(self) -> Callable:
        if self.teachers:
            settings = self.config.finetune
            losses = settings.generative_coefficient, settings.classification_coefficient
            return distillation.make_loss(self.network, self.teachers, self.distill, *losses)
        return self.task.loss(self.network)

    def batch(self, rows: int, split: jax.NamedSharding | None = None) -> dict:
        """Abstract arrays of a batch of `rows` images, with inputs and weights of every part."""

        def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=split)

        config, image = self.config, self.network.layout.parts[0]
        sizes = {part.name: part.size for part in self.task.parts() if part.predicted}
        found = {"variant": array()} | ({"label": array()} if "label" in self.task.needs else {})
        if image.vocabulary:
            found["tokens"] = array(image.size)
        data = config.data
        pixels = (data.frames,) * (data.frames > 0) + data.size
        if self.task.pixels or self.network.patch:
            channels = {"grey": 1, "learned": config.tokens.autoencoder.channels}
            shape = (*pixels, channels.get(config.tokens.kind, 3))
            found["image"] = array(*shape, dtype=jnp.uint8)
        if "segmentation" in self.task.needs:
            found["segmentation"] = array(*pixels, dtype=jnp.uint8)
        if sizes:
            found["targets"] = {name: array(size) for name, size in sizes.items()}
            found["inputs"] = dict(found["targets"])
            found["weights"] = {n: array(size, dtype=jnp.float32) for n, size in sizes.items()}
        return found
