"""Tokenizers of other programs: diffusers' `VQModel`, and LlamaGen's VQ-8 and VQ-16."""

import pathlib
import re

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.config import fields
from gptv_jax.errors import InputError, as_input_error, shorten
from gptv_jax.model.vqgan import CODEBOOK

# From both programs' names to the names in model/vqgan.py; every pattern is applied, in this order.
NAMES = (
    (r"\.(down_blocks|up_blocks|conv_blocks)\.", ".levels."),
    (r"\.mid_block\.", ".middle."),
    (r"\.mid\.0\.", ".middle.blocks.0."),
    (r"\.mid\.1\.", ".middle.attention.0."),
    (r"\.mid\.2\.", ".middle.blocks.1."),
    (r"\.(resnets|res)\.", ".blocks."),
    (r"\.(attentions|attn)\.", ".attention."),
    (r"\.(conv_shortcut|nin_shortcut)\.", ".shortcut."),
    (r"\.((downsamplers|upsamplers)\.0|downsample|upsample)\.conv\.", ".resample."),
    (r"\.group_norm\.", ".norm."),
    (r"\.(to_)?([qkv])(uery|ey|alue)?\.", r".\2."),
    (r"\.(to_out\.0|proj_attn|proj_out)\.", ".out."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"^quantize\.embedding\.weight$", CODEBOOK),
)
IGNORED = "quantize.codebook_used"  # LlamaGen's count of used codes in training
LLAMAGEN = "encoder.conv_blocks.0.res.0.norm1.weight"  # a tensor that its files have
ACTIVATIONS = ("silu", "swish")  # names of the one that model/vqgan.py has


def is_vq_model(folder: pathlib.Path) -> bool:
    """Whether a folder is one of diffusers' `VQModel.save_pretrained`."""
    return files.read_json(folder / "config.json", {}).get("_class_name") == "VQModel"


def read_vq_model(folder: pathlib.Path) -> tuple[config_lib.Autoencoder, dict, dict]:
    """The settings, the weights and the provenance of a folder of diffusers' `VQModel`."""
    given = files.read_json(folder / "config.json", {})
    path = folder / "diffusion_pytorch_model.safetensors"
    if not path.exists():
        advice = "write it by diffusers' VQModel.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        raise InputError(f"{folder} has no {path.name}; {advice}.")
    if (found := given.get("act_fn", "silu")) not in ACTIVATIONS:
        raise InputError(f"{folder}/config.json has act_fn={found}; it takes silu.")
    params = _renamed(files.read_weights(path)[0])
    with as_input_error(f"{folder}/config.json does not describe a VQModel", (KeyError, TypeError)):
        down, up = given["down_block_types"], given["up_block_types"]
        config = _settings(
            folder,
            channels=given["in_channels"],
            widths=given["block_out_channels"],
            blocks=given["layers_per_block"],
            codes=given["num_vq_embeddings"],
            code_size=given.get("vq_embed_dim") or given["latent_channels"],
            groups=given.get("norm_num_groups", 32),
        )
    expected = {f"encoder.levels.{i}" for i, kind in enumerate(down) if kind.startswith("Attn")}
    expected |= {f"decoder.levels.{i}" for i, kind in enumerate(up) if kind.startswith("Attn")}
    if given.get("mid_block_add_attention", True):
        expected |= {"encoder.middle", "decoder.middle"}
    _check_attention(params, expected, path)
    return config, params, {"format": "diffusers VQModel", "image_size": given.get("sample_size")}


def read_llamagen(params: dict[str, np.ndarray], path: pathlib.Path):
    """As `read_vq_model`, of the tensors of a file with LlamaGen's VQ-8 or VQ-16.

    LlamaGen compares unit vectors. With codes of length 1, the code in the nearest direction is the
    nearest code.
    """
    params, widths = _renamed(params), []
    while (first := params.get(f"encoder.levels.{len(widths)}.blocks.0.conv1.weight")) is not None:
        widths.append(first.shape[0])
    with as_input_error(f"{path} has no codebook", (KeyError, ValueError)):
        codebook = params[CODEBOOK]
        codes, size = codebook.shape
    lengths = np.linalg.norm(codebook, axis=-1, keepdims=True)
    params[CODEBOOK] = codebook / np.maximum(lengths, 1e-12)
    config = _settings(
        path, channels=3, widths=widths, blocks=2, codes=codes, code_size=size, groups=32
    )
    lowest = {f"encoder.levels.{len(widths) - 1}", "decoder.levels.0"}
    _check_attention(params, lowest | {"encoder.middle", "decoder.middle"}, path)
    return config, params, {"format": "LlamaGen", "image_size": 256}


def _settings(where: pathlib.Path, *, widths, blocks, **facts) -> config_lib.Autoencoder:
    """Checked settings of the network; InputError where this project does not take them."""
    facts |= {"downsample": 2 ** (len(widths) - 1), "widths": tuple(widths), "quantizer": "vq"}
    facts |= {"encoder_blocks": blocks, "decoder_blocks": blocks + 1}
    config = config_lib.Autoencoder(norm=True, attention=True, **facts)
    flat = fields.unflatten(fields.flatten(config))
    return fields.from_dict(config_lib.Autoencoder, flat, f"the tokenizer in {where}: autoencoder")


def _renamed(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays by this project's names; weights of linear layers become kernels of one pixel."""
    found = {}
    for name, array in arrays.items():
        if name == IGNORED:
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        linear = array.ndim == 2 and name != CODEBOOK
        found[name] = array[..., None, None] if linear else array
    return found


def _check_attention(params: dict, expected: set[str], path: pathlib.Path) -> None:
    found = {name.partition(".attention.")[0] for name in params if ".attention." in name}
    if differing := shorten(sorted(found ^ expected)):
        raise InputError(f"{path} has attention too many or too few in: {differing}.")
