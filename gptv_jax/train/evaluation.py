"""How a network is measured on a split: every example once, on any number of processes."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gptv_jax import hosts, sharding
from gptv_jax.model.gpt import Network
from gptv_jax.train import objective
from gptv_jax.train.objective import cross_entropy

# Accuracy first; among equals, the lower cross-entropy.
CLASSIFICATION = {"accuracy": 1, "class_nats": -1}


@dataclasses.dataclass(frozen=True)
class Metric:
    """What an evaluation computes, and which of its numbers ranks checkpoints."""

    step: Callable[[dict, dict], dict]  # `(params, batch) -> sums`, jitted, where "mask" is 1
    result: Callable[[dict], dict[str, float]]  # `total -> {name: number}`, on the host
    # Sums stay on the devices; a metric that needs every prediction fetches each part here.
    add: Callable = lambda total, part: jax.tree.map(jnp.add, total, part)
    # Names by importance; 1: larger is better, -1: smaller. Empty: the last checkpoint is kept.
    primary: dict[str, int] = dataclasses.field(default_factory=dict)

    def measure(self, params: dict, batches: Iterable[dict]) -> dict[str, float]:
        """The numbers of a split, given by `Pipeline.evaluation`; raises as `on_mesh` does."""
        parts = (self.step(params, batch) for batch in on_mesh(batches))
        return self.result(total(parts, self.add))


def on_mesh(batches: Iterable[dict]) -> Iterator[dict]:
    """A split's batches (this process's rows, NumPy) as global arrays; raises as `until_stop`."""
    return map(sharding.global_batch, hosts.until_stop(batches))


def total(parts: Iterable, add: Callable = Metric.add):
    """The sum of trees of arrays, such as a split's batches give, fetched to the host."""
    return jax.device_get(functools.reduce(add, parts))


def make_eval_step(network: Network) -> Callable:
    """`(params, batch) -> sums` over the rows whose "mask" is 1, jitted.

    The sums are "nats_per_token", "images" and, with a class head, "correct" images and
    "class_nats", the cross-entropy of the class. For BERT, nats are means over the votes, and the
    class is that of most votes. A class-conditional network without a class head sees the class.
    """

    def eval_step(params: dict, batch: dict) -> dict[str, Array]:
        nats, logits, model = 0.0, [], network.bind(params)
        for vote in range(network.votes):
            output, mask = objective.evaluate_batch(
                network, params, batch, vote, condition_on_label=not network.classes
            )
            nats += objective.nats_per_token(model, output, batch["tokens"], mask)
            logits.append(output.class_logits)
        rows = {"nats_per_token": nats / network.votes, "images": jnp.ones_like(batch["mask"])}
        if network.classes:
            logits = jnp.stack(logits)
            rows["correct"] = objective.majority_class(logits) == batch["label"]
            labels = jnp.broadcast_to(batch["label"], logits.shape[:-1])
            rows["class_nats"] = cross_entropy(logits, labels).mean(axis=0)
        return {name: (values * batch["mask"]).sum() for name, values in rows.items()}

    return jax.jit(eval_step)


def make_metric(network: Network) -> Metric:
    """Measures "nats_per_token" and, with a class head, "accuracy" and "class_nats" (per image)."""

    def result(sums: dict[str, np.ndarray]) -> dict[str, float]:
        images = float(sums["images"])
        names = {"nats_per_token": "nats_per_token"}
        if network.classes:
            names |= {"accuracy": "correct", "class_nats": "class_nats"}
        return {name: float(sums[key]) / images for name, key in names.items()}

    primary = CLASSIFICATION if network.classes else {}
    return Metric(make_eval_step(network), result, primary=primary)
