"""One training step and one evaluation step: gradients, microbatches, randomness and sums."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import MODERN, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model.gpt import parameter_count
from gptv_jax.train import optimizer, step

pytestmark = pytest.mark.usefixtures("one_device")

SGD = optax.sgd(1.0)  # new parameters are the old ones less the gradient


def constant_rate(count):
    return jnp.float32(1.0)


NETWORK = tiny_network(classes=5, scan_layers=False)
MODERN_NETWORK = tiny_network(classes=5, scan_layers=False, **MODERN)


def numbers(metrics):
    return {name: float(value) for name, value in metrics.items()}


def host(tree):
    """A NumPy copy; the arrays themselves are gone when a step has donated them."""
    return jax.tree.map(np.array, jax.device_get(tree))


def one_step(network, microbatches=1, mesh=(1, 1, 1)):
    """Parameters and metrics after one SGD step, and the parameters before it."""
    with jax.set_mesh(make_mesh(mesh)):
        loss = step.make_loss(network, 1.0, 0.5)
        take = step.make_train_step(loss, SGD, constant_rate, microbatches=microbatches)
        state = step.state_of(random_params(network), SGD)
        before = host(state["params"])
        state, metrics = take(state, sharding.global_batch(random_batch(network)))
        return host(state["params"]), numbers(metrics), before


def assert_same_step(found, wanted):
    (found, found_metrics, before), (wanted, wanted_metrics, _) = found, wanted
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, f), w, b in zip(
        jax.tree.leaves_with_path(found),
        jax.tree.leaves(wanted),
        jax.tree.leaves(before),
        strict=True,
    ):
        scale = np.abs(w - b).max() + 1e-3  # of the gradient
        np.testing.assert_allclose(f / scale, w / scale, atol=2e-5, rtol=0, err_msg=str(path))
    assert found_metrics == pytest.approx(wanted_metrics, rel=1e-5)


@pytest.fixture(scope="module")
def whole_batch():
    return one_step(MODERN_NETWORK)


# The training step


@pytest.mark.parametrize(("microbatches", "mesh"), [(4, (1, 1, 1)), (2, (2, 2, 2))])
def test_microbatches_give_the_gradient_and_the_metrics_of_the_whole_batch(
    microbatches, mesh, whole_batch
):
    assert_same_step(one_step(MODERN_NETWORK, microbatches, mesh), whole_batch)


@pytest.mark.parametrize(
    ("scan", "microbatches", "times"), [(True, 8, 2), (False, 8, 2.5), (False, 1, 4)]
)
def test_a_step_holds_its_gradients_once(scan, microbatches, times):
    network = tiny_network(width=128, layers=4, scan_layers=scan)
    adamw, loss = optax.adamw(1e-3), step.make_loss(network)
    take = step.make_train_step(loss, adamw, constant_rate, microbatches=microbatches)
    state = sharding.abstract(lambda key: step.state_of(network.init(key), adamw))
    compiled = take.lower(state, sharding.global_batch(random_batch(network))).compile()
    weights = 4 * parameter_count(state["params"])
    # The summed gradients and the activations. One more copy for each part would make it 2.5 times
    # the weights, one for each unrolled layer 4.4 times.
    assert compiled.memory_analysis().temp_size_in_bytes < times * weights


def test_a_step_takes_the_gradient_of_the_loss_at_the_old_parameters(whole_batch):
    after, metrics, before = whole_batch
    batch = sharding.global_batch(random_batch(MODERN_NETWORK))
    loss = step.make_loss(MODERN_NETWORK, 1.0, 0.5)
    gradient = jax.device_get(jax.jit(jax.grad(lambda p: loss(p, None, batch, None)[0]))(before))
    difference = jax.tree.map(np.subtract, before, after)
    for name, norm in (("grad_norm", gradient), ("param_norm", after)):
        wanted = np.sqrt(
            sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(norm))
        )
        assert metrics[name] == pytest.approx(wanted, rel=1e-5)
    jax.tree.map(lambda d, g: np.testing.assert_allclose(d, g, atol=1e-6), difference, gradient)


def test_steps_are_counted_and_the_logged_rate_is_that_of_the_step():
    network = tiny_network(scan_layers=False)
    config = config_lib.Optimizer("muon", learning_rate=0.8, warmup_steps=4)
    update, rate = optimizer.make_optimizer(config, 10)
    loss, traces = step.make_loss(network), []

    def traced(*arguments):
        traces.append(arguments)
        return loss(*arguments)

    take = step.make_train_step(traced, update, rate)
    state = jax.jit(step.make_init(network, update))(jax.random.key(0))
    batch = sharding.global_batch(random_batch(network))
    assert state["step"].dtype == jnp.int32
    for count, wanted in enumerate([0.2, 0.4, 0.6]):
        assert int(state["step"]) == count
        old = state
        state, metrics = take(state, batch)
        assert float(metrics["learning_rate"]) == pytest.approx(wanted)
        assert old["params"]["head"].is_deleted()  # its memory is reused
    assert int(state["step"]) == 3
    assert len(traces) == 1  # the first state has the type of all later states


def test_training_does_not_change_the_standardisation_of_the_class_head(whole_batch):
    after, _, before = whole_batch
    for name in ("class_center", "class_scale"):
        np.testing.assert_array_equal(after["classifier"][name], before["classifier"][name])
    assert (after["classifier"]["class_head"] != before["classifier"]["class_head"]).all()


def test_dropout_depends_on_the_step_and_the_seed_alone():
    network = tiny_network(layers=1, dropout=0.3)
    still = optax.sgd(0.0)
    batch = sharding.global_batch(random_batch(network))
    loss = step.make_loss(network)

    def losses(take):
        state, found = step.state_of(random_params(network), still), []
        for _ in range(2):
            state, metrics = take(state, batch)
            found.append(float(metrics["nats_per_token"]))
        return found

    one, other = (step.make_train_step(loss, still, constant_rate, seed=seed) for seed in (0, 1))
    a, again, b = losses(one), losses(one), losses(other)
    assert a == again
    assert len({*a, *b}) == 4


def test_every_microbatch_has_its_own_key():
    keys = []

    def loss(params, frozen, batch, key, step):
        jax.debug.callback(lambda k: keys.append(k.tolist()), jax.random.key_data(key))
        return jnp.sum(params["w"]), {}

    take = step.make_train_step(loss, SGD, constant_rate, microbatches=4)
    take(step.state_of({"w": jnp.zeros(3)}, SGD), sharding.global_batch(random_batch(NETWORK)))
    jax.effects_barrier()
    assert len({tuple(key) for key in keys}) == len(keys) == 4


# Losses


def softmax_nats(logits, targets):
    logits = np.asarray(logits, np.float64)
    log_sum = np.log(np.exp(logits).sum(axis=-1))
    return log_sum - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


@pytest.fixture(scope="module")
def evaluated():
    """A network, its weights, a NumPy batch and the network's output for it."""
    network = NETWORK
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params, batch = random_params(network), random_batch(network)
        on_device = sharding.global_batch(batch)
        output = jax.jit(lambda p, b: network.bind(p)(b["tokens"], b["variant"]))(params, on_device)
        return network, params, batch, output


