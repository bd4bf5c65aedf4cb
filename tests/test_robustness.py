"""The stage robustness: a run's numbers, files and pictures, and what the stage refuses."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from conftest import scenes_config
from PIL import Image

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import weights
from gptv_jax.config import fields
from gptv_jax.data import cache, sources
from gptv_jax.errors import InputError
from gptv_jax.runs.record import config_of
from gptv_jax.stages import STAGES, setup
from gptv_jax.stages.finetuned import FineTuned
from gptv_jax.stages.run import run_stages
from gptv_jax.tokens import GreyCodec
from gptv_jax.weights import native

KINDS = ("noise", "shift")


def numbers(summary: dict) -> dict:
    prefix = "robustness/"
    return {n.removeprefix(prefix): x for n, x in summary.items() if n.startswith(prefix)}


def settings(folder, **changes) -> config_lib.Config:
    """The configuration of a run, with other settings of robustness."""
    config = config_of(folder)
    small = {"images": 60, "corruptions": KINDS, "attack_tokens": 0}
    return dataclasses.replace(config, robustness=config_lib.Robustness(**small | changes))


@pytest.fixture(scope="module")
def tuned(finished_run, tmp_path_factory):
    """A run whose fine-tuning learns more than that of the finished run; to be read only."""
    folder, config = tmp_path_factory.mktemp("tuned") / "run", config_of(finished_run.folder)
    optimizer = dataclasses.replace(config.finetune.train.optimizer, learning_rate=0.02)
    train = dataclasses.replace(
        config.finetune.train, steps=120, eval_every=40, checkpoint_every=120, optimizer=optimizer
    )
    finetune = dataclasses.replace(config.finetune, train=train, scratch=False)
    config = dataclasses.replace(config, finetune=finetune, init_from=str(finished_run.folder))
    assert run_stages(config, str(folder), ["finetune"])["finetune/test_accuracy"] > 0.4
    return folder


@pytest.fixture
def copied(tuned, tmp_path):
    return shutil.copytree(tuned, tmp_path / "run")


@pytest.mark.process
def test_the_command_measures_a_run_beside_its_export_and_reports_both(command, copied, tmp_path):
    gptv_jax.load(copied).save(tmp_path / "export.safetensors")
    flags = {
        "images": None,
        "corruptions": ("noise", "blur", "occlusion"),
        "compare": tmp_path / "export.safetensors",
        "attack_tokens": 3,
        "attack_calls": 40,
        "attack_images": 90,
    }
    given = [f"--config.robustness.{name}={value}" for name, value in flags.items()]
    arguments = [f"--config={copied}", f"--workdir={copied}", *given, "--stages=robustness"]
    ended = command("main", *arguments)
    assert ended.code == 0, ended.errors[-3000:]
    summary = json.loads(ended.output)
    found, clean = numbers(summary), summary["finetune/test_accuracy"]
    assert found["test_images"] == 400 and found["test_accuracy_clean"] == pytest.approx(clean)
    about = json.loads((copied / "robustness.json").read_text())
    own, other = about["networks"]
    assert about["metric"] == "accuracy" and own["clean"] == found["test_accuracy_clean"]
    every = [value for row in own["corruptions"].values() for value in row]
    assert {len(row) for row in own["corruptions"].values()} == {5} and len(every) == 15
    for kind, row in own["corruptions"].items():
        assert found[f"test_accuracy_{kind}"] == pytest.approx(np.mean(row))
    assert found["test_accuracy_mean"] == pytest.approx(np.mean(every))
    assert found["test_accuracy_worst"] == min(every) < clean
    # Equal weights have equal numbers, by whatever way they are read.
    assert {"corruptions", "clean", "attack"} <= own.keys()
    assert [other[name] for name in ("corruptions", "clean")] == [own["corruptions"], own["clean"]]
    assert other["attack"] == own["attack"] and other["source"] != own["source"]
    assert found["compared_test_accuracy_worst"] == found["test_accuracy_worst"]
    assert found["attacked_images"] == 90
    assert own["attack"]["calls"] == 40 and found["attack_calls_most"] <= 40
    right = {name: np.array(own["attack"][name]) for name in ("attacked", "searched", "random")}
    for name, each in right.items():
        assert [found[f"test_accuracy_{name}_{k}"] for k in (1, 2, 3)] == each[1:].tolist()
        assert (np.diff(each) <= 0).all()
    # The gradient helps beyond as many tries, and tries beyond chance.
    assert len({each[0] for each in right.values()}) == 1
    assert right["attacked"][3] < right["searched"][3] < right["random"][3] < right["random"][0]
    page = (copied / "report.html").read_text()
    assert "<h2>Robustness</h2>" in page and "Corrupted images, mean accuracy" in page
    assert "samples/corruptions.png" not in page  # pictures are part of the page
    (section,) = re.findall(r"<h2>Robustness</h2>(.*?)<h2>", page, re.DOTALL)
    assert section.count("<img") == 5  # curves of both, the attack, and two pictures
    with Image.open(copied / "samples/corruptions.png") as picture:
        assert picture.height > 2 * 3 * 64 and picture.width > 6 * 64
    assert (copied / "samples/attacked.png").exists()
    assert not (copied / "robustness.unfinished.json").exists()
    assert {name.partition(".")[0] for name in STAGES["robustness"].files} >= {"robustness"}


def test_a_stage_that_was_stopped_goes_on_and_finds_equal_numbers(copied, monkeypatch):
    config = settings(copied, attack_tokens=1, attack_calls=5, attack_images=8)
    whole = numbers(run_stages(config, str(copied), ["robustness"]))
    files = [copied / name for name in STAGES["robustness"].files]
    contents = {path: path.read_bytes() for path in files if path.exists()}
    assert set(files) - set(contents) == {copied / "robustness.unfinished.json"}
    read, batches = [], FineTuned.batches

    def counted(self, limit, entries=(), clips=1):
        read.append(entries)
        if len(read) == 5:
            raise KeyboardInterrupt
        return batches(self, limit, entries, clips)

    monkeypatch.setattr(FineTuned, "batches", counted)
    with pytest.raises(KeyboardInterrupt):
        run_stages(config, str(copied), ["robustness"])
    assert (copied / "robustness.unfinished.json").exists()
    again = numbers(run_stages(config, str(copied), ["robustness"]))
    assert again == whole
    assert len(read) == 4 + 1 + (11 - 4) + 1  # clean, two corruptions at five strengths, the attack
    assert {path: path.read_bytes() for path in contents} == contents
    # Scores of other settings are not taken for those of these.
    monkeypatch.undo()
    (copied / "robustness.unfinished.json").write_text('{"of": [], "found": {"0 clean 1": 0.5}}')
    assert numbers(run_stages(config, str(copied), ["robustness"])) == whole


def test_scores_of_a_file_that_was_replaced_are_not_kept(copied, tmp_path, monkeypatch):
    path, batches, read = tmp_path / "export.safetensors", FineTuned.batches, []
    model = gptv_jax.load(copied)
    model.save(path)
    config = settings(copied, compare=str(path), images=20, corruptions=("noise",))

    def stopping(self, *given, **more):
        read.append(self.source)
        if len(read) == 9:  # after six passes of the run, and two of the file
            raise KeyboardInterrupt
        return batches(self, *given, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FineTuned, "batches", stopping)
        run_stages(config, str(copied), ["robustness"])
    stored = weights.read(path)
    head = {n: -x if n == "classifier.class_head" else x for n, x in stored.params.items()}
    native.write(dataclasses.replace(stored, params=head), path)  # of an equal step
    found = numbers(run_stages(config, str(copied), ["robustness"]))
    wanted = numbers(run_stages(config, str(copied), ["robustness"]))
    assert found == wanted
    clean = "test_accuracy_clean"
    assert found[f"compared_{clean}"] < found[clean]


def test_a_run_folder_with_other_tokens_is_compared_on_the_same_images(copied, tmp_path):
    config, entries = config_of(copied), ("normalize()", "quantize(5)")
    short = dataclasses.replace(config.finetune.train, steps=2)
    other = dataclasses.replace(
        config,
        init_from=None,
        data=dataclasses.replace(config.data, eval_transforms=entries, train_transforms=entries),
        tokens=dataclasses.replace(config.tokens, levels=5),
        model=dataclasses.replace(config.model, start_per_variant=False),
        train=dataclasses.replace(config.train, steps=2),
        finetune=dataclasses.replace(config.finetune, train=short),
    )
    run_stages(other, str(tmp_path / "other"), ["pretrain", "finetune"])
    config = settings(copied, compare=str(tmp_path / "other"), images=20, corruptions=("jpeg",))
    found = numbers(run_stages(config, str(copied), ["robustness"]))
    alone = settings(tmp_path / "other", images=20, corruptions=("jpeg",))
    wanted = numbers(run_stages(alone, str(tmp_path / "other"), ["robustness"]))
    for name in ("clean", "jpeg", "worst"):
        name = f"test_accuracy_{name}"
        assert found[f"compared_{name}"] == wanted[name]


def test_without_fine_tuning_the_probe_is_measured(finished_run, tmp_path):
    copied = shutil.copytree(finished_run.folder, tmp_path / "run")
    summary = json.loads((copied / "summary.json").read_text())
    # The run is of another process, whose devices may round otherwise: the probe is repeated here.
    gone = ("finetune/", "probe/")
    kept = {name: x for name, x in summary.items() if not name.startswith(gone)}
    (copied / "summary.json").write_text(json.dumps(kept))
    config = settings(copied, images=None, corruptions=("occlusion",))
    summary = run_stages(config, str(copied), ["probe"])
    found = numbers(run_stages(config, str(copied), ["robustness"]))
    assert found["test_probe_accuracy_clean"] == pytest.approx(summary["probe/test_accuracy"])
    assert found["test_probe_accuracy_occlusion"] < found["test_probe_accuracy_clean"]
    assert not any("attack" in name for name in found)
    with pytest.raises(InputError, match="no finished fine-tuning"):
        sgd = dataclasses.replace(config.probe, method="sgd")
        config = dataclasses.replace(config, probe=sgd, init_from=str(copied))
        setup.open_run(config, str(tmp_path / "new"), ["robustness"])


def test_numbers_of_weights_that_go_on_training_are_moved_away(copied):
    run_stages(settings(copied, images=8, corruptions=("blur",)), str(copied), ["robustness"])
    config = config_of(copied)
    longer = dataclasses.replace(config.finetune.train, steps=config.finetune.train.steps + 1)
    config = dataclasses.replace(
        config, finetune=dataclasses.replace(config.finetune, train=longer)
    )
    found = run_stages(config, str(copied), ["finetune"])
    assert not numbers(found) and "finetune/test_accuracy" in found
    assert not (copied / "robustness.json").exists()
    (moved,) = (copied / "earlier").iterdir()
    assert (moved / "robustness.json").exists()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """`scenes(task)` is the folder of a fine-tuned run on scenes, to be read only."""
    made = {}

    def run(name: str):
        if name not in made:
            detect = config_lib.Detect(objects=2, bins=9)
            segment = config_lib.Segment(cell=8, codes=8, measured=10, write=False)
            config = scenes_config(config_lib.Task(name, detect=detect, segment=segment), 16, 8, 9)
            robustness = config_lib.Robustness(images=8, corruptions=("shift",))
            config = dataclasses.replace(config, robustness=robustness)
            made[name] = tmp_path_factory.mktemp(name) / "run"
            run_stages(config, str(made[name]), ["finetune"])
        return made[name]

    return run


@pytest.mark.parametrize(("name", "metric"), [("detect", "ap"), ("segment", "miou")])
def test_other_tasks_are_measured_by_their_own_number_without_the_attack(
    name, metric, scenes, tmp_path, caplog
):
    folder = shutil.copytree(scenes(name), tmp_path / "run")
    caplog.set_level("INFO", logger="gptv_jax")
    measured = numbers(run_stages(config_of(folder), str(folder), ["robustness"]))
    assert {f"test_{metric}_{n}" for n in ("clean", "shift", "mean", "worst")} <= measured.keys()
    assert measured["test_images"] == 8 and f"config.task.name={name}" in caplog.text
    assert not any("attack" in each for each in measured)
    assert 0 <= measured[f"test_{metric}_worst"] <= measured[f"test_{metric}_mean"] <= 1
    assert "<h2>Robustness</h2>" in (folder / "report.html").read_text()


def test_what_cannot_be_measured_is_refused_before_any_work(finished_run, copied, tmp_path):
    pretrained = tmp_path / "pretrained.safetensors"
    gptv_jax.load(finished_run.folder, stage="pretrain").save(pretrained)
    refused = {
        "does not exist": {"compare": str(tmp_path / "nowhere")},
        "is not fine-tuned": {"compare": str(pretrained)},
        "has no finished stage finetune": {"compare": str(unfinished(copied, tmp_path))},
        "attack_calls is 8, but .*attack_tokens=4 takes 9": {"attack_tokens": 4, "attack_calls": 8},
    }
    for words, changes in refused.items():
        with pytest.raises(InputError, match=words):
            setup.open_run(settings(copied, **changes), str(copied), ["robustness"])
    with pytest.raises(InputError, match="no finished fine-tuning; name finetune in --stages"):
        setup.open_run(settings(copied), str(tmp_path / "new"), ["robustness"])
    assert not (tmp_path / "new").exists()


def test_a_token_cache_is_refused_as_it_has_no_pixels(copied, tmp_path):
    codec, splits = GreyCodec(17, 8), {}
    for split in ("train", "validation", "test"):
        source = sources.open_source(config_lib.Data(), split)
        records = [source[i] for i in range(20)]
        rows = codec.encode(np.stack([record["image"] for record in records]))
        splits[split] = [r | {"tokens": row} for r, row in zip(records, rows, strict=True)]
    config = settings(copied)
    header = {"source": {"name": "digits"}, "tokens": fields.flatten(config.tokens), "classes": 10}
    folder = tmp_path / "cache"
    folder.mkdir()
    cache.write(folder, codec, splits, header | {"image_size": 8, "transforms": ()})
    data = config_lib.Data(name="tokens", path=str(folder))
    config = dataclasses.replace(config, data=data, init_from=str(copied))
    with pytest.raises(InputError, match="is a token cache, which has no pixels to corrupt"):
        setup.open_run(config, str(tmp_path / "new"), ["robustness"])


def unfinished(folder, tmp_path):
    """A copy of a run whose fine-tuning has not finished."""
    made = shutil.copytree(folder, tmp_path / "unfinished")
    kept = json.loads((made / "summary.json").read_text())
    kept = {name: value for name, value in kept.items() if not name.startswith("finetune/")}
    (made / "summary.json").write_text(json.dumps(kept))
    return made


def test_weights_for_other_classes_or_another_task_are_refused(copied, scenes, tmp_path):
    made = shutil.copytree(copied, tmp_path / "other")
    record = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(record | {"classes": list("abcdefghi")}))
    config = settings(copied, compare=str(made))
    with pytest.raises(InputError, match=r"tells apart a, b, c, .*this run's classes are 0, 1, 2"):
        setup.open_run(config, str(copied), ["robustness"])
    with pytest.raises(InputError, match=r"fine-tuned for config\.task\.name=detect"):
        config = settings(copied, compare=str(scenes("detect")))
        setup.open_run(config, str(copied), ["robustness"])
