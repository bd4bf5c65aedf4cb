"""What may change between two starts of a run: more steps, and settings that no work depends on."""

import dataclasses
import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.errors import InputError
from gptv_jax.runs.record import config_of
from gptv_jax.stages import pretrain, setup
from gptv_jax.stages.run import run_stages
from gptv_jax.train.metrics import MetricWriter

CONSTANT = config_lib.Optimizer(schedule="constant")
CONFIG = config_lib.Config(
    model=config_lib.Model(layers=1, width=16, heads=2, scan_layers=False, dropout=0.1),
    train=config_lib.Train(
        steps=4, batch_size=64, optimizer=CONSTANT, ema=0.5, checkpoint_every=2, log_every=1
    ),
    finetune=config_lib.Finetune(
        train=config_lib.Train(steps=2, batch_size=64, optimizer=CONSTANT, eval_every=1),
        scratch=False,
    ),
)
STAGES = ["pretrain", "finetune"]


def changed(config=CONFIG, **values) -> config_lib.Config:
    """The configuration with other values, by names such as train__steps."""
    for name, value in values.items():
        *sections, last = name.split("__")
        value = {last: value}
        for section in [*reversed(sections)]:
            inner = config
            for each in sections[: sections.index(section) + 1]:
                inner = getattr(inner, each)
            value = {section: dataclasses.replace(inner, **value)}
        config = dataclasses.replace(config, **value)
    return config


def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


def results(folder) -> dict:
    """The numbers that do not depend on the clock."""
    clock = ("tokens_per_second", "goodput", "restarts", "seconds", "mfu", "redone")
    return {k: v for k, v in summary(folder).items() if not any(word in k for word in clock)}


def same_weights(a, b, stage: str) -> None:
    pair = (gptv_jax.load(folder, stage).params for folder in (a, b))
    jax.tree.map(np.testing.assert_array_equal, *pair)


def same_files(a, b) -> None:
    found = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (a, b)]
    assert found[0] == found[1] != {}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A finished pretraining of 4 steps; to be copied."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    run_stages(CONFIG, str(folder), ["pretrain"])
    return folder


