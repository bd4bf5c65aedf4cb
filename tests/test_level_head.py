"""The head by levels: a distribution over codes, by the chain rule, and everywhere one head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import generator, make_mesh, random_batch, random_params, tiny_network
from jax.test_util import check_grads

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.config import Drawing, rules
from gptv_jax.decode import speculative
from gptv_jax.decode.sampler import Sampler
from gptv_jax.errors import InputError
from gptv_jax.model import autoencoder, flops, layers
from gptv_jax.model.layout import Part, causal, of_images
from gptv_jax.model.level_head import LevelHead
from gptv_jax.planning.training import Pretraining
from gptv_jax.tasks.network import network_of
from gptv_jax.tokens.learned import Tokenizer
from gptv_jax.train import distillation, optimizer, step
from gptv_jax.weights import native
from gptv_jax.weights.native import WeightsFile

one_device = pytest.mark.usefixtures("one_device")
LEVELS = {12: (3, 2, 2), 30: (2, 5, 3), 7: (7,)}  # by number of codes
WIDTH = 5


def head_and_features(levels, rows=4, positions=3):
    """A head of random weights as `(params, final)`; weights and features are float64 or 32."""
    rng, prefixes = generator(), sum(int(np.prod(levels[:i])) for i in range(1, len(levels)))
    params = {"level_rows": rng.normal(size=(sum(levels), WIDTH)).astype(np.float32)}
    if prefixes:
        params["prefix_scale"] = rng.normal(size=(prefixes, WIDTH)).astype(np.float32)
    final = rng.normal(size=(rows, positions, WIDTH)).astype(np.float32)
    return jax.tree.map(jnp.asarray, (params, final))


def bound(levels, params):
    """The head with these weights."""
    return layers.bind(Head, levels, params=params)


class Head(LevelHead):
    """The head as `layers.bind` makes a module."""

    def __init__(self, levels, *, rngs):
        del rngs  # of random weights; the head's are zero
        super().__init__(levels, WIDTH)


def chain_rule(levels, params, final):
    """Log-probabilities of all codes, float64 [B, N, V], code by code and level by level."""
    params, final = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, final))
    found = np.zeros((*final.shape[:2], int(np.prod(levels))))
    for code in range(found.shape[-1]):
        rest, stride, row, prefix_row = code, 1, 0, 0
        for i, count in enumerate(levels):
            level, rest = rest % count, rest // count
            read = final
            if i:
                read = final * (1 + params["prefix_scale"][prefix_row + code % stride])
                prefix_row += stride
            logits = read @ params["level_rows"][row : row + count].T
            normed = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            found[..., code] += normed[..., level]
            row, stride = row + count, stride * count
    return found


@one_device
@pytest.mark.parametrize("levels", LEVELS.values(), ids=str)
def test_probabilities_of_all_codes_sum_to_1_and_are_those_of_the_chain_rule(levels):
    params, final = head_and_features(levels)
    head, wanted = bound(levels, params), chain_rule(levels, params, final)
    found = np.asarray(head.log_probabilities(final))
    assert found.std() > 0.5
    np.testing.assert_allclose(np.exp(found).sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    for code in range(found.shape[-1]):
        nats = head.nats(final, jnp.full(final.shape[:2], code))
        np.testing.assert_allclose(nats, -wanted[..., code], atol=2e-5)


@one_device
def test_gradients_are_those_of_numbers_and_both_ways_to_a_codes_nats_agree():
    levels = LEVELS[12]
    params, final = head_and_features(levels)
    codes = jnp.asarray(generator().integers(12, size=final.shape[:2]))

    def by_level(params, final):
        return bound(levels, params).nats(final, codes).sum()

    def from_all(params, final):
        found = bound(levels, params).log_probabilities(final)
        return -(found * jax.nn.one_hot(codes, 12)).sum()

    def of_arrays(*arrays):  # the check's are NumPy's
        return by_level(*jax.tree.map(jnp.asarray, arrays))

    check_grads(of_arrays, (params, final), order=1, modes=["rev"], rtol=2e-2)
    pairs = (jax.grad(each, argnums=(0, 1))(params, final) for each in (by_level, from_all))
    for one, other in zip(*map(jax.tree.leaves, pairs), strict=True):
        assert np.abs(one).max() > 0.1
        np.testing.assert_allclose(one, other, atol=1e-5)


def flat_head(levels, params):
    """The flat head that a head by levels without prefixes is: sums of the rows of the levels."""
    rows, table = np.asarray(params["level_rows"]), np.zeros((1, params["level_rows"].shape[1]))
    for count in levels:  # the codes of the levels so far vary the fastest
        own, rows = rows[:count], rows[count:]
        table = (own[:, None] + table[None]).reshape(-1, table.shape[1])
    return table.astype(np.float32)


def loss_of(network):
    """`(params, batch) -> nats` of every image and their sum's gradient."""
    loss = step.make_loss(network)
    return jax.jit(jax.value_and_grad(lambda params, batch: loss(params, None, batch, None)[0]))


