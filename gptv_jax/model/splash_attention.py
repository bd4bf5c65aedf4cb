"""Attention on a TPU: JAX's splash kernels, which never hold T x T scores and skip what is masked.

Of causal attention the tiles that are masked as a whole are skipped: with n tiles to a side
(n + 1) / 2n of the square is computed.
"""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from gptv_jax.model import remat

LANES = 128  # of a TPU's vector unit; a device's queries and keys come in multiples of it
BLOCK = 512  # queries and keys a tile, where they divide the length


def make_kernel(
    mesh, heads: int, length: int, split: int, *, causal: bool, interpret: bool = False
):
    """The kernel for the heads and positions of a mesh, and how its tables are split over it.

    Args:
      mesh: with axes "tensor", which splits the heads, and "sequence", which may split the queries.
      heads: H, of all devices.
      length: T, of all devices.
      split: parts that the queries are split into, 1 or the size of "sequence".
      causal: whether a position sees itself and earlier ones, or all.
      interpret: emulates the TPU, to try it elsewhere.

    Returns:
      The kernel, an argument of `jax.shard_map`, and the partition specs that it is passed with.
    """
    axis = "sequence" if split > 1 else None
    # The heads are alike, and so are all queries that see everything; which queries a device has
    # matters to a causal mask alone.
    if causal:
        mask, shards, spec = masks.CausalMask((length, length)), split, P(None, axis)
    else:
        mask, shards, spec = masks.FullMask((length // split, length)), 1, P(None, None)
    queries, keys = tile(length // split), tile(length)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * (heads // mesh.shape["tensor"])),
        block_sizes=splash.BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_q_dq=queries,
            block_kv_dq=keys,
        ),
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=remat.PRODUCT,
        interpret=interpret,
    )
    specs = kernel.manual_sharding_spec(NamedSharding(mesh, spec))
    return jax.tree.map(jax.sharding.reshard, kernel, specs), specs


def splash_attention(
    kernel: splash.SplashAttentionKernel,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
) -> Float[Array, "B T H K"]:
    """Attention of one device's own rows, heads and queries, inside `jax.shard_map`."""
    q = q * q.shape[-1] ** -0.5
    by_head = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(*by_head).swapaxes(1, 2)


def tile(length: int) -> int:
    """Queries or keys of a tile, for so many of them on a device."""
    return next(size for size in (BLOCK, 256, LANES, 1) if length % size == 0)
