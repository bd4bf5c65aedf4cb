"""The loss of a student with frozen teachers: what it is, and that nothing changes the teachers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh, random_batch, random_params, tiny_network

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.errors import InputError
from gptv_jax.model import flops
from gptv_jax.planning import plan, topology
from gptv_jax.planning.training import Pretraining
from gptv_jax.train import distillation, objective, step

pytestmark = pytest.mark.usefixtures("one_device")

Distill, Matching = config_lib.Distill, config_lib.Matching
TEACH_ALONE = Distill(data_weight=0.0)
SMALL = tiny_network(layers=1, width=16, scan_layers=False)
LARGE = tiny_network(scan_layers=False)


def on_mesh(network, seed=0):
    return sharding.global_batch(random_batch(network, seed=seed))


def value_and_gradient(loss, params, frozen, batch, key=None, at=0):
    key = jax.random.key(3) if key is None else key
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return run(params, frozen, batch, key, jnp.int32(at))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def logits_of(network, params, batch, **more):
    return np.asarray(network.bind(params)(batch["tokens"], batch["variant"], **more).logits)


# The divergence

VIEWS = {  # networks whose training draws something that the teacher must see as well
    "raster": ({}, {}),
    "random orders": ({"rotary": True, "random_order": (0.9, 1.0)}, {}),
    "masks": ({"objective": "bert", "masked_share": 0.5}, {}),
    "hidden tokens of clips": ({"context_masking": 0.9}, {"grid": (2, 2, 4)}),
    "classes": ({"class_tokens": 5, "label_dropout": 0.5}, {}),
}


@pytest.mark.parametrize("case", VIEWS)
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(case):
    model, more = VIEWS[case]
    network = tiny_network(layers=1, scan_layers=False, **more, **model)
    if network.config.class_tokens:
        network = dataclasses.replace(network, starts=6)
    loss = distillation.make_loss(network, (network,), TEACH_ALONE, steps=10)
    params, batch = random_params(network), on_mesh(network)
    (value, metrics), gradient = value_and_gradient(loss, params, {"teachers": (params,)}, batch)
    assert abs(float(value)) < 1e-6 and float(metrics["nats_per_token"]) > 1
    other = {"teachers": (random_params(network, seed=1),)}
    (far, _), away = value_and_gradient(loss, params, other, batch)
    assert float(far) > 0.05
    assert float(optax.tree.norm(gradient)) < 1e-5 * float(optax.tree.norm(away))


def test_a_still_among_clips_counts_by_its_first_frame_alone():
    network = tiny_network(layers=1, grid=(2, 2, 4), scan_layers=False)
    batch = on_mesh(network) | {"still": jnp.ones(8, bool)}
    loss = distillation.make_loss(network, (network,), TEACH_ALONE)
    teacher = {"teachers": (random_params(network, seed=1),)}

    def value(batch):
        return float(value_and_gradient(loss, random_params(network), teacher, batch)[0][0])

    tokens = batch["tokens"].at[:, 8:].set(0)  # of the second frame, which no first frame sees
    assert value(batch | {"tokens": tokens}) == pytest.approx(value(batch), rel=1e-6)


@pytest.fixture(scope="module")
def pair():
    """Weights of the student and of two teachers, and a batch."""
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = random_params(SMALL), [random_params(LARGE, seed) for seed in (1, 2)]
        return *params, on_mesh(SMALL)


def test_the_loss_is_the_weighted_sum_of_divergence_nats_and_features(pair):
    params, (teacher, second), batch = pair
    settings = Distill(weight=0.7, data_weight=0.3, temperature=2.0, features=0.5, teacher_layer=2)
    teachers = LARGE, LARGE
    loss = distillation.make_loss(SMALL, teachers, settings)
    maps = distillation.init_maps(SMALL, teachers, settings, jax.random.key(0))
    frozen = {"teachers": (teacher, second)}
    (value, metrics), _ = value_and_gradient(loss, params | maps, frozen, batch)

    own = logits_of(SMALL, params, batch)
    each = [np.exp(log_softmax(logits_of(LARGE, t, batch) / 2)) for t in (teacher, second)]
    mean = (each[0] + each[1]) / 2
    kl = (mean * (np.log(mean) - log_softmax(own / 2))).sum(axis=-1).mean()
    targets = np.asarray(batch["tokens"])[..., None]
    nats = -np.take_along_axis(log_softmax(own), targets, axis=-1).mean()
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-5)
    assert float(metrics["nats_per_token"]) == pytest.approx(nats, rel=1e-5)

    def kept(network, params, layer):
        found = network.bind(params)(batch["tokens"], batch["variant"], keep=(layer,)).kept[0]
        return np.asarray(found, np.float64)

    distances = []
    for i, weights in enumerate((teacher, second)):
        ours = kept(SMALL, params, 1) @ np.asarray(maps["feature_maps"][str(i)]["feature_map"])
        theirs = kept(LARGE, weights, 2)
        lengths = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
        distances.append(1 - ((ours * theirs).sum(axis=-1) / lengths).mean())
    assert float(metrics["feature_distance"]) == pytest.approx(np.mean(distances), rel=1e-4)
    wanted = 0.7 * 4 * kl + 0.3 * nats + 0.5 * np.mean(distances)
    assert float(value) == float(metrics["loss"]) == pytest.approx(wanted, rel=1e-5)


def test_dropout_is_the_students_alone(pair):
    params, (teacher, _), batch = pair

    def value(own: float, theirs: float, key: int = 3) -> float:
        networks = (
            dataclasses.replace(n, config=dataclasses.replace(n.config, dropout=rate))
            for n, rate in ((SMALL, own), (LARGE, theirs))
        )
        student, large = networks
        loss = distillation.make_loss(student, (large,), TEACH_ALONE)
        given = params, {"teachers": (teacher,)}, batch, jax.random.key(key)
        return float(value_and_gradient(loss, *given)[0][0])

    assert value(0.0, 0.5) == pytest.approx(value(0.0, 0.0), rel=1e-6)
    assert value(0.5, 0.5) == pytest.approx(value(0.5, 0.0), rel=1e-6)
    assert value(0.5, 0.5) != pytest.approx(value(0.5, 0.5, key=4), rel=1e-3)


def test_a_loss_in_chunks_is_the_loss_and_holds_no_logits_of_a_batch(pair, monkeypatch):
    params, teachers, batch = pair
    loss = distillation.make_loss(SMALL, (LARGE, LARGE), Distill(temperature=1.5))
    frozen = {"teachers": tuple(teachers)}

    def run():
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
        compiled = compiled.lower(params, frozen, batch, None).compile()
        return jax.device_get(compiled(params, frozen, batch, None)), compiled.as_text()

    wanted, whole = run()
    # Four positions of eight images, of three networks.
    monkeypatch.setattr(objective, "LOGITS_BYTES", 3 * 4 * 11 * 8 * 4)
    assert objective.loss_chunks(SMALL, 8, {}, networks=3) == 4
    found, parts = run()
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, atol=2e-6), found, wanted)
    assert "f32[8,16,11]" in whole and "f32[8,16,11]" not in parts and "f32[8,4,11]" in parts


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 2, 2)], ids=str)
def test_loss_and_gradient_are_the_same_on_every_mesh(shape, monkeypatch):
    monkeypatch.setattr(objective, "LOGITS_BYTES", 2 * 4 * 11 * 8)
    settings = Distill(features=1.0)
    loss = distillation.make_loss(SMALL, (LARGE,), settings)

    def run(mesh):
        with jax.set_mesh(make_mesh(mesh)):
            maps = distillation.init_maps(SMALL, (LARGE,), settings, jax.random.key(0))
            maps = jax.tree.map(lambda x: 0.1 + 0 * x, maps)
            frozen = {"teachers": (random_params(LARGE, 1),)}
            params = random_params(SMALL) | maps
            return jax.device_get(value_and_gradient(loss, params, frozen, on_mesh(SMALL)))

    found, wanted = run(shape), run((1, 1, 1))
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(f, w, rtol=1e-4, atol=1e-5 * max(np.abs(w).max(), 1e-3))


# Classes


def test_function_matching_learns_the_teachers_classes_and_not_the_labels():
    student, teacher = (tiny_network(5, layers=n, scan_layers=False) for n in (1, 2))
    params, frozen = random_params(student), {"teachers": (random_params(teacher, 1),)}
    batch = on_mesh(student)
    loss = distillation.make_loss(student, (teacher,), Matching(temperature=2.0))
    (value, metrics), gradient = value_and_gradient(loss, params, frozen, batch)

    def classes(network, params):
        output = network.bind(params)(batch["tokens"], batch["variant"])
        return log_softmax(np.asarray(output.class_logits) / 2)

    own, theirs = classes(student, params), classes(teacher, frozen["teachers"][0])
    kl = (np.exp(theirs) * (theirs - own)).sum(axis=-1).mean()
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-4)
    assert float(value) == pytest.approx(4 * kl, rel=1e-4)
    assert not np.any(gradient["head"])  # no token is predicted
    relabelled = batch | {"label": (batch["label"] + 1) % 5}
    again = value_and_gradient(loss, params, frozen, relabelled)
    jax.tree.map(np.testing.assert_array_equal, again, ((value, metrics), gradient))
    both = Matching(data_weight=0.5)
    loss = distillation.make_loss(student, (teacher,), both, generative=2.0, classification=3.0)
    _, found = loss(params, frozen, batch, None)
    wanted = found["kl"] + 0.5 * (2 * found["nats_per_token"] + 3 * found["class_nats"])
    assert float(found["loss"]) == pytest.approx(float(wanted), rel=1e-6)
    assert float(value_and_gradient(
        distillation.make_loss(student, (student,), Matching()),
        params, {"teachers": (params,)}, batch,
    )[0][0]) == pytest.approx(0, abs=1e-6)  # fmt: skip


# Evaluation


@pytest.mark.parametrize("classes", [0, 5])
def test_an_evaluation_compares_student_and_teacher_on_the_images_that_count(classes):
    student, teacher = (tiny_network(classes, layers=n, scan_layers=False) for n in (1, 2))
    params, theirs = random_params(student), random_params(teacher, 1)
    batches = [random_batch(student, seed=seed) for seed in (0, 1)]
    metric = distillation.make_metric(student, (teacher,), {"teachers": (theirs,)})
    found = metric.measure(params, iter(batches))
    plain = [step.make_metric(n).measure(p, iter(batches))
             for n, p in ((student, params), (teacher, theirs))]  # fmt: skip
    names = ["accuracy", "class_nats"] if classes else ["nats_per_token"]
    for name, (own, other) in itertools.product(names, [plain]):
        assert found[name] == pytest.approx(own[name], rel=1e-5)
        assert found[f"teacher_{name}"] == pytest.approx(other[name], rel=1e-5)
    rows = []
    for batch in map(sharding.global_batch, batches):
        outputs = [n.bind(p)(batch["tokens"], batch["variant"])
                   for n, p in ((student, params), (teacher, theirs))]  # fmt: skip
        a, b = (log_softmax(o.class_logits if classes else o.logits) for o in outputs)
        kl, same = (np.exp(b) * (b - a)).sum(axis=-1), a.argmax(axis=-1) == b.argmax(axis=-1)
        kl, same = (x.reshape(8, -1).mean(axis=1)[:7] for x in (kl, same))  # one row is masked
        rows.append([kl, same])
    kl, same = np.concatenate(rows, axis=1)
    assert found["kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert found["agreement"] == pytest.approx(same.mean(), abs=1e-6)
    itself = distillation.make_metric(student, (student,), {"teachers": (params,)})
    assert itself.measure(params, iter(batches))["agreement"] == 1


def test_votes_make_one_class_of_the_student_and_of_the_teacher_as_in_every_evaluation():
    bert = {"objective": "bert", "masked_share": 0.6, "votes": 3, "scan_layers": False}
    names = {"index": np.arange(8, dtype=np.int32)}
    student, teacher = (tiny_network(5, layers=n, **bert) for n in (1, 2))
    batches = [random_batch(student, seed=seed) | names for seed in range(8)]

    def weights(network, seed):
        """Random weights whose classes have a mean logit of 0, so that votes differ."""
        params = random_params(network, seed)
        each = map(sharding.global_batch, batches)
        logits = [objective.evaluate_batch(network, params, b)[0].class_logits for b in each]
        head = params["classifier"]
        scaled = np.asarray(head["class_scale"]) * np.asarray(head["class_head"])
        shift = np.mean(logits, axis=(0, 1)) @ np.linalg.pinv(scaled.T)
        return params | {"classifier": head | {"class_center": head["class_center"] + shift}}

    params, theirs = weights(student, 0), weights(teacher, 1)
    metric = distillation.make_metric(student, (teacher,), {"teachers": (theirs,)})
    found = metric.measure(params, iter(batches))
    for beginning, network, given in (("", student, params), ("teacher_", teacher, theirs)):
        own = step.make_metric(network).measure(given, iter(batches))
        for name in ("accuracy", "class_nats"):
            assert found[f"{beginning}{name}"] == pytest.approx(own[name], rel=1e-5)


# The training

TRAINED = config_lib.Config(
    model=config_lib.Model(layers=1, width=16, heads=2),
    train=config_lib.Train(steps=4, batch_size=8, microbatches=2, ema=0.5),
    distill=Distill(teacher=("large",), features=1.0),
)
TEACHER = dataclasses.replace(TRAINED, model=config_lib.Model(layers=2, width=32, heads=4))


def test_only_student_and_map_are_trained_and_the_map_stays_beside_the_student():
    teacher = Pretraining(TEACHER, ()).network
    training = Pretraining(TRAINED, (teacher,))
    weights = random_params(teacher, 1)
    before = jax.device_get(weights)
    state = jax.jit(training.init)(jax.random.key(0))
    plain = jax.jit(Pretraining(TRAINED, ()).init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state["params"], plain["params"])
    names = set(sharding.by_name(state))
    maps = {n for n in names if n.startswith(step.BESIDE)}
    assert maps == {"beside.feature_maps.0.feature_map"}
    for part in ("params", "ema"):
        assert state[part].keys() == plain[part].keys()
    assert not [name for name in names if "teacher" in name]
    first, batch = jax.device_get(state), on_mesh(training.network)
    state, metrics = training.train_step(state, batch, {"teachers": (weights,)})
    for part in ("params", step.BESIDE):
        moved = jax.tree.map(lambda a, b: np.any(a != np.asarray(b)), first[part], state[part])
        assert any(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(weights))
    assert {"kl", "nats_per_token", "loss", "feature_distance"} <= metrics.keys()
    assert jax.tree.structure(jax.device_get(state)) == jax.tree.structure(first)


# Plans


def test_a_plan_counts_weights_and_forward_pass_of_the_teachers():
    gpu, teacher = topology.parse("gpu:4xh100"), Pretraining(TEACHER, ()).network
    config = dataclasses.replace(TRAINED, mesh=config_lib.Mesh(data=2, fsdp=2))
    with_one, alone = (
        plan.make(Pretraining(config, each), gpu, compiling=False) for each in ((teacher,), ())
    )
    params = sharding.abstract(teacher.init)
    assert with_one.memory.teachers > 4 * sum(x.size for x in jax.tree.leaves(params)) / 2 * 0.9
    assert with_one.numbers()["bytes"]["teachers"] == with_one.memory.teachers
    assert "teachers" not in alone.numbers()["bytes"]
    assert with_one.bytes_per_device > alone.bytes_per_device + with_one.memory.teachers * 0.9
    tokens = 64 * 8
    assert with_one.flops_per_step - alone.flops_per_step == flops.forward(teacher).total * tokens
    assert with_one.executed > alone.executed and with_one.params == alone.params
    three = dataclasses.replace(TEACHER, model=config_lib.Model(layers=1, width=30, heads=3))
    odd = dataclasses.replace(config, mesh=config_lib.Mesh(data=2, tensor=2))
    with pytest.raises(InputError, match=r"config\.model\.heads is 3"):
        plan.make(Pretraining(odd, (Pretraining(three, ()).network,)), gpu, compiling=False)
