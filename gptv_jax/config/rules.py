"""Rules between settings, which no field can check by itself.

`check` holds for every run. The rules of one section (`SECTIONS`) are checked only where a stage
that needs this section runs.
"""

import dataclasses
from collections.abc import Iterable

from gptv_jax.config.autoencoder import MOST_CODES
from gptv_jax.config.model import Model
from gptv_jax.config.run import Config
from gptv_jax.config.train import Train
from gptv_jax.errors import InputError

RESTORING = ("l1", "l2", "gradient", "ssim", "lpips")  # losses that compare images with restored


def check(config: Config) -> None:
    """Checks the mesh, the network and the tokens, as far as data and devices do not matter.

    Raises:
      InputError: names the fields, their values and what would be accepted.
    """
    mesh, model = config.mesh, config.model
    if dataclasses.astuple(mesh).count(-1) > 1:
        raise InputError("config.mesh has more than one -1; only one axis can be filled.")
    if model.width % model.heads:
        raise InputError(
            f"config.model.heads is {model.heads}; it takes a divisor of config.model.width = "
            f"{model.width}."
        )
    if model.rotary and model.width // model.heads % 4:
        raise InputError(
            f"config.model.rotary is True, but a head's size, config.model.width / "
            f"config.model.heads = {model.width // model.heads}, is no multiple of 4, as rows and "
            "columns each rotate pairs of channels; take fewer heads or another width."
        )
    if model.class_tokens and model.start_per_variant:
        raise InputError(
            f"config.model.class_tokens is {model.class_tokens}, but start_per_variant=True needs "
            "the start vectors for variants; set class_tokens=0 or start_per_variant=False."
        )
    if model.objective == "bert":
        _check_bert(model)
    tables = model.target_positions and (model.learned_positions or model.axial_positions)
    if model.random_order and not (model.rotary or tables):
        raise InputError(
            f"config.model.random_order is {model.random_order}, but the network would know "
            "neither the position of its input token nor that of the token to predict; set "
            "config.model.rotary, or target_positions with learned_positions or axial_positions."
        )
    if config.tokens.kind == "learned":
        _check_autoencoder(config)


def check_sections(config: Config, sections: Iterable[str]) -> None:
    """Checks the rules of these sections.

    Raises:
      InputError: as `check`.
    """
    for section in sections:
        if section in SECTIONS:
            SECTIONS[section](config)


def check_classes(config: Config, classes: int) -> None:
    """Checks the network's class tokens against the number of classes of the data.

    Args:
      config: of the run.
      classes: of the data; 0: unlabelled.

    Raises:
      InputError: the two numbers differ.
    """
    wanted, found = config.model.class_tokens, f"{classes} classes" if classes else "no labels"
    if wanted and wanted != classes:
        raise InputError(
            f"config.model.class_tokens is {wanted}, but the images of config.data.name="
            f"{config.data.name} have {found}; take {classes}."
        )


def _check_bert(model: Model) -> None:
    """Refuses fields that need tokens to be predicted one after the other."""
    if model.class_tokens:
        raise InputError(
            f"config.model.class_tokens is {model.class_tokens}, but objective=bert has no start "
            "token; set class_tokens=0 or objective=autoregressive."
        )
    if model.start_per_variant:
        raise InputError(
            "config.model.start_per_variant is True, but config.model.objective=bert has no start "
            "token; set start_per_variant=False or objective=autoregressive."
        )
    if not (model.learned_positions or model.axial_positions):
        raise InputError(
            "config.model.learned_positions is False, but config.model.objective=bert needs an "
            "added position to tell masked tokens apart; set learned_positions or axial_positions."
        )
    if model.target_positions:
        raise InputError(
            "config.model.target_positions is True, but with config.model.objective=bert the "
            "input and the predicted token have the same position; set target_positions=False."
        )
    if model.random_order:
        raise InputError(
            f"config.model.random_order is {model.random_order}, but config.model.objective=bert "
            "has no order; set random_order=()."
        )


