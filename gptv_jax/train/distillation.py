"""Distillation: the loss of a network, the student, that also learns from frozen teachers.

The teachers read what the student reads: equal tokens, hidden tokens and orders; dropout is the
student's alone. The loss is

  weight * t^2 * KL(teacher || student) + data_weight * (the loss without a teacher)
  + features * (1 - cosine of features of a layer of each)

with all logits divided by the temperature t (Hinton et al. 2015, arXiv:1503.02531). KL is the mean
over positions of the divergence over the whole vocabulary or, of networks with a class head, the
mean over images of the divergence over the classes. Of several teachers, the mean of their
distributions counts.

`frozen["teachers"]` has the teachers' weights in the order of the teachers' networks.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model.gpt import GPT, Network, Output
from gptv_jax.train import objective, voting
from gptv_jax.train.objective import cross_entropy, row_means
from gptv_jax.train.step import Metric, View, draw_view

Teachers = tuple[Network, ...]
MAPS = "feature_maps"  # linear maps of features, weights that are trained beside the network's
EPSILON = 1e-12  # of squared lengths of features, so that zeros have a gradient


def mean_log_probabilities(
    logits: Sequence[Float[Array, "*B V"]], temperature: float = 1.0
) -> Float[Array, "*B V"]:
    """Logarithm of the mean of the distributions that several logits stand for."""
    each = [jax.nn.log_softmax(x / temperature, axis=-1) for x in logits]
    if len(each) == 1:
        return each[0]
    return jax.nn.logsumexp(jnp.stack(each), axis=0) - math.log(len(each))


def divergence(
    student: Float[Array, "*B V"], teacher: Float[Array, "*B V"], temperature: float = 1.0
) -> Float[Array, "*B"]:
    """KL(teacher || student) in nats, from the student's logits and `mean_log_probabilities`."""
    own = jax.nn.log_softmax(student / temperature, axis=-1)
    return (jnp.exp(teacher) * (teacher - own)).sum(axis=-1)


def feature_layers(
    network: Network, teachers: Teachers, settings: config_lib.Distill
) -> tuple[int, tuple[int, ...]]:
    """The layers of the student and of each teacher whose features are compared."""

    def layer(given: int | None, of: Network) -> int:
        return (of.config.layers + 1) // 2 if given is None else given

    own = layer(settings.student_layer, network)
    return own, tuple(layer(settings.teacher_layer, each) for each in teachers)


def init_maps(
    network: Network, teachers: Teachers, settings: config_lib.Distill, key: PRNGKeyArray
) -> dict:
    """{MAPS: a random linear map from the student's features to each teacher's}.

    {} where no features are compared. Call this function under a mesh, inside jit.
    """
    maps, spec, width = {}, sharding.PARAMETERS["feature_map"], network.config.width
    for i, each in enumerate(teachers if settings.features else ()):
        shape = width, each.config.width
        drawn = jax.random.normal(jax.random.fold_in(key, i), shape, out_sharding=spec)
        maps[str(i)] = {"feature_map": width**-0.5 * drawn}
    return {MAPS: maps} if maps else {}


def feature_distance(
    features: Float[Array, "B T D"], target: Float[Array, "B T E"], weights: Float[Array, "D E"]
) -> Float[Array, "B T"]:
    """1 - cosine between features after a linear map and other features."""
    weights = sharding.gather(weights, jnp.float32)
    mapped = jnp.einsum("btd,de->bte", features.astype(jnp.float32), weights)
    return 1 - (_unit(mapped) * _unit(target.astype(jnp.float32))).sum(axis=-1)


def _unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + EPSILON)


