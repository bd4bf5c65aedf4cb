"""The convolutional encoder and decoder of VQGAN (Esser et al. 2021, arXiv:2012.09841).

Diffusers' `VQModel` and LlamaGen's tokenizers are this network, with weights by other names, which
tokens/foreign.py reads. It is applied, not trained. Weights are a flat dict. Kernels are [outputs,
inputs, rows, columns], as PyTorch has them. Letters as in model/autoencoder.py. Images run from -1
to 1.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model.attention import self_attention
from gptv_jax.model.autoencoder import depth_to_space
from gptv_jax.model.layout import full_mask

EPSILON = 1e-6  # of the group norms
LAYOUT = ("NHWC", "OIHW", "NHWC")
CODEBOOK = "codebook"  # name of the codes, [V, Z]


class Vqgan:
    """The network with its weights. A block has attention if `params` has its attention weights."""

    def __init__(self, config: config_lib.Autoencoder, params: Mapping, shapes_only: bool = False):
        self.config, self.params, self.shapes_only = config, params, shapes_only
        self.latent = params["quant_conv.weight"].shape[1]  # channels between encoder and codes
        self.read: dict[str, jax.ShapeDtypeStruct] = {}  # the weights that were read

    def encode(self, images: Float[Array, "B H W C"]) -> Int[Array, "B h w"]:
        """The codes nearest to the encoder's vectors."""
        config = self.config
        x = self._conv("encoder.conv_in", images.astype(config.dtype), config.widths[0])
        for i, width in enumerate(config.widths):
            x = self._level(f"encoder.levels.{i}", x, width, config.encoder_blocks)
            if i + 1 < len(config.widths):
                x = self._conv(f"encoder.levels.{i}.resample", x, width, stride=2)
        x = self._level("encoder.middle", x, config.widths[-1], 2)
        x = jax.nn.silu(self._norm("encoder.norm_out", x))
        x = self._conv("encoder.conv_out", x, self.latent)
        z = self._conv("quant_conv", x, config.code_size, side=1).astype(jnp.float32)
        book = self._codebook()
        # |z - code|^2 / 2 without |z|^2 / 2. By default a TPU rounds the products to bfloat16, and
        # takes the wrong one of two near codes.
        products = jnp.einsum("bhwz,vz->bhwv", z, book, precision="highest")
        half_squares = jnp.square(book).sum(axis=-1) / 2
        return jnp.argmin(half_squares[None, None, None] - products, axis=-1)

    def decode(self, codes: Int[Array, "B h w"]) -> Float[Array, "B H W C"]:
        """Float32 images of about -1 to 1, not clipped, of a grid of any size."""
        config, widths = self.config, self.config.widths[::-1]
        values = self._codebook().at[codes].get(out_sharding=jax.typeof(codes).sharding.spec)
        x = self._conv("post_quant_conv", values.astype(config.dtype), self.latent, side=1)
        x = self._conv("decoder.conv_in", x, widths[0])
        x = self._level("decoder.middle", x, widths[0], 2)
        for i, width in enumerate(widths):
            x = self._level(f"decoder.levels.{i}", x, width, config.decoder_blocks)
            if i + 1 < len(widths):
                doubled = depth_to_space(jnp.concatenate([x] * 4, axis=-1), 2)  # nearest neighbours
                x = self._conv(f"decoder.levels.{i}.resample", doubled, width)
        x = jax.nn.silu(self._norm("decoder.norm_out", x))
        return self._conv("decoder.conv_out", x, config.channels).astype(jnp.float32)

    def _level(
        self, name: str, x: Float[Array, "B h w N"], width: int, blocks: int
    ) -> Float[Array, "B h w M"]:
        for j in range(blocks):
            x = self._block(f"{name}.blocks.{j}", x, width)
            x = self._attention(f"{name}.attention.{j}", x)
        return x

    def _block(self, name: str, x: Float[Array, "B h w N"], width: int) -> Float[Array, "B h w M"]:
        y = self._conv(f"{name}.conv1", jax.nn.silu(self._norm(f"{name}.norm1", x)), width)
        y = self._conv(f"{name}.conv2", jax.nn.silu(self._norm(f"{name}.norm2", y)), width)
        return y + (self._conv(f"{name}.shortcut", x, width, side=1) if x.shape[-1] != width else x)

    def _attention(self, name: str, x: Float[Array, "B h w N"]) -> Float[Array, "B h w N"]:
        """A residual branch in which all positions attend to all, with one head; x without it."""
        if f"{name}.norm.weight" not in self.params:
            return x
        (B, h, w, N), batch = x.shape, sharding.BATCH_FIRST
        normed = self._norm(f"{name}.norm", x)
        qkv = (self._conv(f"{name}.{part}", normed, N, side=1) for part in "qkv")
        qkv = (each.reshape(B, h * w, 1, N, out_sharding=batch) for each in qkv)
        mixed = self_attention(*qkv, visible=full_mask(h * w))
        mixed = mixed.reshape(B, h, w, N, out_sharding=batch)
        return x + self._conv(f"{name}.out", mixed, N, side=1)

    def _conv(
        self, name: str, x: Float[Array, "B h w N"], outputs: int, side: int = 3, stride: int = 1
    ) -> Float[Array, "B H W M"]:
        kernel = self._weight(f"{name}.weight", outputs, x.shape[-1], side, side).astype(x.dtype)
        bias = self._weight(f"{name}.bias", outputs).astype(x.dtype)
        # With stride 2 the zeros lie below and to the right alone.
        padding, strides = [(side // 2, side // 2) if stride == 1 else (0, 1)] * 2, [stride] * 2
        out = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)
        return out + bias[None, None, None]

    def _norm(self, name: str, x: Float[Array, "B h w N"]) -> Float[Array, "B h w N"]:
        """Group norm, in float32."""
        B, h, w, N = x.shape
        scale, bias = (self._weight(f"{name}.{part}", N) for part in ("weight", "bias"))
        groups = (B, h, w, self.config.groups, N // self.config.groups)
        y = x.astype(jnp.float32).reshape(groups, out_sharding=sharding.BATCH_FIRST)
        y = y - y.mean(axis=(1, 2, 4), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=(1, 2, 4), keepdims=True) + EPSILON)
        y = y.reshape(B, h, w, N, out_sharding=sharding.BATCH_FIRST)
        return (y * scale[None, None, None] + bias[None, None, None]).astype(x.dtype)

    def _codebook(self) -> Float[Array, "V Z"]:
        return self._weight(CODEBOOK, self.config.codes, self.config.code_size)

    def _weight(self, name: str, *shape: int) -> Array:
        self.read[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jnp.zeros(shape) if self.shapes_only else self.params[name]


def shapes(config: config_lib.Autoencoder, params: Mapping) -> dict[str, jax.ShapeDtypeStruct]:
    """The weights that the network reads, by name, as float32 arrays without values.

    `params` has NumPy arrays by name, of which only the names and one shape count: it says which
    blocks have attention. Call it under a mesh.
    """
    network, side = Vqgan(config, params, shapes_only=True), config.downsample
    rows = jax.sharding.get_abstract_mesh().size  # which the mesh divides
    pixels = jax.ShapeDtypeStruct((rows, side, side, config.channels), jnp.float32)
    jax.eval_shape(lambda images: network.decode(network.encode(images)), pixels)
    return network.read