@pytest.fixture(scope="module")
def short(pretrained, tmp_path_factory):
    """A finished run of 4 steps, and 2 of fine-tuning; to be copied."""
    folder = shutil.copytree(pretrained, tmp_path_factory.mktemp("short") / "run")
    run_stages(CONFIG, str(folder), STAGES)
    return folder


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A run of 8 steps that never ended before; to be read only."""
    folder = tmp_path_factory.mktemp("long") / "run"
    run_stages(changed(train__steps=8), str(folder), STAGES)
    return folder


@pytest.fixture
def copied(short, tmp_path):
    return shutil.copytree(short, tmp_path / "run")


def test_a_finished_run_with_more_steps_becomes_the_longer_run_bit_for_bit(
    copied, short, long, caplog
):
    caplog.set_level(logging.INFO, logger="gptv_jax")
    before = summary(copied)
    run_stages(changed(train__steps=8), str(copied), STAGES)
    for stage in STAGES:  # the later stage has started from the new weights
        same_weights(copied, long, stage)
    assert results(copied) == results(long)
    assert summary(copied)["pretrain/restarts"] == 0
    assert "pretrain goes on from step 4 to 8, in place of 4; the learning rate" in caplog.text
    aside = copied / "checkpoints/earlier/pretrain-4"
    assert f"Checkpoints of finetune are moved to {aside}." in caplog.text
    assert "To be run again now: finetune." in caplog.text and (aside / "finetune/2").is_dir()
    same_files(copied / "earlier/pretrain-4/finetune", short / "finetune")
    assert "pretrain continues from step 4 of 8; 0 steps" in caplog.text
    record = json.loads((copied / "config.json").read_text())
    assert record["config"]["train.steps"] == 8
    assert [each["fields"] for each in record["changes"]] == [{"train.steps": [4, 8]}]
    # What belonged to the weights before is beside the run.
    assert json.loads((copied / "earlier/pretrain-4/summary.json").read_text()) == before
    logged = [e["step"] for e in MetricWriter(copied).read() if e["stage"] == "pretrain"]
    assert sorted({*logged}) == [*range(9)]
    # The same again changes nothing, and fewer steps than were taken are refused.
    numbers = summary(copied)
    run_stages(changed(train__steps=8), str(copied), STAGES)
    assert summary(copied) == numbers
    with pytest.raises(InputError, match=r"config\.train\.steps is 6, but .* has taken 8 steps"):
        run_stages(changed(train__steps=6), str(copied), STAGES)
    assert summary(copied) == numbers


def test_more_steps_of_fine_tuning_leave_pretraining_alone(copied, pretrained, tmp_path):
    config = changed(finetune__train__steps=4)
    run_stages(config, str(copied), STAGES)
    shutil.copytree(pretrained, tmp_path / "whole")
    run_stages(config, str(tmp_path / "whole"), STAGES)
    same_weights(copied, tmp_path / "whole", "finetune")
    assert not (copied / "earlier/finetune-2/pretrain").exists()
    assert results(copied) == results(tmp_path / "whole")


@pytest.mark.parametrize("stage", ["robustness", "typicality"])
def test_more_steps_of_fine_tuning_move_the_numbers_that_were_measured_of_it(copied, stage):
    numbers = summary(copied) | {f"{stage}/test_accuracy": 0.5}
    (copied / "summary.json").write_text(json.dumps(numbers))
    config = changed(finetune__train__steps=4)
    setup.open_run(config, str(copied), ["finetune"]).folder.release()
    assert not [name for name in summary(copied) if name.startswith((stage, "finetune"))]
    moved = json.loads((copied / "earlier/finetune-2/summary.json").read_text())
    assert moved[f"{stage}/test_accuracy"] == 0.5


def test_the_stage_that_takes_more_steps_must_be_among_the_stages(copied):
    before = summary(copied)
    with pytest.raises(InputError, match=r"config\.train\.steps was 4 and is 8 now.*name pretrain"):
        run_stages(changed(train__steps=8), str(copied), ["finetune"])
    assert summary(copied) == before


def test_later_stages_that_are_left_out_are_said_to_run_in_a_later_start(copied, caplog):
    caplog.set_level(logging.INFO, logger="gptv_jax")
    setup.open_run(changed(train__steps=8), str(copied), ["pretrain"]).folder.release()
    assert "To be run again where a later start's --stages allows it: finetune." in caplog.text
    assert "again now" not in caplog.text


@pytest.mark.process
def test_after_more_steps_no_file_of_the_weights_before_is_left(finished_run, tmp_path):
    folder = shutil.copytree(finished_run.folder, tmp_path / "run")
    files_of_run = {"config.json", "summary.json", "metrics.jsonl", "sessions.json", "report.html"}
    files_of_run |= {".lock", "tensorboard", "checkpoints"}
    before = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    of_stages = {p for p in before if p.parts[0] not in files_of_run}
    assert {"finetune", "probe", "samples"} <= {p.parts[0] for p in of_stages}
    config = config_of(folder)
    config = changed(config, train__steps=config.train.steps + 1)
    setup.open_run(config, str(folder), ["pretrain"]).folder.release()
    assert {p.name for p in folder.iterdir()} - {"samples"} == files_of_run | {"earlier"}
    assert not [p for p in folder.glob("samples/*")]
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"earlier", "pretrain"}
    aside = folder / "earlier" / f"pretrain-{config.train.steps - 1}"
    assert all((aside / path).is_file() for path in of_stages)


class KilledError(Exception):
    """Stands for a kill."""


def test_a_kill_while_a_run_is_extended_leaves_a_run_of_either_length(
    copied, short, tmp_path, monkeypatch
):
    extended, real, written = changed(train__steps=8), files.replace, []

    def opened(folder, die_at: int) -> None:
        """Extends the run, but dies before the file of this number is written."""
        written.clear()

        def write(path, content):
            written.append(path)
            if len(written) > die_at:
                raise KilledError
            real(path, content)

        with monkeypatch.context() as patched:
            patched.setattr(files, "replace", write)
            setup.open_run(extended, str(folder), STAGES).folder.release()

    def state(folder) -> tuple:
        paths = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_dir()}
        return results(folder), paths, MetricWriter(folder).read()

    whole = shutil.copytree(copied, tmp_path / "whole")
    opened(whole, 99)
    assert summary(whole) == {"data/skipped": 0} and not (whole / "checkpoints/finetune").exists()
    names = [path.name for path in written]
    until = names.index("config.json")
    assert names.index("summary.json") < until  # config.json is the last of the changes
    for number in range(until + 1):
        folder = shutil.copytree(copied, tmp_path / str(number))
        with pytest.raises(KilledError):
            opened(folder, number)
        assert json.loads((folder / "config.json").read_text())["config"]["train.steps"] == 4
        if number == until:  # the old command ends as before, and trains nothing that is there
            again = shutil.copytree(folder, tmp_path / "again")
            run_stages(CONFIG, str(again), STAGES)
            assert results(again) == results(short)
            same_weights(again, short, "finetune")
        opened(folder, 99)
        assert state(folder) == state(whole)


def test_settings_of_a_stage_that_has_not_begun_may_change(copied):
    with pytest.raises(InputError, match="finetune"):
        run_stages(changed(finetune__patience=7), str(copied), STAGES)
    probe = config_lib.Probe(c=(0.1,), refine=1, labels_per_class=(10_000,), draws=1)
    with pytest.raises(InputError, match="labels_per_class"):
        run_stages(dataclasses.replace(CONFIG, probe=probe), str(copied), ["probe"])
    fewer = dataclasses.replace(CONFIG, probe=dataclasses.replace(probe, labels_per_class=(2,)))
    setup.open_run(fewer, str(copied), ["probe"]).folder.release()
    assert config_of(copied).probe == fewer.probe
    (copied / "probe").mkdir(exist_ok=True)  # as of a stage that has begun
    with pytest.raises(InputError, match=r"probe\.draws is 2, expected 1"):
        both = dataclasses.replace(fewer.probe, draws=2)
        run_stages(dataclasses.replace(fewer, probe=both), str(copied), ["probe"])


# Pretraining that goes on from given weights.

COLORED = changed(
    tokens__kind="palette",
    tokens__colors=6,
    data__train_transforms=("decode(channels=3)",),
    data__eval_transforms=("decode(channels=3)",),
    model__dropout=0.0,
    train__steps=2,
    train__ema=None,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A run, and its weights as a file and as Hugging Face's folder."""
    place = tmp_path_factory.mktemp("weights")
    run_stages(COLORED, str(place / "run"), ["pretrain"])
    model = gptv_jax.load(place / "run")
    model.save(place / "weights.safetensors")
    gptv_jax.to_huggingface(model, place / "hf")
    return place


