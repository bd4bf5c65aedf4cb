"""Hugging Face's ImageGPT: a folder with config.json, safetensors and preprocessor_config.json.

`transformers` stores the start vector as row V of the token embedding, q, k and v side by side in
one matrix, and a bias beside every matrix, which OpenAI's weights leave at zero. `transformers`
does not prepend the start token: to score tokens x, feed [V, x_0 .. x_(T-2)].
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
from gptv_jax.errors import InputError, as_input_error
from gptv_jax.tokens import palette as palettes
from gptv_jax.tokens.palette import Palette
from gptv_jax.weights import native
from gptv_jax.weights.native import WeightsFile, choose_palette
from gptv_jax.weights.strict_reader import StrictReader, read_class_head

LOG = logging.getLogger(__name__)
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# What this project's network computes. A config with another value describes another network.
FIXED = {
    "activation_function": "quick_gelu",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
# Attention masks, which old versions of `transformers` saved beside the weights.
MASKS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
# Fields of config.model that the format can express, or that do not change what the network
# computes. Any other field must have its default.
EXPRESSED = {
    "layers", "width", "heads", "mlp_ratio", "axial_positions", "start_per_variant", "dropout",
    "dtype", "scan_layers", "remat", "masked_share", "votes", "base_width", "label_dropout",
    "random_order", "context_masking", "bfloat16_on_cpu",
}  # fmt: skip
ARCHITECTURES = {
    "generation": "ImageGPTForCausalImageModeling",
    "classification": "ImageGPTForImageClassification",
}


def recognizes(path: pathlib.Path) -> bool:
    """See `weights.is_weights_path`."""
    try:
        return "model_type" in json.loads((path / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def read_definition(folder: pathlib.Path) -> Palette | None:
    """See `weights.read_definition`."""
    path = folder / PREPROCESSOR
    clusters = files.read_json(path, {}).get("clusters")
    if clusters is None:
        return None
    with as_input_error(f"clusters of {path} are no list of colours"):
        centers = np.asarray(clusters, np.float32)
    provenance, ours = {"file": f"{folder.name}/{PREPROCESSOR}"}, False
    if (folder / WEIGHTS).exists():  # what this project exported is from -1 to 1, however bright
        with files.open_safetensors(folder / WEIGHTS) as file:
            ours = native.HEADER in (file.metadata() or {})
    return palettes.checked(centers, provenance, f"clusters of {path}", trusted_range=ours)


def read(folder: pathlib.Path, palette: Palette | None = None) -> WeightsFile:
    """See `weights.read`."""
    config = _read_config(folder)
    reader, metadata = _open(folder)
    if native.HEADER in metadata:  # this project exported the folder
        header, definition = native.parse_header(metadata, folder), None
        if header.get("palette") is not None:
            definition = choose_palette(palette, read_definition(folder), str(folder))
        weights_file = native.from_header(header, {}, definition, folder)
    else:
        vocabulary, T, D, L, H, F = (config[name] for name in SIZES)
        weights_file = WeightsFile(
            model=config_lib.Model(layers=L, width=D, heads=H, mlp_ratio=F // D),
            tokens=config_lib.Tokens(kind="palette", colors=vocabulary - 1),
            image_size=math.isqrt(T),
            params={},
            definition=choose_palette(palette, read_definition(folder), str(folder)),
        )
    params = _read_params(config, folder, reader)
    classes = len(params.get("classifier.class_head", ()))
    names = _class_names(config, classes, folder)
    return dataclasses.replace(
        weights_file, params=params, classes=classes, class_names=names
    ).checked(str(folder))


def _class_names(config: dict, classes: int, folder: pathlib.Path) -> tuple[str, ...]:
    """The names that `id2label` gives to the classes; () where it has the default names alone."""
    labels, default = config.get("id2label"), _default_labels(classes)
    if not classes or not labels or labels == default:
        return ()
    if not isinstance(labels, dict) or labels.keys() != default.keys():
        LOG.warning("id2label of %s does not name %d classes; they get numbers.", folder, classes)
        return ()
    return tuple(str(labels[number]) for number in default)


def _default_labels(classes: int) -> dict[str, str]:
    """`id2label` as `transformers` writes it for classes without names."""
    return {str(i): f"LABEL_{i}" for i in range(classes)}


def _read_config(folder: pathlib.Path) -> dict:
    """The content of `config.json`, where it describes a network that this project computes."""
    path = folder / CONFIG
    config = files.read_json(path, {})
    if config["model_type"] != "imagegpt":
        raise InputError(f"{path} has model_type={config['model_type']!r}; it must be 'imagegpt'.")
    for name, only in FIXED.items():
        if config.get(name, only) != only:
            raise InputError(f"{path} has {name}={config[name]!r}; this network has {only!r}.")
    if config.get("n_inner") is None:
        config["n_inner"] = 4 * config["n_embd"] if type(config.get("n_embd")) is int else 1
    for name in SIZES:
        if type(config.get(name)) is not int or config[name] < 1:
            raise InputError(f"{path} has {name}={config.get(name)!r}, no whole number.")
    _, T, D, _, H, F = (config[name] for name in SIZES)
    if math.isqrt(T) ** 2 != T:
        raise InputError(f"{path} has n_positions={T}, which is no square of pixels.")
    if F % D or D % H:
        problem = f"{path} has n_inner={F} and n_head={H}; n_inner must be a multiple of n_embd={D}"
        raise InputError(f"{problem}, and n_head must divide n_embd.")
    return config


def _layer_tensors(config: dict) -> dict[str, tuple]:
    """For every stacked parameter: Hugging Face's name and shape in a layer, and our shape."""
    D, H, F = config["n_embd"], config["n_head"], config["n_inner"]
    K = D // H
    return {
        "blocks.norm_1": ("ln_1.weight", (D,), (D,)),
        "blocks.qkv": ("attn.c_attn.weight", (D, 3 * D), (D, 3, H, K)),
        "blocks.attention_out": ("attn.c_proj.weight", (D, D), (H, K, D)),
        "blocks.norm_2": ("ln_2.weight", (D,), (D,)),
        "blocks.mlp_in": ("mlp.c_fc.weight", (D, F), (D, F)),
        "blocks.mlp_out": ("mlp.c_proj.weight", (F, D), (F, D)),
    }