@one_device
@pytest.mark.parametrize("codes", LEVELS)
def test_without_prefixes_it_is_the_flat_head_of_the_sums_of_rows(codes):
    levels, flat = LEVELS[codes], tiny_network(vocabulary=codes)
    network = tiny_network(vocabulary=codes, levels=levels)
    params, batch = random_params(network), sharding.global_batch(random_batch(network))
    if len(levels) > 1:
        params["head"]["prefix_scale"] = jnp.zeros_like(params["head"]["prefix_scale"])
    plain = params | {"head": jnp.asarray(flat_head(levels, params["head"]))}
    found, wanted = (
        np.asarray(each.bind(p)(batch["tokens"]).logits)
        for each, p in ((network, params), (flat, plain))
    )
    wanted = np.asarray(jax.nn.log_softmax(wanted))
    assert wanted.std() > 0.5
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    (nats, gradient), (flat_nats, flat_gradient) = (
        loss_of(each)(p, batch) for each, p in ((network, params), (flat, plain))
    )
    np.testing.assert_allclose(nats, flat_nats, rtol=1e-6)
    for name in ("final_norm", "token_embedding"):  # the network below learns the same
        np.testing.assert_allclose(gradient[name], flat_gradient[name], atol=1e-6)
    # A teacher of the other head says nothing new, and its logits are not normalised.
    output, of_teacher = network.bind(params), flat.bind(plain)
    given = output(batch["tokens"]), of_teacher(batch["tokens"])
    compared = distillation.compare_tokens(
        output, given[0], [(of_teacher, given[1])], batch["tokens"], evaluating=True
    )
    np.testing.assert_allclose(compared["kl"], 0, atol=1e-5)
    np.testing.assert_allclose(compared["nats"], compared["teacher_nats"], atol=2e-5)


@one_device
def test_training_begins_at_ln_v_and_learns_what_independent_levels_cannot():
    """Two codes that differ in both levels: without the prefix each level is a coin."""
    network = tiny_network(vocabulary=4, levels=(2, 2), grid=(1, 2))
    tokens = np.repeat([[0, 3], [3, 0]], 8, axis=0).astype(np.int32)  # levels 00 and 11
    batch = sharding.global_batch(
        random_batch(network, 16) | {"tokens": tokens, "variant": 0 * tokens[:, 0]}
    )
    settings = config_lib.Optimizer(name="adam", learning_rate=0.03)
    update, rate = optimizer.make_optimizer(settings, 100)
    train = step.make_train_step(step.make_loss(network), update, rate)
    state, found = jax.jit(step.make_init(network, update))(jax.random.key(0)), []
    for _ in range(100):
        state, metrics = train(state, batch)
        found.append(float(metrics["nats_per_token"]))
    assert found[0] == pytest.approx(np.log(4), abs=1e-5)
    # The first code is a coin and the second one known: of independent levels, ln 4 / 2 at best.
    assert np.log(2) / 2 - 1e-3 < found[-1] < 0.4 < np.log(4) / 2


@one_device
def test_a_token_changes_the_probabilities_of_later_positions_alone():
    network = tiny_network(vocabulary=12, levels=LEVELS[12])
    params, tokens = random_params(network), random_batch(network)["tokens"]
    other = tokens.copy()
    other[:, 6] = (other[:, 6] + 1) % 12
    read = jax.jit(lambda tokens: network.bind(params)(tokens).logits)
    one, two = (np.asarray(read(sharding.shard_rows(each))) for each in (tokens, other))
    np.testing.assert_array_equal(one[:, :7], two[:, :7])
    assert (np.abs(one - two)[:, 7:].max(axis=-1) > 1e-6).all()


