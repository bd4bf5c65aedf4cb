"""Attention: the plain form, which is the reference, and the choice of a faster equivalent form.

Each device of the mesh computes attention for its rows, heads and, where the sequence is split, its
queries; it gathers keys and values of the whole sequence. They are gathered and not passed round in
a ring because keys and values of one layer are small beside the layer's other activations at the
lengths of images (docs/scaling.md has the arithmetic), because the compiler hides one collective
more easily than a loop of them, and because the same kernels serve with and without the split.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jaxtyping import Array, Bool, Float

from gptv_jax import sharding
from gptv_jax.model.layers import PRODUCT, accumulator
from gptv_jax.model.layout import causal_mask, full_mask

with epy.lazy_imports():  # slow to import, and for TPUs alone
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LONG = 128  # T from which the blocked form is faster than the plain form on a CPU
BLOCK = 256  # queries of the blocked form; 128 is slower, see docs/results.md
CUDNN_HEADS = range(8, 129, 8)  # values of K that cuDNN accepts on every GPU; on Hopper up to 256
LANES = 128  # of a TPU's vector unit; splash takes multiples of 128 queries and keys a device
SPLASH_TILE = 512  # queries and keys of a tile at most; a tile divides their number on a device


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    mask: Bool[Array, "T S"],
) -> Float[Array, "B T H K"]:
    """Scaled dot-product attention; query t sees key s where mask[t, s]. Softmax in float32."""
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=accumulator(q))
    scores = jnp.where(mask[None, None], scores / math.sqrt(q.shape[-1]), -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def form(platform: str, visible: tuple[int, ...], split: int, dtype: str, head_size: int) -> str:
    """Which form attention takes: "splash", "cudnn", "blocked" or "plain".

    The platform is tpu, gpu or cpu, `visible` the mask, see `self_attention`, `split` the number of
    devices that a sequence is split over, `dtype` the dtype of compute, and `head_size` is K.
    """
    length = len(visible)
    causal, full = visible == causal_mask(length), visible == full_mask(length)
    if platform == "tpu" and (length // split) % LANES == 0:
        return "splash"
    # cuDNN's causal mask begins with the first query: it cannot serve a part of a split sequence.
    if platform == "gpu" and dtype == "bfloat16" and (split == 1 or not causal):
        return "cudnn" if head_size in CUDNN_HEADS and length % 2 == 0 else "plain"
    return (
        "blocked" if platform == "cpu" and not full and split == 1 and length >= LONG else "plain"
    )


@jax.named_scope("attention")
def self_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    *,
    visible: tuple[int, ...],
) -> Float[Array, "B T H K"]:
    """Attention in the fastest form; q, k and v have one sharding.

    Position t attends to positions 0 .. visible[t] - 1, see `Layout`; `visible` has T numbers.
    """
    mesh, T = jax.sharding.get_abstract_mesh(), q.shape[1]
    if mesh.empty:
        return attention(q, k, v, _mask(visible, 0, T))
    spec = jax.P(*jax.typeof(q).sharding.spec[:3], None)  # heads are whole along K
    split = mesh.shape["sequence"] if spec[1] else 1  # decoding splits only rows and heads
    chosen = form(sharding.platform(), visible, split, q.dtype.name, head_size=q.shape[-1])

    def local(kernel, q, k, v):
        first = 0
        if split > 1:
            first = jax.lax.axis_index("sequence") * (T // split)
            k, v = (jax.lax.all_gather(x, "sequence", axis=1, tiled=True) for x in (k, v))
        if kernel is not None:  # of one row, [H, T, K], with scaled queries
            by_head = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
            return jax.vmap(kernel)(*by_head).swapaxes(1, 2)
        if chosen == "cudnn" and jax.default_backend() == "gpu":
            known = visible in (causal_mask(T), full_mask(T))
            mask = None if known else _mask(visible, first, q.shape[1])[None, None]
            kind = {"is_causal": visible == causal_mask(T), "implementation": "cudnn"}
            return jax.nn.dot_product_attention(q, k, v, mask=mask, **kind)
        # Plans for GPUs are traced without a GPU; the blocked form keeps the arrays cuDNN keeps.
        if chosen in ("cudnn", "blocked"):  # of a split sequence, the plan is of the last device's
            return blocked_attention(q, k, v, visible[-q.shape[1] :])
        return attention(q, k, v, _mask(visible, first, q.shape[1]))

    kernel = kernel_specs = None
    if chosen == "splash":
        kernel, kernel_specs = _splash_kernel(mesh, q.shape[2], visible, split)
    # No check_vma: the kernels do not declare over which mesh axes their results vary.
    in_specs = (kernel_specs, spec, spec, spec)
    return jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)(kernel, q, k, v)


def _mask(visible, first, count) -> Bool[Array, "count S"]:
    """The keys that `count` queries see, from the query at position `first` on."""
    seen = jax.lax.dynamic_slice_in_dim(jnp.array(visible), first, count)
    return jnp.arange(len(visible))[None] < seen[:, None]


def _splash_kernel(mesh, heads: int, visible: tuple[int, ...], split: int):
    """JAX's splash kernel for TPUs, an argument of `jax.shard_map`, and its partition specs there.

    The kernel never holds T x T scores and skips masked tiles: of a causal mask with n tiles a side
    it computes (n + 1) / 2n of the square of scores. The mesh's axis "tensor" splits the heads, and
    its axis "sequence" the queries into `split` parts.
    """
    # One mask serves all heads. A mask that hides anything depends on which queries a device has.
    length, shards = len(visible), split
    if visible == causal_mask(length):
        mask = masks.CausalMask((length, length))
    elif visible == full_mask(length):
        mask, shards = masks.FullMask((length // split, length)), 1
    else:
        mask = masks.NumpyMask(np.arange(length)[None] < np.array(visible)[:, None])
    queries, keys = (math.gcd(count, SPLASH_TILE) for count in (length // split, length))
    of_queries = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), queries)
    of_keys = dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dq"), keys)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * (heads // mesh.shape["tensor"])),
        block_sizes=splash.BlockSizes(**of_queries, **of_keys),
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=PRODUCT,
    )
    spec = jax.P(None, "sequence" if shards > 1 else None)
    specs = kernel.manual_sharding_spec(jax.NamedSharding(mesh, spec))
    return jax.tree.map(jax.sharding.reshard, kernel, specs), specs


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def blocked_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    visible: tuple[int, ...],
    block: int = BLOCK,
) -> Float[Array, "B T H K"]:
    """Attention of one device's rows and heads on a CPU, `block` queries at a time.

    The blocked form loops over the heads of all rows, and within a head over blocks of queries,
    each against all keys that its last query sees. So it holds the scores of one block at a time,
    at most T x block, and skips what no query of a block sees. Only keys that the block's first
    query does not see are masked. The backward
    pass computes the probabilities again from the saved logs of the softmax sums (as in
    FlashAttention, Dao et al. 2022). Everything is in float32, which costs nothing on a CPU.
    docs/results.md has the gain.

    Scores are stored keys by queries, [S, b]: their maxima and sums then run along the vector
    units, and every product is a plain [m, k] x [k, n], the only form that XLA's CPU backend
    computes fast.
    """
    return _blocked_forward(q, k, v, visible, block)[0]


def _blocked_forward(q, k, v, visible, block):
    B, _, H, _ = q.shape
    heads = tuple(_by_head(x) for x in (q, k, v))
    # log_sums: the log of the sum of each query's softmax
    out, log_sums = jax.lax.map(lambda head: _head_forward(visible, block, *head), heads)
    out, log_sums = _by_row(out, B).astype(q.dtype), log_sums.reshape(B, H, -1)
    return out, (q, k, v, out, log_sums)


def _blocked_backward(visible, block, saved, gradient):
    q, k, v, out, log_sums = saved
    B, T, H, _ = q.shape
    # The gradient of a softmax subtracts sum_s P dP, which equals sum_k out dout.
    shift = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(axis=-1)
    per_query = (log_sums.reshape(B * H, T), shift.swapaxes(1, 2).reshape(B * H, T))
    heads = (*(_by_head(x) for x in (q, k, v, gradient)), *per_query)
    gradients = jax.lax.map(lambda head: _head_backward(visible, block, *head), heads)
    return tuple(_by_row(x, B).astype(q.dtype) for x in gradients)


blocked_attention.defvjp(_blocked_forward, _blocked_backward)


def _head_forward(visible, block, q, k, v):
    """Mixed values [T, K] and logs of softmax sums [T] of one head of one row."""
    q_t, v_t = (q / math.sqrt(q.shape[1])).T, v.T
    outs, log_sums = [], []
    for start in range(0, len(q), block):
        seen = visible[start : start + block]
        scores = _scores(k, q_t[:, start : start + block], seen)
        largest = scores.max(axis=0)
        p = jnp.exp(scores - largest[None])
        total = p.sum(axis=0)
        outs.append(v_t[:, : seen[-1]] @ p / total[None])
        log_sums.append(largest + jnp.log(total))
    return jnp.concatenate(outs, axis=1).T, jnp.concatenate(log_sums)


def _head_backward(visible, block, q, k, v, gradient, log_sums, shift):
    """Gradients of q, k and v, each [T, K], of one head of one row."""
    T, K = q.shape
    q = q / math.sqrt(K)
    q_t, k_t, gradient_t = q.T, k.T, gradient.T
    dq, dk, dv = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for start in range(0, T, block):
        rows, seen = slice(start, start + block), visible[start : start + block]
        end = seen[-1]
        p = jnp.exp(_scores(k, q_t[:, rows], seen) - log_sums[None, rows])
        dp = v[:end] @ gradient_t[:, rows]
        ds = p * (dp - shift[None, rows])
        dq.append(k_t[:, :end] @ ds)
        dk = dk.at[:end].add(ds @ q[rows])
        dv = dv.at[:end].add(p @ gradient[rows])
    return jnp.concatenate(dq, axis=1).T / math.sqrt(K), dk, dv


def _scores(k, q_t, seen):
    """Scores [S, b] of keys 0 .. seen[-1]-1 by b queries, -inf where a query does not see a key."""
    scores = k[: seen[-1]] @ q_t
    # All queries see the keys up to `first`; masking the others alone saves a pass over the block.
    first = seen[0] - 1
    masked = jnp.arange(first, seen[-1])[:, None] < jnp.array(seen)[None]
    masked = jnp.where(masked, scores[first:], -jnp.inf)
    return jax.lax.dynamic_update_slice(scores, masked, (first, 0))


def _by_head(x):
    """[B, T, H, K] as float32 [B H, T, K]."""
    B, T, H, K = x.shape
    return x.swapaxes(1, 2).reshape(B * H, T, K).astype(jnp.float32)


def _by_row(x, B):
    """[B H, T, K] as [B, T, H, K]."""
    return x.reshape(B, -1, *x.shape[1:]).swapaxes(1, 2)
