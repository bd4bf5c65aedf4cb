"""What a user would pick instead: a plain GPT in PyTorch, and `transformers`' ImageGPT.

Each factory makes a task of the same work as that of its namesake in `ours`, on a GPU where there
is one. PyTorch keeps its default threads, which are idle when they have nothing to do.
"""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.sizes import Size
from benchmarks.worker import Task, UnavailableError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = 1e-5  # of the norm, as everywhere in iGPT


class Block(nn.Module):
    """A pre-norm layer without biases."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.RMSNorm(width, eps=EPSILON)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm_2 = nn.RMSNorm(width, eps=EPSILON)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(
        self, x: torch.Tensor, cache: torch.Tensor | None = None, position: int = 0
    ) -> torch.Tensor:
        """Returns the residual stream [B, T, D] after this layer.

        Args:
          x: residual stream of a whole sequence; with a cache, of one position.
          cache: keys and values [2, B, H, T, K]; those before `position` are already written.
          position: index of the position of `x`, where its keys and values are written.
        """
        B, T, D = x.shape
        qkv = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[:, :, :, position] = qkv[1:, :, :, 0]
            k, v = cache[:, :, :, : position + 1]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(B, T, D))
        up = self.mlp_in(self.norm_2(x))
        return x + self.mlp_out(up * torch.sigmoid(1.702 * up))


class GPT(nn.Module):
    """The network of gptv_jax's default configuration, written plainly in PyTorch."""

    def __init__(self, size: Size):
        super().__init__()
        self.token_embedding = nn.Embedding(size.vocabulary, size.width)
        self.start = nn.Parameter(0.02 * torch.randn(1, 1, size.width))
        self.position = nn.Parameter(0.01 * torch.randn(size.tokens, size.width))
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.final_norm = nn.RMSNorm(size.width, eps=EPSILON)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def trunk(self, tokens: torch.Tensor) -> torch.Tensor:
        """The final norm's output [B, T, D], for tokens [B, T]."""
        start = self.start.expand(len(tokens), -1, -1)
        x = torch.cat([start, self.token_embedding(tokens[:, :-1])], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V]; position t predicts token t."""
        return self.head(self.trunk(tokens))

    def empty_cache(self, batch: int, room: int) -> torch.Tensor:
        """An empty cache of the keys and values of all layers [L, 2, B, H, room, K]."""
        heads, width = self.blocks[0].heads, self.position.shape[1]
        shape = (len(self.blocks), 2, batch, heads, room, width // heads)
        return self.position.new_empty(shape)

    def extend(self, before: torch.Tensor | None, position: int, cache: torch.Tensor):
        """Logits [B, V] of the token at `position`; writes into the cache.

        `before` has the tokens [B] of the position before; None at the first position.
        """
        if before is None:
            x = self.start.expand(cache.shape[2], 1, -1)
        else:
            x = self.token_embedding(before[:, None])
        x = x + self.position[position]
        for block, layer in zip(self.blocks, cache, strict=True):
            x = block(x, layer, position)
        return self.head(self.final_norm(x))[:, 0]

    @torch.inference_mode()
    def draw(self, batch: int, count: int) -> torch.Tensor:
        """Draws the first tokens [B, count] of sequences."""
        cache, tokens = self.empty_cache(batch, count), []
        for position in range(count):
            logits = self.extend(tokens[-1] if tokens else None, position, cache)
            tokens.append(torch.multinomial(logits.float().softmax(-1), 1)[:, 0])
        return torch.stack(tokens, dim=1)

    @torch.no_grad()
    def copy_weights(self, params: dict[str, np.ndarray]) -> None:
        """Copies the weights of gptv_jax's network, given by their flat names."""
        width = self.position.shape[1]
        norms = {"norm_1", "norm_2"}
        for name in (*norms, "qkv", "attention_out", "mlp_in", "mlp_out"):
            for block, layer in zip(self.blocks, params[f"blocks.{name}"], strict=True):
                inputs = 4 * width if name == "mlp_out" else width
                weight = layer if name in norms else layer.reshape(inputs, -1).T
                getattr(block, name).weight.copy_(torch.tensor(weight))
        self.start.copy_(torch.tensor(params["start"][None]))
        self.position.copy_(torch.tensor(params["position"]))
        for name in ("token_embedding", "final_norm", "head"):
            getattr(self, name).weight.copy_(torch.tensor(params[name]))


