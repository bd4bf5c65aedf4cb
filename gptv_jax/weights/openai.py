"""OpenAI's Image GPT: the TensorFlow 1 checkpoints of openai/image-gpt, read by TensorFlow.

Only this module needs TensorFlow; `pip install -e '.[prepare]'` installs it.
"""

import logging
import math
import pathlib
import re

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.errors import InputError, as_input_error
from gptv_jax.tokens.palette import Palette
from gptv_jax.weights.native import WeightsFile, choose_palette
from gptv_jax.weights.strict_reader import StrictReader, read_class_head

LOG = logging.getLogger(__name__)
SCOPE = "model/"
BERT = re.compile(r"igpt-\w+-bert")  # OpenAI's names of the folders with BERT checkpoints
# Variables of an optimizer, which a checkpoint may hold.
OPTIMIZER = re.compile(r".*(adam_m|adam_v|Adam(_\d+)?|global_step|beta[12]_power)$")


def recognizes(prefix: pathlib.Path) -> bool:
    """See `weights.is_weights_path`."""
    return prefix.with_name(f"{prefix.name}.index").is_file()


def read_definition(prefix: pathlib.Path) -> None:
    """A checkpoint stores no palette."""


def read(prefix: pathlib.Path, palette: Palette | None = None) -> WeightsFile:
    """See `weights.read`."""
    palette = choose_palette(palette, None, f"{prefix}, a TensorFlow checkpoint,")
    try:  # nothing else reads TensorFlow 1 checkpoints; only this function imports TensorFlow
        import tensorflow as tf
    except ImportError as error:
        advice = "to read it, pip install -e '.[prepare]'"
        raise InputError(f"{prefix} is a TensorFlow checkpoint; {advice}.") from error
    with as_input_error(f"{prefix} cannot be read"):  # TensorFlow's readers raise several types
        checkpoint = tf.train.load_checkpoint(str(prefix))
        stored = checkpoint.get_variable_to_shape_map().items()
        variables = {name: tuple(shape) for name, shape in stored if not OPTIMIZER.match(name)}
        shapes = {name.removeprefix(SCOPE): shape for name, shape in variables.items()}
        if len(shapes) < len(variables):
            raise ValueError(f"it has the same variable inside {SCOPE} and outside")
        scope = SCOPE if any(name.startswith(SCOPE) for name in variables) else ""
        reader = StrictReader(shapes, lambda name: checkpoint.get_tensor(scope + name))
    return convert(reader, prefix, palette)


def convert(reader: StrictReader, prefix: pathlib.Path, palette: Palette) -> WeightsFile:
    """The weights under this project's names.

    The `reader` has the checkpoint's variables, by name without the scope. The names of the folders
    of the checkpoint at `prefix` tell BERT from autoregressive weights, and its name ends in the
    training step.
    """
    with as_input_error(f"{prefix} holds no Image GPT"):
        (V, D), (T, _) = reader.shapes["wte"], reader.shapes["wpe"]
        H, K, _ = reader.shapes["h0/attn/q_proj"]
        F = reader.shapes["h0/mlp/c_fc/w"][1]
    L = len({name.partition("/")[0] for name in reader.shapes if re.match(r"h\d+/", name)})

    def stack(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return reader.stack([f"h{i}/{name}" for i in range(L)], shape, shape)

    qkv = np.empty((L, D, 3, H, K), np.float32)
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        qkv[:, :, i] = stack(f"attn/{name}", (H, K, D)).transpose(0, 3, 1, 2)
    params = {
        "token_embedding": reader.take("wte", (V, D)),
        "position": reader.take("wpe", (T, D)),
        "blocks.norm_1": stack("ln_1/g", (D,)),
        "blocks.qkv": qkv,
        "blocks.attention_out": stack("attn/c_proj", (H, K, D)),
        "blocks.norm_2": stack("ln_2/g", (D,)),
        "blocks.mlp_in": stack("mlp/c_fc/w", (D, F)),
        "blocks.mlp_out": stack("mlp/c_proj/w", (F, D)),
        "final_norm": reader.take("ln_f/g", (D,)),
        "head": reader.take("wtet", (V, D)),
    }
    # No variable tells BERT from autoregressive weights.
    bert = any(BERT.fullmatch(part) for part in prefix.parts)
    objective = "bert" if bert else "autoregressive"
    LOG.info("%s is read as %s, by the names of its folders.", prefix, objective)
    start = reader.take("sos", (D,)) if not bert or "sos" in reader.shapes else None
    if not bert:  # BERT checkpoints may hold a start vector, but do not use it
        params["start"] = start[None]
    params |= read_class_head(reader, "clf/wclf", D)
    reader.close(prefix)
    step = re.search(r"ckpt-(\d+)$", prefix.name)
    weights_file = WeightsFile(
        model=config_lib.Model(layers=L, width=D, heads=H, mlp_ratio=F // D, objective=objective),
        tokens=config_lib.Tokens(kind="palette", colors=V),
        image_size=math.isqrt(T),
        params=params,
        definition=palette,
        classes=len(params.get("classifier.class_head", ())),
        step=int(step[1]) if step else None,
    )
    return weights_file.checked(str(prefix))
