"""Hugging Face's ImageGPT: a folder with config.json, safetensors and preprocessor_config.json.

`transformers` keeps the start vector as row V of the token embedding, q, k and v side by side in
one matrix, and a bias beside every matrix, which OpenAI's weights leave at zero. It does not
prepend the start token by itself: to score tokens x, feed [V, x_0 .. x_(T-2)].
"""

import dataclasses
import json
import logging
import math
import pathlib
import re

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.config import fields
from gptv_jax.errors import InputError
from gptv_jax.tokens import palette as palettes
from gptv_jax.tokens.palette import Palette
from gptv_jax.weights import native
from gptv_jax.weights.file import WeightsFile, agreed, class_head
from gptv_jax.weights.strict_reader import StrictReader

LOG = logging.getLogger(__name__)
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# What the network computes; a config that says otherwise is of another network.
FIXED = {
    "activation_function": "quick_gelu",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
# Buffers that old versions saved beside the weights: masks, which are not learned.
BUFFERS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
# Fields of the model that this form has a word for, or that are of no matter to it; whatever else
# differs from the default is refused.
EXPRESSED = {
    "layers", "width", "heads", "mlp_ratio", "axial_positions", "start_per_variant", "dropout",
    "dtype", "scan_layers", "remat", "masked_share", "votes", "base_width", "label_dropout",
    "random_order",
}  # fmt: skip
ARCHITECTURES = {
    "generation": "ImageGPTForCausalImageModeling",
    "classification": "ImageGPTForImageClassification",
}


def found(path: pathlib.Path) -> bool:
    """Whether `path` is meant to be such a folder."""
    try:
        return "model_type" in json.loads((path / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def read_definition(folder: pathlib.Path) -> Palette | None:
    """See `interop.read_definition`."""
    path = folder / PREPROCESSOR
    clusters = files.read_json(path, {}).get("clusters")
    if clusters is None:
        return None
    try:
        centers = np.asarray(clusters, np.float32)
    except (ValueError, TypeError) as error:
        raise InputError(f"clusters of {path} are no list of colours.") from error
    provenance = {"file": f"{folder.name}/{PREPROCESSOR}"}
    return palettes.checked(centers, provenance, f"clusters of {path}")


def read(folder: pathlib.Path, palette: Palette | None = None) -> WeightsFile:
    """See `interop.read`."""
    config = _config(folder)
    there, metadata = _open(folder)
    if native.HEADER in metadata:  # our own export, which says what its tokens are
        header = native.header(metadata, folder)
        colours = native.uses_colours(header)
        own = agreed(palette, read_definition(folder), str(folder)) if colours else None
        weights_file = native.described(header, {}, own, folder)
    else:
        own = agreed(palette, read_definition(folder), str(folder))
        weights_file = _described(config, folder, own)
    params = _weights(config, folder, there)
    classes = len(params.get("classifier.class_head", ()))
    return dataclasses.replace(weights_file, params=params, classes=classes).checked(str(folder))


def _config(folder: pathlib.Path) -> dict:
    config = files.read_json(folder / CONFIG, {})
    if config["model_type"] != "imagegpt":
        raise InputError(
            f"{folder / CONFIG} is of a model of type {config['model_type']!r}; it takes imagegpt."
        )
    for name, only in FIXED.items():
        if config.get(name, only) != only:
            raise InputError(
                f"{folder / CONFIG} has {name}={config[name]!r}; this network has {only!r}."
            )
    if config.get("n_inner") is None:
        config["n_inner"] = 4 * config["n_embd"] if type(config.get("n_embd")) is int else 1
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise InputError(f"{folder / CONFIG} has {name}={config.get(name)!r}, no whole number.")
    return config


def _described(config: dict, folder: pathlib.Path, palette: Palette) -> WeightsFile:
    """What `config.json` says, without weights."""
    width, size = config["n_embd"], math.isqrt(config["n_positions"])
    inner = config["n_inner"]
    if size**2 != config["n_positions"]:
        raise InputError(
            f"{folder / CONFIG} has n_positions={config['n_positions']}, which is no square of "
            "pixels."
        )
    if inner % width or width % config["n_head"]:
        raise InputError(
            f"{folder / CONFIG} has n_inner={inner} and n_head={config['n_head']}, but "
            f"n_embd={width} must divide the one and be a multiple of the other."
        )
    return WeightsFile(
        model=config_lib.Model(
            layers=config["n_layer"],
            width=width,
            heads=config["n_head"],
            mlp_ratio=inner // width,
        ),
        tokens=config_lib.Tokens(kind="palette", colors=config["vocab_size"] - 1),
        image_size=size,
        params={},
        definition=palette,
    )


def _parts(config: dict) -> dict[str, tuple]:
    """Of each stacked parameter: the name in a layer, its shape there, and its shape here."""
    D, H = config["n_embd"], config["n_head"]
    F, K = config["n_inner"], D // H
    return {
        "blocks.norm_1": ("ln_1.weight", (D,), (D,)),
        "blocks.qkv": ("attn.c_attn.weight", (D, 3 * D), (D, 3, H, K)),
        "blocks.attention_out": ("attn.c_proj.weight", (D, D), (H, K, D)),
        "blocks.norm_2": ("ln_2.weight", (D,), (D,)),
        "blocks.mlp_in": ("mlp.c_fc.weight", (D, F), (D, F)),
        "blocks.mlp_out": ("mlp.c_proj.weight", (F, D), (F, D)),
    }


def _weights(config: dict, folder: pathlib.Path, there: StrictReader) -> dict[str, np.ndarray]:
    """Our parameters, of every tensor there.

    Raises:
      InputError: one is missing, left over, misshapen or a bias that is not zero.
    """
    V, T, D = config["vocab_size"] - 1, config["n_positions"], config["n_embd"]
    F = config["n_inner"]
    # A model that was saved without its head has no prefix.
    prefix = "" if "wte.weight" in there else "transformer."
    present = sum(name.endswith(".ln_1.weight") for name in there.shapes)
    L = min(config["n_layer"], present + 1)  # one too many is enough to be told of
    embedding = there.take(f"{prefix}wte.weight", (V + 1, D))
    params = {
        "token_embedding": embedding[:V],
        "start": embedding[V:],
        "position": there.take(f"{prefix}wpe.weight", (T, D)),
        "final_norm": there.take(f"{prefix}ln_f.weight", (D,)),
    }
    for ours, (name, shape, layer) in _parts(config).items():
        names = [f"{prefix}h.{i}.{name}" for i in range(L)]
        params[ours] = there.stack(names, shape, layer)
    widths = {"attn.c_attn": 3 * D, "attn.c_proj": D, "mlp.c_fc": F, "mlp.c_proj": D}
    for i in range(L):
        for name, width in widths.items():
            there.zeros(f"{prefix}h.{i}.{name}.bias", (width,))
    if "score.weight" in there:
        classes = there.shapes["score.weight"][0] if there.shapes["score.weight"] else 0
        params |= class_head(there.take("score.weight", (classes, D)))
    if "lm_head.weight" not in there and ("score.weight" in there or not prefix):
        LOG.warning("%s has no token head; it is left at zero.", folder)
        params["head"] = np.zeros((V, D), np.float32)
    else:
        params["head"] = there.take("lm_head.weight", (V, D))
    there.close(folder)
    return params


def _open(folder: pathlib.Path) -> tuple[StrictReader, dict[str, str]]:
    """The tensors of a folder, whatever number of files they are spread over, and the metadata."""
    paths = [folder / WEIGHTS]
    if not paths[0].exists():
        index = files.read_json(folder / INDEX, {}).get("weight_map", {})
        if not isinstance(index, dict) or not all(isinstance(n, str) for n in index.values()):
            raise InputError(f"{folder / INDEX} is damaged: its weight_map names no files.")
        paths = [folder / name for name in sorted(set(index.values()))]
    if not paths:
        raise InputError(
            f"{folder} has no {WEIGHTS}; where it holds pytorch_model.bin, load it with "
            "transformers and save_pretrained() it, which writes safetensors."
        )
    shapes, opened = {}, {}
    for path in paths:
        file = files.open_safetensors(path)
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            if name in shapes:
                raise InputError(f"{folder} has {name} in two of its files.")
            if not BUFFERS.fullmatch(name):
                shapes[name], opened[name] = tuple(file.get_slice(name).get_shape()), file
    return StrictReader(shapes, lambda name: opened[name].get_tensor(name)), file.metadata() or {}


def write(weights_file: WeightsFile, folder: pathlib.Path, task: str) -> None:
    """Writes a folder that `transformers` loads, `ImageGPTForCausalImageModeling` or the like.

    What that form has no word for is folded in: tables of rows and columns into that of positions,
    the scale of a class head's input into its weights; of several start vectors the first stays,
    which is that of images as they are.

    Args:
      weights_file: the weights.
      folder: made where it is not there.
      task: "generation", with the token head, or "classification", with the class head.

    Raises:
      InputError: the folder cannot be written or holds something else, or the network has what
        that form cannot express.
    """
    if folder.exists() and not found(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} cannot be written: it holds something else; name a new folder.")
    if weights_file.classes and task == "generation":
        LOG.warning("the class head is left out; task=classification writes it, without the other.")
    weights_file = _folded(weights_file, task)
    params, codec = weights_file.params, weights_file.codec
    V, T, D = codec.vocabulary, codec.grid[0] * codec.grid[1], weights_file.model.width
    config = {
        "architectures": [ARCHITECTURES[task]],
        "model_type": "imagegpt",
        "vocab_size": V + 1,
        "n_positions": T,
        "n_embd": D,
        "n_layer": weights_file.model.layers,
        "n_head": weights_file.model.heads,
        "n_inner": weights_file.model.mlp_ratio * D,
        "resid_pdrop": weights_file.model.dropout,
        "embd_pdrop": weights_file.model.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **FIXED,
    }
    arrays = {
        "transformer.wte.weight": np.concatenate([params["token_embedding"], params["start"]]),
        "transformer.wpe.weight": params["position"],
        "transformer.ln_f.weight": params["final_norm"],
    }
    for ours, (name, shape, _) in _parts(config).items():
        for i, layer in enumerate(params[ours]):
            arrays[f"transformer.h.{i}.{name}"] = layer.reshape(shape)
            if name.startswith(("attn", "mlp")):
                bias = name.replace("weight", "bias")
                arrays[f"transformer.h.{i}.{bias}"] = np.zeros(shape[-1], np.float32)
    if task == "generation":
        arrays["lm_head.weight"] = params["head"]
    else:
        arrays["score.weight"] = params["classifier.class_head"]
        labels = {str(i): f"LABEL_{i}" for i in range(weights_file.classes)}
        config |= {"id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
    # Token by token a colour to show it as; for a palette, the palette.
    every = np.arange(V)[:, None].repeat(T, axis=1)
    shown = codec.picture(codec.decode(every))[:, 0, 0]
    centers = weights_file.definition.centers if weights_file.definition else shown / 127.5 - 1
    preprocessor = {
        "image_processor_type": "ImageGPTImageProcessor",
        "clusters": centers.tolist(),
        "do_color_quantize": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 2,
        "size": {"height": codec.grid[0], "width": codec.grid[1]},
    }
    files.claim(folder, "to")
    (folder / CONFIG).unlink(missing_ok=True)  # of an earlier export
    header = json.dumps(native.describe(weights_file))
    files.write_safetensors(arrays, folder / WEIGHTS, {"format": "pt", native.HEADER: header})
    files.write_json(folder / PREPROCESSOR, preprocessor)
    files.write_json(folder / CONFIG, config)  # last: by it the folder is known


def _folded(weights_file: WeightsFile, task: str) -> WeightsFile:
    """The same network within what Hugging Face's form can express.

    Raises:
      InputError: it has what that form cannot express; names it.
    """
    default = fields.flatten(config_lib.Model())
    foreign = [
        f"model.{name}={value}"
        for name, value in fields.flatten(weights_file.model).items()
        if name not in EXPRESSED and value != default[name]
    ]
    if weights_file.tokens.kind == "learned":
        foreign.append("tokens.kind=learned")  # its tokens are colours
    params = dict(weights_file.params)
    head = {
        n: params.pop(f"classifier.{n}", None)
        for n in ("class_head", "class_center", "class_scale")
    }
    if task == "classification":
        if head["class_head"] is None:
            raise InputError("the model has no class head to export; take task=generation.")
        if head["class_center"].any():
            foreign.append("a class head whose input is centred (finetune.standardize)")
        params["classifier.class_head"] = head["class_head"] * head["class_scale"]
    if foreign:
        raise InputError(f"Hugging Face's form has no word for {', '.join(foreign)}.")
    if weights_file.model.axial_positions:
        rows, columns = weights_file.codec.grid
        row, column = params.pop("row"), params.pop("column")
        params["position"] = (
            params["position"] + row.repeat(columns, axis=0) + np.tile(column, (rows, 1))
        )
    if weights_file.starts > 1:
        LOG.warning("of %d start vectors the first one is exported.", weights_file.starts)
        params["start"] = params["start"][:1]
    return dataclasses.replace(
        weights_file,
        model=dataclasses.replace(
            weights_file.model, axial_positions=False, start_per_variant=False
        ),
        params=params,
        starts=1,
        classes=weights_file.classes if task == "classification" else 0,
    )