class ImageGPT(nn.Module):
    """`transformers`' ImageGPT, with the start token that it leaves to the user."""

    def __init__(self, size: Size):
        super().__init__()
        import transformers

        config = transformers.ImageGPTConfig(
            vocab_size=size.vocabulary + 1,
            n_positions=size.tokens,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        self.model = transformers.ImageGPTForCausalImageModeling(config)
        self.start = size.vocabulary

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V]; position t predicts token t."""
        shifted = torch.cat([torch.full_like(tokens[:, :1], self.start), tokens[:, :-1]], dim=1)
        return self.model(shifted, use_cache=False).logits

    @torch.inference_mode()
    def draw(self, batch: int, count: int) -> torch.Tensor:
        """Draws the first tokens of sequences; returned after the start token [B, 1 + count]."""
        start = torch.full((batch, 1), self.start, device=DEVICE)
        lengths = {"min_new_tokens": count, "max_new_tokens": count}
        return self.model.generate(start, do_sample=True, top_k=0, use_cache=True, **lengths)


MODELS = {"gpt": GPT, "imagegpt": ImageGPT}


def train(size: dict, batch: int, dtype: str, model: str, compiled: bool = False) -> Task:
    """A train step: the loss of a batch, its gradient, AdamW."""
    size = Size(**size)
    network = MODELS[model](size).to(DEVICE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    forward, tokens = _compiled(network) if compiled else network, tokens_of(size, batch)

    def step():
        with autocast(dtype):
            logits = forward(tokens)
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return Task(step, wait)


def generate(size: dict, batch: int, dtype: str, count: int, model: str) -> Task:
    """Draws the first `count` tokens of `batch` sequences, with a cache."""
    network = MODELS[model](Size(**size)).to(DEVICE, getattr(torch, dtype)).eval()
    return Task(lambda: network.draw(batch, count), wait)


def read(size: dict, batch: int, dtype: str, compiled: bool = False) -> Task:
    """Reads features of all layers."""
    size = Size(**size)
    network = GPT(size).to(DEVICE, getattr(torch, dtype)).eval()
    return Task(pooling(network, tokens_of(size, batch), compiled=compiled), wait)


def pooling(network: GPT, tokens: torch.Tensor, *, compiled: bool = False):
    """A function that returns means over positions of every layer's normed input.

    Forward hooks collect the inputs.
    """
    means: list[torch.Tensor] = []
    for norm in (*(block.norm_1 for block in network.blocks), network.final_norm):
        norm.register_forward_hook(lambda _, __, output: means.append(output.float().mean(1)))
    trunk = _compiled(network.trunk) if compiled else network.trunk

    @torch.inference_mode()
    def read():
        means.clear()
        trunk(tokens)
        return torch.stack(means)

    return read


def attend(batch: int, tokens: int, heads: int, head_size: int, backward: bool, dtype: str) -> Task:
    """Causal attention in PyTorch's own form."""
    shape, kind = (batch, heads, tokens, head_size), getattr(torch, dtype)
    *qkv, gradient = (torch.randn(shape, device=DEVICE, dtype=kind) for _ in range(4))
    if not backward:
        forward = torch.inference_mode()(F.scaled_dot_product_attention)
        return Task(lambda: forward(*qkv, is_causal=True), wait)
    for array in qkv:
        array.requires_grad_()

    def step():
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True)
        return torch.autograd.grad(mixed, qkv, gradient)

    return Task(step, wait)


def matmul(side: int, dtype: str) -> Task:
    """A product of two square matrices."""
    a, b = (torch.randn(side, side, device=DEVICE, dtype=getattr(torch, dtype)) for _ in range(2))
    return Task(torch.inference_mode()(lambda: a @ b), wait)


def tokens_of(size: Size, batch: int) -> torch.Tensor:
    """Random tokens [B, T] on the device."""
    drawn = np.random.default_rng(0).integers(size.vocabulary, size=(batch, size.tokens))
    return torch.tensor(drawn, device=DEVICE)


def autocast(dtype: str):
    """A context in which matrix products use this dtype; the weights stay in float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(DEVICE, dtype=getattr(torch, dtype))


def wait(_) -> None:
    """Waits until the device has finished all work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _compiled(function):
    """Compiles a function by `torch.compile`, after a trial with the smallest function.

    Raises:
      UnavailableError: `torch.compile` does not work on this machine.
    """
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=DEVICE))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UnavailableError(f"no compiler for torch.compile: {reason}") from error
    return torch.compile(function)