def test_the_loss_weighs_tokens_and_classes_by_the_coefficients(evaluated):
    network, params, batch, output = evaluated
    tokens = softmax_nats(output.logits, batch["tokens"]).mean()
    classes = softmax_nats(output.class_logits, batch["label"]).mean()
    predicted = np.argmax(np.asarray(output.class_logits), axis=-1)
    wanted = {
        "nats_per_token": tokens,
        "class_nats": classes,
        "accuracy": np.mean(predicted == batch["label"]),
    }
    coefficients = [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 3.0)]
    losses = [step.make_loss(network, *c) for c in coefficients]
    all_of_them = jax.jit(lambda p, b: [loss(p, None, b, None) for loss in losses])
    found = all_of_them(params, sharding.global_batch(batch))
    for (a, b), (value, metrics) in zip(coefficients, found, strict=True):
        np.testing.assert_allclose(value, a * tokens + b * classes, rtol=1e-5)
        assert numbers(metrics) == pytest.approx(wanted, rel=1e-5)
    assert tokens != pytest.approx(classes, rel=0.01)


def test_the_loss_of_pretraining_is_the_mean_of_the_nats_of_all_tokens(evaluated):
    network, params, batch, output = evaluated
    loss = jax.jit(step.make_loss(network, classification=0.0))
    value, metrics = loss(params, None, sharding.global_batch(batch), None)
    np.testing.assert_allclose(
        value, softmax_nats(output.logits, batch["tokens"]).mean(), rtol=1e-5
    )
    assert value == metrics["nats_per_token"]


