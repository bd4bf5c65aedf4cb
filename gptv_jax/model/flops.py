"""FLOPs of the networks, computed from their shapes."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.model import attention as attention_lib
from gptv_jax.model import autoencoder, splash_attention
from gptv_jax.model.blocked_attention import BLOCK
from gptv_jax.model.gpt import Network


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one token, in products with weights and in attention."""

    matmul: int
    attention: int

    @property
    def parts(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def times(self, factor: int):
        return type(self)(*(factor * part for part in self.parts.values()))


@dataclasses.dataclass(frozen=True)
class ImageFlops:
    """FLOPs of one image, in an encoder and in a decoder."""

    encoder: int
    decoder: int
    parts, total, times = Flops.parts, Flops.total, Flops.times


def forward(network: Network) -> Flops:
    """FLOPs that one token needs in a forward pass, by the convention of PaLM.

    Each weight of a product counts 2, and attention 4 L T D with the masked half of a causal mask
    counted (Chowdhery et al. 2022, appendix B), so that MFU compares across codebases.
    """
    blocks = _blocks(network)
    return Flops(blocks.matmul + _head(network), blocks.attention)


def training(network: Network) -> Flops:
    """FLOPs that one token of training needs: the backward pass does each product twice."""
    return forward(network).times(3)


def tile(form: str, length: int) -> int:
    """Side of the tiles of scores that a form of attention computes or skips as a whole."""
    splash = splash_attention.tile(length)
    return {"plain": length, "blocked": BLOCK, "cudnn": CUDNN_TILE, "splash": splash}[form]


# Products of size T x T x K that a form of attention computes, forward and backward; the
# convention counts 2 and 4. Forms that never store the scores compute them again, splash in two
# kernels.
PRODUCTS = {"plain": (2, 4), "blocked": (2, 5), "cudnn": (2, 5), "splash": (2, 7)}
CUDNN_TILE = 128  # positions; of FlashAttention's kernels on Ampere and later


def executed(network: Network, platform: str, split: int = 1, loss_parts: int = 1) -> Flops:
    """FLOPs that the program executes for one token of training.

    Unlike `training`, this counts computations that are repeated and leaves out skipped tiles.

    Args:
      network: the network.
      platform: tpu, gpu or cpu, which determines the form of attention.
      split: number of devices that a sequence is split over.
      loss_parts: parts in which logits are computed; if several, the backward pass repeats them.
    """
    c, blocks, model = network.config, _blocks(network), training(network)
    causal = c.objective == "autoregressive"
    kind = {"dtype": c.dtype, "head_size": c.width // c.heads}
    form = attention_lib.form(platform, network.length, split, causal=causal, **kind)
    ahead, back = PRODUCTS[form]
    # With "dots" the results of the splash kernel are kept.
    again = c.remat == "full" or (c.remat == "dots" and form != "splash")
    attention = blocks.attention * (ahead * (1 + again) + back) // 2
    if causal:  # masked tiles are skipped
        tiles = -(-network.length // tile(form, network.length))
        attention = attention * (tiles + 1) // (2 * tiles)
    matmul = model.matmul + (loss_parts > 1) * _head(network)
    if c.remat == "full":  # repeats all products of a layer but the last, which no gradient reads
        matmul += blocks.matmul - 2 * c.layers * c.mlp_width * c.width
    return Flops(matmul, attention)


def of_autoencoder(config: config_lib.Autoencoder, size: int) -> ImageFlops:
    """FLOPs of encoding and decoding an image of `size` pixels a side; training needs 3 times."""
    images = jax.ShapeDtypeStruct((1, size, size, config.channels), jnp.float32)
    # The mesh in force may split the batch, which one image does not allow.
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh(), jax.local_devices()[:1])):
        params = jax.eval_shape(lambda: autoencoder.init(config, jax.random.key(0)))
        encode, decode = (
            lambda params, x: autoencoder.bind(config, params).encode(x).values,
            lambda params, x: autoencoder.bind(config, params).decoder(x),
        )
        values = jax.eval_shape(encode, params, images)
        return ImageFlops(of_program(encode, params, images), of_program(decode, params, values))


def of_program(function: Callable, *arguments) -> int:
    """FLOPs of the products and convolutions in `function`, which is traced and not run.

    Arguments are arrays or abstract shapes. The body of a `while` loop counts once.
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
    """FLOPs of one token in a forward pass through all layers, without the head."""
    c = network.config
    products = 3 if c.mlp == "swiglu" else 2
    weights = c.layers * (4 * c.width + products * c.mlp_width) * c.width
    return Flops(2 * weights, 4 * c.layers * network.length * c.width)