DRAWS = 8192


@one_device
@pytest.mark.parametrize("drafted", [False, True])
def test_drawn_codes_follow_the_product_distribution_at_a_temperature(drafted):
    drawing = Drawing(temperature=0.7, top_p=0.95, draft_tokens=2)
    network = tiny_network(vocabulary=12, levels=LEVELS[12], grid=(1, 2))
    params = random_params(network)
    params["head"] = jax.tree.map(lambda x: 2 * x, params["head"])
    draft = tiny_network(vocabulary=12, grid=(1, 2), layers=1)  # of a flat head
    draft = speculative.Draft(draft, random_params(draft, seed=1)) if drafted else None
    unknown = np.full((1, 2), -1, np.int32)
    drawn = Sampler(network, params, drawing, draft).draw(unknown, jax.random.key(0), samples=DRAWS)
    every = np.stack(np.meshgrid(np.arange(12), np.arange(12), indexing="ij"), axis=-1)
    every = every.reshape(-1, 2).astype(np.int32)
    logits = network.bind(params)(sharding.shard_rows(every)).logits
    p = np.asarray(jax.nn.softmax(logits.astype(jnp.float32) / 0.7), np.float64)
    order = np.argsort(-p, axis=-1)
    ranked = np.take_along_axis(p, order, axis=-1)
    kept = np.take_along_axis(
        np.cumsum(ranked, axis=-1) - ranked < 0.95, np.argsort(order, axis=-1), axis=-1
    )
    assert not kept.all() and kept.sum(axis=-1).min() > 1
    p = p * kept / (p * kept).sum(axis=-1, keepdims=True)
    wanted = DRAWS * np.take_along_axis(p, every[..., None], axis=-1)[..., 0].prod(axis=1)
    found = np.bincount(drawn @ [12, 1], minlength=144)
    assert not found[wanted == 0].any()
    likely = wanted > 5
    found, wanted = (np.append(x[likely], x[~likely].sum()) for x in (found, wanted))
    chi_square = ((found - wanted) ** 2 / np.maximum(wanted, 1)).sum()
    assert likely.sum() > 10
    assert chi_square < likely.sum() + 4 * np.sqrt(2 * likely.sum())


def test_meshes_give_equal_probabilities():
    network = tiny_network(vocabulary=12, levels=LEVELS[12])

    def read(shape):
        with jax.set_mesh(make_mesh(shape)):
            tokens = sharding.global_batch(random_batch(network))["tokens"]
            return jax.device_get(jax.jit(lambda p: network.bind(p)(tokens).logits)(
                random_params(network)))  # fmt: skip

    wanted = read((1, 1, 1))
    for shape in ((1, 2, 2, 2), (2, 1, 4, 1)):
        np.testing.assert_allclose(read(shape), wanted, atol=1e-5)


@one_device
def test_weights_outlive_a_file_and_another_head_is_named(tmp_path):
    coder = config_lib.Autoencoder(widths=(8,), encoder_blocks=1, decoder_blocks=1, levels=(3, 4))
    tokens = config_lib.Tokens("learned", autoencoder=coder)
    model = dataclasses.replace(tiny_network().config, code_head="levels")
    data = config_lib.Data(image_size=16)
    config = config_lib.Config(model=model, tokens=tokens, data=data)
    params = jax.device_get(sharding.by_name(random_params(network_of(config))))
    assert {"head.level_rows", "head.prefix_scale"} < params.keys()
    saved = WeightsFile(model, tokens, 16, params, definition=_tokenizer(coder))
    native.write(saved.checked("here"), tmp_path / "x.safetensors")
    found = native.read(tmp_path / "x.safetensors")
    assert found.network == network_of(config) and found.network.layout.parts[0].levels == (3, 4)
    for name, array in params.items():
        np.testing.assert_array_equal(found.params[name], array)
    flat = dataclasses.replace(config, model=dataclasses.replace(model, code_head="flat"))
    [fault] = found.differing(flat, starts=1)
    assert fault.startswith("config.model.code_head is 'flat', expected 'levels'")


