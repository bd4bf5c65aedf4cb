"""The probe for sets too large for L-BFGS: linear heads trained by SGD on augmented images.

Heads for every learning rate and every group of layers are trained at once, on the same forward
pass of the frozen network; each has a loss and a rate of its own, so none changes another.

Letters: G groups of N layers each, R learning rates, B batch, T tokens, D width, C classes.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import hosts, sharding
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.model import flops
from gptv_jax.model.gpt import Network, Output
from gptv_jax.probe.features import Batches, Features, statistics
from gptv_jax.probe.logistic import preference
from gptv_jax.train import loop, objective, step
from gptv_jax.train.metrics import MetricWriter
from gptv_jax.train.objective import cross_entropy
from gptv_jax.train.optimizer import apply_update

Group = tuple[int, ...]  # layers whose features a head reads side by side


@dataclasses.dataclass(frozen=True)
class Heads:
    """All that fixes the heads' shapes and what they read; their weights are a nested dict."""

    network: Network
    config: config_lib.Probe
    classes: int  # C
    groups: tuple[Group, ...]

    def stacks(self) -> dict[str, list[Group]]:
        """Groups by their number of layers, each lot trained as one array."""
        sizes = sorted({len(group) for group in self.groups})
        return {f"layers_{n}": [g for g in self.groups if len(g) == n] for n in sizes}

    def init(self, key: PRNGKeyArray | None = None) -> dict:
        """Float32 zeros, as the network's own heads begin; call it under a mesh, inside jit.

        `{stack: {"weight" [G, R, C, N, D], "bias" [G, R, C]}}`; for attentive pooling "query"
        [G, R, N, D], by which at first all positions count the same; to standardise "center" and
        "scale" [G, R, N, D], alike for all rates, which are not trained.
        """
        del key
        R, C, D = len(self.config.sgd.learning_rates), self.classes, self.network.config.width
        weights = {}
        for name, groups in self.stacks().items():
            G, N = len(groups), len(groups[0])
            shapes = {"weight": (G, R, C, N, D), "bias": (G, R, C)}
            if self.config.pooling == "attentive":
                shapes["query"] = (G, R, N, D)
            if self.config.sgd.standardize:
                shapes["center"] = shapes["scale"] = (G, R, N, D)
            weights[name] = {
                leaf: jnp.zeros(shape, out_sharding=SPECS[leaf]) for leaf, shape in shapes.items()
            }
        return weights

    def standardised(self, weights: dict, features: Features) -> dict:
        """The weights with center and scale set by the first training images."""
        mean, deviation = statistics(features)
        for name, groups in self.stacks().items():
            for leaf, value in (("center", mean), ("scale", 1 / deviation)):
                of_groups = np.stack([value[list(group)] for group in groups])[:, None]
                old = weights[name][leaf]
                new = np.broadcast_to(of_groups, old.shape).astype(np.float32)
                weights[name][leaf] = jax.make_array_from_callback(
                    old.shape, old.sharding, lambda index, new=new: new[index]
                )
        return weights

    def reading(self) -> dict:
        """What the network is to be called with, beside its inputs."""
        layers = sorted({layer for group in self.groups for layer in group})
        keep = tuple(layers) if self.config.pooling == "attentive" else ()
        return {"raw": self.config.features == "raw", "keep": keep}

    def logits(self, weights: dict, output: Output) -> dict[str, Float[Array, "G R B C"]]:
        """Class logits of every head, from the network's output for a batch."""
        keep, logits = self.reading()["keep"], {}
        source = output.kept if keep else output.pooled
        for name, groups in self.stacks().items():
            w = {leaf: sharding.gather(each, jnp.float32) for leaf, each in weights[name].items()}
            at = [[keep.index(layer) if keep else layer for layer in group] for group in groups]
            x = jnp.stack([jnp.stack([source[i] for i in group]) for group in at])
            x = x.astype(jnp.float32)
            if keep:
                scores = jnp.einsum("gnbtd,grnd->grnbt", x, w["query"]) / x.shape[-1] ** 0.5
                shares, spec = jax.nn.softmax(scores, axis=-1), P(None, None, None, sharding.BATCH)
                x = jnp.einsum("grnbt,gnbtd->grnbd", shares, x, out_sharding=spec)
            if "center" in w:
                center, scale = jax.lax.stop_gradient((w["center"], w["scale"]))
                # One copy will do where the features are the same for all rates.
                at = slice(None) if keep else 0
                x = (x - center[:, at, :, None]) * scale[:, at, :, None]
            equation = "grnbd,grcnd->grbc" if keep else "gnbd,grcnd->grbc"
            logits[name] = jnp.einsum(equation, x, w["weight"]) + w["bias"][:, :, None]
        return logits