def evaluations(folder, stage: str) -> dict[int, float]:
    """Validation losses by step."""
    name, events = "validation_nats_per_token", MetricWriter(folder).read()
    return {e["step"]: e[name] for e in events if e["stage"] == stage and name in e}


@pytest.mark.parametrize("source", ["run", "weights.safetensors", "hf"])
def test_pretraining_goes_on_from_weights_and_later_stages_read_the_result(
    weights, tmp_path, source
):
    start = weights / source
    if start.is_file():
        start = pathlib.Path(shutil.copy(start, tmp_path))
    config = changed(COLORED, init_from=str(start), seed=1, model__dropout=0.1)
    before = summary(weights / "run")["pretrain/validation_nats_per_token"]
    run_stages(config, str(tmp_path / "run"), ["pretrain"])
    losses = evaluations(tmp_path / "run", "pretrain")
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert losses[2] < losses[0]
    assert summary(tmp_path / "run")["pretrain/init_from"] == str(start)
    if source == "run":  # later stages, with the same settings, read what this run has trained
        run_stages(config, str(tmp_path / "run"), ["finetune"])
        assert evaluations(tmp_path / "run", "finetune")[0] == pytest.approx(losses[2], rel=1e-5)
    if source == "weights.safetensors":  # which the run, once it has adapted them, needs no more
        start.unlink()
        setup.open_run(config, str(tmp_path / "run"), ["finetune"]).folder.release()
    after = gptv_jax.load(tmp_path / "run", "pretrain")
    assert after.codec.definition.equivalent(gptv_jax.load(weights / source).codec.definition)
    assert np.any(after.params["head"] != gptv_jax.load(weights / source).params["head"])


