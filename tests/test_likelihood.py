"""The loss as a code length: in the summary, from Python, and by an arithmetic coder."""

import importlib.util
import math
import pathlib

import numpy as np
import pytest

import gptv_jax
from gptv_jax.data import sources
from gptv_jax.runs.record import config_of

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def coder():
    """The benchmark, as a module."""
    pytest.importorskip("constriction", reason="constriction is not installed")
    path = BENCHMARKS / "arithmetic_coding.py"
    spec = importlib.util.spec_from_file_location("arithmetic_coding", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_arithmetic_coder_needs_the_bits_that_the_model_claims(coder, finished_run):
    model = gptv_jax.load(finished_run.folder, stage="pretrain")
    tokens = coder.tokens_of(str(finished_run.folder), model, 64)
    assert tokens.shape == (64, 64) and len(np.unique(tokens, axis=0)) == 64
    claimed, needed = coder.code(model, tokens)  # reads back what it wrote, or raises
    assert claimed <= needed <= 1.01 * claimed
    assert needed < 0.9 * tokens.size * math.log2(17)  # and the model has learnt something
    nats = -model.log_likelihood(model.detokenize(tokens)).sum()
    assert claimed == pytest.approx(nats / math.log(2), rel=1e-5)


def test_lossless_tokens_have_bits_per_dimension(finished_run):
    summary = finished_run.summary
    bits = summary["pretrain/test_bits_per_token"]
    assert bits == pytest.approx(summary["pretrain/test_nats_per_token"] / math.log(2))
    assert summary["pretrain/test_bits_per_dimension"] == bits  # one token, one grey value
    assert summary["pretrain/test_distortion_mse"] == 0
    assert summary["pretrain/test_distortion_psnr_db"] is None
    source = sources.open_source(config_of(finished_run.folder).data, "test")
    images = np.stack([source[i]["image"] for i in range(50)])
    model = gptv_jax.load(finished_run.folder, stage="pretrain")
    np.testing.assert_array_equal(model.detokenize(model.tokenize(images)), images)
