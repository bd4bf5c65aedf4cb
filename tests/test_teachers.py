"""Which teachers a stage takes, and that a stage goes on with the teachers it began with."""

import dataclasses
import itertools
import json

import jax
import pytest
from conftest import make_mesh, random_params, tiny_network
from test_distillation_run import (
    CONFIG,
    StopError,
    distilled,
    matched,
    summary,
    weights_file,
)

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.errors import InputError
from gptv_jax.stages import setup
from gptv_jax.stages.select import choose_stages

COLOURS = ("decode(channels=3, maximum=16)",)
ORDERS = {"rotary": True, "random_order": (0.5, 1.0)}


def changed(**sections) -> config_lib.Config:
    """CONFIG with other fields of its sections."""
    made = {n: dataclasses.replace(getattr(CONFIG, n), **each) for n, each in sections.items()}
    return dataclasses.replace(CONFIG, **made)


def open_and_close(config, folder, stages) -> None:
    """What a start of a run does before any stage."""
    context = setup.open_run(config, str(folder), stages)
    context.log.close()
    context.folder.release()


# Which teachers are taken


def test_grey_levels_do_not_teach_colours_or_codes_that_are_not_made_yet(tmp_path):
    data = {"train_transforms": COLOURS, "eval_transforms": COLOURS}
    palette = changed(data=data, tokens={"kind": "palette", "colors": 17})
    coder = config_lib.Autoencoder(widths=(8,), levels=(4, 4), downsample=4)
    learned = changed(data=data, tokens={"kind": "learned", "autoencoder": coder})
    for config, given in ((palette, {}), (learned, {"levels": 16, "image_size": 2})):
        kind = config.tokens.kind
        name = weights_file(tmp_path / "grey.safetensors", **given)
        with pytest.raises(InputError, match=f"{name} has kind of tokens grey, not {kind}; a"):
            open_and_close(distilled(name, config=config), tmp_path / kind, ["pretrain"])
        assert not (tmp_path / kind).exists()


def test_a_student_whose_teacher_is_to_bring_the_tokenizer_trains_none():
    config = changed(tokens={"kind": "learned"})
    held = ["image", "label"]
    assert "tokenizer" in choose_stages(config, held)
    for taught in (distilled("a", config=config), matched("a", config=config)):
        assert "tokenizer" not in choose_stages(taught, held)
        with pytest.raises(InputError, match="leave the stage tokenizer out"):
            choose_stages(taught, held, ["tokenizer", "pretrain", "finetune"])
    # Without fine-tuning no teacher of classes is read.
    assert "tokenizer" in choose_stages(taught, held, ["tokenizer", "pretrain"])


def test_a_classifier_in_raster_order_teaches_the_classes_of_a_student_with_random_orders(tmp_path):
    config = changed(model=ORDERS)
    plain = weights_file(tmp_path / "plain.safetensors")
    classifier = weights_file(tmp_path / "classifier.safetensors", classes=10)
    with pytest.raises(InputError, match="has read images in raster order alone"):
        open_and_close(distilled(plain, config=config), tmp_path / "one", ["pretrain"])
    taught = matched(classifier, config=config)
    open_and_close(taught, tmp_path / "other", ["pretrain", "finetune"])


def test_a_teacher_of_other_shifts_is_refused(tmp_path):
    shifts = {1: ("shift(pixels=1)",), 2: ("shift(pixels=2)",), 0: ()}
    given = {"classes": 10, "starts": 9, "start_per_variant": True}
    name = weights_file(tmp_path / "shifts.safetensors", **given)
    words = "make 25 variants of an image, but .* has start vectors for 9, which are other shifts"
    for pixels in (0, 1):
        config = changed(data={"train_transforms": shifts[pixels]})
        open_and_close(distilled(name, config=config), tmp_path / str(pixels), ["pretrain"])
    wider = changed(data={"train_transforms": shifts[2]})
    with pytest.raises(InputError, match=rf"config\.data\.train_transforms {words}"):
        open_and_close(distilled(name, config=wider), tmp_path / "refused", ["pretrain"])
    tuned = changed(finetune={"train_transforms": shifts[2]})
    with pytest.raises(InputError, match=rf"config\.finetune\.train_transforms {words}"):
        stages = ["pretrain", "finetune"]
        open_and_close(matched(name, config=tuned), tmp_path / "refused", stages)
    assert not (tmp_path / "refused").exists()
    # A teacher with one start vector, and one of classes, are told of no shift.
    for number, more in enumerate(({}, {"starts": 11, "class_tokens": 10})):
        plain = weights_file(tmp_path / f"{number}.safetensors", **more)
        open_and_close(distilled(plain, config=wider), tmp_path / f"taken {number}", ["pretrain"])


# A stage goes on with its teachers


def test_the_digest_of_weights_is_of_the_weights_and_of_no_mesh():
    found = {}
    for shape in ((1, 1, 1), (1, 2, 2)):
        with jax.set_mesh(make_mesh(shape)):
            params = [random_params(tiny_network(), seed) for seed in (0, 1)]
            found[shape] = [sharding.hash_params(each) for each in params]
    one, other = found.values()
    assert one == other and one[0] != one[1]


def train_until(config, folder, stages, number, at, monkeypatch) -> None:
    """A run that ends at a batch of the training `number` of those that it begins."""
    read, begun = Pipeline.train, itertools.count(1)

    def batches(*arguments, **more):
        given = read(*arguments, **more)
        yield from itertools.islice(given, at - 1) if next(begun) == number else given
        raise StopError

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(Pipeline, "train", batches)
        gptv_jax.train(config, folder, stages)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_stage_that_began_with_other_teachers_is_refused(stage, tmp_path, monkeypatch):
    path, run, stages = tmp_path / "teacher.safetensors", tmp_path / "run", ["pretrain"]
    given, taught = {}, distilled
    if stage == "finetune":
        given, taught, stages = {"classes": 10}, matched, ["pretrain", "finetune"]
    config = taught(weights_file(path, **given))
    kept = path.read_bytes()
    # Before the first step nothing has been learned, and another teacher may come.
    weights_file(path, seed=1, **given)
    train_until(config, run, stages, len(stages), 1, monkeypatch)
    path.write_bytes(kept)
    train_until(config, run, stages, 1, 4, monkeypatch)
    recorded = json.loads((run / "config.json").read_text())["teachers"]
    assert [*recorded] == [stage]
    weights_file(path, seed=1, **given)
    with pytest.raises(InputError, match=rf"begun the stage {stage} with other teachers than .*\."):
        gptv_jax.train(config, run, stages)
    path.write_bytes(kept)
    gptv_jax.train(config, run, stages)
    found = summary(run)
    assert f"{stage}/test_kl" in found
    # A stage that has finished needs its teachers no more.
    path.unlink()
    gptv_jax.train(config, run, stages)
    assert summary(run) == found
    # More steps are of the teachers of the first ones, or no number is moved away.
    weights_file(path, seed=1, **given)
    steps = dataclasses.replace(CONFIG.train, steps=6)
    longer = dataclasses.replace(config, train=steps)
    if stage == "finetune":
        finetune = dataclasses.replace(config.finetune, train=steps)
        longer = dataclasses.replace(config, finetune=finetune)
    with pytest.raises(InputError, match=f"has begun the stage {stage} with other teachers"):
        gptv_jax.train(longer, run, stages)
    assert summary(run) == found and not (run / "earlier").exists()
