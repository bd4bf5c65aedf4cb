"""Distillation from the draws of a token cache, without the teacher in memory.

The loss is

  weight * t^2 * CE + data_weight * (the loss without a teacher)

where CE is the mean over positions of the cross-entropy of the student's distribution, its logits
divided by the temperature t, against the shares of the ids that the teacher drew. The mean of the
shares over draws is the teacher's distribution, so that the mean of CE and of its gradient over
draws are those of the cross-entropy against the whole distribution; this is KL(teacher || student)
and the teacher's entropy, which no weight changes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model.gpt import Network
from gptv_jax.train import objective
from gptv_jax.train.objective import row_means
from gptv_jax.train.step import draw_view


def cross_entropy_of_draws(
    logits: Float[Array, "*B V"],
    ids: Real[Array, "*B K"],
    counts: Real[Array, "*B K"],
    temperature: float = 1.0,
) -> Float[Array, "*B"]:
    """Cross-entropy in nats against the ids' shares of the draws; see `Draws.padded`."""
    counts = counts.astype(jnp.float32)
    shares = counts / counts.sum(axis=-1, keepdims=True)
    logits = logits / temperature
    drawn = jnp.take_along_axis(logits, ids.astype(jnp.int32), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - (shares * drawn).sum(axis=-1)


def make_loss(network: Network, settings: config_lib.Distill, steps: int | None = None) -> Callable:
    """The loss of this module, see `train.step`; `steps` as of `step.make_loss`.

    Batches have "teacher_ids" and "teacher_counts". Metrics are "loss", "nats_per_token" and
    "teacher_cross_entropy", CE without the factor t^2.
    """
    part, t = network.layout.parts[0], settings.temperature

    def loss(params, frozen, batch, key, step=None):
        del frozen
        model, view = network.bind(params), draw_view(network, batch, key, step, steps)
        final = model(view.tokens, view.start, key, view.hidden, view.order).final

        def nats(tokens, final, ids, counts):
            logits = model.token_logits(final)
            taught = cross_entropy_of_draws(logits, ids, counts, t)
            return objective.cross_entropy(logits, tokens), taught

        given = view.targets, batch["teacher_ids"], batch["teacher_counts"]
        with jax.named_scope("loss"):
            tokens, ids, counts = jax.sharding.reshard(given, sharding.HIDDEN)
            found = objective.by_chunks(nats, network, part, (tokens, final, ids, counts))
            data, taught = (row_means(each, view.counted).mean() for each in found)
        total = settings.weight * t**2 * taught + settings.data_weight * data
        metrics = {"loss": total, "nats_per_token": data, "teacher_cross_entropy": taught}
        return total, metrics

    return loss
