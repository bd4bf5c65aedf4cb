"""Converts weights of a run, Hugging Face or OpenAI to a .safetensors file or to Hugging Face.

python -m gptv_jax.convert --from=runs/digits --to=digits.safetensors
python -m gptv_jax.convert --from=runs/digits --to=exports/digits            # Hugging Face's form
python -m gptv_jax.convert --from=model.ckpt-1000000 --palette=kmeans_centers.npy --to=igpt-s
"""

import logging

from absl import flags
from etils import epy

from gptv_jax import command
from gptv_jax.errors import InputError
from gptv_jax.stages import STAGES

with epy.lazy_imports():  # see `command`
    from gptv_jax import api
    from gptv_jax.weights import hub, huggingface

FROM = flags.DEFINE_string(
    "from",
    None,
    "Run folder, .safetensors file, Hugging Face's folder, hf://user/model of its Hub, or "
    "TensorFlow's prefix.",
)
TO = flags.DEFINE_string(
    "to", None, "A .safetensors file, hf://user/model to upload, or a folder for Hugging Face."
)
TRAINED = [stage.name for stage in STAGES.values() if stage.trains_network]
STAGE = flags.DEFINE_enum("stage", None, TRAINED, "Stage of a run folder; default: the latest one.")
PALETTE = flags.DEFINE_string("palette", None, "kmeans_centers.npy, for weights without colours.")
TASK = flags.DEFINE_string(
    "task", "generation", "Head to write for Hugging Face: generation or classification."
)
LOG = logging.getLogger("gptv_jax.convert")


def main() -> None:
    """Reads, checks and writes."""
    if TASK.value not in huggingface.ARCHITECTURES:
        taken = " or ".join(huggingface.ARCHITECTURES)
        raise InputError(f"--task is {TASK.value!r}; it takes {taken}.")
    model = api.load(FROM.value, stage=STAGE.value, palette=PALETTE.value)
    if TO.value.startswith(hub.SCHEME) or TO.value.endswith(".safetensors"):
        if flags.FLAGS["task"].present:
            raise InputError(f"--task is of Hugging Face's form; {TO.value} has every head.")
        (model.push_to_hub if TO.value.startswith(hub.SCHEME) else model.save)(TO.value)
    else:
        api.to_huggingface(model, TO.value, task=TASK.value)
    LOG.info("%s is written to %s.", FROM.value, TO.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["from", "to"])
    command.run(main, [api])
