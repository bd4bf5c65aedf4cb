"""One step of training or evaluation, as pure functions for `jax.jit`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import sharding
from gptv_jax.model.gpt import Network, Output, in_order
from gptv_jax.train import objective
from gptv_jax.train.objective import cross_entropy
from gptv_jax.train.optimizer import apply_update, average

Metrics = dict[str, Array]


def generative_loss(network: Network, steps: int | None = None) -> Callable:
    """`(params, batch, key, step) -> (nats per token, metrics)`, the pretraining objective.

    The key is of all that is drawn: dropout, what is hidden, whose class is not told, and orders.
    None, where nothing is hidden, switches the rest off.

    Args:
      network: the network.
      steps: of the whole training, in the course of which random orders become raster.

    Raises:
      ValueError: they do, but `steps` is not known.
    """
    if network.config.random_order and steps is None:
        raise ValueError("orders become raster in the course of the training: say its steps.")

    def loss(
        params: dict, batch: dict, key: PRNGKeyArray | None, step: Int[Array, ""] | None = None
    ) -> tuple[Array, Metrics]:
        order = objective.draw_order(network, len(batch["tokens"]), key, step, steps)
        _, nats = _forward(network, params, batch, key, order, told=True)
        return nats, {"nats_per_token": nats}

    return loss


def _forward(
    network, params, batch, key, order=None, *, told: bool
) -> tuple[Output, Float[Array, ""]]:
    """Output and nats per token of a training batch."""
    hidden = objective.hide(network, len(batch["tokens"]), key)
    model, tokens = network.bind(params), batch["tokens"]
    output = model(tokens, objective.starts(network, batch, key, told=told), key, hidden, order)
    targets = tokens if order is None else in_order(tokens, order)
    return output, objective.nats_per_token(model, output, targets, hidden).mean()


def joint_loss(network: Network, generative: float, classification: float) -> Callable:
    """As `generative_loss`, plus cross-entropy of the class, weighted by the two coefficients.

    What is to tell the class is not told it, and reads images in raster order.
    """

    def loss(
        params: dict, batch: dict, key: PRNGKeyArray | None, step: Int[Array, ""] | None = None
    ) -> tuple[Array, Metrics]:
        del step
        output, nats = _forward(network, params, batch, key, told=False)
        class_nats = cross_entropy(output.class_logits, batch["label"]).mean()
        correct = jnp.argmax(output.class_logits, axis=-1) == batch["label"]
        metrics = {"nats_per_token": nats, "class_nats": class_nats, "accuracy": correct.mean()}
        return generative * nats + classification * class_nats, metrics

    return loss


def abstract_batch(network: Network, rows: int, split: NamedSharding | None = None) -> dict:
    """Shapes of what the pretraining loss reads of a batch of so many rows, and how they lie."""
    shapes = {"tokens": (rows, network.length), "variant": (rows,)}
    if network.config.class_tokens:
        shapes["label"] = (rows,)
    return {k: jax.ShapeDtypeStruct(s, jnp.int32, sharding=split) for k, s in shapes.items()}


def make_init(
    network: Network, optimizer: optax.GradientTransformation, ema: float | None = None
) -> Callable:
    """`key -> state`, the train state of `state_of`, every leaf born in its sharding."""
    return lambda key: state_of(network.init(key), optimizer, ema)


def state_of(
    params: dict, optimizer: optax.GradientTransformation, ema: float | None = None
) -> dict:
    """The train state {step, params, opt} before the first step; with an average, "ema" as well."""
    # Constants among the optimizer's state come without a sharding of their own; given one, the
    # state before the first step has the type of all later ones, and the step compiles once.
    opt = jax.tree.map(
        lambda x: jax.sharding.reshard(x, jax.typeof(x).sharding.spec), optimizer.init(params)
    )
    # A copy of its own, since the step is given both to write over.
    averaged = {} if ema is None else {"ema": jax.tree.map(jnp.copy, params)}
    return {"step": jnp.zeros((), jnp.int32), "params": params, "opt": opt, **averaged}


def make_train_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    *,
    microbatches: int = 1,
    seed: int = 0,
    ema: float | None = None,
) -> Callable:
    """`(state, batch) -> (state, metrics)`, donating the state.

    Args:
      loss: of parameters, batch, key and step, such as `generative_loss` makes.
      optimizer: takes the mean gradient of the batch.
      rate: learning rate by step, for the metrics.
      microbatches: parts the batch is worked through in, to need less memory; the same result but
        for dropout and what else is drawn by the key, part by part.
      seed: of the loss's key, which is folded from the step, so that it needs no state.
      ema: decay of the average of the weights; None: the state has none.
    """
    gradient = jax.grad(loss, has_aux=True)

    def accumulate(params, batch, key, step):
        # Rows r, r + A, r + 2A ... make part r: a split that keeps every row on its device.
        parts = jax.tree.map(
            lambda x: x.reshape(
                -1, microbatches, *x.shape[1:], out_sharding=sharding.BATCH_FIRST
            ).swapaxes(0, 1),
            batch,
        )
        keys = jax.random.split(key, microbatches)
        # Every part adds its gradients to one sum. Scanned layers do so one by one, so that there
        # is no second copy; of unrolled ones there is.
        total = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), params)

        def add(_, inputs):
            of_part = lambda p: loss(p, *inputs, step)  # noqa: E731
            nats, backward, metrics = jax.vjp(of_part, params, has_aux=True)
            backward.with_refs(total)(jnp.full_like(nats, 1 / microbatches))
            return None, metrics

        _, metrics = jax.lax.scan(add, None, (parts, keys))
        metrics = jax.tree.map(lambda x: x.mean(axis=0), metrics)
        return jax.tree.map(lambda x: x[...], total), metrics

    def train_step(state: dict, batch: dict) -> tuple[dict, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        grads, metrics = (gradient if microbatches == 1 else accumulate)(
            state["params"], batch, key, state["step"]
        )
        params, opt = apply_update(optimizer, grads, state["opt"], state["params"])
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "learning_rate": rate(state["step"]),
        }
        averaged = {}
        if ema is not None:
            averaged["ema"] = average(state["ema"], params, state["step"], ema)
        return {"step": state["step"] + 1, "params": params, "opt": opt, **averaged}, metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(network: Network) -> Callable:
    """`(params, batch) -> sums` over the batch's real rows (mask 1).

    The sums are nats per token, images and, with a class head, correctly classified images and the
    cross-entropy of the class in nats. Where positions are hidden, nats are means over the votes,
    and the class is that of most of them. A class-conditional network is told the class, but where
    it has a class head.
    """
    told = not network.classes

    def eval_step(params: dict, batch: dict) -> Metrics:
        nats, class_logits, model = 0.0, [], network.bind(params)
        for vote in range(network.votes):
            output, hidden = objective.evaluated(network, params, batch, vote, told=told)
            nats += objective.nats_per_token(model, output, batch["tokens"], hidden)
            class_logits.append(output.class_logits)
        sums = {
            "nats_per_token": (nats / network.votes * batch["mask"]).sum(),
            "images": batch["mask"].sum(),
        }
        if network.classes:
            class_logits = jnp.stack(class_logits)
            correct = objective.elect(class_logits) == batch["label"]
            sums["correct"] = (correct * batch["mask"]).sum()
            class_nats = cross_entropy(
                class_logits, jnp.broadcast_to(batch["label"], class_logits.shape[:-1])
            ).mean(axis=0)
            sums["class_nats"] = (class_nats * batch["mask"]).sum()
        return sums

    return jax.jit(eval_step)
