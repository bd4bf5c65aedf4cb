"""Tokenizers of diffusers and LlamaGen compared with PyTorch, on random weights.

LlamaGen has no package, so the reference for its network is written below, from its publication
(Sun et al. 2024, arXiv:2406.06525) and its tensors' names. The tests need torch and diffusers
(pip install -e '.[bench]'), and are skipped without them.
"""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import make_mesh, random_image

from gptv_jax import config as config_lib
from gptv_jax import tokens
from gptv_jax.model import vqgan
from gptv_jax.tokens import learned

torch = pytest.importorskip("torch", reason="torch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
nn, F = torch.nn, torch.nn.functional
SIZE = 32  # pixels


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(32, n, eps=1e-6) for n in (inputs, outputs))
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class Side(nn.Module):
    """The encoder, from fine to coarse with two blocks a level, or the decoder with three."""

    def __init__(self, inputs: int, widths: list[int], outputs: int, decoding: bool):
        super().__init__()
        self.decoding, width = decoding, widths[0]
        lowest = 0 if decoding else len(widths) - 1
        self.conv_in = nn.Conv2d(inputs, width, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, wanted in enumerate(widths):
            level = nn.Module()
            level.res, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(3 if decoding else 2):
                level.res.append(Block(width, wanted))
                width = wanted
                if i == lowest:
                    level.attn.append(Attention(width))
            if i + 1 < len(widths):
                resample = nn.Module()
                padding = {"padding": 1} if decoding else {"stride": 2}
                resample.conv = nn.Conv2d(width, width, 3, **padding)
                setattr(level, "upsample" if decoding else "downsample", resample)
            self.conv_blocks.append(level)
        middle = widths[lowest]
        self.mid = nn.ModuleList([Block(middle, middle), Attention(middle), Block(middle, middle)])
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, outputs, 3, padding=1)

    def middle(self, x):
        for part in self.mid:
            x = part(x)
        return x

    def forward(self, x):
        x = self.conv_in(x)
        x = self.middle(x) if self.decoding else x
        for level in self.conv_blocks:
            for i, block in enumerate(level.res):
                x = block(x)
                x = level.attn[i](x) if level.attn else x
            if hasattr(level, "upsample"):
                x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            if hasattr(level, "downsample"):
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        x = x if self.decoding else self.middle(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class LlamaGen(nn.Module):
    def __init__(self, codes: int = 64, code_size: int = 8, latent: int = 24):
        super().__init__()
        widths = [32, 32, 64, 64, 96]
        self.encoder = Side(3, widths, latent, decoding=False)
        self.decoder = Side(latent, widths[::-1], 3, decoding=True)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(codes, code_size)
        self.quantize.register_buffer("codebook_used", torch.zeros(65536))
        self.quant_conv = nn.Conv2d(latent, code_size, 1)
        self.post_quant_conv = nn.Conv2d(code_size, latent, 1)

    def codebook(self):
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    def codes(self, x):
        z = F.normalize(self.quant_conv(self.encoder(x)), dim=1)
        return torch.einsum("bzhw,vz->bhwv", z, self.codebook()).argmax(-1)

    def decode(self, codes):
        return self.decoder(self.post_quant_conv(self.codebook()[codes].permute(0, 3, 1, 2)))


class VQModel:
    """Diffusers' network with the methods of `LlamaGen`."""

    def __init__(self, **changes):
        settings = {
            "down_block_types": ("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",),
            "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 12, 16),
            "layers_per_block": 2,
            "latent_channels": 6,
            "vq_embed_dim": 4,
            "num_vq_embeddings": 50,
            "norm_num_groups": 4,
            "sample_size": SIZE,
        }
        self.network = diffusers.VQModel(**settings | changes).eval()

    def codes(self, x):
        z = self.network.encode(x).latents
        _, _, (_, _, found) = self.network.quantize(z)
        return found.reshape(len(x), *z.shape[2:])

    def decode(self, codes):
        values = self.network.quantize.embedding(codes).permute(0, 3, 1, 2)
        return self.network.decode(values, force_not_quantize=True).sample


def spread(network) -> None:
    """Weights under which codes, biases and attention matter."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 1:
                center = float("norm" in name and name.endswith("weight"))
                weight.normal_(center, 0.2)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5)
        network.quantize.embedding.weight.normal_(0, 1)


def saved(kind: str, folder):
    """A reference network, and the place where its program would have saved it."""
    if kind == "llamagen":
        theirs, place = LlamaGen().eval(), folder / "vq_ds16.safetensors"
        spread(theirs)
        arrays = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
        safetensors.numpy.save_file(arrays, place)
        return theirs, place
    plain = {"down_block_types": ("DownEncoderBlock2D",) * 3, "vq_embed_dim": None}
    plain |= {"up_block_types": ("UpDecoderBlock2D",) * 3, "mid_block_add_attention": False}
    theirs = VQModel(**(plain if kind == "vq_plain" else {}))
    spread(theirs.network)
    theirs.network.save_pretrained(folder)
    return theirs, folder


@pytest.mark.parametrize("kind", ["llamagen", "vq_attention", "vq_plain"])
def test_codes_and_images_are_those_of_the_program_that_saved_the_weights(kind, tmp_path):
    theirs, place = saved(kind, tmp_path)
    tokenizer = learned.load(place)
    settings = config_lib.Tokens("learned", autoencoder=tokenizer.config)
    codec = tokens.make_codec(settings, SIZE, tokenizer)
    images = random_image(3, SIZE // 4, SIZE // 4, 3).repeat(4, 1).repeat(4, 2)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        wanted = theirs.codes(pixels).numpy()
        restored = theirs.decode(torch.from_numpy(wanted)).permute(0, 2, 3, 1).numpy()
    assert len(np.unique(wanted)) > 5
    codes = codec.encode(images).reshape(wanted.shape)
    assert codec.grid == wanted.shape[1:] and np.mean(codes == wanted) > 0.99
    with jax.set_mesh(make_mesh((1, 1, 1))):
        network = vqgan.Vqgan(tokenizer.config, jax.device_put(tokenizer.params))
        ours = network.decode(jax.numpy.asarray(wanted))
    np.testing.assert_allclose(ours, restored, atol=1e-4 * np.abs(restored).max())
    shown = np.clip(np.rint((restored + 1) * 127.5), 0, 255)
    assert np.abs(codec.decode(wanted.reshape(3, -1)) - shown).max() <= 1  # of 255, by rounding


def test_a_foreign_tokenizer_is_saved_as_one_of_this_project(tmp_path):
    _, place = saved("vq_attention", tmp_path)
    tokenizer = learned.load(place)
    tokenizer.save(tmp_path / "again.safetensors")
    again = learned.load(tmp_path / "again.safetensors")
    assert again.equivalent(tokenizer) and again.provenance == tokenizer.provenance
    assert dataclasses.asdict(again.config) == dataclasses.asdict(tokenizer.config)
