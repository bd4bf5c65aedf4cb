"""The parts of the network: parameters, norm, MLP and the block that joins them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import remat, rotary

EPSILON = 1e-5  # of the norm, as in openai/image-gpt


def init(module: type[nnx.Module], *arguments, key: PRNGKeyArray) -> dict:
    """Fresh weights of `module(*arguments)` as a nested dict; call it under a mesh, inside jit."""
    return nnx.to_pure_dict(nnx.state(module(*arguments, rngs=nnx.Rngs(key)), nnx.Param))


def bind(module: type[nnx.Module], *arguments, params: dict) -> nnx.Module:
    """The module that `module(*arguments)` makes, with these weights; arguments are hashable."""
    return nnx.merge(_graphdef(module, *arguments), params)


@functools.cache
def _graphdef(module, *arguments):
    return nnx.graphdef(nnx.eval_shape(lambda: module(*arguments, rngs=nnx.Rngs(0))))


def normal(rngs: nnx.Rngs, name: str, shape: tuple[int, ...], std: float) -> nnx.Param:
    """Float32 N(0, std) parameter, drawn in the sharding that `sharding.PARAMETERS` has."""
    draw = jax.random.normal(rngs.params(), shape, out_sharding=sharding.PARAMETERS[name])
    return nnx.Param(std * draw)


def constant(name: str, shape: tuple[int, ...], value: float) -> nnx.Param:
    """Float32 parameter of one value, in the sharding that `sharding.PARAMETERS` has."""
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=sharding.PARAMETERS[name]))


def accumulator(x: Array) -> jnp.dtype:
    """Dtype for sums over `x`: float32, or float64 if `x` is float64."""
    return jnp.promote_types(x.dtype, jnp.float32)


def rms_norm(x: Float[Array, "*any D"], gain: Float[Array, "D"]) -> Float[Array, "*any D"]:
    """X / sqrt(mean(x^2) + 1e-5) * gain: no centring, no bias (openai/image-gpt, `norm`)."""
    mean_square = jnp.mean(jnp.square(x.astype(accumulator(x))), axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(mean_square + EPSILON).astype(x.dtype)
    return x * scale * jnp.expand_dims(gain.astype(x.dtype), range(x.ndim - 1))


def quick_gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """X * sigmoid(1.702 x) (openai/image-gpt, `gelu2`)."""
    return x * jax.nn.sigmoid(1.702 * x)


def project(
    equation: str,
    x: Float[Array, "B T *inputs"],
    weight: Float[Array, "*weight"],
    out_sharding: PartitionSpec | None = None,
) -> Float[Array, "B T *outputs"]:
    """`jnp.einsum(equation, x, weight)` in the dtype of `x`, with the weight gathered over fsdp.

    Both gradients are einsums of their own, for three reasons. The backward pass gathers the weight
    again, so that no device keeps whole weights. The weight's gradient is requested in the weight's
    sharding: the sum over the batch and the split over fsdp are then one reduce-scatter, not an
    all-reduce of twice the bytes. And JAX's rule would compute that gradient transposed, for which
    XLA's CPU matrix product takes 2.5 times as long (docs/results.md).

    The result is named `remat.PRODUCT`, so that rematerialisation can keep it.
    """
    return checkpoint_name(_project(equation, x, weight, out_sharding), remat.PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _project(equation, x, weight, out_sharding):
    whole = sharding.gather(weight, x.dtype)
    return jnp.einsum(equation, x, whole, out_sharding=out_sharding)


def _project_forward(equation, x, weight, out_sharding):
    return _project(equation, x, weight, out_sharding), (x, weight)


def _project_backward(equation, _, saved, gradient):
    x, weight = saved
    inputs, outputs = equation.split("->")
    left, right = inputs.split(",")

    def like(primal, equation, a, b):
        return jnp.einsum(equation, a, b, out_sharding=jax.typeof(primal).sharding.spec)

    whole = sharding.gather(weight, x.dtype)
    of_weight = like(weight, f"{left},{outputs}->{right}", x, gradient)
    return (
        like(x, f"{outputs},{right}->{left}", gradient, whole),
        of_weight.astype(weight.dtype),
    )


_project.defvjp(_project_forward, _project_backward)


class Block(nnx.Module):
    """Weights of all L layers, stacked on a leading axis; a call takes one layer's slice."""

    def __init__(self, config: config_lib.Model, *, rngs: nnx.Rngs):
        L, D, H = config.layers, config.width, config.heads
        K, F = D // H, config.mlp_width
        self.config = config
        # Standard deviations of the released code: only attention's output shrinks with depth. The
        # released 0.02 of the MLP, the same for all widths, holds at muP's base width.
        mlp = 0.02 * config.relative_width**-0.5
        self.norm_1 = constant("norm_1", (L, D), 1.0)
        self.qkv = normal(rngs, "qkv", (L, D, 3, H, K), D**-0.5)
        self.attention_out = normal(rngs, "attention_out", (L, H, K, D), (D * L) ** -0.5)
        self.norm_2 = constant("norm_2", (L, D), 1.0)
        if config.mlp == "swiglu":
            self.mlp_gate_up = normal(rngs, "mlp_gate_up", (L, D, 2, F), mlp)
        else:
            self.mlp_in = normal(rngs, "mlp_in", (L, D, F), mlp)
        self.mlp_out = normal(rngs, "mlp_out", (L, F, D), mlp)
        if config.qk_norm:
            self.q_norm = constant("q_norm", (L, K), 1.0)
            self.k_norm = constant("k_norm", (L, K), 1.0)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: Callable,
        key: PRNGKeyArray | None = None,
        rotation: rotary.Rotation | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """One pre-norm layer.

        Args:
          x: the residual stream.
          attend: maps (q, k, v), each [B, T, H, K], to mixed values [B, T, H, K]; the caller
            decides which keys a query sees (by a mask or a cache).
          key: of dropout; None switches dropout off.
          rotation: rotary phases of the positions of `x`; None: no rotary positions.

        Returns:
          The residual stream after the layer, and the normed input n^l that a probe reads.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        spec = jax.typeof(x).sharding.spec  # products summed over "tensor" are sharded as x is

        n = rms_norm(x, self.norm_1[...])
        q, k, v = jnp.moveaxis(project("btd,dchk->btchk", n, self.qkv[...]), 2, 0)
        if self.config.qk_norm:
            q, k = rms_norm(q, self.q_norm[...]), rms_norm(k, self.k_norm[...])
        if rotation is not None:
            q, k = rotary.rotate(q, rotation.queries), rotary.rotate(k, rotation.keys)
        mixed = attend(q, k, v)
        out = project("bthk,hkd->btd", mixed, self.attention_out[...], spec)
        x = x + dropout(out, self.config.dropout, keys[0])

        with jax.named_scope("mlp"):
            active = self._activated(rms_norm(x, self.norm_2[...]))
            out = project("btf,fd->btd", active, self.mlp_out[...], spec)
        return x + dropout(out, self.config.dropout, keys[1]), n

    def _activated(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        if self.config.mlp == "swiglu":
            gate, up = jnp.moveaxis(project("btd,dgf->btgf", x, self.mlp_gate_up[...]), 2, 0)
            return jax.nn.silu(gate) * up
        return quick_gelu(project("btd,df->btf", x, self.mlp_in[...]))


def dropout(
    x: Float[Array, "B T D"], rate: float, key: PRNGKeyArray | None
) -> Float[Array, "B T D"]:
    """Zeroes a share `rate` of `x` and scales the rest by 1 / (1 - rate); no key: identity."""
    if key is None or rate == 0:
        return x
    # The same random numbers as nnx.Dropout, but each device draws its part of the mask only.
    key, spec = nnx.Rngs(dropout=key).dropout(), jax.typeof(x).sharding.spec
    kept = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=spec)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))
