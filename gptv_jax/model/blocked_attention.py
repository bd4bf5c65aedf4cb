"""Causal attention for long sequences on a CPU, without the T x T scores of every head.

The blocked form loops over the heads of all rows, and within a head over blocks of queries, each
against all keys up to the block's end. So it holds the scores of one block at a time, at most
T x block, and skips the masked triangle except for squares on the diagonal. The backward pass
computes the probabilities again from the saved logs of the softmax sums (as in FlashAttention, Dao
et al. 2022). docs/results.md has the gain.

Scores are stored keys by queries, [S, b]: their maxima and sums then run along the vector units,
and every product is a plain [m, k] x [k, n], the only form that XLA's CPU backend computes fast.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 256  # queries of a block; 128 is as fast within noise, and slower to compile


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    block: int = BLOCK,
) -> Float[Array, "B T H K"]:
    """Causal attention of one device's rows and heads, `block` queries at a time.

    It computes in float32 whatever the dtype of the inputs, which costs nothing on a CPU.
    """
    return _forward(q, k, v, block)[0]


def _forward(q, k, v, block):
    B, _, H, _ = q.shape
    out, log_sums = jax.lax.map(  # log_sums: the log of the sum of each query's softmax
        lambda inputs: _head_forward(block, *inputs), tuple(_by_head(x) for x in (q, k, v))
    )
    out, log_sums = _by_row(out, B).astype(q.dtype), log_sums.reshape(B, H, -1)
    return out, (q, k, v, out, log_sums)


def _backward(block, saved, gradient):
    q, k, v, out, log_sums = saved
    B, T, H, _ = q.shape
    # The gradient of a softmax subtracts sum_s P dP, which equals sum_k out dout.
    shift = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(axis=-1)
    per_query = (log_sums.reshape(B * H, T), shift.swapaxes(1, 2).reshape(B * H, T))
    gradients = jax.lax.map(
        lambda inputs: _head_backward(block, *inputs),
        (*(_by_head(x) for x in (q, k, v, gradient)), *per_query),
    )
    return tuple(_by_row(x, B).astype(q.dtype) for x in gradients)


blocked_attention.defvjp(_forward, _backward)


def _head_forward(block, q, k, v):
    """Mixed values [T, K] and logs of softmax sums [T] of one head of one row."""
    T, K = q.shape
    q_t, v_t = (q / math.sqrt(K)).T, v.T
    outs, log_sums = [], []
    for start, end in _blocks(T, block):
        scores = _scores(k, q_t, start, end)
        largest = scores.max(axis=0)
        p = jnp.exp(scores - largest[None])
        total = p.sum(axis=0)
        outs.append(v_t[:, :end] @ p / total[None])
        log_sums.append(largest + jnp.log(total))
    return jnp.concatenate(outs, axis=1).T, jnp.concatenate(log_sums)


def _head_backward(block, q, k, v, gradient, log_sums, shift):
    """Gradients of q, k and v, each [T, K], of one head of one row."""
    T, K = q.shape
    q = q / math.sqrt(K)
    q_t, k_t, gradient_t = q.T, k.T, gradient.T
    dq, dk, dv = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for start, end in _blocks(T, block):
        p = jnp.exp(_scores(k, q_t, start, end) - log_sums[None, start:end])
        dp = v[:end] @ gradient_t[:, start:end]
        ds = p * (dp - shift[None, start:end])
        dq.append(k_t[:, :end] @ ds)
        dk = dk.at[:end].add(ds @ q[start:end])
        dv = dv.at[:end].add(p @ gradient[start:end])
    return jnp.concatenate(dq, axis=1).T / math.sqrt(K), dk, dv


def _scores(k, q_t, start, end):
    """Scores [S, b] of keys 0 .. end-1 by queries start .. end-1, -inf where a key is later."""
    scores = k[:end] @ q_t[:, start:end]
    # Only the last square has later keys; masking the whole block would be another pass over it.
    seen = jnp.tri(end - start, dtype=bool).T
    square = jnp.where(seen, scores[start:], -jnp.inf)
    return jax.lax.dynamic_update_slice(scores, square, (start, 0))


def _blocks(T, block):
    return [(start, min(start + block, T)) for start in range(0, T, block)]


def _by_head(x):
    """[B, T, H, K] as float32 [B H, T, K]."""
    B, T, H, K = x.shape
    return x.swapaxes(1, 2).reshape(B * H, T, K).astype(jnp.float32)


def _by_row(x, B):
    """[B H, T, K] as [B, T, H, K]."""
    return x.reshape(B, -1, *x.shape[1:]).swapaxes(1, 2)