def _read_params(config: dict, folder: pathlib.Path, reader: StrictReader) -> dict[str, np.ndarray]:
    """The parameters under this project's names; every bias must be zero."""
    V, T, D = config["vocab_size"] - 1, config["n_positions"], config["n_embd"]
    # A model that was saved without its head has no prefix.
    prefix = "" if "wte.weight" in reader.shapes else "transformer."
    stored = sum(name.endswith(".ln_1.weight") for name in reader.shapes)
    L = min(config["n_layer"], stored + 1)  # however wrong n_layer is, one missing layer says it
    embedding = reader.take(f"{prefix}wte.weight", (V + 1, D))
    params = {
        "token_embedding": embedding[:V],
        "start": embedding[V:],
        "position": reader.take(f"{prefix}wpe.weight", (T, D)),
        "final_norm": reader.take(f"{prefix}ln_f.weight", (D,)),
    }
    for ours, (name, shape, layer) in _layer_tensors(config).items():
        names = [f"{prefix}h.{i}.{name}" for i in range(L)]
        params[ours] = reader.stack(names, shape, layer)
        if len(shape) == 2:
            for matrix in names:
                reader.require_zeros(matrix.replace(".weight", ".bias"), shape[-1:])
    params |= read_class_head(reader, "score.weight", D)
    if "lm_head.weight" not in reader.shapes and ("score.weight" in reader.shapes or not prefix):
        LOG.warning("%s has no token head; the token head is left at zero.", folder)
        params["head"] = np.zeros((V, D), np.float32)
    else:
        params["head"] = reader.take("lm_head.weight", (V, D))
    reader.close(folder)
    return params


def _open(folder: pathlib.Path) -> tuple[StrictReader, dict[str, str]]:
    """The tensors of all of a folder's safetensors files, and the metadata."""
    paths = [folder / WEIGHTS]
    if not paths[0].exists():
        index = files.read_json(folder / INDEX, {}).get("weight_map", {})
        if not isinstance(index, dict) or not all(isinstance(n, str) for n in index.values()):
            raise InputError(f"{folder / INDEX} is damaged: its weight_map names no files.")
        paths = [folder / name for name in sorted(set(index.values()))]
    if not paths:
        raise InputError(
            f"{folder} has no {WEIGHTS}. Where the model has pytorch_model.bin alone, write "
            "safetensors first: transformers.ImageGPTForCausalImageModeling.from_pretrained(NAME)"
            ".save_pretrained(NEW_FOLDER)."
        )
    shapes, file_of = {}, {}
    for path in paths:
        file = files.open_safetensors(path)
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            if name in shapes:
                raise InputError(f"{folder} has {name} in two of its files.")
            if not MASKS.fullmatch(name):
                shapes[name], file_of[name] = tuple(file.get_slice(name).get_shape()), file
    reader = StrictReader(shapes, lambda name: file_of[name].get_tensor(name))
    return reader, file.metadata() or {}


