import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh, random_batch, random_params, tiny_network
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import attention
from gptv_jax.model.layout import Part, causal_mask, full_mask, prefixed
from gptv_jax.planning import topology
from gptv_jax.train.step import make_loss

T, BLOCK = 11, 4  # two whole blocks and a part of one
QUERIES = jax.sharding.PartitionSpec(sharding.BATCH, "sequence", "tensor", None)
WHOLE = jax.sharding.PartitionSpec(sharding.BATCH, None, "tensor", None)


def draw(count, shape=(8, T, 4, 6), spec=QUERIES):
    """Arrays [B, T, H, K], split over the mesh as queries, keys and values are."""
    rng = np.random.default_rng(0)
    placed = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
    return [jax.device_put(rng.normal(size=shape).astype(np.float32), placed) for _ in range(count)]


def prefix(length: int) -> tuple[int, ...]:
    """The mask of a task that writes after an image, such as detection.

    The prefix ends within a block of queries.
    """
    return prefixed(Part("image", 0, (length // 2,)), Part("boxes", 7, (-(-length // 2),))).visible


# How many positions each of `length` positions sees.
MASKS = {
    "causal": causal_mask,
    "bidirectional": full_mask,
    "prefix": prefix,
    "frames": lambda length: tuple(min(3 * (t // 3 + 1), length) for t in range(length)),
}


def plain(q, k, v, mask="causal"):
    visible = np.array(MASKS[mask](q.shape[1]))
    return attention.attention(q, k, v, jnp.array(np.arange(q.shape[1]) < visible[:, None]))


def blocked(q, k, v, block=BLOCK, mask="causal"):
    """The blocked form, which is of one device, on every device."""
    spec, visible = jax.typeof(q).sharding.spec, MASKS[mask](q.shape[1])
    local = lambda *inputs: attention.blocked_attention(*inputs, visible, block)  # noqa: E731
    return jax.shard_map(local, in_specs=3 * (spec,), out_specs=spec, check_vma=False)(q, k, v)


def output_and_gradients(attend, q, k, v, direction):
    """The mixed values, and the gradients of q, k and v along a direction, as NumPy in float32."""

    @jax.jit
    def run(q, k, v, direction):
        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(direction)

    return [np.asarray(x, np.float32) for x in run(q, k, v, direction)]


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("block", [4, 11, 16], ids=lambda block: f"block{block}")
def test_blocked_form_and_its_gradients_are_those_of_the_plain_form(block, mask):
    inputs = draw(4, spec=WHOLE)
    wanted = output_and_gradients(functools.partial(plain, mask=mask), *inputs)
    found = output_and_gradients(functools.partial(blocked, block=block, mask=mask), *inputs)
    for f, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(f, w, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("one_device")
def test_bfloat16_errs_no_more_than_the_plain_form():
    inputs = draw(4, spec=WHOLE)
    half = [x.astype(jnp.bfloat16) for x in inputs]
    exact = output_and_gradients(plain, *(x.astype(jnp.float32) for x in half))
    found, rounded = output_and_gradients(blocked, *half), output_and_gradients(plain, *half)
    for f, r, e in zip(found, rounded, exact, strict=True):
        assert 0 < np.abs(f - e).mean() <= np.abs(r - e).mean()
    assert blocked(*half[:3]).dtype == jnp.bfloat16


@pytest.mark.usefixtures("one_device")
def test_scores_far_from_zero_neither_overflow_nor_vanish():
    q, k, v, direction = draw(4, spec=WHOLE)
    inputs = (100 * q, k, v, direction)  # plain exponentials of such scores are inf or 0
    found, wanted = (output_and_gradients(f, *inputs) for f in (blocked, plain))
    for f, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(f, w, rtol=0, atol=1e-5 * np.abs(w).max())


@pytest.mark.usefixtures("one_device")
def test_changing_a_position_changes_what_comes_after_it_and_nothing_before():
    inputs = draw(4, (1, T, 2, 6), WHOLE)[:3]
    attend = jax.jit(blocked)
    base = np.asarray(attend(*inputs))
    for s in range(T):
        _, k, v = (x.at[:, s].add(1.0) for x in inputs)
        found = np.asarray(attend(inputs[0], k, v))
        np.testing.assert_array_equal(found[:, :s], base[:, :s])
        assert (np.abs(found - base)[:, s:].max(axis=-1) > 1e-6).all()


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_meshes_change_no_number_and_no_sharding(shape):
    with jax.set_mesh(make_mesh((1, 1, 1))):
        wanted = output_and_gradients(blocked, *draw(4))
    with jax.set_mesh(make_mesh(shape)):
        inputs = draw(4)
        found = output_and_gradients(blocked, *inputs)
        out, backward = jax.vjp(blocked, *inputs[:3])
        for x in (out, *backward(out)):
            assert x.sharding == inputs[0].sharding
    for f, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(f, w, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_devices_tell_each_other_nothing(shape):
    with jax.set_mesh(make_mesh(shape)):
        program = jax.jit(lambda *x: jax.vjp(blocked, *x[:3])[1](x[3])).lower(*draw(4))
        text = program.compile().as_text()
    assert "while" in text
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "permute("))


def loss_and_gradients(shape=(1, 1, 1), **changes):
    network = tiny_network(**changes)
    with jax.set_mesh(make_mesh(shape)):
        batch = sharding.global_batch(random_batch(network))
        loss = make_loss(network)
        gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, None, batch, None)[0]))
        return jax.device_get(gradient(random_params(network)))


@pytest.fixture(scope="module")
def plain_network():
    return loss_and_gradients()


WALKS = [
    ((1, 1, 1), False, "none"),
    ((1, 1, 1), True, "dots"),
    ((1, 1, 1), False, "full"),
    ((2, 2, 2), True, "full"),
]


@pytest.mark.parametrize(("shape", "scan", "remat"), WALKS, ids=str)
def test_network_does_not_notice_the_form(shape, scan, remat, plain_network, monkeypatch):
    calls = []

    def forced(q, k, v, *, visible):
        calls.append(visible == causal_mask(16))
        return blocked(q, k, v, block=5)

    monkeypatch.setattr(attention, "self_attention", forced)
    loss, grads = loss_and_gradients(shape, scan_layers=scan, remat=remat)
    assert calls and all(calls)
    np.testing.assert_allclose(loss, plain_network[0], rtol=1e-5)
    for (path, f), w in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(plain_network[1]), strict=True
    ):
        scale = np.abs(w).max() + 1e-30
        np.testing.assert_allclose(f / scale, w / scale, atol=1e-5, rtol=0, err_msg=str(path))


@pytest.mark.usefixtures("one_device")
def test_long_sequences_on_a_cpu_take_the_blocked_form_and_others_the_plain_one(monkeypatch):
    def walks_over_heads(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 2), jnp.float32)
        attend = functools.partial(attention.self_attention, visible=causal_mask(length))
        return "scan" in str(jax.make_jaxpr(attend)(x, x, x))

    assert walks_over_heads(attention.LONG) and not walks_over_heads(attention.LONG - 1)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    assert not walks_over_heads(attention.LONG)


def test_form_follows_the_devices_of_the_mesh_and_not_this_process():
    mesh = make_mesh((2, 2, 2)).abstract_mesh
    tpu = jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
    for other, platform in ((mesh, "cpu"), (mesh.update(abstract_device=tpu), "tpu")):
        with jax.sharding.use_abstract_mesh(other):
            assert sharding.platform() == platform


# A sequence that is split.

# Every mask over one axis, and those of two kernels over all axes.
SPLIT = [((1, 1, 8, 1), mask) for mask in MASKS]
SPLIT += [((1, 2, 2, 2), mask) for mask in ("causal", "frames")]


def attend(mask, q, k, v):
    return attention.self_attention(q, k, v, visible=MASKS[mask](q.shape[1]))


FORMS = {mask: functools.partial(attend, mask) for mask in MASKS}


@pytest.mark.parametrize(("shape", "mask"), SPLIT, ids=str)
def test_splitting_the_sequence_changes_no_number_and_gathers_keys_and_values_alone(shape, mask):
    whole = (8, 16, 4, 6)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        wanted = output_and_gradients(FORMS[mask], *draw(4, whole))
    with jax.set_mesh(make_mesh(shape)):
        inputs = draw(4, whole)
        found = output_and_gradients(FORMS[mask], *inputs)
        out, backward = jax.vjp(FORMS[mask], *inputs[:3])
        for x in (out, *backward(out)):
            assert x.sharding == inputs[0].sharding
        program = jax.jit(lambda *x: jax.vjp(FORMS[mask], *x[:3])[1](x[3])).lower(*inputs)
        text = program.compile().as_text()
    for f, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(f, w, rtol=0, atol=1e-6)
    assert "all-gather" in text and "reduce-scatter" in text
    assert not any(name in text for name in ("all-reduce(", "all-to-all", "permute("))


def emulate_tpu(monkeypatch):
    emulated = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", emulated)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["plain", "blocked", "splash"])
def test_a_position_reaches_the_positions_that_see_the_position_and_no_others(
    kind, mask, monkeypatch
):
    if kind == "splash":
        emulate_tpu(monkeypatch)
    length = 128 if kind == "splash" else 11
    by_kind = {"blocked": functools.partial(blocked, mask=mask)}
    q, k, v, direction = draw(4, (1, length, 1, 64), WHOLE)
    run = jax.jit(lambda k, v: jax.vjp(by_kind.get(kind, FORMS[mask]), q, k, v))
    visible, (base, _) = np.array(MASKS[mask](length)), run(k, v)
    of = jax.jit(lambda direction: jax.vjp(by_kind.get(kind, FORMS[mask]), q, k, v)[1](direction))
    for s in {0, 1, 3, length // 2, length // 2 + 1, length - 1}:
        moved = np.abs(run(k.at[:, s].add(1), v.at[:, s].add(1))[0] - base).max(axis=(0, 2, 3))
        assert (moved[visible <= s] == 0).all() and (moved[visible > s] > 1e-7).all()
        alone = jnp.zeros_like(direction).at[:, s].set(direction[:, s])
        for gradient in of(alone)[1:]:
            size = np.abs(gradient).max(axis=(0, 2, 3))
            assert (size[visible[s] :] == 0).all()
            # A single key has all the weight, whatever the key is.
            assert (size[: visible[s]] > 0).all() or visible[s] == 1


# The kernels for a TPU: emulated here for their numbers, compiled for the real one in earnest.


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 2, 2)], ids=str)
def test_splash_attention_and_its_gradients_are_those_of_the_plain_form(shape, mask, monkeypatch):
    whole = (1, 256, 2, 64)
    with jax.set_mesh(make_mesh(shape)):
        inputs = draw(4, whole)
        monkeypatch.setattr(attention, "LONG", np.inf)
        wanted = output_and_gradients(FORMS[mask], *inputs)
        emulate_tpu(monkeypatch)
        found = output_and_gradients(FORMS[mask], *inputs)
    for f, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(f, w, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def tpu():
    """A mesh of a TPU v5e with four chips, which this machine does not have."""
    # Programs for devices that are not here can be written to the compilation cache, but not read.
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, float("inf"))
    yield sharding.make_mesh(config_lib.Mesh(1, 1, 2, 2), topology.parse("v5e:2x2").devices())
    jax.config.update(name, before)


