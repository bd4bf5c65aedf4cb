"""The real command that converts weights."""

import numpy as np
import pytest
from conftest import generator

import gptv_jax

pytestmark = pytest.mark.process


def test_a_run_is_converted_to_hugging_face_and_from_there_to_a_safetensors_file(
    command, finished_run, tmp_path
):
    there, back = tmp_path / "hf", tmp_path / "back.safetensors"
    for source, target in ((finished_run.folder, there), (there, back)):
        ended = command("convert", f"--from={source}", f"--to={target}")
        assert ended.code == 0, ended.errors
        assert f"{source} is written to {target}" in ended.errors
    ours, theirs = gptv_jax.load(finished_run.folder), gptv_jax.load(back)
    tokens = generator().integers(17, size=(3, 64), dtype=np.int32)
    np.testing.assert_allclose(theirs.logits(tokens), ours.logits(tokens), atol=2e-5)
    ended = command(
        "convert", f"--from={finished_run.folder}", f"--to={tmp_path / 'x'}", "--stage=pretrain"
    )
    assert ended.code == 0, ended.errors
    pretrained = gptv_jax.load(finished_run.folder, stage="pretrain")
    found = gptv_jax.from_huggingface(tmp_path / "x").logits(tokens)
    np.testing.assert_allclose(found, pretrained.logits(tokens), atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to=x"], "--from must be given"),
        (["--from={empty}", "--to=x"], "is not a run folder"),
        (["--from={run}", "--to={empty}/x", "--stage=probe"], "--stage"),
        (
            ["--from={run}", "--to={empty}/x", "--task=classification"],
            "cannot express a class head",
        ),
        (["--from={run}", "--to={empty}/file/x"], "cannot be written"),
        (["--from={run}", "--to={empty}/file/x.safetensors"], "cannot be written"),
        (["--from={run}", "--to={empty}/x", "more"], "more is no flag"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_written(
    command, finished_run, tmp_path, arguments, words
):
    (tmp_path / "file").touch()
    places = {"run": finished_run.folder, "empty": tmp_path}
    ended = command("convert", *(argument.format(**places) for argument in arguments))
    [line] = [line for line in ended.errors.splitlines() if line.startswith("error:")]
    assert ended.code == 1 and words in line and "Traceback" not in ended.errors
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
