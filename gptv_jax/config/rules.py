"""What settings must be for each other: the part of a check that no field can say by itself."""

import dataclasses
from typing import TYPE_CHECKING

from gptv_jax.config.autoencoder import MOST_CODES
from gptv_jax.errors import InputError

RESTORING = (
    "l1",
    "l2",
    "gradient",
    "ssim",
    "lpips",
)  # losses that compare images with restored ones

if TYPE_CHECKING:  # which imports this module
    from gptv_jax import config as config_lib


def check(config: "config_lib.Config") -> None:
    """Whether fields fit each other, as far as can be judged without data or devices.

    Raises:
      InputError: names the fields, their values and what would do.
    """
    mesh, model = config.mesh, config.model
    if dataclasses.astuple(mesh).count(-1) > 1:
        raise InputError("config.mesh has more than one -1; only one axis can fill what is left.")
    if model.width % model.heads:
        raise InputError(
            f"config.model.heads is {model.heads}; it takes a divisor of config.model.width = "
            f"{model.width}."
        )
    _check_objective(model)
    if model.class_tokens and (model.start_per_variant or model.objective == "bert"):
        other = "start_per_variant" if model.start_per_variant else "objective=bert"
        raise InputError(
            f"config.model.class_tokens is {model.class_tokens}, whose tokens stand in the place "
            f"of the start vector, which {other} has other plans for; set one of them otherwise."
        )
    _check_order(model)
    if model.rotary and model.width // model.heads % 4:
        raise InputError(
            f"config.model.rotary is True, but a head's size, config.model.width / "
            f"config.model.heads = {model.width // model.heads}, is no multiple of 4, as rows and "
            "columns each turn pairs of channels; take fewer heads or another width."
        )
    _check_probe(config.probe, model.layers + 1)
    if config.profile.window and config.profile.window[1] > config.train.steps:
        raise InputError(
            f"config.profile.steps is {config.profile.steps!r}, but pretraining ends at step "
            f"config.train.steps = {config.train.steps}; take earlier steps."
        )
    if config.tokens.kind == "learned":
        _check_learned(config)
    trainings = {
        "tokenizer.train": config.tokenizer.train,
        "train": config.train,
        "finetune.train": config.finetune.train,
    }
    for where, train in trainings.items():
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
                f"{prefix}.rest_learning_rate is {optimizer.rest_learning_rate}, but only muon "
                f"treats the rest apart; take {prefix}.name=muon or rest_learning_rate=None."
            )


def check_classes(config: "config_lib.Config", classes: int) -> None:
    """Whether the network has tokens for the classes of the data, of which 0 are unlabelled.

    Raises:
      InputError: it has them for another number of classes.
    """
    wanted, found = config.model.class_tokens, f"{classes} classes" if classes else "no labels"
    if wanted and wanted != classes:
        raise InputError(
            f"config.model.class_tokens is {wanted}, but the images of config.data.name="
            f"{config.data.name} have {found}; take {classes}."
        )


def _check_objective(model: "config_lib.Model") -> None:
    """Fields that make no sense where tokens are hidden, not predicted one after the other."""
    if model.objective != "bert":
        return
    if model.start_per_variant:
        raise InputError(
            "config.model.start_per_variant is True, but config.model.objective=bert has no start "
            "vector; set one of them otherwise."
        )
    if not (model.learned_positions or model.axial_positions):
        raise InputError(
            "config.model.learned_positions is False, but config.model.objective=bert knows a "
            "hidden token by the position added in its place alone; set it, or axial_positions."
        )


def _check_learned(config: "config_lib.Config") -> None:
    """Fields of learned tokens and of their training."""
    network, settings = config.tokens.autoencoder, config.tokenizer
    size, down, prefix = config.data.image_size, network.downsample, "config.tokens.autoencoder"
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
    if settings.train.microbatches > 1:
        raise InputError(
            f"config.tokenizer.train.microbatches is {settings.train.microbatches}; the tokenizer "
            "is trained on whole batches, so it takes 1."
        )
    if settings.lpips and not settings.lpips_weights:
        raise InputError(
            f"config.tokenizer.lpips is {settings.lpips}, but config.tokenizer.lpips_weights names "
            "no file of weights; name one, or take lpips=0."
        )
    if settings.lpips and network.channels != 3:
        raise InputError(
            f"config.tokenizer.lpips is {settings.lpips}, but {prefix}.channels is "
            f"{network.channels}, and VGG-16 takes RGB; take lpips=0."
        )
    if settings.lpips and size < 16:
        raise InputError(
            f"config.tokenizer.lpips is {settings.lpips}, but config.data.image_size is {size}, "
            "and VGG-16 halves it four times; take 16 pixels or more, or lpips=0."
        )
    if not any(getattr(settings, name) for name in RESTORING):
        raise InputError(
            f"config.tokenizer has {', '.join(f'{name}=0' for name in RESTORING)}, so that nothing "
            "asks for images to be restored; take l2=1, say."
        )
    parts = 2**settings.discriminator_layers
    if settings.adversarial and size % parts:
        raise InputError(
            f"config.tokenizer.discriminator_layers is {settings.discriminator_layers}, each of "
            f"which halves the image, but {parts} does not divide config.data.image_size = {size}; "
            "take fewer."
        )


def _check_order(model: "config_lib.Model") -> None:
    """Fields without which, or with which, tokens cannot come in another order than raster."""
    if model.target_positions and model.objective == "bert":
        raise InputError(
            "config.model.target_positions is True, but with config.model.objective=bert a "
            "position holds the very token that it predicts; set one of them otherwise."
        )
    if not model.random_order:
        return
    where = f"config.model.random_order is {model.random_order}"
    if model.objective == "bert":
        raise InputError(
            f"{where}, but config.model.objective=bert has no order; set one of them otherwise."
        )
    tables = model.learned_positions or model.axial_positions
    if not (model.rotary or (model.target_positions and tables)):
        raise InputError(
            f"{where}, but the network would not know the places both of the tokens that it holds "
            "and of the one to predict; set config.model.rotary, or target_positions beside "
            "learned_positions or axial_positions."
        )


def _check_probe(probe: "config_lib.Probe", layers: int) -> None:
    """Fields of the probe of a network with so many layers to read."""
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