def _check_autoencoder(config: Config) -> None:
    network, size = config.tokens.autoencoder, config.data.image_size
    down, prefix = network.downsample, "config.tokens.autoencoder"
    if size % down:
        raise InputError(
            f"config.data.image_size is {size}; {prefix}.downsample = {down} does not divide it: "
            f"a token stands for a square of that many pixels a side; take a multiple of {down}."
        )
    if network.patch < 1:
        raise InputError(
            f"{prefix}.widths has {len(network.widths)} resolutions, each half the one before, but "
            f"{prefix}.downsample = {down} leaves room for {down.bit_length()}; take fewer, or a "
            "larger downsample."
        )
    if network.vocabulary > MOST_CODES:
        raise InputError(
            f"{prefix}.levels is {network.levels}, which make {network.vocabulary} codes; take at "
            f"most {MOST_CODES} (their product)."
        )


def _check_training(train: Train, where: str) -> None:
    """Checks one training, whose settings are the section `config.<where>`."""
    optimizer, prefix = train.optimizer, f"config.{where}.optimizer"
    if train.batch_size % train.microbatches:
        raise InputError(
            f"config.{where}.microbatches is {train.microbatches}; it takes a divisor of "
            f"config.{where}.batch_size = {train.batch_size}."
        )
    if optimizer.name == "adam" and optimizer.weight_decay:
        raise InputError(
            f"{prefix}.weight_decay is {optimizer.weight_decay}, but adam has no decay; take "
            f"{prefix}.name=adamw or weight_decay=0."
        )
    if optimizer.name != "muon" and optimizer.rest_learning_rate is not None:
        raise InputError(
            f"{prefix}.rest_learning_rate is {optimizer.rest_learning_rate}, but only muon has a "
            f"second learning rate; take {prefix}.name=muon or rest_learning_rate=None."
        )


def _check_tokenizer(config: Config) -> None:
    network, settings, size = config.tokens.autoencoder, config.tokenizer, config.data.image_size
    _check_training(settings.train, "tokenizer.train")
    if settings.train.microbatches > 1:
        raise InputError(
            f"config.tokenizer.train.microbatches is {settings.train.microbatches}; the tokenizer "
            "is trained on whole batches, so it takes 1."
        )
    lpips = f"config.tokenizer.lpips is {settings.lpips}"
    if settings.lpips and not settings.lpips_weights:
        raise InputError(
            f"{lpips}, but config.tokenizer.lpips_weights names no file of weights; name one, or "
            "take lpips=0."
        )
    if settings.lpips and network.channels != 3:
        raise InputError(
            f"{lpips}, but config.tokens.autoencoder.channels is {network.channels}, and VGG-16 "
            "takes RGB; take lpips=0."
        )
    if settings.lpips and size < 16:
        raise InputError(
            f"{lpips}, but config.data.image_size is {size}, and VGG-16 halves it four times; take "
            "16 pixels or more, or lpips=0."
        )
    if not any(getattr(settings, name) for name in RESTORING):
        raise InputError(
            f"config.tokenizer has {', '.join(f'{name}=0' for name in RESTORING)}, so that no loss "
            "compares images with restored images; take l2=1, say."
        )
    parts = 2**settings.discriminator_layers
    if settings.adversarial and size % parts:
        raise InputError(
            f"config.tokenizer.discriminator_layers is {settings.discriminator_layers}, each of "
            f"which halves the image, but {parts} does not divide config.data.image_size = {size}; "
            "take fewer."
        )


def _check_profile(config: Config) -> None:
    window = config.profile.window
    if window and window[1] > config.train.steps:
        raise InputError(
            f"config.profile.steps is {config.profile.steps!r}, but pretraining ends at step "
            f"config.train.steps = {config.train.steps}; take earlier steps."
        )


def _check_probe(config: Config) -> None:
    probe, layers = config.probe, config.model.layers + 1
    for name in ("concatenate", "refine"):
        if (count := getattr(probe, name)) and count > layers:
            raise InputError(
                f"config.probe.{name} is {count}; config.model.layers + 1 = {layers} can be read, "
                f"so it takes at most that many."
            )
    for name, plain, method in (("pooling", "mean", "sgd"), ("labels_per_class", (), "lbfgs")):
        if (value := getattr(probe, name)) != plain and probe.method != method:
            raise InputError(
                f"config.probe.{name} is {value!r}, which only config.probe.method={method} has; "
                f"take that, or {name}={plain}."
            )


SECTIONS = {
    "tokenizer": _check_tokenizer,
    "train": lambda config: _check_training(config.train, "train"),
    "profile": _check_profile,
    "probe": _check_probe,
    "finetune": lambda config: _check_training(config.finetune.train, "finetune.train"),
}