def make_loss(
    network: Network,
    teachers: Teachers,
    settings: config_lib.Distill,
    generative: float = 1.0,
    classification: float = 1.0,
    steps: int | None = None,
) -> Callable:
    """The loss of this module, see `train.step`; coefficients and `steps` as of `step.make_loss`.

    A network with a class head learns the teachers' classes. Metrics are "loss", "kl" (without the
    factor t^2), those of the loss without a teacher where this counts, and "feature_distance".
    """
    if network.several:
        raise ValueError("a network of several parts is not distilled; take one of images alone.")
    plain, t = network.classes == 0, settings.temperature
    own_layer, their_layers = feature_layers(network, teachers, settings)
    keep = (own_layer,) if settings.features else ()

    def loss(params, frozen, batch, key, step=None):
        maps = params.get(MAPS, {})
        params = {name: value for name, value in params.items() if name != MAPS}
        model, view = network.bind(params), draw_view(network, batch, key, step, steps)
        output = model(view.tokens, view.start, key, view.hidden, view.order, keep=keep)
        layers = their_layers if keep else None
        taught = _read(network, teachers, frozen, view, batch, layers)
        data, metrics = 0.0, {}
        if plain:
            found = compare_tokens(model, output, taught, view.targets, t)
            means = {n: row_means(each, view.counted).mean() for n, each in found.items()}
            data, kl, metrics = means["nats"], means["kl"], {"nats_per_token": means["nats"]}
        else:
            their = mean_log_probabilities([each.class_logits for _, each in taught], t)
            kl = divergence(output.class_logits, their, t).mean()
            if settings.data_weight:
                if network.predicts_images and generative:
                    counted = view.targets, view.counted
                    nats = objective.nats_per_token(model, output, *counted).mean()
                    data, metrics = generative * nats, {"nats_per_token": nats}
                class_nats = cross_entropy(output.class_logits, batch["label"]).mean()
                data, metrics = (
                    data + classification * class_nats,
                    metrics | {"class_nats": class_nats},
                )
        total = settings.weight * t**2 * kl + settings.data_weight * data
        metrics["kl"] = kl
        if keep:
            distances = [
                feature_distance(output.kept[0], each.kept[0], maps[str(i)]["feature_map"]).mean()
                for i, (_, each) in enumerate(taught)
            ]
            metrics["feature_distance"] = sum(distances) / len(distances)
            total += settings.features * metrics["feature_distance"]
        return total, metrics | {"loss": total}

    return loss


def _read(
    network: Network, teachers: Teachers, frozen: dict, view: View, batch: dict, layers=None
) -> list[tuple[GPT, Output]]:
    """Every teacher with its output for the student's view; `layers` are those to be kept."""
    found = []
    for i, (teacher, params) in enumerate(zip(teachers, frozen["teachers"], strict=True)):
        model, keep = teacher.bind(params), (layers[i],) if layers else ()
        start = _start(network, teacher, view, batch)
        with jax.named_scope("teacher"):
            read = model(view.tokens, start, None, view.hidden, view.order, keep=keep)
        found.append((model, read))
    return found


def _start(network: Network, teacher: Network, view: View, batch: dict) -> Int[Array, " B"] | None:
    """The teacher's start vectors: those of the student's classes, or of the images' variants."""
    classes = teacher.config.class_tokens
    if classes:
        return view.start if network.config.class_tokens == classes else None
    return objective.start_vectors(teacher, batch, condition_on_label=False)


@jax.named_scope("loss")
def compare_tokens(
    model: GPT,
    output: Output,
    taught: list[tuple[GPT, Output]],
    tokens: Int[Array, "B T"],
    temperature: float = 1.0,
    evaluating: bool = False,
) -> dict[str, Float[Array, "B T"]]:
    """{"nats", "kl"} at every position; see `objective.by_chunks`: no logits are held for long.

    "nats" are of the tokens by the student. In an evaluation also "teacher_nats" and "agreement",
    1 where student and teacher find one token the most likely.
    """
    network, models = model.network, [each for each, _ in taught]

    def compare(tokens, final, *finals):
        own = model.token_logits(final)
        logits = [each.token_logits(x) for each, x in zip(models, finals, strict=True)]
        their = mean_log_probabilities(logits, temperature)
        found = {"nats": cross_entropy(own, tokens), "kl": divergence(own, their, temperature)}
        if not evaluating:
            return found
        return found | {"teacher_nats": nats_of(their, tokens), "agreement": agreement(own, their)}

    tokens = jax.sharding.reshard(tokens, sharding.HIDDEN)
    arrays, part = (tokens, output.final, *(x.final for _, x in taught)), network.layout.parts[0]
    return objective.by_chunks(compare, network, part, arrays, 1 + len(taught))


