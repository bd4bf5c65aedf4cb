"""FLOPs of the networks, computed from their shapes."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.config.data import ImageSize, height_and_width
from gptv_jax.model import autoencoder
from gptv_jax.model.attention import BLOCK, SPLASH_TILE, form
from gptv_jax.model.gpt import Network
from gptv_jax.model.layout import causal_mask
from gptv_jax.model.parts import CHANNELS


class Flops(dict[str, int]):
    """FLOPs of a token: "matmul", "attention", "stem", "teacher"; of an image: its coders'."""

    @property
    def total(self) -> int:
        return sum(self.values())

    def times(self, factor: int) -> "Flops":
        return Flops({part: factor * count for part, count in self.items()})


# Products of size T x T x K that a form of attention computes, forward and backward; the
# convention of `forward` counts 2 and 4. Forms that never store the scores compute them again,
# splash in two kernels.
PRODUCTS = {"plain": (2, 4), "blocked": (2, 5), "cudnn": (2, 5), "splash": (2, 7)}
CUDNN_TILE = 128  # positions; of FlashAttention's kernels on Ampere and later


def forward(network: Network, whole_logits: bool = False) -> Flops:
    """FLOPs that one position needs in a forward pass, by the convention of PaLM.

    Each weight of a product counts 2, and attention 4 L T D with the masked half of a causal mask
    counted (Chowdhery et al. 2022, appendix B), so that MFU compares across codebases. Heads and
    stem are shared out over all positions of a sequence. The loss of a head by levels needs the
    probabilities of one code; with `whole_logits`, as for distillation, all codes are counted.
    """
    blocks, head, attention = _forward_parts(network, whole_logits)
    stem = {"stem": _stem(network) // network.length} if network.stem else {}
    return Flops(matmul=blocks + head, attention=attention, **stem)


def training(
    network: Network, teachers: Sequence[Network] = (), whole_logits: bool = False
) -> Flops:
    """FLOPs that one token of training needs: the backward pass does each product twice.

    Of teachers only the forward pass is needed. `whole_logits` is explained at `forward`.
    """
    taught = {"teacher": sum(map(sum, map(_teacher_parts, teachers)))} if teachers else {}
    return Flops(forward(network, whole_logits).times(3), **taught)


def executed(
    network: Network,
    platform: str,
    split: int = 1,
    loss_chunks: int = 1,
    teachers: Sequence[Network] = (),
    whole_logits: bool = False,
) -> Flops:
    """FLOPs that the program executes for one token of training.

    Unlike `training`, this counts computations that are repeated and leaves out skipped tiles.
    The platform is tpu, gpu or cpu, `split` the number of devices that a sequence is split over,
    and `loss_chunks` the number of chunks of the logits; the backward pass repeats several.
    `whole_logits` is explained at `forward`.
    """
    c, T = network.config, network.length
    blocks, head, attention = _forward_parts(network, whole_logits)
    ahead, back, tiles, kept = _attention(network, platform, split)
    again = c.remat == "full" or (c.remat == "dots" and not kept)
    attention = attention * (ahead * (1 + again) + back) // 2 * tiles[0] // tiles[1]
    matmul = 3 * (blocks + head) + (loss_chunks > 1) * head
    if c.remat == "full":  # repeats all products of a layer but the last, which no gradient reads
        matmul += blocks - 2 * c.layers * c.mlp_width * c.width
    stem = {"stem": 3 * _stem(network) // T} if network.stem else {}
    taught = 0
    for teacher in teachers:
        blocks, head, plain = _teacher_parts(teacher)
        ahead, _, tiles, _ = _attention(teacher, platform, split)
        taught += blocks + (1 + (loss_chunks > 1)) * head
        taught += plain * ahead // 2 * tiles[0] // tiles[1]
    more = stem | ({"teacher": taught} if teachers else {})
    return Flops(matmul=matmul, attention=attention, **more)


def _attention(
    network: Network, platform: str, split: int
) -> tuple[int, int, tuple[int, int], bool]:
    """How the program computes attention, see `PRODUCTS`.

    Products forward and backward, tiles that are computed and all tiles, and whether
    rematerialisation by "dots" keeps the result, as it does that of the splash kernel.
    """
    c, T, visible = network.config, network.length, network.layout.visible
    chosen = form(platform, visible, split, c.dtype, head_size=c.width // c.heads)
    # Scores are computed or skipped by whole tiles. cuDNN skips tiles of a causal mask alone.
    cudnn = CUDNN_TILE if visible == causal_mask(T) else T
    sides = {"plain": T, "blocked": BLOCK, "cudnn": cudnn, "splash": math.gcd(T, SPLASH_TILE)}
    side = sides[chosen]
    last = [visible[min(start + side, T) - 1] for start in range(0, T, side)]
    tiles = sum(-(-keys // side) for keys in last), len(last) ** 2
    return *PRODUCTS[chosen], tiles, chosen == "splash"


@functools.cache
def of_autoencoder(config: config_lib.Autoencoder, size: ImageSize, frames: int = 0) -> Flops:
    """FLOPs of encoding and decoding an image of `size` pixels; training needs 3 times.

    With `frames`, those of a clip.
    """
    shape = (1, *(frames,) * (frames > 0), *height_and_width(size), config.channels)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    # The mesh in force may split the batch, which one image does not allow.
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh(), jax.local_devices()[:1])):
        params = jax.eval_shape(lambda: autoencoder.init(config, jax.random.key(0)))
        model = functools.partial(autoencoder.bind, config)
        encode, decode = lambda p, x: model(p).encode(x).values, lambda p, x: model(p).decoder(x)
        values = jax.eval_shape(encode, params, images)
        counts = of_program(encode, params, images), of_program(decode, params, values)
        return Flops(zip(("encoder", "decoder"), counts, strict=True))


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


def _forward_parts(network: Network, whole_logits: bool = False) -> tuple[int, int, int]:
    """FLOPs of a token in a forward pass: products of inputs and layers, head, attention."""
    c = network.config
    weights = c.layers * (4 * c.width + (3 if c.mlp == "swiglu" else 2) * c.mlp_width) * c.width
    attention = 4 * c.layers * network.length * c.width
    parts = [part for part in network.layout.parts if part.predicted]
    predicted = sum(part.size * part.head_products(whole_logits) for part in parts)
    if read := network.reading:
        predicted += network.layout.parts[0].size * read.outputs * max(len(read.layers), 1)
    weights += math.prod(network.patch) * c.width if network.patch else 0
    return 2 * weights, 2 * predicted * c.width // network.length, attention


def _teacher_parts(network: Network) -> tuple[int, int, int]:
    """As `_forward_parts`, of a teacher; a teacher of classes predicts no tokens."""
    blocks, head, attention = _forward_parts(network, whole_logits=True)
    return blocks, head * (not network.classes), attention


def _stem(network: Network) -> int:
    """FLOPs of the stem's forward pass for an image; every convolution halves height and width."""
    of_position = network.stem[-1] * network.config.width
    for i, (inputs, outputs) in enumerate(itertools.pairwise((CHANNELS, *network.stem))):
        of_position += 4 ** (len(network.stem) - 1 - i) * 9 * inputs * outputs
    return 2 * network.layout.parts[0].size * of_position
