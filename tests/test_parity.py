"""The network compared with ImageGPT of `transformers`, on random weights that go both ways.

Needs the `bench` extra; without it the tests are skipped. `.ci/run` installs it after the others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import generator, make_mesh

import gptv_jax
from gptv_jax import sharding, weights
from gptv_jax.train.objective import cross_entropy
from gptv_jax.weights.native import WeightsFile

torch = pytest.importorskip("torch", reason="the bench extra (torch) is not installed")
transformers = pytest.importorskip(
    "transformers", reason="the bench extra (transformers) is not installed"
)

TINY = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 16, "vocab_size": 12}
S_SHAPED = {"n_layer": 24, "n_embd": 512, "n_head": 8, "n_positions": 1024, "vocab_size": 513}
SHAPES = {"tiny": TINY, "igpt-s": S_SHAPED}


def theirs(shape: dict, kind: str = "ForCausalImageModeling", **more):
    """A model of `transformers`: random weights and norm gains, biases of zero, no dropout."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    config = transformers.ImageGPTConfig(**shape, **more)
    model = getattr(transformers, f"ImageGPT{kind}")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
    return model


def saved(model, folder, **more):
    """The folder that `save_pretrained` of `transformers` writes, and an image processor."""
    model.save_pretrained(folder, **more)
    clusters = generator().uniform(-1, 1, (model.config.vocab_size - 1, 3)).tolist()
    processor = transformers.ImageGPTImageProcessor
    processor(clusters=clusters).save_pretrained(folder)
    return folder


def tokens_of(shape: dict, rows: int = 2) -> np.ndarray:
    size = (rows, shape["n_positions"])
    return generator(1).integers(shape["vocab_size"] - 1, size=size, dtype=np.int32)


def shifted(tokens: np.ndarray, shape: dict):
    """The input from which ImageGPT predicts `tokens`: the start token, then all but the last."""
    start = np.full((len(tokens), 1), shape["vocab_size"] - 1)
    return torch.tensor(np.concatenate([start, tokens[:, :-1]], axis=1), dtype=torch.long)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_every_layer_agree(name, tmp_path):
    shape = SHAPES[name]
    model = theirs(shape)
    weights_file = weights.read(saved(model, tmp_path / "hf", max_shard_size="40MB"))
    sharded = (tmp_path / "hf" / "model.safetensors.index.json").exists()
    assert sharded == (name == "igpt-s")
    tokens = tokens_of(shape)
    with torch.no_grad():
        output = model(shifted(tokens, shape), output_hidden_states=True)
        *raw, final = output.hidden_states  # only the last one is normed
    layers, network = tuple(range(len(raw) + 1)), weights_file.network

    @functools.partial(jax.jit, static_argnames=("raw", "keep"))
    def forward(params, **reading):
        return network.bind(params)(jnp.asarray(tokens), **reading)

    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = weights_file.on_mesh()
        found = forward(params, raw=True, keep=layers[:-1])
        last = forward(params, raw=False, keep=layers[-1:]).kept[0]
    np.testing.assert_allclose(found.logits, output.logits.numpy(), rtol=0, atol=1e-5)
    for layer, (ours, wanted) in enumerate(zip([*found.kept, last], [*raw, final], strict=True)):
        scale = np.abs(
            wanted.numpy()
        ).max()  # rounding errors of a layer are in proportion to the layer
        np.testing.assert_allclose(ours / scale, wanted / scale, rtol=0, atol=1e-5, err_msg=layer)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_the_raw_alignment_agree(name, tmp_path):
    """Fed as the image processor feeds them: token i at position i, and no start token."""
    shape = SHAPES[name]
    model = theirs(shape)
    weights_file = weights.read(saved(model, tmp_path / "hf"))
    tokens = tokens_of(shape)
    with torch.no_grad():
        wanted = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    found = raw_logits(weights_file, tokens)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def raw_logits(weights_file: WeightsFile, tokens: np.ndarray) -> np.ndarray:
    """Logits with the first token of each row in place of the start vector, row by row."""
    rows, network = [], weights_file.network
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = weights_file.on_mesh()
        forward = jax.jit(lambda params, read: network.bind(params)(read).logits[0])
        for row in tokens:
            start = {"start": params["token_embedding"][row[0]][None]}
            read = np.append(row[1:], row[:1])[None]  # the last token is only a target
            rows.append(np.asarray(forward(params | start, jnp.asarray(read))))
    return np.stack(rows)


