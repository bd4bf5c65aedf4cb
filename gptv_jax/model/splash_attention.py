"""Attention on a TPU: JAX's splash kernels, which never hold T x T scores and skip masked tiles.

For a causal mask with n tiles a side, (n + 1) / 2n of the square of scores is computed.
"""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from gptv_jax.model import remat

LANES = 128  # of a TPU's vector unit; the kernels take multiples of 128 queries and keys a device
BLOCK = 512  # queries and keys of a tile, where 512 divides the length


def make_kernel(
    mesh, heads: int, length: int, split: int, *, causal: bool, interpret: bool = False
):
    """The kernel, to be an argument of `jax.shard_map`, and its partition specs there.

    Args:
      mesh: its axis "tensor" splits the heads.
      heads: H, of all devices.
      length: T, of all devices.
      split: into how many parts the axis "sequence" splits the queries; 1: not.
      causal: whether a position sees itself and earlier positions, or all.
      interpret: emulates the TPU, for tests on other platforms.
    """
    axis = "sequence" if split > 1 else None
    # All heads have the same mask. Only with a causal mask does it matter which queries a device
    # has.
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
    """Attention of one device's rows, heads and queries, inside `jax.shard_map`."""
    q = q * q.shape[-1] ** -0.5
    by_head = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(*by_head).swapaxes(1, 2)


def tile(length: int) -> int:
    """Queries or keys of a tile where a device has `length` of them."""
    return next(size for size in (BLOCK, 256, LANES, 1) if length % size == 0)
