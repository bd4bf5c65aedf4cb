"""Weights from a Hugging Face Hub and to it, by huggingface_hub and a server on this machine."""

import builtins
import dataclasses
import functools
import json
import os
import sys

import jax
import numpy as np
import pytest
from conftest import generator, small_arguments
from hub_server import serve

import gptv_jax
from gptv_jax import weights
from gptv_jax.errors import InputError
from gptv_jax.quality.features import make_features
from gptv_jax.runs.record import config_of
from gptv_jax.stages import pretrained as stages_pretrained
from gptv_jax.stages import setup
from gptv_jax.weights import hub as hub_lib

pytestmark = pytest.mark.process  # of the run that the tests share


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A hub on this machine, which huggingface_hub takes for the Hub, and an empty cache."""
    with serve() as (found, address), pytest.MonkeyPatch.context() as patch:
        # The library reads its environment when it is imported.
        for name in [n for n in sys.modules if n.partition(".")[0] == "huggingface_hub"]:
            patch.delitem(sys.modules, name)
        patch.setenv("HF_ENDPOINT", address)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("HF_TOKEN", "hf_of_the_test")
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        yield found


@pytest.fixture
def hub(served):
    """The hub, without models and requests."""
    served.models, served.asked, served.gated = {}, [], set()
    return served


@pytest.fixture(scope="module")
def pretrained(finished_run):
    return gptv_jax.load(finished_run.folder, stage="pretrain")


TOKENS = generator().integers(17, size=(3, 64), dtype=np.int32)


def test_a_model_that_is_pushed_comes_back_and_then_from_the_cache_alone(
    hub, pretrained, monkeypatch
):
    assert pretrained.push_to_hub("me/digits").endswith("/me/digits")
    files = hub.models["me/digits"]
    assert {"gptv_jax.safetensors", "model.safetensors", "config.json"} <= set(files)
    wanted = pretrained.logits(TOKENS)
    np.testing.assert_array_equal(gptv_jax.load("hf://me/digits").logits(TOKENS), wanted)
    other = dataclasses.replace(pretrained.weights_file(), step=77)
    hub_lib.push(other, "me/digits", "trained longer")
    assert "step 77" in repr(gptv_jax.load("hf://me/digits"))
    hub.asked.clear()
    from huggingface_hub import constants  # after the fixture has set the environment

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    np.testing.assert_array_equal(gptv_jax.load("hf://me/digits").logits(TOKENS), wanted)
    assert hub.asked == []
    with pytest.raises(InputError, match=r"the Hub cannot be reached, and its cache here has no"):
        gptv_jax.load("hf://me/another")


def test_the_card_has_the_numbers_of_the_run_and_no_path_and_stays_when_it_was_edited(
    hub, finished_run, pretrained
):
    pretrained.push_to_hub("hf://me/digits")
    text = hub.models["me/digits"]["README.md"].decode()
    settings, number = text.split("---")[1], finished_run.summary["probe/test_accuracy"]
    assert "library_name: gptv_jax" in settings and "license:" not in settings
    assert f"| probe/test_accuracy | {number:.6g} |" in text and repr(pretrained) in text
    assert "| model.width | `16` |" in text and str(finished_run.folder) not in text
    hub.models["me/digits"]["README.md"] = b"edited"
    pretrained.push_to_hub("me/digits")
    assert hub.models["me/digits"]["README.md"] == b"edited"


def test_a_folder_of_transformers_is_read_from_the_hub_wherever_weights_are_named(
    hub, pretrained, tmp_path, command
):
    gptv_jax.to_huggingface(pretrained, tmp_path / "hf")
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    hub.models["them/gpt"] = files | {"pytorch_model.bin": b"of another program"}
    found = gptv_jax.from_huggingface("hf://them/gpt@main")
    np.testing.assert_allclose(found.logits(TOKENS), pretrained.logits(TOKENS), atol=2e-5)
    assert not [line for line in hub.asked if "pytorch_model.bin" in line]
    assert weights.is_weights_path("hf://them/gpt")
    assert weights.read("hf://them/gpt").model.width == 16
    one = weights.locate("hf://them/gpt/preprocessor_config.json")
    assert json.loads(one.read_text())["size"] == {"height": 8, "width": 8}


def test_what_the_hub_does_not_give_is_a_sentence(hub, pretrained, monkeypatch):
    hub.models["them/gated"], hub.gated = {}, {"them/gated"}
    hub.models["them/bin"] = {"config.json": b'{"model_type": "imagegpt", "n_embd": 8, '}
    hub.models["them/bin"]["config.json"] += (
        b'"n_layer": 1, "n_head": 1, "n_positions": 16, "vocab_size": 9}'
    )
    for name, words in {
        "hf://them/none": "no such model",
        "hf://them/gated": "must grant access",
        "hf://them/bin/x.safetensors": "no such file",
        "hf://them/bin": "pytorch_model.bin alone, write safetensors first",
        "hf://them": "written hf://user/model",
        "gs://them/gpt": "is an address",
    }.items():
        with pytest.raises(InputError, match=words) as caught:
            gptv_jax.load(name)
        assert len(str(caught.value)) <= 300 + len(os.environ["HF_HOME"])
    with pytest.raises(InputError, match="written user/model"):
        pretrained.push_to_hub("digits")
    for write in (pretrained.save, functools.partial(gptv_jax.to_huggingface, pretrained)):
        with pytest.raises(InputError, match=r"is an address; .*push_to_hub uploads"):
            write("hf://me/digits")
    usual = builtins.__import__

    def absent(name, *rest, **more):
        if name == "huggingface_hub":
            raise ImportError(name)
        return usual(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"pip install 'gptv_jax\[hub\]'"):
        gptv_jax.load("hf://them/other")


@pytest.mark.parametrize("call", ["load", "from_huggingface", "load_tokenizer"])
def test_a_name_of_the_hub_alone_is_told_apart_from_a_path(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        getattr(gptv_jax, call)("openai/imagegpt-small")
    for part in (
        "nothing is downloaded",
        "hf://openai/imagegpt-small",
        "hf download openai/imagegpt-small --local-dir=imagegpt-small",
    ):
        assert part in str(caught.value)
    assert len(str(caught.value)) <= 293  # and "error: "
    (tmp_path / "openai").mkdir()
    with pytest.raises(InputError) as caught:
        getattr(gptv_jax, call)("openai/imagegpt-small")
    assert "hf download" not in str(caught.value)
    for path in ("palettes/kmeans_centers.npy", "mine/digits.safetensors"):
        with pytest.raises(InputError, match=r"does not exist|there is no") as caught:
            getattr(gptv_jax, call)(path)
        assert "hf download" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        ("convert", "--from={}"),
        ("main", "--config.init_from={}"),
        ("main", "--config.tokens.palette={}"),
    ],
)
def test_commands_say_the_same(command, tmp_path, module, flag):
    more = ["--to=x"] if module == "convert" else small_arguments(tmp_path / "run")
    more += ["--config.tokens.kind=palette"] * ("palette" in flag)
    ended = command(module, *more, flag.format("openai/imagegpt-small"))
    last = ended.errors.splitlines()[-1]
    assert ended.code == 1 and last.startswith("error: ") and len(last) <= 300
    assert "hf download openai/imagegpt-small" in last and not (tmp_path / "run").exists()


def test_a_run_starts_from_weights_on_the_hub(hub, finished_run, pretrained, tmp_path):
    pretrained.push_to_hub("me/start")
    config = config_of(finished_run.folder)
    config = dataclasses.replace(config, init_from="hf://me/start")
    context = setup.open_run(config, str(tmp_path / "run"), ["probe"])
    with jax.set_mesh(context.mesh):
        found = stages_pretrained.load(context).params
    jax.tree.map(np.testing.assert_array_equal, found, pretrained.params)
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["config"]["init_from"] == "hf://me/start"
    features = make_features("hf://me/start", (8, 8, 1))
    images = generator().integers(17, size=(8, 8, 8, 1), dtype=np.uint8)
    np.testing.assert_array_equal(features(images)[0], pretrained.features(images))
    with pytest.raises(InputError, match=r"hf download openai/imagegpt-small"):
        make_features("openai/imagegpt-small", (8, 8, 1))