def test_adapting_counts_what_a_kill_left_of_results_of_the_given_weights(weights, tmp_path):
    config = changed(COLORED, init_from=str(weights / "run"))
    setup.open_run(config, str(tmp_path), ["finetune"]).folder.release()
    # Killed before its first step, and while the results of the stage sample were moved.
    shutil.copytree(weights / "run/checkpoints/pretrain/0", tmp_path / "checkpoints/finetune/0")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/unconditional.png").write_bytes(b"old")
    setup.open_run(config, str(tmp_path), ["pretrain", "finetune"]).folder.release()
    assert (tmp_path / "earlier/pretrain-0/samples/unconditional.png").read_bytes() == b"old"
    assert not (tmp_path / "checkpoints/finetune").exists()


def test_a_stage_without_a_mesh_names_the_call_that_sets_it(tmp_path):
    context = setup.open_run(CONFIG, str(tmp_path), ["pretrain"])
    with pytest.raises(InputError, match=r"jax\.set_mesh\(context\.mesh\).*gptv_jax\.train"):
        pretrain.run_stage(context)


def test_weights_without_classes_become_class_conditional(weights, tmp_path):
    config = changed(COLORED, init_from=str(weights / "run"), model__class_tokens=10)
    run_stages(config, str(tmp_path), ["pretrain"])
    before = summary(weights / "run")["pretrain/validation_nats_per_token"]
    assert evaluations(tmp_path, "pretrain")[0] == pytest.approx(before, rel=1e-5)
    assert len(gptv_jax.load(tmp_path).params["start"]) == 11
    with pytest.raises(InputError, match=r"model\.width is 32, expected 16"):
        wider = changed(config, model__width=32)
        run_stages(wider, str(tmp_path / "wider"), ["pretrain"])


def test_a_folder_without_work_takes_any_configuration_and_builds_its_palette_anew(
    weights, tmp_path, caplog
):
    caplog.set_level(logging.INFO, logger="gptv_jax")
    folder, first = tmp_path / "run", changed(COLORED, tokens__colors=4)
    setup.open_run(first, str(folder), ["pretrain"]).folder.release()
    # A training that diverges at its first step leaves the checkpoint before it.
    shutil.copytree(weights / "run/checkpoints/pretrain/0", folder / "checkpoints/pretrain/0")
    mended = changed(first, train__optimizer__learning_rate=1e-4, tokens__colors=6, seed=1)
    opened = setup.open_run(mended, str(folder), ["pretrain"])
    assert "held no work; it takes this configuration" in caplog.text
    assert not [*opened.folder.path.glob("checkpoints/*")] and not (folder / "dropped").exists()
    fresh = setup.open_run(mended, str(tmp_path / "fresh"), ["pretrain"])
    centers = [each.codec.definition.centers for each in (opened, fresh)]
    np.testing.assert_array_equal(*centers)
    assert config_of(folder) == mended