@pytest.mark.parametrize(
    ("mask", "head_size"),
    [("causal", 64), ("causal", 96), ("causal", 128), ("causal", 192), ("prefix", 64)],
)
def test_splash_attention_compiles_for_a_tpu_without_t_by_t_scores(tpu, mask, head_size):
    batch, length = 2, 1024
    with jax.set_mesh(tpu):
        placed = jax.sharding.NamedSharding(tpu, QUERIES)
        shape = (batch, length, 4, head_size)
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed)

        def gradients(*inputs):
            out, backward = jax.vjp(FORMS[mask], *inputs)
            return backward(out)

        compiled = jax.jit(gradients).lower(x, x, x).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3  # forward, dq, and dk with dv
    scores = batch * 2 * (length // 2) * length * 4  # bytes on one device, of heads, queries, keys
    assert compiled.memory_analysis().temp_size_in_bytes < scores


# A GPU


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("mask", MASKS)
def test_a_gpu_in_bfloat16_runs_cudnn_on_each_devices_own_rows_and_heads(mask, shape, monkeypatch):
    """JAX's call of cuDNN is replaced by the same call of XLA, which runs without a GPU."""
    calls, original = [], jax.nn.dot_product_attention

    def recorded(q, k, v, *, mask, is_causal, implementation):
        shapes = q.shape, k.shape, v.shape, None if mask is None else mask.shape
        calls.append((*shapes, q.dtype, is_causal, implementation))
        return original(q, k, v, mask=mask, is_causal=is_causal, implementation="xla")

    with jax.set_mesh(make_mesh((1, 1, 1))):
        inputs = [x.astype(jnp.bfloat16) for x in draw(3, (8, 128, 4, 64), WHOLE)]
        exact = [x.astype(jnp.float32) for x in inputs]
        wanted = np.asarray(jax.jit(functools.partial(plain, mask=mask))(*exact))
    with jax.set_mesh(make_mesh(shape)):
        inputs = [x.astype(jnp.bfloat16) for x in draw(3, (8, 128, 4, 64))]
        monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
        monkeypatch.setattr(sharding, "platform", lambda: "gpu")
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        found = jax.jit(FORMS[mask])(*inputs)
    local = (8 // (shape[0] * shape[1]), 128, 4 // shape[2], 64)
    known = mask in ("causal", "bidirectional")  # to cuDNN, which then skips masked tiles
    of_mask = None if known else (1, 1, 128, 128)
    kinds = jnp.bfloat16, mask == "causal", "cudnn"
    assert calls == [(local, local, local, of_mask, *kinds)]
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, atol=2e-2)


@pytest.mark.parametrize(
    "changed",
    [{"visible": full_mask(256)}, {"split": 2}, {"visible": causal_mask(127)}],
    ids=["full", "split", "short"],
)
def test_what_the_blocked_form_does_not_do_a_cpu_computes_in_the_plain_one(changed):
    kind = {"visible": causal_mask(256), "split": 1, "dtype": "float32", "head_size": 64}
    assert attention.form("cpu", **kind) == "blocked"
    assert attention.form("cpu", **kind | {"visible": MASKS["prefix"](256)}) == "blocked"
    assert attention.form("cpu", **kind | changed) == "plain"


@pytest.mark.parametrize(
    "changed",
    [{"dtype": "float32"}, {"head_size": 12}, {"head_size": 136}, {"split": 2}, {"length": 49}],
    ids=str,
)
def test_what_cudnn_does_not_take_a_gpu_computes_in_the_plain_form(changed):
    def form(length=64, split=1, dtype="bfloat16", head_size=64):
        return attention.form("gpu", causal_mask(length), split, dtype, head_size)

    assert form() == "cudnn" and form(**changed) == "plain"
