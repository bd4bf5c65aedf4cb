import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODERN, RECIPES, make_mesh, random_batch, random_params, tiny_network

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import layers
from gptv_jax.model.gpt import Network, parameter_count
from gptv_jax.model.layout import of_images
from gptv_jax.train.objective import cross_entropy
from gptv_jax.train.step import make_loss

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES)
def distinct(request):
    """A network with as many token values as positions, its weights, and tokens that all differ."""
    network = tiny_network(vocabulary=16, **request.param)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        tokens = np.random.default_rng(1).permutation(16).astype(np.int32)
        return network, random_params(network), tokens[None]


def forward(network):
    return jax.jit(lambda params, *inputs: network.bind(params)(*inputs))


def tiny_batch(network, size=8):
    return sharding.global_batch(random_batch(network, size))


def assert_trees_close(found, wanted, tolerance):
    """Equal to `tolerance` times the largest value of each leaf."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, f), w in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        scale = np.abs(w).max() + 1e-30
        np.testing.assert_allclose(f / scale, w / scale, atol=tolerance, rtol=0, err_msg=str(path))


# Causality


def test_logits_depend_on_all_earlier_tokens_and_no_others_by_gradient(distinct):
    network, params, tokens = distinct
    given = jnp.asarray(tokens)
    weights = np.random.default_rng(2).normal(size=network.vocabulary).astype(np.float32)

    # All tokens differ, so row v of an embedding table is the input of one position alone.
    @jax.jit
    @jax.grad
    def gradient(table, weights):
        return (network.bind(params | {"token_embedding": table})(given).logits * weights).sum()

    size = np.zeros((16, 16))  # [t, s]: the largest slope of logits[t] along the input of token s
    for t in range(16):
        at_t = np.zeros((1, 16, 16), np.float32)
        at_t[0, t] = weights
        size[t] = np.abs(gradient(params["token_embedding"], at_t)).max(axis=-1)[tokens[0]]
    earlier = np.tri(16, k=-1, dtype=bool)
    assert (size[~earlier] == 0).all()
    assert (size[earlier] > 1e-6).all()


def test_changing_a_token_changes_the_logits_after_it_and_no_others(distinct):
    network, params, tokens = distinct
    logits = forward(network)
    base = np.asarray(logits(params, tokens).logits[0])
    for s in range(network.length):
        changed = tokens.copy()
        changed[0, s] = (tokens[0, s] + 5) % network.vocabulary
        found = np.asarray(logits(params, changed).logits[0])
        np.testing.assert_array_equal(found[: s + 1], base[: s + 1])
        assert (np.abs(found[s + 1 :] - base[s + 1 :]).max(axis=-1) > 1e-6).all()


# Ways of walking the layers


PLAIN = (False, "none")  # scan, remat
WALKS = {
    "igpt": [(True, "none"), (True, "dots"), (False, "full")],
    "modern": [(False, "dots"), (True, "full")],
}


def output_and_gradients(recipe, scan, remat):
    network = tiny_network(classes=5, scan_layers=scan, remat=remat, **recipe)
    batch = tiny_batch(network, 3)

    def loss(params):
        output = network.bind(params)(batch["tokens"], batch["variant"])
        nats = cross_entropy(output.logits, batch["tokens"]).mean()
        return nats + jnp.square(output.pooled).sum() + output.class_logits[:, 0].sum(), output

    return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(random_params(network)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_scan_and_remat_change_no_output_and_no_gradient(recipe):
    wanted = output_and_gradients(RECIPES[recipe], *PLAIN)
    for scan, remat in WALKS[recipe]:
        assert_trees_close(output_and_gradients(RECIPES[recipe], scan, remat), wanted, 2e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_stronger_remat_keeps_less_for_the_backward_pass(scan):
    def kept(remat):
        network = tiny_network(scan_layers=scan, remat=remat, **MODERN)
        batch = tiny_batch(network)
        loss = make_loss(network)
        params = jax.eval_shape(network.init, jax.random.key(0))
        backward = jax.eval_shape(
            lambda p: jax.vjp(lambda p: loss(p, None, batch, None)[0], p)[1], params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept("none") > kept("dots") > kept("full")


# Values


def oracle(network, params, tokens, variant):
    """The forward pass of openai/image-gpt in NumPy and float64, one image and head at a time.

    It also has the fields of the network that image-gpt does not have.
    """
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    blocks, config, columns = p["blocks"], network.config, network.grid[1]

    def norm(x, gain):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * gain

    def softmax(x):
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    def turned(x, places):
        """Rotary positions on channels as complex numbers: half by row, half by column."""
        half = x.shape[1] // 2
        for t, place in enumerate(places):
            numbers = x[t, :half] + 1j * x[t, half:]
            for i in range(half):
                axis, number = divmod(i, half // 2)
                angle = divmod(place, columns)[axis] * 10_000 ** (-number / (half // 2))
                numbers[i] *= np.exp(1j * angle)
            x[t] = np.concatenate([numbers.real, numbers.imag])
        return x

    logits, features, class_logits = [], [], []
    for row, kind in zip(tokens, variant, strict=True):
        h = np.stack([p["start"][kind], *p["token_embedding"][row[:-1]]])
        if config.learned_positions:
            h = h + p["position"]
        if config.axial_positions:
            h = h + [p["row"][t // columns] + p["column"][t % columns] for t in range(len(h))]
        pooled = []
        for i in range(network.config.layers):
            n = norm(h, blocks["norm_1"][i])
            pooled.append(n.mean(axis=0))
            mixed = 0
            for head in range(network.config.heads):
                q, k, v = (n @ blocks["qkv"][i, :, c, head] for c in range(3))
                if config.qk_norm:
                    q, k = norm(q, blocks["q_norm"][i]), norm(k, blocks["k_norm"][i])
                if config.rotary:  # what is predicted at t, and what is held there
                    q, k = turned(q, range(len(h))), turned(k, range(-1, len(h) - 1))
                scores = q @ k.T / math.sqrt(k.shape[1])
                scores = np.where(np.tri(len(h), dtype=bool), scores, -1e10)
                mixed = mixed + softmax(scores) @ v @ blocks["attention_out"][i, head]
            h = h + mixed
            n = norm(h, blocks["norm_2"][i])
            if config.mlp == "swiglu":
                gate, up = (n @ blocks["mlp_gate_up"][i, :, c] for c in range(2))
                active = gate / (1 + np.exp(-gate)) * up
            else:
                up = n @ blocks["mlp_in"][i]
                active = up / (1 + np.exp(-1.702 * up))
            h = h + active @ blocks["mlp_out"][i]
        final = norm(h, p["final_norm"])
        pooled.append(final.mean(axis=0))
        logits.append(final @ p["head"].T)
        features.append(pooled)
        head = p["classifier"]
        standard = (pooled[-1] - head["class_center"]) * head["class_scale"]
        class_logits.append(standard @ head["class_head"].T)
    return np.stack(logits), np.stack(features, axis=1), np.stack(class_logits)


CASES = {"learned": {"axial_positions": False, "scan_layers": False}, "axial": {}}
CASES |= {"modern": MODERN}
TABLES = {"start", "token_embedding", "position", "row", "column"}


@pytest.fixture(params=CASES.values(), ids=CASES)
def oracle_case(request):
    """A network, its weights and a batch; rows and columns, and heads and head size, differ."""
    network = tiny_network(classes=5, grid=(2, 5), **request.param)
    params = random_params(network)
    for name in params.keys() & TABLES:
        params[name] *= 0.05  # so small that the norm's epsilon counts
    return network, params, tiny_batch(network, 4)


def test_forward_pass_is_that_of_the_numpy_oracle(oracle_case):
    network, params, batch = oracle_case
    found = forward(network)(params, batch["tokens"], batch["variant"])
    wanted = oracle(network, params, np.asarray(batch["tokens"]), np.asarray(batch["variant"]))
    assert len(set(np.asarray(batch["variant"]))) > 1
    for f, w in zip(found[:3], wanted, strict=True):
        assert f.shape == w.shape and f.dtype == jnp.float32
        np.testing.assert_allclose(f, w, rtol=2e-5, atol=2e-6 * np.abs(w).max())


def test_gradients_are_the_slopes_of_the_numpy_oracle(oracle_case):
    network, params, batch = oracle_case
    rng = np.random.default_rng(0)
    shapes = ((4, 10, 11), (3, 4, 32), (4, 5))
    weights = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    def weighted(params):
        output = network.bind(params)(batch["tokens"], batch["variant"])
        return sum((value * w).sum() for value, w in zip(output[:3], weights, strict=True))

    def oracle_weighted(params):
        values = oracle(network, params, np.asarray(batch["tokens"]), np.asarray(batch["variant"]))
        return sum((value * w).sum() for value, w in zip(values, weights, strict=True))

    gradients = jax.device_get(jax.jit(jax.grad(weighted))(params))
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(params))
    leaves, tree = jax.tree.flatten(exact)
    for i, (path, gradient) in enumerate(jax.tree.leaves_with_path(gradients)):
        if path[-1].key in ("class_center", "class_scale"):
            assert (gradient == 0).all()  # they are not trained
            continue
        # Along the gradient, and along noise, which sees parts that the gradient lacks.
        for direction in (gradient / np.linalg.norm(gradient), rng.normal(size=gradient.shape)):
            step = 1e-6 * direction
            ahead, behind = (
                oracle_weighted(tree.unflatten([*leaves[:i], leaves[i] + s, *leaves[i + 1 :]]))
                for s in (step, -step)
            )
            slope, found = (ahead - behind) / 2e-6, (gradient * direction).sum()
            scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
            assert abs(found - slope) < 2e-5 * scale, path


def test_fresh_network_predicts_the_uniform_distribution():
    network = tiny_network(classes=5)
    params, batch = jax.jit(network.init)(jax.random.key(0)), tiny_batch(network)

    @jax.jit
    def first(params):
        output = network.bind(params)(batch["tokens"], batch["variant"])
        nats = cross_entropy(output.logits, batch["tokens"])
        loss, _ = make_loss(network, classification=0.0)(params, None, batch, None)
        return output, nats, loss

    output, nats, loss = first(params)
    assert (output.logits == 0).all() and (output.class_logits == 0).all()
    np.testing.assert_allclose(nats, np.log(11), rtol=2e-7)
    np.testing.assert_allclose(loss, np.log(11), rtol=1e-5)  # 128 roundings in the mean


@pytest.mark.parametrize(
    ("count", "shape"),
    [(76_571_648, (24, 512, 8)), (455_157_760, (36, 1024, 8)), (1_362_250_752, (48, 1536, 16))],
    ids=["iGPT-S", "iGPT-M", "iGPT-L"],
)
def test_parameter_counts_are_those_of_the_paper(count, shape):
    network = Network(config_lib.Model(*shape), of_images(512, (32, 32)))
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert parameter_count(params) == count
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_initial_weights_have_the_standard_deviations_of_the_released_code():
    config = config_lib.Model(layers=4, width=128, heads=4)
    network = Network(config, of_images(512, (16, 16)))
    params = jax.jit(network.init)(jax.random.key(0))
    blocks = params["blocks"]
    wanted = {"qkv": 128**-0.5, "attention_out": (4 * 128) ** -0.5, "mlp_in": 0.02, "mlp_out": 0.02}
    for name, std in wanted.items():
        np.testing.assert_allclose(jnp.std(blocks[name]), std, rtol=0.02, err_msg=name)
    for name, std in {"token_embedding": 0.02, "position": 0.01}.items():
        np.testing.assert_allclose(jnp.std(params[name]), std, rtol=0.02, err_msg=name)
    for gain in (blocks["norm_1"], blocks["norm_2"], params["final_norm"]):
        assert (gain == 1).all()
    for layer in range(1, 4):
        assert (blocks["qkv"][layer] != blocks["qkv"][0]).all()


# Products with weights


@pytest.mark.parametrize(
    ("equation", "shape", "product"),
    [("btf,fd->btd", (32, 8), "8x32"), ("btd,df->btf", (8, 32), "8x32")],
)
def test_on_a_cpu_the_gradient_of_a_weight_is_computed_with_the_shorter_side_first(
    equation, shape, product
):
    x, weight = (np.random.default_rng(0).normal(size=s) for s in ((2, 3, shape[0]), shape))
    x, weight = jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32)
    found, wanted = (
        jax.jit(jax.grad(lambda w, f=f: jnp.sin(f(equation, x, w)).sum()))
        for f in (layers.project, jnp.einsum)
    )
    np.testing.assert_allclose(found(weight), wanted(weight), rtol=1e-5, atol=1e-5)
    results = re.findall(r"dot_general .*-> tensor<(\d+x\d+)xf32>", found.lower(weight).as_text())
    assert results == [product]


# Start vectors


def test_every_variant_begins_with_its_own_start_vector_and_none_with_the_first():
    network = tiny_network()
    params, row = random_params(network), random_batch(network, size=1)["tokens"]
    tokens, logits = np.repeat(row, 3, axis=0), forward(network)
    by_variant = logits(params, tokens, np.arange(3, dtype=np.int32)).logits
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(by_variant[a] - by_variant[b]).max(axis=-1) > 1e-6).all()
    first = logits(params, tokens, np.zeros(3, np.int32)).logits
    np.testing.assert_array_equal(logits(params, tokens).logits, first)


# Dropout


def test_dropout_depends_on_the_key_alone_and_is_off_without_one():
    network = tiny_network(dropout=0.3)
    params, batch = random_params(network), tiny_batch(network)
    logits = forward(network)
    inputs = (params, batch["tokens"], batch["variant"])
    a, again, b = (logits(*inputs, jax.random.key(seed)).logits for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - b).max() > 1e-3
    off, without = logits(*inputs).logits, forward(tiny_network())(*inputs).logits
    np.testing.assert_array_equal(off, without)
    assert np.abs(a - off).max() > 1e-3


def test_dropout_zeroes_its_share_and_preserves_the_mean():
    x = jnp.full((64, 16, 32), 2.0)
    dropped = layers.dropout(x, 0.25, jax.random.key(0))
    assert set(np.unique(dropped)) == {0.0, np.float32(2 / 0.75)}
    np.testing.assert_allclose((dropped == 0).mean(), 0.25, atol=0.01)
    np.testing.assert_allclose(dropped.mean(), 2.0, atol=0.03)
    assert layers.dropout(x, 0.25, None) is x and layers.dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_draws_anew_for_the_embeddings_and_each_branch_of_each_layer(monkeypatch):
    network = tiny_network(dropout=0.3, scan_layers=False)
    params, batch = random_params(network), tiny_batch(network)
    original = layers.dropout

    @jax.jit
    def keys_used(params, key):
        keys = []

        def recording(x, rate, key):
            keys.append(jax.random.key_data(key))
            return original(x, rate, key)

        monkeypatch.setattr(layers, "dropout", recording)
        network.bind(params)(batch["tokens"], batch["variant"], key)
        return keys

    keys = keys_used(params, jax.random.key(0))
    assert len({tuple(np.asarray(k)) for k in keys}) == len(keys) == 1 + 2 * 2


# Compute in bfloat16


def test_bfloat16_computes_in_bfloat16_and_keeps_weights_and_logits_float32():
    network = tiny_network(dtype="bfloat16")
    params, batch = random_params(network), tiny_batch(network)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    inputs = (params, batch["tokens"], batch["variant"])
    output, precise = forward(network)(*inputs), forward(tiny_network())(*inputs)
    assert output.logits.dtype == output.pooled.dtype == jnp.float32
    for found, wanted in ((output.logits, precise.logits), (output.pooled, precise.pooled)):
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        assert 1e-4 < error < 3e-2
    embed = jax.eval_shape(lambda p: network.bind(p).embed(batch["tokens"][:, :-1]), params)
    assert embed.dtype == jnp.bfloat16
    gradient = jax.eval_shape(
        jax.grad(lambda p: make_loss(network)(p, None, batch, None)[0]), params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
