"""Pretraining from a teacher's cached draws: checked before any work, and resumed bit for bit."""

import dataclasses
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from test_taught_cache import CONFIG, data_of, drawer, export, some_examples, write

from gptv_jax import config as config_lib
from gptv_jax import sharding, tokens, weights
from gptv_jax.data import pipeline
from gptv_jax.errors import InputError
from gptv_jax.planning.training import Pretraining
from gptv_jax.stages.run import run_stages
from gptv_jax.train import cached_distillation, step
from gptv_jax.train.optimizer import make_optimizer
from gptv_jax.weights import native

STEPS = 6


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A cache with the draws of a teacher of random weights, at temperature 1."""
    folder, codec = tmp_path_factory.mktemp("taught"), tokens.codec_of(CONFIG)
    teacher = export(folder / "teacher.safetensors", CONFIG, seed=3)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        write(folder / "cache", drawer(folder / "cache", teacher, codec), codec, some_examples(96))
    return folder / "cache"


def configured(taught, **changes) -> config_lib.Config:
    config = dataclasses.replace(
        CONFIG,
        data=data_of(taught),
        model=dataclasses.replace(CONFIG.model, dropout=0.1),
        distill=config_lib.Distill(cached=True, weight=0.5),
        train=config_lib.Train(
            steps=STEPS, batch_size=16, eval_every=3, checkpoint_every=2, log_every=1
        ),
    )
    return dataclasses.replace(config, **changes)


def weights_of(folder) -> dict[str, np.ndarray]:
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh())):
        found = sharding.by_name(native.read_run(folder, "pretrain")[1])
        return {name: np.asarray(leaf) for name, leaf in found.items()}


def test_a_run_that_is_interrupted_is_bit_for_bit_the_whole_run(taught, tmp_path, monkeypatch):
    config = configured(taught)
    whole = run_stages(config, str(tmp_path / "whole"), ["pretrain"])
    assert whole["pretrain/steps"] == STEPS

    train = pipeline.Pipeline.train
    for count in (1, 2):  # batches that a process reads before it ends
        with monkeypatch.context() as patch:

            def ended(*given, _count=count, **more):
                yield from itertools.islice(train(*given, **more), _count)
                raise KeyboardInterrupt

            patch.setattr(pipeline.Pipeline, "train", ended)
            with pytest.raises(KeyboardInterrupt):
                run_stages(config, str(tmp_path / "parts"), ["pretrain"])
    parts = run_stages(config, str(tmp_path / "parts"), ["pretrain"])
    key = "pretrain/test_nats_per_token"
    assert parts[key] == whole[key]
    jax.tree.map(
        np.testing.assert_array_equal, *(weights_of(tmp_path / n) for n in ("parts", "whole"))
    )


def test_a_run_goes_on_with_the_draws_it_began_with(taught, tmp_path, monkeypatch):
    codec, train, run = tokens.codec_of(CONFIG), pipeline.Pipeline.train, str(tmp_path / "run")
    other = export(tmp_path / "teacher.safetensors", CONFIG, seed=4)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        made = drawer(tmp_path / "other", other, codec)
        write(tmp_path / "other", made, codec, some_examples(96))
    write(tmp_path / "plain", None, codec, some_examples(96))
    moved = shutil.copytree(taught, tmp_path / "moved")

    def ended(*given, **more):
        yield from itertools.islice(train(*given, **more), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.Pipeline, "train", ended)
        run_stages(configured(taught), run, ["pretrain"])
    again = configured(taught, data=data_of(tmp_path / "other"))
    with pytest.raises(InputError, match=r"other teachers than config\.data\.path gives now"):
        run_stages(again, run, ["pretrain"])
    found = run_stages(configured(taught, data=data_of(moved)), run, ["pretrain"])
    assert found["pretrain/steps"] == STEPS
    # Pretraining that has finished needs no draws.
    for place in ("other", "plain"):
        data = data_of(tmp_path / place)
        assert run_stages(configured(taught, data=data), run, ["pretrain"]) == found


def test_a_student_of_the_draws_comes_nearer_to_its_teacher(taught, one_device):
    """With the teacher's loss alone, on batches of the pipeline."""
    config, codec = configured(taught), tokens.codec_of(CONFIG)
    settings = dataclasses.replace(config.distill, data_weight=0.0)
    network = Pretraining(config).network
    loss = cached_distillation.make_loss(network, settings)
    optimizer, rate = make_optimizer(config_lib.Optimizer(learning_rate=0.01), 40)
    train_step = step.make_train_step(loss, optimizer, rate)
    state = jax.jit(step.make_init(network, optimizer))(jax.random.key(0))
    batches, found = pipeline.Pipeline(config.data, codec, 0).train(16, taught=True), []
    for batch in itertools.islice(batches, 40):
        state, metrics = train_step(state, sharding.global_batch(batch))
        found.append(float(metrics["teacher_cross_entropy"]))
    assert found[0] == pytest.approx(np.log(17), abs=1e-5)  # a new network knows nothing
    teacher = weights.read(taught.parent / "teacher.safetensors")
    tokens_of = np.stack([each["tokens"] for each in some_examples(96)])
    read = teacher.network.bind(teacher.on_mesh())(jnp.asarray(tokens_of))
    log = jax.nn.log_softmax(read.logits)
    entropy = -(jnp.exp(log) * log).sum(axis=-1).mean()  # the least cross-entropy
    assert np.mean(found[-5:]) - entropy < (found[0] - entropy) / 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": {"temperature": 2.0}}, "temperature is 2, but the teachers of .* drew at 1"),
        ({"distill": {"teacher": ("a",)}}, "config.distill.teacher is .'a',., but .* take \\(\\)"),
        ({"distill": {"features": 1.0}}, "config.distill.features is 1.0, but .* take 0"),
        ({"distill": {"compare": True}}, "config.distill.compare is True, but .* take False"),
        ({"distill": {"weight": 0.0}}, "config.distill.weight is 0.0, but .* take 1"),
        ({"model": {"objective": "bert"}}, "config.model.objective is 'bert', but"),
        (
            {"model": {"random_order": (0.5, 0.9), "rotary": True}},
            "config.model.random_order is .*, but .* take \\(\\)",
        ),
        ({"data": {"train_transforms": ("flip()",)}}, "train_transforms has flip"),
        ({"data": {"name": "digits", "path": None}}, "config.data.name is 'digits', but"),
    ],
)
def test_what_the_draws_cannot_teach_is_refused_before_any_work(taught, tmp_path, changes, words):
    config = configured(taught)
    for section, given in changes.items():
        section = {section: dataclasses.replace(getattr(config, section), **given)}
        config = dataclasses.replace(config, **section)
    with pytest.raises(InputError, match=words):
        run_stages(config, str(tmp_path / "run"), ["pretrain"])
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_cache_without_draws_is_refused(taught, tmp_path):
    write(tmp_path / "plain", None, tokens.codec_of(CONFIG), some_examples(96))
    config = configured(taught, data=data_of(tmp_path / "plain"))
    with pytest.raises(InputError, match=r"has none; make a token cache by .* --teacher=RUN"):
        run_stages(config, str(tmp_path / "run"), ["pretrain"])


def test_a_plan_counts_the_draws_and_no_teacher(taught, tmp_path):
    plain = Pretraining(configured(taught, distill=config_lib.Distill()))
    training = Pretraining(configured(taught))
    assert training.flops.total == plain.flops.total and training.frozen() is None
    found = training.batch(16)
    assert found["teacher_ids"].shape == found["teacher_counts"].shape == (16, 64, 5)
    # Before the cache is made, as many ids as the command draws by default.
    later = Pretraining(configured(taught, data=data_of(tmp_path / "none")))
    assert later.batch(16)["teacher_ids"].shape == (16, 64, 32)
    mesh = sharding.make_mesh(config_lib.Mesh())
    with jax.set_mesh(mesh):
        assert training.lower(mesh) is not None