SPECS = {  # the width is split over fsdp, as the network's own class head is
    "weight": P(None, None, None, None, "fsdp"),
    "bias": P(None, None, None),
    **dict.fromkeys(("query", "center", "scale"), P(None, None, None, "fsdp")),
}


def fit(
    heads: Heads,
    frozen: dict,
    *,
    checkpoints: Checkpoints,
    log: MetricWriter,
    training: Callable[[int], Iterator[dict]],
    evaluation: Batches,
    features: Features,
    seed: int,
) -> dict[Group, dict]:
    """Trains all heads to the end of the schedule, from the newest checkpoint where there is one.

    Args:
      heads: what is trained.
      frozen: the network's weights, only read.
      checkpoints: open, and left open.
      log: takes the events.
      training: `position -> iterator` over this process's share of augmented batches from there on.
      evaluation: a split's batches.
      features: of the training split, by which heads are standardised.
      seed: see `make_train_step`.

    Returns:
      For each group {"learning_rate", "validation_accuracy", "validation_nats", "test_accuracy"} of
      the rate with the best validation accuracy, among equals the lowest cross-entropy, after the
      last step.

    Raises:
      InputError: see `loop.fit`.
    """
    settings, optimizer = heads.config.sgd, make_optimizer(heads.config.sgd)
    train_step, eval_step = make_train_step(heads, optimizer, seed), make_eval_step(heads)

    def init(key: PRNGKeyArray) -> dict:
        return step.state_of(heads.init(key), optimizer)

    def evaluate(weights: dict, split: str = "validation") -> dict[str, dict]:
        total = None
        for batch in hosts.until_stop(evaluation(split)):
            sums = eval_step(weights, frozen, sharding.global_batch(batch))
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        total = jax.device_get(total)
        images = total.pop("images")
        return jax.tree.map(lambda x: x.astype(np.float64) / images, total)

    def initial() -> dict:
        state = jax.jit(init)(jax.random.key(seed))
        if settings.standardize:
            state["params"] = heads.standardised(state["params"], features)
        return state

    def best(weights: dict) -> dict[str, float]:
        found = evaluate(weights)
        return {
            "best_accuracy": max(float(x.max()) for x in found["accuracy"].values()),
            "best_class_nats": min(float(x.min()) for x in found["class_nats"].values()),
        }

    fitted = loop.fit(
        "probe",
        config_lib.Train(
            steps=settings.steps,
            batch_size=settings.batch_size,
            eval_every=settings.eval_every,
            checkpoint_every=settings.checkpoint_every,
            log_every=settings.log_every,
        ),
        length=heads.network.length,
        # Gradients do not go through the network.
        flops=flops.forward(heads.network).total,
        checkpoints=checkpoints,
        log=log,
        initial=initial,
        abstract=sharding.abstract(init),
        train_step=lambda state, batch: train_step(state, frozen, batch),
        batches=training,
        evaluate=best,
    )
    validation, test = (evaluate(fitted.params, split) for split in ("validation", "test"))
    chosen = {}
    for name, groups in heads.stacks().items():
        for g, group in enumerate(groups):
            rows = [
                {
                    "learning_rate": rate,
                    "validation_accuracy": float(validation["accuracy"][name][g, r]),
                    "validation_nats": float(validation["class_nats"][name][g, r]),
                    "test_accuracy": float(test["accuracy"][name][g, r]),
                }
                for r, rate in enumerate(settings.learning_rates)
            ]
            chosen[group] = max(rows, key=preference)
    return chosen


