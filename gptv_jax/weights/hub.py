"""The Hugging Face Hub: weights are downloaded into the Hub's cache, and models are uploaded.

Only this module needs huggingface_hub; `pip install -e '.[hub]'` installs it. It keeps what it has
downloaded, and reads the cache alone where HF_HUB_OFFLINE=1 is set or there is no network.
"""

import logging
import pathlib
import re
import tempfile

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.config import fields
from gptv_jax.errors import InputError, as_input_error
from gptv_jax.runs import record
from gptv_jax.weights import huggingface, native
from gptv_jax.weights.native import WeightsFile

LOG = logging.getLogger(__name__)
SCHEME = "hf://"
NAME = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?")
WEIGHTS, CARD = "gptv_jax.safetensors", "README.md"
# What a folder of weights may hold; other programs' copies of the weights are not downloaded.
WANTED = ["*.safetensors", "*.json", "*.npy", "*.npz"]
# Reasons by the classes of huggingface_hub's errors; the first class that fits an error counts.
REASONS = {
    "GatedRepoError": "its owners must grant access, on the model's page; then run: hf auth login",
    "RepositoryNotFoundError": "the Hub has no such model, or a private one (run: hf auth login)",
    "RevisionNotFoundError": "the model has no such revision",
    "LocalEntryNotFoundError": "the Hub cannot be reached, and its cache here has no copy",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "EntryNotFoundError": "the model has no such file",
    "LocalTokenNotFoundError": "nobody is logged in; run: hf auth login",
    "ConnectionError": "the Hub cannot be reached",  # of requests; the next one is of httpx
    "TransportError": "the Hub cannot be reached",
    "ImportError": "it needs pip install 'gptv_jax[hub]'",
}
# Settings of a run that its model card shows where they differ from the defaults. Paths, which say
# where files lie on somebody's machine, are none of them.
SHOWN = re.compile(
    r"seed$|(model|train|finetune)\.|data\.(name|image_size|.*transforms)$"
    r"|tokens\.(?!palette$|tokenizer$)"
)
CARD_TEXT = """---
library_name: gptv_jax
pipeline_tag: {task}
tags:
- image-gpt
- jax
---
<!-- State the licence of the weights as `license:` in the lines above. -->
# {name}

{description}

```python
import gptv_jax  # pip install 'gptv_jax[hub]'

model = gptv_jax.load("hf://{name}")
```

## Classes

{classes}

## Numbers

{numbers}

## Settings

{settings}
"""


def _reason(error: Exception) -> str | None:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return next((REASONS[name] for name in REASONS if name in kinds), None)


def download(name: str) -> pathlib.Path:
    """The file or folder of `hf://user/model[@revision][/file]` in the Hub's cache.

    Without a file in the name it is this project's file of weights, where the model has one, or
    else the folder. InputError: the Hub does not give it, and the cache does not have it.
    """
    parts = NAME.fullmatch(name)
    if not parts:
        raise InputError(f"{name} is no name of a model; it is written hf://user/model.")
    model, revision, file = parts.groups()
    with as_input_error(f"{name} cannot be downloaded", reason=_reason):
        from huggingface_hub import errors, hf_hub_download, snapshot_download

        try:
            path = hf_hub_download(model, file or WEIGHTS, revision=revision)
        except errors.EntryNotFoundError:
            if file:
                raise
            path = snapshot_download(model, revision=revision, allow_patterns=WANTED)
        return pathlib.Path(path)


def push(
    weights_file: WeightsFile,
    name: str,
    description: str,
    run: pathlib.Path | None = None,
    private: bool | None = None,
) -> str:
    """See `api.Model.push_to_hub`; the model card has the `description` and the run's numbers."""
    parts = NAME.fullmatch(name)
    if not parts or any(parts.groups()[1:]):
        raise InputError(f"{name!r} is no name of a model on the Hub; it is written user/model.")
    name = parts[1]
    explained = as_input_error(f"{name} cannot be uploaded", reason=_reason)
    with tempfile.TemporaryDirectory() as place, explained:
        import huggingface_hub

        folder, hub = pathlib.Path(place) / "model", huggingface_hub.HfApi()
        try:
            task = "classification" if weights_file.classes else "generation"
            huggingface.write(weights_file, folder, task)
        except InputError as error:
            LOG.info("the upload has no files for transformers: %s", error)
        native.write(weights_file, folder / WEIGHTS)
        (folder / CARD).write_text(card(weights_file, name, description, run))
        hub.create_repo(name, private=private, exist_ok=True)
        kept = [CARD] if hub.file_exists(name, CARD) else None
        place = {"repo_id": name, "folder_path": folder, "commit_message": "Upload by gptv_jax"}
        return str(hub.upload_folder(**place, ignore_patterns=kept).repo_url)


def card(
    weights_file: WeightsFile, name: str, description: str, run: pathlib.Path | None = None
) -> str:
    """The text of a model card: the description, the classes, the run's numbers and settings."""
    config = record.config_of(run) if run else config_lib.Config(model=weights_file.model)
    summary = files.read_json(run / "summary.json", {}) if run else {}
    given, defaults = fields.flatten(config), fields.flatten(config_lib.Config())
    settings = {n: v for n, v in given.items() if SHOWN.match(n) and v != defaults[n]}
    measured = {n: v for n, v in summary.items() if isinstance(v, int | float)}
    return CARD_TEXT.format(
        task="image-classification" if weights_file.classes else "unconditional-image-generation",
        name=name,
        description=description,
        classes=", ".join(weights_file.class_names) or "The classes have no names.",
        numbers=_table({n: f"{value:.6g}" for n, value in measured.items()}),
        settings=_table({n: f"`{value}`" for n, value in settings.items()}),
    )


def _table(rows: dict[str, str]) -> str:
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines) if rows else "None."
