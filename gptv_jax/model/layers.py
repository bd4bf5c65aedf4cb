"""The parts of the network: parameters, norm, rotary positions, a layer, the class head."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from gptv_jax import config as config_lib
from gptv_jax import sharding

EPSILON = 1e-5  # of the norm, as in openai/image-gpt
BASE = 10_000.0  # rotary frequencies fall geometrically from 1 towards 1 / BASE, as in LlamaGen
# The name of activations that are costly to compute again: products with a weight, and the arrays
# that a fused attention kernel keeps for its gradient.
PRODUCT = "product"
# Rematerialisation: which activations the forward pass keeps for the backward pass.
REMAT = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


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


def rms_norm(x: Float[Array, "*any D"], gain: Float[Array, " D"]) -> Float[Array, "*any D"]:
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
    out_sharding: jax.P | None = None,
) -> Float[Array, "B T *outputs"]:
    """`jnp.einsum(equation, x, weight)` in the dtype of `x`, with the weight gathered over fsdp.

    Both gradients are einsums of their own, for three reasons. The backward pass gathers the weight
    again, so that no device keeps whole weights. The weight's gradient is requested in the weight's
    sharding: the sum over the batch and the split over fsdp are then one reduce-scatter, not an
    all-reduce of twice the bytes. And JAX's rule would compute that gradient transposed, for which
    XLA's CPU matrix product takes 2.5 times as long (docs/results.md). In float32 on a CPU the
    shorter side of the gradient comes first, and the gradient is transposed afterwards, for the
    same reason.

    The result is named PRODUCT, so that rematerialisation can keep it.
    """
    return checkpoint_name(_project(equation, x, weight, out_sharding), PRODUCT)


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
    tall = x.size > gradient.size and x.dtype != jnp.bfloat16  # in bfloat16 nothing is gained
    if sharding.platform() == "cpu" and tall:
        of_weight = _transposed(left, outputs, x, weight, gradient)
    else:
        of_weight = like(weight, f"{left},{outputs}->{right}", x, gradient)
    of_x = like(x, f"{outputs},{right}->{left}", gradient, whole)
    return of_x, of_weight.astype(weight.dtype)


def _transposed(left, outputs, x, weight, gradient):
    """The weight's gradient as outputs by inputs, then transposed."""
    axes, spec = outputs[2:] + left[2:], jax.typeof(weight).sharding.spec
    count = len(left) - 2  # axes of the inputs, the first of the weight
    turned = jax.P(*spec[count:], *spec[:count])
    found = jnp.einsum(f"{outputs},{left}->{axes}", gradient, x, out_sharding=turned)
    # Without a barrier XLA would turn the product back.
    return jnp.moveaxis(jax.lax.optimization_barrier(found), range(-count, 0), range(count))


_project.defvjp(_project_forward, _project_backward)


class Rotation(NamedTuple):
    """Float32 cosines and sines (leading axis) that rotate queries and keys of P positions.

    A query is rotated by the place of the token that its position predicts, a key by the place of
    its position's input token (-1 for the start vector): their difference is the offset in rows and
    columns from the input token to the predicted token, also from the end of one row to the
    beginning of the next.
    """

    queries: Float[Array, "2 *B P half"]  # with axis B where rows have orders of their own
    keys: Float[Array, "2 *B P half"]


def phases(places: Float[Array, "P 3"], size: int) -> Float[Array, "2 P half"]:
    """Cosines and sines of the angles of places, given by frame, row and column.

    Half of each head's channels are rotated by the row of a place on the grid and half by the
    column, so that scores depend on differences of rows and columns alone (Su et al. 2021,
    arXiv:2104.09864; along two axes as in LlamaGen, Sun et al. 2024, arXiv:2406.06525). The
    number of the frame rotates all channels, with the frequencies in reverse order, so a channel
    has two axes, as in RoPE-Mixed (Heo et al. 2024, arXiv:2403.13298). The first frame is rotated
    as an image is.

    `size` is K, a multiple of 4; half is K / 2.
    """
    frequencies = BASE ** -jnp.linspace(0, 1, size // 4, endpoint=False, dtype=jnp.float32)
    angles = places[:, 1:, None] * frequencies[None, None]
    angles = angles + places[:, :1, None] * frequencies[None, None, ::-1]
    angles = angles.reshape(len(places), size // 2)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Float[Array, "B P H K"], by: Float[Array, "2 *B P half"]) -> Float[Array, "B P H K"]:
    """Rotates every pair of channels i, i + K/2 by an angle; computed in float32."""
    cosine, sine = (by if by.ndim == x.ndim else by[:, None])[..., None, :]
    first, second = jnp.split(x.astype(accumulator(x)), 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


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
        rotation: Rotation | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """One pre-norm layer: the residual stream after it, and its normed input n^l for probes.

        `attend` maps (q, k, v), each [B, T, H, K], to mixed values [B, T, H, K]: the caller decides
        which keys a query sees (by a mask or a cache). Without a `key` there is no dropout, without
        the `rotation` of the positions of `x` there are no rotary positions.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        spec = jax.typeof(x).sharding.spec  # products summed over "tensor" are sharded as x is

        n = rms_norm(x, self.norm_1[...])
        q, k, v = jnp.moveaxis(project("btd,dchk->btchk", n, self.qkv[...]), 2, 0)
        if self.config.qk_norm:
            q, k = rms_norm(q, self.q_norm[...]), rms_norm(k, self.k_norm[...])
        if rotation is not None:
            q, k = rotate(q, rotation.queries), rotate(k, rotation.keys)
        mixed = attend(q, k, v)
        out = project("bthk,hkd->btd", mixed, self.attention_out[...], spec)
        x = x + dropout(out, self.config.dropout, keys[0])

        with jax.named_scope("mlp"):
            read = rms_norm(x, self.norm_2[...])
            if self.config.mlp == "swiglu":
                both = project("btd,dgf->btgf", read, self.mlp_gate_up[...])
                gate, up = jnp.moveaxis(both, 2, 0)
                active = jax.nn.silu(gate) * up
            else:
                active = quick_gelu(project("btd,df->btf", read, self.mlp_in[...]))
            out = project("btf,fd->btd", active, self.mlp_out[...], spec)
        return x + dropout(out, self.config.dropout, keys[1]), n


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


class ClassHead(nnx.Module):
    """Bias-free, zero-initialised linear classifier of mean-pooled final features.

    `class_center` and `class_scale` standardise the features. They are 0 and 1 (which is iGPT's
    head exactly) until fine-tuning sets them, and are not trained.
    """

    def __init__(self, classes: int, width: int):
        self.class_head = constant("class_head", (classes, width), 0.0)
        self.class_center = constant("class_center", (width,), 0.0)
        self.class_scale = constant("class_scale", (width,), 1.0)

    def __call__(self, pooled: Float[Array, "B F"]) -> Float[Array, "B C"]:
        center, scale = jax.lax.stop_gradient((self.class_center[...], self.class_scale[...]))
        standardised = (pooled - center[None]) * scale[None]
        weight = sharding.gather(self.class_head[...], pooled.dtype)
        return jnp.einsum("bd,cd->bc", standardised, weight)