def write(weights_file: WeightsFile, folder: pathlib.Path, task: str) -> None:
    """Writes a folder that `transformers` loads as one of `ARCHITECTURES`.

    The tables of rows and columns are added to the table of positions, and the class head's weights
    are multiplied by the scale of the class head's input. Of several start vectors the first one is
    written, which belongs to images that were not augmented. The folder is new, or has an earlier
    export. The task "generation" writes the token head, "classification" the class head.
    """
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not recognizes(folder):
        raise InputError(f"{folder} cannot be written: it holds something else; name a new folder.")
    if weights_file.classes and task == "generation":
        LOG.warning("the class head is not exported; task=classification exports it alone.")
    weights_file = _expressible(weights_file, task)
    model, params, codec = weights_file.model, weights_file.params, weights_file.codec
    V, T, D = codec.vocabulary, codec.grid[0] * codec.grid[1], model.width
    sizes = V + 1, T, D, model.layers, model.heads, model.mlp_ratio * D
    config = {
        "architectures": [ARCHITECTURES[task]],
        "model_type": "imagegpt",
        **dict(zip(SIZES, sizes, strict=True)),
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
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
    for ours, (name, shape, _) in _layer_tensors(config).items():
        for i, layer in enumerate(params[ours]):
            arrays[f"transformer.h.{i}.{name}"] = layer.reshape(shape)
            if len(shape) == 2:
                bias = name.replace("weight", "bias")
                arrays[f"transformer.h.{i}.{bias}"] = np.zeros(shape[-1], np.float32)
    if task == "generation":
        arrays["lm_head.weight"] = params["head"]
    else:
        arrays["score.weight"] = params["classifier.class_head"]
        names = {str(i): name for i, name in enumerate(weights_file.class_names)}
        labels = names or _default_labels(weights_file.classes)
        config |= {"id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
    if weights_file.definition:
        centers = weights_file.definition.centers
    else:  # the colour in which each token is shown
        every_token = np.arange(V)[:, None].repeat(T, axis=1)
        centers = codec.picture(codec.decode(every_token))[:, 0, 0] / 127.5 - 1
    preprocessor = {
        "image_processor_type": "ImageGPTImageProcessor",
        "clusters": centers.tolist(),
        "do_color_quantize": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 2,
        "size": {"height": codec.grid[0], "width": codec.grid[1]},
    }
    files.claim(folder, "--to")
    # config.json is removed first and written last: a folder with it is complete.
    (folder / CONFIG).unlink(missing_ok=True)
    header = json.dumps(native.make_header(weights_file))
    files.write_safetensors(arrays, folder / WEIGHTS, {"format": "pt", native.HEADER: header})
    files.write_json(folder / PREPROCESSOR, preprocessor)
    files.write_json(folder / CONFIG, config)


def _expressible(weights_file: WeightsFile, task: str) -> WeightsFile:
    """An equivalent network that the format can express; the error names what it cannot."""
    model, usual = weights_file.model, fields.flatten(config_lib.Model())
    given = {n: v for n, v in fields.flatten(model).items() if n not in EXPRESSED}
    unsupported = [f"model.{name}={value}" for name, value in given.items() if value != usual[name]]
    if weights_file.tokens.kind == "learned":
        unsupported.append("tokens.kind=learned")  # the format's tokens are colours
    if patch := weights_file.tokens.patch:
        unsupported.append(f"tokens.patch={patch}")
    if weights_file.frames:
        unsupported.append(f"data.frames={weights_file.frames}")
    if isinstance(size := weights_file.image_size, tuple):
        unsupported.append(f"data.image_size={size}, a rectangle")
    classes = weights_file.classes if task == "classification" else 0
    params = weights_file.headless().params
    if task == "classification":
        if not classes:
            raise InputError("the model has no class head to export; take task=generation.")
        names = (f"classifier.class_{part}" for part in ("head", "center", "scale"))
        head, center, scale = (weights_file.params[name] for name in names)
        if center.any():
            unsupported.append("a class head whose input is centred (finetune.standardize)")
        params["classifier.class_head"] = head * scale
    if unsupported:
        raise InputError(f"Hugging Face's format cannot express {', '.join(unsupported)}.")
    if model.axial_positions:
        rows, columns = weights_file.codec.grid
        along = params.pop("row").repeat(columns, axis=0) + np.tile(params.pop("column"), (rows, 1))
        params["position"] = params["position"] + along
    if weights_file.starts > 1:
        LOG.warning("of %d start vectors the first one is exported.", weights_file.starts)
        params["start"] = params["start"][:1]
    model = dataclasses.replace(model, axial_positions=False, start_per_variant=False)
    return dataclasses.replace(weights_file, model=model, params=params, starts=1, classes=classes)
