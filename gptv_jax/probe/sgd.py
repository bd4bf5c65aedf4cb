"""The probe for sets too large for L-BFGS: linear heads trained by SGD on augmented images.

Heads for every learning rate and every group of layers are trained together, on the same forward
pass of the frozen network. Each has its own loss and rate, so no head changes another.

Letters: G groups of N layers each, R learning rates, B batch, T tokens, D width, C classes.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.model import flops
from gptv_jax.model.gpt import Network, Output
from gptv_jax.probe import features
from gptv_jax.probe.features import Batches, Features
from gptv_jax.probe.logistic import preference
from gptv_jax.train import loop, objective, step, voting
from gptv_jax.train.metrics import MetricWriter
from gptv_jax.train.step import on_mesh, total

Group = tuple[int, ...]  # layers whose features a head reads side by side

SPECS = {  # the width is split over fsdp, as in the network's own class head
    "weight": jax.P(None, None, None, None, "fsdp"),
    "bias": jax.P(None, None, None),
    **dict.fromkeys(("query", "center", "scale"), jax.P(None, None, None, "fsdp")),
}


@dataclasses.dataclass(frozen=True)
class Heads:
    """The shapes of all heads and the features they read; their weights are a nested dict."""

    network: Network
    config: config_lib.Probe
    classes: int  # C
    groups: tuple[Group, ...]

    def stacks(self) -> dict[str, list[Group]]:
        """Groups by their number of layers; groups of one size are trained as one array."""
        sizes = sorted({len(group) for group in self.groups})
        return {f"layers_{n}": [g for g in self.groups if len(g) == n] for n in sizes}

    def init(self) -> dict:
        """Float32 zeros, as the network's own heads begin; call it under a mesh, inside jit.

        "query" is for attentive pooling, where zeros weigh all positions alike. "center" and
        "scale" standardise; they are the same for all rates and are not trained.
        """
        R, C = len(self.config.sgd.learning_rates), self.classes
        D = self.network.pooled_width
        weights = {}
        for name, groups in self.stacks().items():
            G, N = len(groups), len(groups[0])
            shapes = {"weight": (G, R, C, N, D), "bias": (G, R, C)}
            if self.config.pooling == "attentive":
                shapes["query"] = (G, R, N, D)
            if self.config.sgd.standardize:
                shapes["center"] = shapes["scale"] = (G, R, N, D)
            weights[name] = {k: jnp.zeros(s, out_sharding=SPECS[k]) for k, s in shapes.items()}
        return weights

    def standardised(self, weights: dict, read: Features) -> dict:
        """The weights with center and scale set by the first training images."""
        mean, deviation = features.statistics(read)
        for name, groups in self.stacks().items():
            for leaf, value in (("center", mean), ("scale", 1 / deviation)):
                old, by_group = weights[name][leaf], value[np.array(groups)][:, None]
                new = np.broadcast_to(by_group, old.shape).astype(np.float32)
                weights[name][leaf] = jax.make_array_from_callback(
                    old.shape, old.sharding, lambda index, new=new: new[index]
                )
        return weights

    def reading(self) -> dict:
        """Arguments of the network's call that make it return the features the heads read."""
        layers = sorted({layer for group in self.groups for layer in group})
        keep = tuple(layers) if self.config.pooling == "attentive" else ()
        return {"raw": self.config.features == "raw", "keep": keep}

    def logits(self, weights: dict, output: Output) -> dict[str, Float[Array, "G R B C"]]:
        """Class logits of every head, from the network's output for a batch."""
        keep, logits = self.reading()["keep"], {}
        source = output.kept if keep else output.pooled
        for name, groups in self.stacks().items():
            w = {leaf: sharding.gather(each, jnp.float32) for leaf, each in weights[name].items()}
            read = (lambda i: source[keep.index(i)]) if keep else source.__getitem__
            x = jnp.stack([jnp.stack([*map(read, group)]) for group in groups]).astype(jnp.float32)
            if keep:
                scores = jnp.einsum("gnbtd,grnd->grnbt", x, w["query"]) / x.shape[-1] ** 0.5
                shares = jax.nn.softmax(scores, axis=-1)
                spec = jax.P(None, None, None, sharding.BATCH)
                x = jnp.einsum("grnbt,gnbtd->grnbd", shares, x, out_sharding=spec)
            if "center" in w:
                center, scale = jax.lax.stop_gradient((w["center"], w["scale"]))
                # Without attention the features are the same for all rates, and one copy will do.
                at = slice(None) if keep else 0
                x = (x - center[:, at, :, None]) * scale[:, at, :, None]
            equation = "grnbd,grcnd->grbc" if keep else "gnbd,grcnd->grbc"
            logits[name] = jnp.einsum(equation, x, w["weight"]) + w["bias"][:, :, None]
        return logits