def test_class_logits_agree(tmp_path):
    model = theirs(TINY, "ForImageClassification", num_labels=5)
    ours = gptv_jax.from_huggingface(saved(model, tmp_path / "hf"))
    tokens = tokens_of(TINY)
    with torch.no_grad():
        wanted = model(shifted(tokens, TINY)).logits.softmax(dim=-1).numpy()
    images = ours.detokenize(tokens)
    np.testing.assert_array_equal(ours.tokenize(images), tokens)
    np.testing.assert_allclose(ours.classify(images), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_of_the_loss_agree_for_every_weight(name, tmp_path):
    shape = SHAPES[name] | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = theirs(shape)
    weights_file = weights.read(saved(model, tmp_path / "hf"))
    tokens = tokens_of(shape, rows=1 if name == "igpt-s" else 4)
    logits = model(shifted(tokens, shape)).logits
    targets = torch.tensor(tokens, dtype=torch.long)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    with torch.no_grad():  # the gradients in place of the weights, converted in the same way
        for weight in model.parameters():
            weight.copy_(weight.grad)
        for weight_name, weight in model.named_parameters():
            if weight_name.endswith("bias"):
                weight.zero_()  # this project's network has no biases
    wanted = weights.read(saved(model, tmp_path / "gradients")).params

    def loss(params):
        logits = weights_file.network.bind(params)(jnp.asarray(tokens)).logits
        return cross_entropy(logits, jnp.asarray(tokens)).mean()

    with jax.set_mesh(make_mesh((1, 1, 1))):
        found = sharding.by_name(jax.jit(jax.grad(loss))(weights_file.on_mesh()))
    assert set(found) == set(wanted)
    for weight_name, gradient in wanted.items():
        layers = "blocks." in weight_name  # compared layer by layer
        pairs = zip(found[weight_name], gradient, strict=True) if layers else [
            (found[weight_name], gradient)
        ]  # fmt: skip
        for ours, theirs_ in pairs:
            error = np.linalg.norm(ours - theirs_)
            assert error <= 1e-4 * np.linalg.norm(theirs_), weight_name
            assert np.linalg.norm(theirs_) > 0, weight_name


# From this project to `transformers`.


@pytest.mark.parametrize("task", ["generation", "classification"])
def test_transformers_loads_what_is_exported(tmp_path, task):
    kind = {"generation": "ForCausalImageModeling", "classification": "ForImageClassification"}
    original = theirs(TINY, kind[task], **({"num_labels": 5} if task == "classification" else {}))
    ours = gptv_jax.from_huggingface(saved(original, tmp_path / "hf"))
    gptv_jax.to_huggingface(ours, tmp_path / "back", task)
    automatic = getattr(transformers, f"ImageGPT{kind[task]}")
    model, info = automatic.from_pretrained(tmp_path / "back", output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(problem), problem
    for (name, weight), other in zip(original.named_parameters(), model.parameters(), strict=True):
        np.testing.assert_array_equal(weight.detach(), other.detach(), err_msg=name)
    processor = transformers.ImageGPTImageProcessor.from_pretrained(tmp_path / "back")
    np.testing.assert_allclose(processor.clusters, ours.codec.definition.centers)


def test_transformers_computes_the_logits_of_a_run(finished_run, tmp_path):
    ours = gptv_jax.load(finished_run.folder, stage="pretrain")
    gptv_jax.to_huggingface(ours, tmp_path / "hf")
    model, info = transformers.ImageGPTForCausalImageModeling.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = tokens_of({"n_positions": 64, "vocab_size": 18})
    with torch.no_grad():
        wanted = model.eval()(shifted(tokens, {"vocab_size": 18})).logits.numpy()
    np.testing.assert_allclose(ours.logits(tokens), wanted, rtol=0, atol=1e-5)
