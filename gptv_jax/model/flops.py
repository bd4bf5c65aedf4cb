"""What the network costs in FLOPs, by its shape alone."""

from typing import NamedTuple

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


def forward(network: Network) -> Flops:
    """FLOPs that one token needs in a forward pass.

    2 a weight that is multiplied, and 4 L T D for attention counted without the causal half saved,
    as in PaLM (Chowdhery et al. 2022, appendix B), so that MFU compares across codebases.
    """
    blocks = _blocks(network)
    head = 2 * network.vocabulary * network.config.width
    return Flops(blocks.matmul + head, blocks.attention)


def training(network: Network) -> Flops:
    """FLOPs that one token of training needs: the backward pass takes two of each product."""
    return forward(network).times(3)


def recomputed(network: Network) -> Flops:
    """FLOPs that the backward pass of one token does a second time, by the config's remat."""
    blocks = _blocks(network)
    match network.config.remat:
        case "none":
            return Flops(0, 0)
        case "dots":
            return Flops(0, blocks.attention)
    # All but the last product of a layer, whose result no gradient needs.
    c = network.config
    last = 2 * c.layers * c.mlp_ratio * c.width**2
    return Flops(blocks.matmul - last, blocks.attention)


def _blocks(network: Network) -> Flops:
    """Of a forward pass through all layers, without the head."""
    c = network.config
    weights = c.layers * (4 + 2 * c.mlp_ratio) * c.width**2
    return Flops(2 * weights, 4 * c.layers * network.length * c.width)
