"""OpenAI's Image GPT: the TensorFlow 1 checkpoints of openai/image-gpt, read by TensorFlow.

TensorFlow is needed here and nowhere else; `pip install -e '.[prepare]'` brings it.
"""

import logging
import math
import pathlib
import re

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax.errors import InputError, first_line
from gptv_jax.tokens.palette import Palette
from gptv_jax.weights.file import WeightsFile, class_head
from gptv_jax.weights.strict_reader import StrictReader

LOG = logging.getLogger(__name__)
SCOPE = "model/"
BERT = re.compile(r"igpt-\w+-bert")  # the folders that OpenAI has the BERT variant in
# The optimizer's, should a checkpoint have them.
FOREIGN = re.compile(r".*(adam_m|adam_v|Adam(_\d+)?|global_step|beta[12]_power)$")


def found(prefix: pathlib.Path) -> bool:
    """Whether `prefix` is meant to be that of a checkpoint."""
    return prefix.with_name(f"{prefix.name}.index").is_file()


def read_definition(prefix: pathlib.Path) -> Palette | None:
    """See `interop.read_definition`: checkpoints have none."""
    return None


def read(prefix: pathlib.Path, palette: Palette | None = None) -> WeightsFile:
    """See `interop.read`."""
    if palette is None:
        raise InputError(
            f"{prefix} is a TensorFlow checkpoint, which has no colours; name the palette "
            "(kmeans_centers.npy) as well."
        )
    return convert(_open(prefix), prefix, palette)


def convert(there: StrictReader, prefix: pathlib.Path, palette: Palette) -> WeightsFile:
    """Our weights from the checkpoint's variables.

    Args:
      there: the variables, by name without scope.
      prefix: of the checkpoint, for messages and the step.
      palette: the colours.

    Raises:
      InputError: a variable is missing, left over or misshapen; all are listed.
    """
    try:
        (V, D), (T, _) = there.shapes["wte"], there.shapes["wpe"]
        H, K, _ = there.shapes["h0/attn/q_proj"]
        F = there.shapes["h0/mlp/c_fc/w"][1]
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{prefix} holds no Image GPT ({first_line(error)}).") from error
    L = len({name.partition("/")[0] for name in there.shapes if re.match(r"h\d+/", name)})
    names = [f"h{i}" for i in range(L)]

    def stack(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return there.stack([f"{layer}/{name}" for layer in names], shape, shape)

    qkv = np.empty((L, D, 3, H, K), np.float32)
    for i, which in enumerate(("q_proj", "k_proj", "v_proj")):
        qkv[:, :, i] = stack(f"attn/{which}", (H, K, D)).transpose(0, 3, 1, 2)
    params = {
        "token_embedding": there.take("wte", (V, D)),
        "position": there.take("wpe", (T, D)),
        "blocks.norm_1": stack("ln_1/g", (D,)),
        "blocks.qkv": qkv,
        "blocks.attention_out": stack("attn/c_proj", (H, K, D)),
        "blocks.norm_2": stack("ln_2/g", (D,)),
        "blocks.mlp_in": stack("mlp/c_fc/w", (D, F)),
        "blocks.mlp_out": stack("mlp/c_proj/w", (F, D)),
        "final_norm": there.take("ln_f/g", (D,)),
        "head": there.take("wtet", (V, D)),
    }
    # No variable tells for sure which of the two it is.
    bert = any(BERT.fullmatch(part) for part in prefix.parts)
    objective = "bert" if bert else "autoregressive"
    LOG.info("%s is read as %s, by the names of its folders.", prefix, objective)
    start = there.take("sos", (D,)) if objective == "autoregressive" or "sos" in there else None
    if objective == "autoregressive":  # BERT makes no use of one, even where it is there
        params["start"] = start[None]
    classes = 0
    if "clf/wclf" in there:
        classes = there.shapes["clf/wclf"][0] if there.shapes["clf/wclf"] else 0
        params |= class_head(there.take("clf/wclf", (classes, D)))
    there.close(prefix)
    weights_file = WeightsFile(
        model=config_lib.Model(layers=L, width=D, heads=H, mlp_ratio=F // D, objective=objective),
        tokens=config_lib.Tokens(kind="palette", colors=V),
        image_size=math.isqrt(T),
        params=params,
        definition=palette,
        classes=classes,
        step=_step(prefix),
    )
    return weights_file.checked(str(prefix))


def _step(prefix: pathlib.Path) -> int | None:
    number = re.search(r"ckpt-(\d+)$", prefix.name)
    return int(number[1]) if number else None


def _open(prefix: pathlib.Path) -> StrictReader:
    """The checkpoint's variables, by name within the scope.

    Raises:
      InputError: TensorFlow is not installed, or cannot read the checkpoint.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise InputError(
            f"{prefix} is a TensorFlow checkpoint; to read it, pip install -e '.[prepare]'."
        ) from error
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        every = reader.get_variable_to_shape_map()
        shapes = {
            name.removeprefix(SCOPE): tuple(shape)
            for name, shape in every.items()
            if not FOREIGN.match(name)
        }
        if len(shapes) < sum(not FOREIGN.match(name) for name in every):
            raise ValueError(f"it has the same variable inside {SCOPE} and outside")
        scope = SCOPE if any(name.startswith(SCOPE) for name in every) else ""
        return StrictReader(shapes, lambda name: reader.get_tensor(scope + name))
    except Exception as error:  # whatever TensorFlow's readers raise
        raise InputError(f"{prefix} cannot be read ({first_line(error)}).") from error
