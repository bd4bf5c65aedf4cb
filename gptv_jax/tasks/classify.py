"""Classification: a linear head on the mean features of the image, beside the prediction of tokens.

The joint training of Image GPT (Chen et al. 2020, section 2.3).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import numpy as np

from gptv_jax.model.gpt import Network
from gptv_jax.probe import features
from gptv_jax.tasks.network import network_of
from gptv_jax.tasks.task import Batches, Records, Task
from gptv_jax.train import step
from gptv_jax.train.step import Metric


@dataclasses.dataclass(frozen=True)
class Classify(Task):
    """The class of the image."""

    reads_pixels: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("label",)
    primary: ClassVar[dict[str, int]] = step.CLASSIFICATION
    unreported: ClassVar[tuple[str, ...]] = ("class_nats",)

    @property
    def names(self) -> tuple[str, ...]:
        return self.classes

    def network(self) -> Network:
        return network_of(self.config, len(self.classes), self.config.finetune)

    def begin(self, network: Network, params: dict, batches: Batches) -> dict:
        """Standardises the head's input by its statistics, where the configuration says so."""
        if not self.config.finetune.standardize:
            return params
        measured = functools.partial(batches, limit=features.MEASURED)

        def last_layer(split: str):
            every = features.of_network(network, params, measured, raw=False)(split)
            return ((x[:, -1:], batch) for x, batch in every)

        mean, deviation = features.statistics(last_layer)
        head = dict(params["classifier"])
        for name, value in (("class_center", mean[0]), ("class_scale", 1 / deviation[0])):
            head[name] = jax.device_put(value.astype(np.float32), head[name].sharding)
        return params | {"classifier": head}

    def loss(self, network: Network) -> Callable:
        settings = self.config.finetune
        coefficients = settings.generative_coefficient, settings.classification_coefficient
        return step.make_loss(network, *coefficients)

    def metric(self, network: Network, annotations: Records) -> Metric:
        del annotations
        return step.make_metric(network, confusion=True)
