"""Attention: the plain form, which says what is meant, and the choice of a fast one.

Over the mesh every device attends with its own rows, heads and, where the sequence is split, its
own queries, for which it gathers the keys and values of the whole sequence. Gathered, not passed
round in a ring: keys and values of one layer are small beside its other activations at the lengths
of images (docs/scaling.md has the arithmetic), one collective is simpler for the compiler to hide
than a loop of them, and the same kernels serve as without the split.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from gptv_jax import sharding
from gptv_jax.model.blocked_attention import blocked_attention
from gptv_jax.model.splash_attention import LANES, make_kernel, splash_attention

LONG = 256  # T from which, on a CPU, the blocked form is the faster one
CUDNN_HEADS = range(8, 129, 8)  # K that cuDNN takes on every GPU; on Hopper, up to 256


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    mask: Bool[Array, "T S"],
) -> Float[Array, "B T H K"]:
    """Scaled dot-product attention; position t sees s where mask[t, s]. Softmax in float32."""
    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=accumulator)
    scores = jnp.where(mask[None, None], scores / math.sqrt(q.shape[-1]), -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


@jax.named_scope("attention")
def causal_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B T H K"], v: Float[Array, "B T H K"]
) -> Float[Array, "B T H K"]:
    """`attention` of every position to itself and all earlier ones, in the form that is fastest."""
    return _over_the_mesh(q, k, v, causal=True)


@jax.named_scope("attention")
def bidirectional_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B T H K"], v: Float[Array, "B T H K"]
) -> Float[Array, "B T H K"]:
    """`attention` of every position to all, in the form that is fastest."""
    return _over_the_mesh(q, k, v, causal=False)


def form(
    platform: str, length: int, split: int, *, causal: bool, dtype: str, head_size: int
) -> str:
    """Which form attention takes: "splash", "cudnn", "blocked" or "plain".

    Args:
      platform: tpu, gpu or cpu.
      length: T.
      split: parts of the sequence, on a device each.
      causal: whether a position sees itself and earlier ones, or all.
      dtype: of compute.
      head_size: K.
    """
    if platform == "tpu" and (length // split) % LANES == 0:
        return "splash"
    # Of a causal mask cuDNN only knows the one that begins with the first query.
    if platform == "gpu" and dtype == "bfloat16" and (split == 1 or not causal):
        return "cudnn" if head_size in CUDNN_HEADS and length % 2 == 0 else "plain"
    if platform == "cpu" and causal and split == 1 and length >= LONG:
        return "blocked"
    return "plain"


def _over_the_mesh(q, k, v, *, causal: bool):
    """Each device's share of the work; q, k and v are split alike."""
    mesh, T = jax.sharding.get_abstract_mesh(), q.shape[1]
    if mesh.empty:
        return _plain(causal, 0, q, k, v)
    spec = P(*jax.typeof(q).sharding.spec[:3], None)  # the whole of K, with each head
    split = mesh.shape["sequence"] if spec[1] else 1  # decoding splits rows and heads alone
    kind = {"dtype": q.dtype.name, "head_size": q.shape[-1]}
    chosen = form(sharding.platform(), T, split, causal=causal, **kind)

    def local(kernel, q, k, v):
        first = 0
        if split > 1:
            first = jax.lax.axis_index("sequence") * (T // split)
            k, v = (jax.lax.all_gather(x, "sequence", axis=1, tiled=True) for x in (k, v))
        if kernel is not None:
            return splash_attention(kernel, q, k, v)
        if chosen == "cudnn" and jax.default_backend() == "gpu":
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
        if chosen in ("cudnn", "blocked"):  # cuDNN is planned for elsewhere, by what it keeps: this
            return blocked_attention(q, k, v)
        return _plain(causal, first, q, k, v)

    kernel = kernel_specs = None
    if chosen == "splash":
        kernel, kernel_specs = make_kernel(mesh, q.shape[2], T, split, causal=causal)
    # The kernels say nothing of which axes their results vary over; all of them are in the specs.
    in_specs = (kernel_specs, spec, spec, spec)
    return jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)(kernel, q, k, v)


def _plain(causal, first, q, k, v):
    """`attention` of the queries of positions `first` and following."""
    T, S = q.shape[1], k.shape[1]
    seen = first + jnp.arange(T)[:, None] >= jnp.arange(S)[None]
    return attention(q, k, v, seen if causal else jnp.ones((T, S), bool))
