"""Attention: the plain form, which is the reference, and the choice of a faster equivalent form.

`GPT.__call__` decides which positions attend to which, by calling `causal_attention` or
`bidirectional_attention`.

Each device of the mesh computes attention for its rows, heads and, where the sequence is split, its
queries; it gathers keys and values of the whole sequence. They are gathered and not passed round in
a ring because keys and values of one layer are small beside the layer's other activations at the
lengths of images (docs/scaling.md has the arithmetic), because the compiler hides one collective
more easily than a loop of them, and because the same kernels serve with and without the split.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from gptv_jax import sharding
from gptv_jax.model.blocked_attention import blocked_attention
from gptv_jax.model.splash_attention import LANES, make_kernel, splash_attention

LONG = 256  # T from which the blocked form is faster than the plain form on a CPU
CUDNN_HEADS = range(8, 129, 8)  # values of K that cuDNN accepts on every GPU; on Hopper up to 256


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    mask: Bool[Array, "T S"],
) -> Float[Array, "B T H K"]:
    """Scaled dot-product attention; query t sees key s where mask[t, s]. Softmax in float32."""
    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=accumulator)
    scores = jnp.where(mask[None, None], scores / math.sqrt(q.shape[-1]), -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


@jax.named_scope("attention")
def causal_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B T H K"], v: Float[Array, "B T H K"]
) -> Float[Array, "B T H K"]:
    """Attention of every position to itself and all earlier positions, in the fastest form."""
    return _on_every_device(q, k, v, causal=True)


@jax.named_scope("attention")
def bidirectional_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B T H K"], v: Float[Array, "B T H K"]
) -> Float[Array, "B T H K"]:
    """Attention of every position to all positions, in the fastest form."""
    return _on_every_device(q, k, v, causal=False)


def form(
    platform: str, length: int, split: int, *, causal: bool, dtype: str, head_size: int
) -> str:
    """Which form attention takes: "splash", "cudnn", "blocked" or "plain".

    The platform is tpu, gpu or cpu, `length` is T, `split` the number of devices that a sequence is
    split over, `dtype` the dtype of compute, and `head_size` is K.
    """
    if platform == "tpu" and (length // split) % LANES == 0:
        return "splash"
    # cuDNN's causal mask begins with the first query: it cannot serve a part of a split sequence.
    if platform == "gpu" and dtype == "bfloat16" and (split == 1 or not causal):
        return "cudnn" if head_size in CUDNN_HEADS and length % 2 == 0 else "plain"
    if platform == "cpu" and causal and split == 1 and length >= LONG:
        return "blocked"
    return "plain"


def _on_every_device(q, k, v, *, causal: bool):
    """Each device's share of attention; q, k and v have the same sharding."""
    mesh, T = jax.sharding.get_abstract_mesh(), q.shape[1]
    if mesh.empty:
        return _plain(causal, 0, q, k, v)
    spec = P(*jax.typeof(q).sharding.spec[:3], None)  # heads are whole along K
    split = mesh.shape["sequence"] if spec[1] else 1  # decoding splits only rows and heads
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
        # Plans for GPUs are traced without a GPU; the blocked form keeps the arrays cuDNN keeps.
        if chosen in ("cudnn", "blocked"):
            return blocked_attention(q, k, v)
        return _plain(causal, first, q, k, v)

    kernel = kernel_specs = None
    if chosen == "splash":
        kernel, kernel_specs = make_kernel(mesh, q.shape[2], T, split, causal=causal)
    # No check_vma: the kernels do not declare over which mesh axes their results vary.
    in_specs = (kernel_specs, spec, spec, spec)
    return jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)(kernel, q, k, v)


def _plain(causal, first, q, k, v):
    """`attention` where the queries are those of positions `first`, `first` + 1, ..."""
    T, S = q.shape[1], k.shape[1]
    seen = first + jnp.arange(T)[:, None] >= jnp.arange(S)[None]
    return attention(q, k, v, seen if causal else jnp.ones((T, S), bool))