def _tokenizer(config) -> Tokenizer:
    """A tokenizer of random weights."""
    abstract, rng = sharding.abstract(functools.partial(autoencoder.init, config)), generator()
    leaves = sharding.by_name(abstract).items()
    return Tokenizer(
        config, {n: rng.normal(size=x.shape).astype(np.float32) for n, x in leaves}, {}
    )


@pytest.mark.parametrize(
    "tokens",
    [
        config_lib.Tokens(),
        config_lib.Tokens("palette"),
        config_lib.Tokens("learned", autoencoder=config_lib.Autoencoder(quantizer="vq")),
    ],
    ids=["grey", "palette", "vq"],
)
def test_tokens_without_levels_are_refused_in_one_sentence(tokens):
    config = config_lib.Config(model=config_lib.Model(code_head="levels"), tokens=tokens)
    with pytest.raises(InputError, match=r"config.model.code_head is 'levels', .*quantizer=fsq"):
        rules.check(config)


def test_a_vocabulary_that_is_no_product_of_its_levels_is_refused():
    with pytest.raises(ValueError, match="product of the levels"):
        causal(Part("image", 13, (2, 2), levels=(3, 2, 2)))


def test_flops_and_state_are_counted_by_hand():
    """Layers 2, D 32, F 128, T 16; 3 + 2 + 2 levels, 3 and 6 prefixes of the last two."""
    network = tiny_network(vocabulary=12, levels=LEVELS[12])
    weights = 2 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 128)
    attention = 12 * 2 * 16 * 32
    assert flops.training(network).total == 6 * (weights + 7 * 32) + attention
    # All codes: 3 of the first level, then 3 x 2 and 6 x 2 pairs of prefix and level.
    whole = flops.training(network, whole_logits=True).total
    assert whole == 6 * (weights + (3 + 6 + 12) * 32) + attention
    part = network.layout.parts[0]
    assert part.head_vectors == 7 + 3 + 6
    assert of_images(12, (4, 4)).parts[0].head_vectors == 12


def test_decay_and_width_treat_the_rows_as_a_head_and_prefixes_as_an_embedding(one_device):
    network = tiny_network(vocabulary=12, levels=LEVELS[12])
    params = {"head": jax.device_get(random_params(network)["head"])}
    settings = config_lib.Optimizer(name="adamw", learning_rate=0.01, weight_decay=0.1)

    def moved(gradient, **scale):
        update, _ = optimizer.make_optimizer(settings, 10, **scale)
        new, _ = update.update(gradient, update.init(params), params)
        return new["head"]

    zero, ones = (jax.tree.map(lambda x, n=n: np.full_like(x, n), params) for n in (0, 1))
    decayed = moved(zero)
    assert np.any(decayed["level_rows"]) and not np.any(decayed["prefix_scale"])
    one, wide = moved(ones), moved(ones, relative_width=4.0)
    np.testing.assert_allclose(wide["level_rows"], one["level_rows"] / 4, rtol=1e-5)
    np.testing.assert_allclose(wide["prefix_scale"], one["prefix_scale"], rtol=1e-5)


def test_a_plan_holds_no_logits_of_a_step_but_those_of_distillation():
    model = config_lib.Model(layers=2, width=32, heads=2, code_head="levels")
    config = config_lib.Config(
        model=model,
        tokens=config_lib.Tokens("learned"),
        data=config_lib.Data(image_size=64),
        train=config_lib.Train(batch_size=64),
    )
    mesh = sharding.abstract_mesh((1, 1, 1, 1), "cpu", "cpu")
    flat = dataclasses.replace(config, model=dataclasses.replace(model, code_head="flat"))
    levels, plain = (Pretraining(each, ()) for each in (config, flat))
    logits = 4 * 64 * 256 * 4096  # bytes
    assert levels.activations(mesh, 64) < plain.activations(mesh, 64) - 2 * logits / 4
    assert levels.executed(mesh) < plain.executed(mesh)
    taught = Pretraining(config, (levels.network,))
    assert taught.activations(mesh, 64) > levels.activations(mesh, 64) + logits / 4
