"""What the network costs in FLOPs, by its shape alone."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import attention as attention_lib
from gptv_jax.model import autoencoder, splash_attention
from gptv_jax.model.blocked_attention import BLOCK
from gptv_jax.model.gpt import Network


class Flops(NamedTuple):
    """FLOPs of one token, products with weights and attention apart."""

    matmul: int
    attention: int

    @property
    def total(self) -> int:
        """Of both."""
        return self.matmul + self.attention

    def times(self, factor: int) -> "Flops":
        """So many times as much."""
        return Flops(self.matmul * factor, self.attention * factor)


class OfImage(NamedTuple):
    """FLOPs of one image in an encoder and a decoder."""

    encoder: int
    decoder: int

    @property
    def total(self) -> int:
        """Of both."""
        return self.encoder + self.decoder

    def times(self, factor: int) -> "OfImage":
        """So many times as much."""
        return OfImage(self.encoder * factor, self.decoder * factor)


def forward(network: Network) -> Flops:
    """FLOPs that one token needs in a forward pass.

    2 a weight that is multiplied, and 4 L T D for attention counted without the causal half saved,
    as in PaLM (Chowdhery et al. 2022, appendix B), so that MFU compares across codebases.
    """
    blocks = _blocks(network)
    return Flops(blocks.matmul + _head(network), blocks.attention)


def training(network: Network) -> Flops:
    """FLOPs that one token of training needs: the backward pass takes two of each product."""
    return forward(network).times(3)


def tile(form: str, length: int) -> int:
    """Positions that a form of attention works on at a time: of none less than all is masked."""
    splash = splash_attention.tile(length)
    return {"plain": length, "blocked": BLOCK, "cudnn": CUDNN_TILE, "splash": splash}[form]


# Products of T x T with K that a form of attention computes, forward and backward; the model's own
# count is 2 and 4. Those that never keep the scores compute them again, splash in two kernels.
PRODUCTS = {"plain": (2, 4), "blocked": (2, 5), "cudnn": (2, 5), "splash": (2, 7)}
CUDNN_TILE = 128  # positions, of FlashAttention's kernels on Ampere and later


def executed(network: Network, platform: str, split: int = 1, loss_parts: int = 1) -> Flops:
    """FLOPs that one token of training does, what is computed again and skipped taken into account.

    Args:
      network: the network.
      platform: tpu, gpu or cpu, which attend in different forms.
      split: parts of the sequence, on a device each.
      loss_parts: that logits are computed in, once more in the backward pass where they are many.
    """
    c, blocks, model = network.config, _blocks(network), training(network)
    causal = c.objective == "autoregressive"
    kind = {"dtype": c.dtype, "head_size": c.width // c.heads}
    form = attention_lib.form(platform, network.length, split, causal=causal, **kind)
    ahead, back = PRODUCTS[form]
    # With "dots" a fused kernel's results are kept.
    again = c.remat == "full" or (c.remat == "dots" and form != "splash")
    attention = blocks.attention * (ahead * (1 + again) + back) // 2
    if causal:  # whole tiles of what is masked are skipped
        tiles = -(-network.length // tile(form, network.length))
        attention = attention * (tiles + 1) // (2 * tiles)
    matmul = model.matmul + (loss_parts > 1) * _head(network)
    if c.remat == "full":  # all but the last product of a layer, whose result no gradient needs
        matmul += blocks.matmul - 2 * c.layers * c.mlp_width * c.width
    return Flops(matmul, attention)


def of_autoencoder(config: config_lib.Autoencoder, size: int) -> OfImage:
    """FLOPs that encoding an image of `size` pixels a side, and decoding it, needs.

    Training needs three times as much: the backward pass takes two of each product.
    """
    images = jax.ShapeDtypeStruct((1, size, size, config.channels), jnp.float32)
    # One image is no batch that a mesh which is set could split.
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh(), jax.local_devices()[:1])):
        params = jax.eval_shape(lambda: autoencoder.init(config, jax.random.key(0)))
        encode, decode = (
            lambda params, x: autoencoder.bind(config, params).encode(x).values,
            lambda params, x: autoencoder.bind(config, params).decoder(x),
        )
        values = jax.eval_shape(encode, params, images)
        return OfImage(of_program(encode, params, images), of_program(decode, params, values))


def of_program(function: Callable, *arguments) -> int:
    """FLOPs of the products and convolutions in what a function traces to.

    Those in a `while` loop, whose turns are not known, count once.

    Args:
      function: of arrays; it is not run.
      arguments: arrays or their shapes.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: jax_core.Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        results = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        match eqn.primitive.name:
            case "conv_general_dilated":
                kernel = eqn.invars[1].aval.shape
                numbers = eqn.params["dimension_numbers"]
                total += 2 * results * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            case "dot_general":
                (summed, _), _ = eqn.params["dimension_numbers"]
                total += 2 * results * math.prod(eqn.invars[0].aval.shape[i] for i in summed)
            case "scan":
                total += eqn.params["length"] * _of_jaxpr(eqn.params["jaxpr"].jaxpr)
            case _:
                total += sum(_of_jaxpr(inner) for inner in jax_core.jaxprs_in_params(eqn.params))
    return total


def _head(network: Network) -> int:
    return 2 * network.vocabulary * network.config.width


def _blocks(network: Network) -> Flops:
    """Of a forward pass through all layers, without the head."""
    c = network.config
    products = 3 if c.mlp == "swiglu" else 2
    weights = c.layers * (4 * c.width + products * c.mlp_width) * c.width
    return Flops(2 * weights, 4 * c.layers * network.length * c.width)
