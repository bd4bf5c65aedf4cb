"""The real command: what it leaves in a run folder, what survives a kill, what bad input gets."""

import collections
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from conftest import SMALL, Ended, small_arguments
from PIL import Image

import gptv_jax

pytestmark = pytest.mark.process

PROMISED = {
    "model/params",
    "pretrain/steps",
    "pretrain/test_nats_per_token",
    "pretrain/test_bits_per_token",
    "pretrain/train_tokens_per_second",
    "pretrain/mfu",
    "probe/best_layer",
    "probe/test_accuracy",
    "probe/raw_pixels_test_accuracy",
    "probe/random_init_test_accuracy",
    "finetune/test_accuracy",
    "finetune/scratch_test_accuracy",
    "sample/tokens_per_second",
}
# These differ from run to run.
TIMES = {"time", "tokens_per_second", "data_wait_share", "mfu", "goodput", "restarts"}
TIMES |= {"steps_redone", "seconds_lost", "seconds_up", "seconds_down"}


def read_events(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(numbers: dict) -> dict:
    return {k: v for k, v in numbers.items() if not any(k.endswith(t) for t in TIMES)}


def checkpointed(folder: pathlib.Path, training: str) -> list[int]:
    """Steps of a training's whole checkpoints."""
    found = (folder / "checkpoints" / training).glob("*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


def assert_same_weights(folder: pathlib.Path, wanted: pathlib.Path, *stages: str) -> None:
    for stage in stages or ("pretrain", "finetune"):
        found = jax.device_get(gptv_jax.load(folder, stage).params)
        jax.tree.map(
            np.testing.assert_array_equal,
            found,
            jax.device_get(gptv_jax.load(wanted, stage).params),
        )


# What a finished run leaves.


def test_summary_holds_the_promised_numbers_and_is_printed(finished_run):
    summary = finished_run.summary
    assert set(summary) >= PROMISED
    assert summary == json.loads(finished_run.output)
    assert summary["pretrain/steps"] == SMALL["train.steps"]
    assert 0 < summary["pretrain/test_nats_per_token"] < np.log(17)  # better than uniform
    for name, value in summary.items():
        assert value is None or np.isfinite(value), name
        assert not name.endswith("accuracy") or 0 <= value <= 1, name


def test_config_json_holds_every_field_and_the_versions(finished_run):
    record = json.loads((finished_run.folder / "config.json").read_text())
    assert {"python", "jax", "flax", "optax", "gptv_jax"} <= set(record["versions"])
    assert record["config"]["model.width"] == 16
    assert record["config"]["seed"] == 0


def test_probe_lists_every_layer(finished_run):
    rows = json.loads((finished_run.folder / "probe" / "layers.json").read_text())
    assert [row["layer"] for row in rows] == [0, 1]
    for row in rows:
        assert 0 <= row["validation_accuracy"] <= 1
        assert 0 <= row["test_accuracy"] <= 1
    best = rows[finished_run.summary["probe/best_layer"]]
    assert best["validation_accuracy"] == max(row["validation_accuracy"] for row in rows)
    assert best["test_accuracy"] == finished_run.summary["probe/test_accuracy"]


@pytest.mark.parametrize(
    ("name", "images"), [("unconditional", SMALL["sample.count"]), ("completions", 8)]
)
def test_samples_are_pictures_large_enough_to_see(finished_run, name, images):
    with Image.open(finished_run.folder / "samples" / f"{name}.png") as picture:
        picture.load()
        assert picture.mode == "RGB"
        assert picture.width * picture.height >= images * 64**2
        assert len(np.unique(np.asarray(picture))) > 5  # grey levels, not a blank sheet


def test_metrics_have_every_event_once_in_order(finished_run):
    steps = collections.defaultdict(list)
    for event in read_events(finished_run.folder):
        assert {"stage", "step", "time"} < set(event)
        kind = "validation" if "validation_nats_per_token" in event else "training"
        steps[event["stage"], kind].append(event["step"])
    assert steps["pretrain", "training"] == list(range(10, 121, 10))
    assert steps["pretrain", "validation"] == list(range(0, 121, 40))
    for stage in ("finetune", "finetune_scratch"):
        assert steps[stage, "training"] == [4, 8, 12]
        assert steps[stage, "validation"] == [0, 4, 8, 12]


def test_tensorboard_holds_the_same_events(finished_run):
    from tensorboard.backend.event_processing import event_accumulator

    board = event_accumulator.EventAccumulator(str(finished_run.folder / "tensorboard/pretrain"))
    board.Reload()
    shown = {s.step: s.value for s in board.Scalars("pretrain/nats_per_token")}
    logged = {
        e["step"]: e["nats_per_token"]
        for e in read_events(finished_run.folder)
        if e["stage"] == "pretrain" and "nats_per_token" in e
    }
    assert shown == pytest.approx(logged)


def test_report_is_one_page_that_needs_no_network(finished_run):
    page = (finished_run.folder / "report.html").read_text()
    assert re.findall(r"""(?:https?:)?//[\w.-]+""", re.sub(r"base64,[\w+/=]+", "", page)) == []
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", page) == []
    accuracy = f"{100 * finished_run.summary['finetune/test_accuracy']:.2f}%"
    assert accuracy in page
    captions = [
        "Pretraining. The training loss",
        "Fine-tuning. Ringed",
        "Layer 0 is the embeddings",
    ]
    captions += [
        "New images, drawn at temperature 1",
        "Test images, each followed by its completion",
    ]
    for caption in captions:
        assert page.count(f"<figcaption>{caption}") == 1, caption


def test_no_other_framework_is_imported(finished_run):
    imported = set(re.findall(r"^import time:.*\| *([\w.]+)$", finished_run.errors, re.MULTILINE))
    tops = {name.split(".")[0] for name in imported}  # failed attempts are listed too
    # A module that is imported lazily is not listed itself, but the modules are that it imports.
    assert "jaxlib" in tops
    assert not tops & {"tensorflow", "keras", "transformers"}
    # tensorboardX tries torch when it is imported, where it is installed; nobody else may.
    attempts = re.findall(r"^import time:.*\| *torch$", finished_run.errors, re.MULTILINE)
    assert len(attempts) <= ("tensorboardX" in tops)


# Kills.


def test_an_interrupt_ends_with_a_sentence(start, tmp_path):
    folder = tmp_path / "run"
    process = start("main", *small_arguments(folder, "--config.train.steps=1000000"))
    while not checkpointed(folder, "pretrain") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "the same command continues" in process.errors.splitlines()[-1]
    assert not (folder / "summary.json").exists()


@pytest.fixture
def main(command):
    """`main(*arguments, devices=1)` runs the command of that name."""
    return functools.partial(command, "main")


@pytest.fixture
def copied_run(finished_run, tmp_path) -> pathlib.Path:
    """A copy of the finished run, to do harm to."""
    return shutil.copytree(finished_run.folder, tmp_path / "copy")


def digest(folder: pathlib.Path) -> dict[str, str]:
    """Hashes of all files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def assert_refused(ended: Ended, *parts: str) -> None:
    """It failed with one sentence, at the end of stderr, that holds all of `parts`."""
    assert ended.code not in (0, None), ended
    assert "Traceback" not in ended.errors, ended.errors
    assert ended.output == ""
    *log, sentence = ended.errors.strip().splitlines()
    assert sentence.startswith("error: ") and not any("error:" in line for line in log), log
    assert len(sentence) <= 300, sentence
    for part in parts:
        assert part in sentence, sentence


def test_a_finished_run_prints_its_summary_again_and_changes_no_number(main, copied_run):
    before = digest(copied_run)
    ended = main(*small_arguments(copied_run))
    assert ended.code == 0, ended.errors
    assert json.loads(ended.output) == json.loads((copied_run / "summary.json").read_text())
    after = digest(copied_run)
    for name in ("report.html", "probe/layers.png"):  # made anew, with the date
        del before[name], after[name]
    assert after == before


# name: (arguments, number of devices, what the message must say)
REFUSED = {
    "unknown field": (["--config.model.depth=3"], 1, ["config.model.depth", "model.layers"]),
    "misspelt field": (["--config.train.step=3"], 1, ["config.train.step ", "config.train.steps"]),
    "unknown section": (["--config.training.steps=3"], 1, ["config.training.steps"]),
    "word for a number": (
        ["--config.train.steps=many"],
        1,
        ["config.train.steps", "many", "int"],
    ),
    "fraction for a whole number": (["--config.train.steps=1.5"], 1, ["config.train.steps", "1.5"]),
    "word for a fraction": (
        ["--config.train.optimizer.learning_rate=fast"],
        1,
        ["config.train.optimizer.learning_rate", "fast"],
    ),
    "word for a truth": (["--config.model.scan_layers=maybe"], 1, ["model.scan_layers", "maybe"]),
    "list with a word": (["--config.probe.c=(1.0,'x')"], 1, ["config.probe.c", "x"]),
    "value out of range": (["--config.model.dropout=1.5"], 1, ["config.model.dropout", "1.5"]),
    "no steps": (["--config.train.steps=0"], 1, ["config.train.steps", "0", "1 or more"]),
    "learning rate of nan": (
        ["--config.train.optimizer.learning_rate=nan"],
        1,
        ["config.train.optimizer.learning_rate", "nan"],
    ),
    "heads that do not divide the width": (
        ["--config.model.heads=3"],
        1,
        ["model.heads", "3", "16"],
    ),
    "unknown optimizer": (
        ["--config.train.optimizer.name=lion"],
        1,
        ["config.train.optimizer.name", "lion", "muon"],
    ),
    "unknown data set": (["--config.data.name=mnis"], 1, ["config.data.name", "mnis", "digits"]),
    "unprepared data set": (
        ["--config.data.name=mnist", "--config.data.dir=/nowhere"],
        1,
        ["mnist", "tfds build mnist --file_format=array_record --data_dir=/nowhere"],
    ),
    "unknown split": (
        ["--config.data.validation_split=val"],
        1,
        ["val", "train (1,197 images), validation (200 images), test (400 images)"],
    ),
    "random evaluation": (
        ["--config.data.eval_transforms=('flip()',)"],
        1,
        ["config.data.eval_transforms", "flip()", "random"],
    ),
    "palette of grey images": (["--config.tokens.kind=palette"], 1, ["palette", "RGB", "grey"]),
    "missing path": (["--config.data.name=folder"], 1, ["config.data.path"]),
    "other image size": (["--config.data.image_size=16"], 1, ["config.data.image_size", "16", "8"]),
    "unknown tokens": (["--config.tokens.kind=rgb"], 1, ["config.tokens.kind", "rgb", "grey"]),
    "too few grey levels": (["--config.tokens.levels=16"], 1, ["config.tokens", "16", "0 to 15"]),
    "unknown augmentation": (
        ["--config.data.train_transforms=('mirror()',)"],
        1,
        ["transforms", "mirror()", "flip("],
    ),
    "unknown argument of an augmentation": (
        ["--config.data.train_transforms=('shift(pixel=1)',)"],
        1,
        ["transforms", "shift(pixel=1)", "pixels"],
    ),
    "mesh that does not divide the devices": (
        ["--config.mesh.fsdp=3"],
        2,
        ["config.mesh.fsdp", "3", "devices", "2"],
    ),
    "mesh larger than the devices": (
        ["--config.mesh.data=4"],
        2,
        ["config.mesh.data", "4", "devices", "2"],
    ),
    "two axes that fill": (["--config.mesh.fsdp=-1"], 2, ["config.mesh", "-1"]),
    "batch that the mesh does not divide": (
        ["--config.train.batch_size=15"],
        2,
        ["config.train.batch_size", "15", "2"],
    ),
    "fine-tuning batch that the mesh does not divide": (
        ["--config.finetune.train.batch_size=15"],
        2,
        ["config.finetune.train.batch_size", "15", "2"],
    ),
    "microbatches that do not divide the batch": (
        ["--config.train.microbatches=3"],
        1,
        ["config.train.microbatches", "3", "16"],
    ),
    "heads that the mesh does not divide": (
        ["--config.mesh.tensor=3"],
        3,
        ["config.model.heads", "2", "mesh.tensor", "3"],
    ),
    "unknown stage": (["--stages=pretrain,prob"], 1, ["--stages", "prob", "probe"]),
    "unknown flag": (["--stage=probe"], 1, ["stage", "stages"]),
    "stray argument": (["train.steps=3"], 1, ["train.steps=3"]),
    "weights from nowhere": (["--config.init_from=/nowhere"], 1, ["config.init_from", "/nowhere"]),
    "probe before pretraining": (["--stages=probe"], 1, ["pretrain"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_in_one_sentence(main, tmp_path, case):
    arguments, devices, parts = REFUSED[case]
    assert_refused(main(*small_arguments(tmp_path / "run"), *arguments, devices=devices), *parts)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("flag", ["config", "workdir"])
def test_a_missing_flag_is_named(main, tmp_path, flag):
    arguments = [a for a in small_arguments(tmp_path) if not a.startswith(f"--{flag}=")]
    if flag == "config":
        arguments = [f"--workdir={tmp_path}"]
    assert_refused(main(*arguments), f"--{flag}")


def test_a_config_file_that_cannot_be_read_is_named(main, tmp_path):
    missing, broken, other = (tmp_path / f"{n}.py" for n in ("missing", "broken", "other"))
    broken.write_text("def get_config(:\n")
    other.write_text("import gptv_jax.nothing\n")
    for path, reason in ((missing, "no file"), (broken, "syntax"), (other, "gptv_jax.nothing")):
        assert_refused(main(f"--config={path}", f"--workdir={tmp_path}"), str(path), reason)


def test_a_folder_that_cannot_be_written_is_named(main, tmp_path):
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        assert_refused(main(*small_arguments(folder)), "--workdir", str(folder))
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("flag", ["--workdir", "--config.init_from"])
def test_an_address_is_no_folder_of_a_run(main, tmp_path, flag):
    given = "gs://bucket/run"
    assert_refused(main(*small_arguments(tmp_path / "run"), f"{flag}={given}"), given)
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused_and_the_folder_left_alone(main, copied_run):
    before = digest(copied_run)
    changed = ["--config.model.width=32", "--config.train.steps=121", "--config.seed=1"]
    free = ["--config.train.log_every=3"]
    ended = main(*small_arguments(copied_run), *changed, *free)
    differing = ["model.width", "32", "16", "train.steps", "121", "120", "config.seed"]
    assert_refused(ended, str(copied_run), *differing)
    assert "log_every" not in ended.errors.splitlines()[-1]
    assert digest(copied_run) == before


def test_where_and_how_often_it_works_may_change(main, copied_run):
    free = ["mesh.fsdp=2", "data.workers=1", "train.log_every=7", "train.checkpoint_every=9"]
    free += ["train.keep_checkpoints=3", "model.scan_layers=True", "train.microbatches=2"]
    arguments = [f"--config.{setting}" for setting in free]
    ended = main(*small_arguments(copied_run), *arguments, devices=2)
    assert ended.code == 0, ended.errors
    assert json.loads(ended.output) == json.loads((copied_run / "summary.json").read_text())


NO_RECORD = {
    "config.json": ['{"config": {"se', "", "{}", "[]", "null", '{"config": 3}'],
    "summary.json": ['{"pretrain/st', "", "[]", "null"],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, c) for name, contents in NO_RECORD.items() for c in contents]
)
def test_a_damaged_record_is_named_and_nothing_is_changed(main, copied_run, name, content):
    (copied_run / name).write_text(content)
    before = digest(copied_run)
    assert_refused(main(*small_arguments(copied_run)), str(copied_run / name))
    assert digest(copied_run) == before


def test_weights_of_another_run_must_be_of_the_same_network(main, finished_run, tmp_path):
    given = [f"--config.init_from={finished_run.folder}", "--config.model.width=32"]
    ended = main(*small_arguments(tmp_path / "run"), *given, "--stages=finetune")
    assert_refused(ended, "config.init_from", "config.model.width is 32, expected 16")
    assert not (tmp_path / "run").exists()


def test_lower_layers_are_tuned_at_lower_rates(main, finished_run, tmp_path):
    given = [f"--config.init_from={finished_run.folder}", "--config.finetune.layer_decay=1e-4"]
    ended = main(*small_arguments(tmp_path / "run"), *given, "--stages=finetune")
    assert ended.code == 0, ended.errors
    tuned = gptv_jax.load(tmp_path / "run", "finetune").weights_file().params
    before = gptv_jax.load(finished_run.folder, "pretrain").weights_file().params
    moved = {name: np.abs(tuned[name] - before[name]).max() for name in before}
    assert moved["token_embedding"] < 1e-6 < moved["blocks.mlp_in"] < 1e-3 < moved["head"]
    freely = gptv_jax.load(finished_run.folder, "finetune").weights_file().params
    assert np.abs(freely["token_embedding"] - before["token_embedding"]).max() > 0.01


def test_weights_of_another_run_are_tuned_and_beside_them_fresh_ones(main, finished_run, tmp_path):
    given = [f"--config.init_from={finished_run.folder}", "--config.probe.c=(0.1,)"]
    still = ["steps=1", "eval_every=0", "optimizer.learning_rate=1e-30"]
    folder, tuning = tmp_path / "run", [f"--config.finetune.train.{setting}" for setting in still]
    ended = main(*small_arguments(folder), *given, *tuning)
    assert ended.code == 0, ended.errors
    assert not (folder / "checkpoints" / "pretrain").exists()
    summary = json.loads(ended.output)
    assert summary["probe/best_layer"] in (0, 1) and "pretrain/steps" not in summary
    assert summary["finetune/scratch_test_nats_per_token"] == pytest.approx(np.log(17))  # fresh
    found = gptv_jax.load(folder, "finetune").params
    wanted = gptv_jax.load(finished_run.folder, "pretrain").params
    without_head = {name: found[name] for name in wanted}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-20), without_head, wanted)


def test_a_run_goes_on_from_exported_weights_as_from_the_run(main, finished_run, tmp_path):
    weights = tmp_path / "weights.safetensors"
    gptv_jax.load(finished_run.folder, stage="pretrain").save(weights)
    ended = main(*small_arguments(tmp_path / "run"), f"--config.init_from={weights}")
    assert ended.code == 0, ended.errors
    wanted = {k: v for k, v in finished_run.summary.items() if not k.startswith(("pret", "model"))}
    assert without_times(json.loads(ended.output)) == without_times(wanted)
    assert_same_weights(tmp_path / "run", finished_run.folder, "finetune")


def test_a_run_goes_on_from_hugging_faces_weights(main, finished_run, tmp_path):
    model = gptv_jax.load(finished_run.folder, stage="pretrain")
    gptv_jax.to_huggingface(model, tmp_path / "hf")
    given = [*small_arguments(tmp_path / "run"), f"--config.init_from={tmp_path / 'hf'}"]
    # Which sums the tables of positions, and has one start vector.
    fitting = ["--config.model.axial_positions=False", "--config.model.start_per_variant=False"]
    ended = main(*given)
    assert_refused(
        ended, "model.axial_positions is True, expected False", "(start vectors) is 9, expected 1"
    )
    assert not (tmp_path / "run").exists()
    ended = main(*given, *fitting)
    assert ended.code == 0, ended.errors
    summary = json.loads(ended.output)
    for name in ("probe/test_accuracy", "probe/raw_pixels_test_accuracy"):
        assert summary[name] == pytest.approx(finished_run.summary[name], abs=0.01)  # to rounding
    assert summary["finetune/test_accuracy"] > summary["finetune/scratch_test_accuracy"] - 0.2
    assert (tmp_path / "run" / "samples" / "completions.png").exists()


def test_a_bert_run_hides_probes_and_tunes_but_draws_nothing(main, tmp_path):
    bert = ["--config.model.objective=bert", "--config.model.start_per_variant=False"]
    seldom = ["--config.train.checkpoint_every=60", "--config.train.eval_every=60"]
    arguments = [*small_arguments(tmp_path / "run"), *bert, *seldom]
    assert_refused(main(*arguments, "--stages=sample"), "sample", "objective=bert")
    ended = main(*arguments)
    assert ended.code == 0, ended.errors
    summary = json.loads(ended.output)
    assert summary["pretrain/test_nats_per_token"] < 2.4  # ln 17 is 2.83
    assert summary["probe/test_accuracy"] > 0.2 and "finetune/test_accuracy" in summary
    assert summary["pretrain/test_bits_per_dimension"] is None  # which hidden tokens do not tell
    assert not any(name.startswith("sample/") for name in summary)
    model = gptv_jax.load(tmp_path / "run")
    images = np.zeros((2, 8, 8, 1), np.uint8)
    assert model.classify(images).shape == (2, 10)
    for call in (model.log_likelihood, model.complete, lambda _: model.sample(1)):
        with pytest.raises(ValueError, match="objective bert cannot"):
            call(images)


def test_a_training_that_diverges_ends_with_one_sentence(main, tmp_path):
    rate = "--config.train.optimizer.rest_learning_rate=1e30"
    ended = main(
        *small_arguments(tmp_path / "run"), rate, "--config.train.optimizer.warmup_steps=0"
    )
    assert_refused(ended, "pretrain", "step 1:", "step 0", "learning_rate")
    assert checkpointed(tmp_path / "run", "pretrain") == [0]


def test_a_stage_that_cannot_run_claims_no_folder(main, tmp_path):
    ended = main(*small_arguments(tmp_path / "run"), "--stages=probe")
    assert_refused(ended, "holds no finished pretraining")
    assert not (tmp_path / "run").exists()


def test_pretrained_weights_that_are_gone_are_named(main, copied_run, finished_run):
    kept = {k: v for k, v in finished_run.summary.items() if k.startswith(("pretrain", "model"))}
    (copied_run / "summary.json").write_text(json.dumps(kept))
    shutil.rmtree(copied_run / "checkpoints")
    ended = main(*small_arguments(copied_run), "--stages=probe")
    assert_refused(ended, str(copied_run / "checkpoints" / "pretrain"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(main, copied_run, finished_run):
    (copied_run / "summary.json").unlink()
    *_, before, newest = checkpointed(copied_run, "pretrain")
    largest = max((copied_run / f"checkpoints/pretrain/{newest}").rglob("*"), key=os.path.getsize)
    largest.write_bytes(largest.read_bytes()[: os.path.getsize(largest) // 2])
    ended = main(*small_arguments(copied_run), "--stages=pretrain")
    assert ended.code == 0, ended.errors
    [warning] = [line for line in ended.errors.splitlines() if "is damaged" in line]
    assert f"checkpoints/pretrain/{newest} is damaged" in warning
    assert f"step {before}" in warning
    pretrained = {
        k: v for k, v in finished_run.summary.items() if k.startswith(("pret", "model", "data"))
    }
    assert without_times(json.loads(ended.output)) == without_times(pretrained)
    wanted = [e for e in read_events(finished_run.folder) if e["stage"] == "pretrain"]
    found = [e for e in read_events(copied_run) if e["stage"] == "pretrain"]
    assert [without_times(e) for e in found] == [without_times(e) for e in wanted]