def fit(
    heads: Heads,
    frozen: dict,  # the network's weights
    *,
    checkpoints: Checkpoints,
    log: MetricWriter,
    training: Callable[[int], Iterator[dict]],  # augmented batches, as `loop.fit` takes them
    evaluation: Batches,
    seed: int,
) -> dict[Group, dict]:
    """{"learning_rate", "validation_accuracy", "validation_nats", "test_accuracy"} of each group.

    All heads are trained to the end of the schedule; of each group's rates the best by `preference`
    is taken. The row of the best single layer has "confusion", see `make_eval_step`, of the test
    images. Continues and raises as `loop.fit` does.
    """
    settings, (optimizer, rate) = heads.config.sgd, make_optimizer(heads.config.sgd)
    train_step = step.make_train_step(make_loss(heads), optimizer, rate, seed=seed)
    eval_step = make_eval_step(heads)

    def init(_: PRNGKeyArray) -> dict:
        return step.state_of(heads.init(), optimizer)

    def initial() -> dict:
        state = jax.jit(init)(jax.random.key(seed))
        if settings.standardize:
            raw = heads.reading()["raw"]
            images = features.of_network(heads.network, frozen, evaluation, raw=raw)
            state["params"] = heads.standardised(state["params"], images)
        return state

    def evaluate(weights: dict, split: str = "validation", head: tuple[int, int] = (0, 0)) -> dict:
        counted, batches = np.array(head, np.int32), on_mesh(evaluation(split))
        sums = total(eval_step(weights, frozen, batch, counted) for batch in batches)
        images, confusion = sums.pop("images"), sums.pop("confusion", None)
        means = jax.tree.map(lambda x: x.astype(np.float64) / images, sums)
        return means if confusion is None else means | {"confusion": confusion.tolist()}

    def best_numbers(weights: dict) -> dict[str, float]:
        numbers = evaluate(weights)
        accuracy = max(float(x.max()) for x in numbers["accuracy"].values())
        nats = min(float(x.min()) for x in numbers["class_nats"].values())
        return {"best_accuracy": accuracy, "best_class_nats": nats}

    shared = ("steps", "batch_size", "eval_every", "checkpoint_every", "log_every")
    fitted = loop.fit(
        "probe",
        config_lib.Train(**{name: getattr(settings, name) for name in shared}),
        length=heads.network.length,
        flops=flops.forward(heads.network).total,  # gradients do not go through the network
        checkpoints=checkpoints,
        log=log,
        initial=initial,
        abstract=sharding.abstract(init),
        train_step=lambda state, batch: train_step(state, batch, frozen),
        batches=training,
        evaluate=best_numbers,
    )
    validation, chosen = evaluate(fitted.params), {}
    for name, groups in heads.stacks().items():
        accuracy, nats = validation["accuracy"][name], validation["class_nats"][name]
        for g, group in enumerate(groups):
            rows = []
            for r, rate in enumerate(settings.learning_rates):
                found = {"validation_accuracy": accuracy[g, r], "validation_nats": nats[g, r]}
                row = {"learning_rate": rate} | {k: float(v) for k, v in found.items()}
                rows.append(row | {"head": (name, g, r)})
            chosen[group] = max(rows, key=preference)
    single = [row for group, row in chosen.items() if len(group) == 1]
    best = max(single, key=preference)
    test = evaluate(fitted.params, "test", best["head"][1:])
    for row in chosen.values():
        name, g, r = row.pop("head")
        row["test_accuracy"] = float(test["accuracy"][name][g, r])
    best["confusion"] = test.get("confusion")
    return chosen


def make_optimizer(
    config: config_lib.ProbeSgd,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """SGD with momentum, every head at its own rate (all fall along a cosine), and the highest."""
    shape = optax.cosine_decay_schedule(1.0, config.steps)

    def scaled(leaf: Array, _) -> Array:
        rates = jnp.array(config.learning_rates, jnp.float32)
        return leaf * rates.reshape(1, -1, *(1,) * (leaf.ndim - 2))

    optimizer = optax.chain(
        optax.trace(config.momentum),
        optax.stateless_with_tree_map(scaled),
        optax.scale_by_schedule(lambda step: -shape(step)),
    )
    return optimizer, lambda step: max(config.learning_rates) * shape(step)


def make_loss(heads: Heads) -> Callable:
    """The sum of all heads' losses; `frozen` holds the network's weights, the key draws masks."""

    def loss(params, frozen, batch, key, step) -> tuple[Array, dict]:
        del step
        network = heads.network
        mask = objective.draw_mask(network, len(batch["tokens"]), key)
        start = objective.start_vectors(network, batch, condition_on_label=False)
        inputs = {"hidden": mask, "pixels": network.pixels_of(batch)}
        output = network.bind(frozen)(batch["tokens"], start, **inputs, **heads.reading())
        logits = heads.logits(params, output).values()
        each = [objective.cross_entropy(x, batch["label"]).mean(axis=-1).ravel() for x in logits]
        nats = jnp.concatenate(each)
        return nats.sum(), {"best_class_nats": nats.min()}

    return loss


def make_eval_step(heads: Heads) -> Callable:
    """`(params, frozen, batch, head) -> sums` over the rows whose "mask" is 1, jitted.

    {"images", "accuracy": {stack: [G, R]}, "class_nats": {stack: [G, R]}}: images that a head
    classifies correctly by majority vote, and nats, averaged over the votes. "confusion", int32
    [C, C], see `voting.confusion`, is that of one head of a single layer: `head` holds the
    numbers of its group and rate. It is left out for more than `CONFUSION_CLASSES` classes.
    """
    network = heads.network

    def eval_step(params: dict, frozen: dict, batch: dict, head: Int[Array, " 2"]) -> dict:
        labels, mask = batch["label"], batch["mask"][None, None]
        votes = []
        for vote in range(network.votes):
            output, _ = objective.evaluate_batch(network, frozen, batch, vote, **heads.reading())
            votes.append(heads.logits(params, output))
        sums = {"images": mask.sum(), "accuracy": {}, "class_nats": {}}
        for name in heads.stacks():
            logits = jnp.stack([vote[name] for vote in votes])
            chosen = voting.majority_class(logits)
            nats = objective.cross_entropy(logits, labels).mean(axis=0)
            sums["accuracy"][name] = ((chosen == labels[None, None]) * mask).sum(axis=-1)
            sums["class_nats"][name] = (nats * mask).sum(axis=-1)
            if name == "layers_1" and heads.classes <= step.CONFUSION_CLASSES:
                one = chosen[head[0], head[1]]
                sums["confusion"] = voting.confusion(labels, one, batch["mask"], heads.classes)
        return sums

    return jax.jit(eval_step)