# Evaluation


def test_evaluation_sums_over_the_rows_that_are_not_masked(evaluated):
    network, params, batch, output = evaluated
    evaluate = step.make_eval_step(network)
    mask = np.array([1, 0, 1, 1, 0, 1, 1, 0], np.float32)
    batch = {**batch, "mask": mask}
    predicted = np.argmax(output.class_logits, axis=-1)
    batch["label"] = np.where(np.arange(8) % 4 < 2, predicted, (predicted + 1) % 5)
    batch["label"] = batch["label"].astype(np.int32)
    sums = numbers(evaluate(params, sharding.global_batch(batch)))
    nats = softmax_nats(output.logits, batch["tokens"]).mean(axis=1)
    class_nats = softmax_nats(output.class_logits, batch["label"])
    wanted = {"nats_per_token": nats @ mask, "images": 5}
    wanted |= {"accuracy": 2, "class_nats": class_nats @ mask}
    assert sums == pytest.approx(wanted, rel=1e-5)

    other = random_batch(network, seed=1)
    masked = mask == 0
    for name in ("tokens", "label", "variant"):
        shape = (8,) + (1,) * (batch[name].ndim - 1)
        batch[name] = np.where(masked.reshape(shape), other[name], batch[name])
    assert numbers(evaluate(params, sharding.global_batch(batch))) == sums


def test_evaluation_without_a_class_head_counts_no_classes():
    network = tiny_network(scan_layers=False)
    evaluate = step.make_eval_step(network)
    batch = sharding.global_batch(random_batch(network))
    sums = jax.eval_shape(evaluate, random_params(network), batch)
    assert sums.keys() == {"nats_per_token", "images"}


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_an_evaluation_counts_which_class_is_taken_for_which(mesh, evaluated):
    network, _, batch, output = evaluated
    with jax.set_mesh(make_mesh(mesh)):
        metric = step.make_metric(network, confusion=True)
        sums = metric.sums(random_params(network), iter([batch, batch]))
    chosen, wanted = np.argmax(output.class_logits, axis=-1), np.zeros((5, 5), int)
    np.add.at(wanted, (batch["label"], chosen), 2 * batch["mask"].astype(int))
    np.testing.assert_array_equal(sums["confusion"], wanted)
    assert wanted.sum() == sums["images"] == 14 and np.trace(wanted) == sums["accuracy"]
    assert metric.result(sums).keys() == {"nats_per_token", "accuracy", "class_nats"}


def test_a_metric_adds_up_a_split_and_names_the_numbers_that_rank_checkpoints(evaluated):
    network, params, _, _ = evaluated
    batches = [random_batch(network, seed=seed) for seed in range(3)]
    metric = step.make_metric(network)
    found = metric.measure(params, iter(batches))
    each = [numbers(metric.step(params, sharding.global_batch(batch))) for batch in batches]
    sums = {name: sum(part[name] for part in each) for name in each[0]}
    assert sums["images"] == 21  # of 24 rows three are masked
    wanted = {"nats_per_token": sums["nats_per_token"] / 21, "accuracy": sums["accuracy"] / 21}
    assert found == pytest.approx(wanted | {"class_nats": sums["class_nats"] / 21}, rel=1e-6)
    assert metric.primary == {"accuracy": 1, "class_nats": -1}
    assert not step.make_metric(tiny_network()).primary
