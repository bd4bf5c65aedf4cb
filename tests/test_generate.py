"""The real command that writes many samples and says how good they are."""

import json
import shutil

import numpy as np
import pytest
from conftest import small_arguments
from PIL import Image

import gptv_jax
from gptv_jax.quality import reference
from gptv_jax.quality.features import Pixels

pytestmark = pytest.mark.process


@pytest.fixture
def generate(command):
    """`generate(folder, *settings)` runs the stage; the summary that it prints."""

    def call(folder, *settings: str) -> dict:
        ended = command("main", *small_arguments(folder, *settings), "--stages=generate")
        assert ended.code == 0, ended.errors[-3000:]
        return json.loads(ended.output)

    return call


def test_samples_are_written_compared_and_go_on_where_they_were(generate, finished_run, tmp_path):
    folder, made = tmp_path / "run", tmp_path / "run" / "generated"
    shutil.copytree(finished_run.folder, folder)
    sizes = ["--config.generate.count=10", "--config.generate.batch_size=4"]
    found = generate(folder, *sizes)
    samples = np.load(made / "samples.npz")["arr_0"]
    assert samples.shape == (10, 8, 8, 3) and samples.dtype == np.uint8
    for i, wanted in enumerate(samples):
        np.testing.assert_array_equal(np.asarray(Image.open(made / f"{i:06d}.png")), wanted)
    assert len(np.unique(samples.reshape(10, -1), axis=0)) == 10
    told = json.loads((made / "quality.json").read_text())
    assert found["generate/count"] == 10 and found["generate/frechet_distance"] > 0
    assert found["generate/reference_count"] == 1197 and found["generate/biased"]
    assert 0 <= found["generate/precision"] <= 1 and found["generate/inception_score"] is None
    assert told["reference"]["data"] == "digits" and told["reference"]["split"] == "train"
    assert reference.load(made / "reference.npz").made_of(Pixels((8, 8, 1)))
    # One batch is lost, and more are wanted: those that are there stay as they are.
    lost = made / "tokens" / "00001.npy"
    kept, before = lost.read_bytes(), (made / "tokens" / "00000.npy").stat().st_mtime_ns
    lost.unlink()
    # And seen by a network, which gives class probabilities.
    seen = f"--config.generate.features={finished_run.folder}"
    more = generate(folder, "--config.generate.count=14", *sizes[1:], seen)
    assert more["generate/count"] == 14 and lost.read_bytes() == kept
    assert (made / "tokens" / "00000.npy").stat().st_mtime_ns == before
    np.testing.assert_array_equal(np.load(made / "samples.npz")["arr_0"][:10], samples)
    assert more["generate/inception_score"] >= 1
    width = gptv_jax.load(finished_run.folder).network.config.width
    assert len(reference.load(made / "reference.npz").mean) == width