def nats_of(log_probabilities: Float[Array, "*B V"], targets: Int[Array, "*B"]):
    """Negative logarithms, in nats, of the probabilities of the targets."""
    return cross_entropy(log_probabilities, targets)  # which normalises once more


def agreement(one: Float[Array, "*B V"], other: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """1 where both find one value the most likely, else 0."""
    return (jnp.argmax(one, axis=-1) == jnp.argmax(other, axis=-1)).astype(jnp.float32)


@functools.cache  # the metrics of several splits share the compiled step
def make_eval_step(network: Network, teachers: Teachers) -> Callable:
    """`(params, frozen, batch) -> sums` over the rows whose "mask" is 1, jitted.

    "images" counts the rows. The other sums are of means over a row's tokens: "nats_per_token",
    "teacher_nats_per_token", "kl" and "agreement"; of networks with a class head, of the class:
    "accuracy", "class_nats", "teacher_accuracy", "teacher_class_nats", "kl" and "agreement".
    BERT's masks and the clips of videos are those of `step.make_eval_step`, and so is how votes
    and clips become a class and nats, of student and teacher.
    """

    def eval_step(params: dict, frozen: dict, batch: dict) -> dict[str, Array]:
        rows, logits, their_logits = [], [], []
        for vote, clip in itertools.product(range(network.votes), objective.clips_of(batch)):
            output, mask = objective.evaluate_batch(
                network, params, clip, vote, condition_on_label=plain
            )
            start = objective.start_vectors(network, clip, condition_on_label=plain)
            view = View(clip["tokens"], start, mask, None, mask)
            taught = _read(network, teachers, frozen, view, clip)
            if plain:
                model, targets = network.bind(params), clip["tokens"]
                found = compare_tokens(model, output, taught, targets, evaluating=True)
                rows.append({name: row_means(each, mask) for name, each in found.items()})
                continue
            logits.append(output.class_logits)
            their_logits.append(mean_log_probabilities([each.class_logits for _, each in taught]))
        if plain:
            rows = jax.tree.map(lambda *each: sum(each) / len(each), *rows)
            named = {"nats": "nats_per_token", "teacher_nats": "teacher_nats_per_token"}
            rows = {named.get(name, name): each for name, each in rows.items()}
        else:
            rows = _compare_classes(network, logits, their_logits, batch["label"])
        rows["images"] = jnp.ones_like(batch["mask"])
        return {name: (values * batch["mask"]).sum() for name, values in rows.items()}

    plain = network.classes == 0
    return jax.jit(eval_step)


def _compare_classes(network, logits, their_logits, label) -> dict[str, Float[Array, " B"]]:
    """Numbers of each row, as `step.make_eval_step` has them; KL is of the mean probabilities.

    The lists have logits of every vote and clip, vote by vote.
    """
    both, chosen, found = [], [], {}
    for name, each in (("", logits), ("teacher_", their_logits)):
        votes = voting.over_clips(each, network.votes)
        chosen.append(voting.majority_class(votes))
        both.append(mean_log_probabilities([votes[i] for i in range(network.votes)]))
        found[f"{name}accuracy"] = (chosen[-1] == label).astype(jnp.float32)
        found[f"{name}class_nats"] = cross_entropy(votes, label).mean(axis=0)
    same = (chosen[0] == chosen[1]).astype(jnp.float32)
    return found | {"kl": divergence(*both), "agreement": same}


def make_metric(network: Network, teachers: Teachers, frozen: dict) -> Metric:
    """Measures the means over images of the sums of `make_eval_step`."""
    compare = make_eval_step(network, teachers)

    def result(sums: dict) -> dict[str, float]:
        images = float(sums["images"])
        return {n: float(value) / images for n, value in sums.items() if n != "images"}

    return Metric(lambda params, batch: compare(params, frozen, batch), result)