def make_optimizer(config: config_lib.ProbeSgd) -> optax.GradientTransformation:
    """SGD with momentum, every head at its own rate, all falling to 0 along a cosine."""
    shape = optax.cosine_decay_schedule(1.0, config.steps)

    def at_own_rate(updates, _):
        def scaled(leaf: Array) -> Array:
            rates = jnp.array(config.learning_rates, jnp.float32)
            return leaf * rates.reshape(1, -1, *(1,) * (leaf.ndim - 2))

        return jax.tree.map(scaled, updates)

    return optax.chain(
        optax.trace(config.momentum),
        optax.stateless(at_own_rate),
        optax.scale_by_schedule(lambda step: -shape(step)),
    )


def make_train_step(heads: Heads, optimizer: optax.GradientTransformation, seed: int) -> Callable:
    """`(state, frozen, batch) -> (state, metrics)`, donating the state.

    Args:
      heads: whose weights the state holds, as its "params".
      optimizer: of the heads.
      seed: of what BERT does not see; the key of a step is folded from the step.
    """
    network = heads.network

    def loss(weights: dict, frozen: dict, batch: dict, step: Array) -> tuple[Array, Array]:
        key = jax.random.fold_in(jax.random.key(seed), step)
        hidden = objective.hide(network, len(batch["tokens"]), key)
        inputs = batch["tokens"], objective.starts(network, batch, told=False)
        output = network.bind(frozen)(*inputs, hidden=hidden, **heads.reading())
        logits = heads.logits(weights, output)
        nats = [_class_nats(each, batch["label"]).mean(axis=-1).ravel() for each in logits.values()]
        nats = jnp.concatenate(nats)
        return nats.sum(), nats.min()

    def train_step(state: dict, frozen: dict, batch: dict) -> tuple[dict, dict]:
        gradient = jax.grad(loss, has_aux=True)
        grads, least = gradient(state["params"], frozen, batch, state["step"])
        params, opt = apply_update(optimizer, grads, state["opt"], state["params"])
        state = {"step": state["step"] + 1, "params": params, "opt": opt}
        return state, {"best_class_nats": least}

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(heads: Heads) -> Callable:
    """`(weights, frozen, batch) -> sums` over rows of mask 1.

    {"images", "accuracy": {stack: [G, R]}, "class_nats": {stack: [G, R]}}: the number of images, of
    those that a head classifies correctly, by majority where there are votes, and nats, the votes'
    mean.
    """
    network = heads.network

    def eval_step(weights: dict, frozen: dict, batch: dict) -> dict:
        labels, mask = batch["label"], batch["mask"][None, None]
        votes = [
            heads.logits(
                weights, objective.evaluated(network, frozen, batch, vote, **heads.reading())[0]
            )
            for vote in range(network.votes)
        ]
        sums = {"images": mask.sum(), "accuracy": {}, "class_nats": {}}
        for name in weights:
            logits = jnp.stack([vote[name] for vote in votes])
            right = objective.elect(logits) == labels[None, None]
            nats = _class_nats(logits, labels).mean(axis=0)
            sums["accuracy"][name] = (right * mask).sum(axis=-1)
            sums["class_nats"][name] = (nats * mask).sum(axis=-1)
        return sums

    return jax.jit(eval_step)


def _class_nats(
    logits: Float[Array, "*heads B C"], labels: Int[Array, "B"]
) -> Float[Array, "*heads B"]:
    return cross_entropy(logits, jnp.broadcast_to(labels, logits.shape[:-1]))
