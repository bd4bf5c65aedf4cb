"""Steps of training and evaluation as pure functions for `jax.jit`, and the network's losses.

Every training has a loss `loss(params, frozen, batch, key, step) -> (number, metrics)`, where
`frozen` holds the arrays that the loss reads and does not train: a probe's network, a perceptual
network. `key` is for everything random in the step; `step` counts the steps taken before.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from gptv_jax import hosts, sharding
from gptv_jax.model.gpt import Network
from gptv_jax.model.inputs import reorder
from gptv_jax.train import objective, voting
from gptv_jax.train.objective import cross_entropy
from gptv_jax.train.optimizer import apply_update, average

Metrics = dict[str, Array]
BESIDE = "beside"  # part of the train state whose weights are trained beside the network's
# Accuracy first; among equals, the lower cross-entropy.
CLASSIFICATION = {"accuracy": 1, "class_nats": -1}
CONFUSION_CLASSES = 2_000  # up to so many classes an evaluation counts which are taken for which


class View(NamedTuple):
    """What a training step shows a network of its batch, see `GPT.__call__`."""

    tokens: Int[Array, "B T"]
    start: Int[Array, " B"] | None
    hidden: Bool[Array, "B T"] | None
    order: Int[Array, "B T"] | None
    counted: Bool[Array, "B T"] | None  # positions that count in the loss; None: all

    @property
    def targets(self) -> Int[Array, "B T"]:
        """The token that each position predicts."""
        return self.tokens if self.order is None else reorder(self.tokens, self.order)


def draw_view(
    network: Network, batch: dict, key: PRNGKeyArray | None, step=None, steps: int | None = None
) -> View:
    """Draws what `make_loss` says; `step` counts the steps taken of `steps`."""
    tokens, classes = batch["tokens"], network.classes
    mask = objective.draw_mask(network, len(tokens), key)
    start = objective.start_vectors(network, batch, key, condition_on_label=not classes)
    order = None if classes else objective.draw_order(network, len(tokens), key, step, steps)
    hidden = objective.draw_hidden(network, len(tokens), key) if mask is None else mask
    counted = mask if "still" not in batch else objective.of_stills(network, batch["still"])
    return View(tokens, start, hidden, order, counted)


def make_loss(
    network: Network, generative: float = 1.0, classification: float = 1.0, steps: int | None = None
) -> Callable:
    """Nats per token; with a class head the weighted sum of these and the class's cross-entropy.

    Of several parts the loss is `objective.make_parts_loss`, which takes no coefficients. If a
    network with a class head predicts no tokens, only the cross-entropy of the class counts.
    Of clips that batch["still"] says are single images, the first frame alone counts.
    A network with a class head does not see the class, and reads images in raster order. Any other
    network with random orders needs `steps`, the length of the training. Without a key nothing is
    drawn: no dropout, no label dropout, raster order; BERT needs a key.
    """
    if network.several:
        if network.classes or (generative, classification) != (1, 1):
            raise ValueError("a network of several parts has no class head and no coefficients.")
        return objective.make_parts_loss(network)
    if network.config.random_order and not network.classes and steps is None:
        raise ValueError(
            "model.random_order needs the length of the training: pass `steps` to make_loss."
        )

    def loss(params, frozen, batch, key, step=None) -> tuple[Array, Metrics]:
        del frozen
        model, view = network.bind(params), draw_view(network, batch, key, step, steps)
        pixels = network.pixels_of(batch)
        output = model(view.tokens, view.start, key, view.hidden, view.order, pixels=pixels)
        total, metrics = 0.0, {}
        if network.predicts_images:
            nats = objective.nats_per_token(model, output, view.targets, view.counted).mean()
            total, metrics = generative * nats, {"nats_per_token": nats}
        if not network.classes:
            return nats, metrics
        class_nats = cross_entropy(output.class_logits, batch["label"]).mean()
        correct = jnp.argmax(output.class_logits, axis=-1) == batch["label"]
        metrics |= {"class_nats": class_nats, "accuracy": correct.mean()}
        return total + classification * class_nats, metrics

    return loss


def make_init(network: Network, optimizer: optax.GradientTransformation, ema=None) -> Callable:
    """`key -> state`, see `state_of`; every leaf is created in its sharding."""

    def init(key: PRNGKeyArray) -> dict:
        return state_of(network.init(key), optimizer, ema)

    return init


def state_of(
    params: dict, optimizer: optax.GradientTransformation, ema=None, beside: dict | None = None
) -> dict:
    """The train state {step, params, opt} before the first step; with an average, "ema" as well.

    `beside`, which becomes state[BESIDE], holds further weights that the loss reads, such as a map
    between features. They are trained with `params`, share no name with `params`, and are dropped
    after the training.
    """
    opt = optimizer.init(params | (beside or {}))
    # Constants in the optimizer's state have no sharding. Given one, the state before the first
    # step has the type of all later ones, so the step compiles once.
    opt = jax.tree.map(lambda x: jax.sharding.reshard(x, jax.typeof(x).sharding.spec), opt)
    # A copy, because the step may write over the buffers of both.
    averaged = {} if ema is None else {"ema": jax.tree.map(jnp.copy, params)}
    further = {BESIDE: beside} if beside else {}
    return {"step": jnp.zeros((), jnp.int32), "params": params, "opt": opt, **averaged, **further}


def make_train_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,  # by step, for the metrics
    *,
    microbatches: int = 1,
    seed: int = 0,  # of the loss's key, into which the step's number is folded
    ema: float | None = None,  # decay of the moving average of the weights; None: there is none
    after: Callable | None = None,
) -> Callable:
    """`(state, batch, frozen=None) -> (state, metrics)`, jitted; it donates the state.

    `frozen` is an argument of the compiled step, so its arrays are not compiled in as constants.
    What `state_of` calls `beside` is given to the loss among the params, and gets its gradient. The
    state may have more parts than step, params, opt, ema and BESIDE, such as a discriminator. After
    params and opt, `after(state, aux, batch, key) -> (state, metrics)` updates these parts, from
    `metrics["aux"]` of the loss. `after` cannot be combined with microbatches.

    Microbatches need less memory. The result is that of the whole batch, except that every part
    draws its own dropout, masks and orders.
    """
    gradient = jax.grad(loss, has_aux=True)

    def accumulate(params, frozen, batch, key, step):
        # Rows r, r + A, r + 2A ... make part r: a split that keeps every row on its device.
        def split(x):
            shape = (-1, microbatches, *x.shape[1:])
            return x.reshape(shape, out_sharding=sharding.BATCH_FIRST).swapaxes(0, 1)

        parts, keys = jax.tree.map(split, batch), jax.random.split(key, microbatches)
        # Every part adds its gradients to one sum. Scanned layers add theirs one by one, so there
        # is no second copy of the gradients; with unrolled layers there is.
        total = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), params)

        def add(_, inputs):
            part_loss = lambda p: loss(p, frozen, *inputs, step)  # noqa: E731
            number, backward, metrics = jax.vjp(part_loss, params, has_aux=True)
            backward.with_refs(total)(jnp.full_like(number, 1 / microbatches))
            return None, metrics

        _, metrics = jax.lax.scan(add, None, (parts, keys))
        metrics = jax.tree.map(lambda x: x.mean(axis=0), metrics)
        return jax.tree.map(lambda x: x[...], total), metrics

    def train_step(state: dict, batch: dict, frozen: dict | None = None) -> tuple[dict, Metrics]:
        step, trained = state["step"], state["params"] | state.get(BESIDE, {})
        known = {"step", "params", "opt", "ema", BESIDE}
        further = {name: state[name] for name in state.keys() - known}
        frozen = {**(frozen or {}), **further} if further else frozen
        key = jax.random.fold_in(jax.random.key(seed), step)
        differentiate = gradient if microbatches == 1 else accumulate
        grads, metrics = differentiate(trained, frozen, batch, key, step)
        aux = metrics.pop("aux", None)
        trained, opt = apply_update(optimizer, grads, state["opt"], trained)
        parts = {part: state[part] for part in ("params", BESIDE) if part in state}
        parts = {part: {name: trained[name] for name in old} for part, old in parts.items()}
        norms = optax.tree.norm(grads), optax.tree.norm(parts["params"])
        metrics |= dict(zip(("grad_norm", "param_norm"), norms, strict=True))
        metrics["learning_rate"] = rate(step)
        state = state | parts | {"opt": opt}
        if after is not None:
            state, more = after(state, aux, batch, key)
            metrics |= more
        if ema is not None:
            state["ema"] = average(state["ema"], state["params"], step, ema)
        return state | {"step": step + 1}, metrics

    return jax.jit(train_step, donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class Metric:
    """What an evaluation computes, and which of its numbers ranks checkpoints."""

    step: Callable[[dict, dict], dict]  # `(params, batch) -> sums`, jitted, where "mask" is 1
    result: Callable[[dict], dict[str, float]]  # `total -> {name: number}`, on the host
    # Sums stay on the devices; a metric that needs every prediction fetches each part here.
    add: Callable = lambda total, part: jax.tree.map(jnp.add, total, part)
    # Names by importance; 1: larger is better, -1: smaller. Empty: the last checkpoint is kept.
    primary: dict[str, int] = dataclasses.field(default_factory=dict)
    finish: Callable = lambda total: total  # of the sums of all batches, on the host

    def measure(self, params: dict, batches: Iterable[dict]) -> dict[str, float]:
        """The numbers of a split, given by `Pipeline.evaluation`; raises as `on_mesh` does."""
        return self.result(self.sums(params, batches))

    def sums(self, params: dict, batches: Iterable[dict]) -> dict:
        """The sums of `step` over a split, on the host; raises as `on_mesh` does."""
        parts = (self.step(params, batch) for batch in on_mesh(batches))
        return self.finish(total(parts, self.add))


def on_mesh(batches: Iterable[dict]) -> Iterator[dict]:
    """A split's batches (this process's rows, NumPy) as global arrays; raises as `until_stop`."""
    return map(sharding.global_batch, hosts.until_stop(batches))


def total(parts: Iterable, add: Callable = Metric.add):
    """The sum of trees of arrays, such as a split's batches give, fetched to the host.

    At most two parts are under way. A faster host would pile up more, and with many programs under
    way the devices of one CPU may wait for each other for ever.
    """

    def added(found, part):
        jax.block_until_ready(found)
        return add(found, part)

    return jax.device_get(functools.reduce(added, parts))


@functools.cache  # the metrics of several splits share the compiled step
def make_eval_step(network: Network, *, confusion: bool = False) -> Callable:
    """`(params, batch) -> sums` over the rows whose "mask" is 1, jitted.

    "images" counts the rows; the other sums are "nats_per_token", where tokens are predicted, and,
    with a class head, "accuracy" (images classified correctly) and "class_nats", the cross-entropy
    of the class. Of clips, where tokens are predicted in order, "by_frame" has the nats per token
    of each frame, [F]. For BERT, nats are means over the votes, and the class is that of most
    votes. Of several clips of a video, "tokens" [b, K, T], nats per token are means, and the class
    is that of the mean probabilities. A class-conditional network without a class head sees the
    class.

    With `confusion`, a network with a class head gives "confusion" as well, int32 [C, C], see
    `voting.confusion`; for more than `CONFUSION_CLASSES` classes that matrix is left out.
    """

    def eval_step(params: dict, batch: dict) -> dict[str, Array]:
        if network.several:
            nats = objective.parts_nats(network, params, batch)
            return {"nats_per_token": (nats * batch["mask"]).sum(), "images": batch["mask"].sum()}
        each, nats, logits, model = [], [], [], network.bind(params)
        for vote, clip in itertools.product(range(network.votes), objective.clips_of(batch)):
            output, mask = objective.evaluate_batch(
                network, params, clip, vote, condition_on_label=not network.classes
            )
            logits.append(output.class_logits)
            if network.predicts_images:
                each.append(objective.token_nats(model, output, clip["tokens"]))
                mean = each[-1].mean(axis=1)
                nats.append(mean if mask is None else objective.masked_mean(each[-1], mask))
        rows = {"images": jnp.ones_like(batch["mask"])}
        if nats:
            rows["nats_per_token"] = sum(nats) / len(nats)
        if network.classes:
            logits = voting.over_clips(logits, network.votes)
            chosen = voting.majority_class(logits)
            rows["accuracy"] = chosen == batch["label"]
            rows["class_nats"] = cross_entropy(logits, batch["label"]).mean(axis=0)
        sums = {name: (values * batch["mask"]).sum() for name, values in rows.items()}
        if network.frames and nats and network.config.objective == "autoregressive":
            spec = sharding.BATCH_FIRST
            each = jax.sharding.reshard(sum(each) / len(each), spec)
            by_frame = each.reshape(len(each), network.frames, -1, out_sharding=spec)
            sums["by_frame"] = (by_frame.mean(axis=2) * batch["mask"][:, None]).sum(axis=0)
        if confusion and 0 < network.classes <= CONFUSION_CLASSES:
            sums["confusion"] = voting.confusion(
                batch["label"], chosen, batch["mask"], network.classes
            )
        return sums

    return jax.jit(eval_step)


def make_metric(network: Network, *, confusion: bool = False) -> Metric:
    """Measures the means over images of the sums of `make_eval_step`.

    The numbers are "nats_per_token" and, with a class head, "accuracy" and "class_nats"; the nats
    of frames and the matrix that `confusion` asks for are among the sums alone.
    """

    def result(sums: dict[str, np.ndarray]) -> dict[str, float]:
        images, means = float(sums["images"]), sums.keys() - {"images", "confusion", "by_frame"}
        return {name: float(value) / images for name, value in sums.items() if name in means}

    primary = CLASSIFICATION if network.classes else {}
    return Metric(make_eval_step(network, confusion=confusion), result, primary=primary)
