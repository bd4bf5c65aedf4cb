"""Rules between settings, which no field can check by itself.

`check` holds for every run. The rules of one section (`SECTIONS`) are checked only where a stage
that needs this section runs. Every rule raises InputError, which names the fields, their values and
what would be accepted.
"""

import dataclasses
import operator

from gptv_jax.config import pretraining_rules, reading_rules
from gptv_jax.config.data import MOST_CODES, image_size
from gptv_jax.config.distill_rules import check_cached
from gptv_jax.config.fields import refuse as refuse  # a name of this module for its users
from gptv_jax.config.stages import Config
from gptv_jax.errors import InputError

RESTORING = ("l1", "l2", "gradient", "ssim", "lpips")  # losses that compare images with restored


def check(config: Config) -> None:
    """Checks the mesh, the network and the tokens, as far as data and devices do not matter."""
    model = config.model
    if dataclasses.astuple(config.mesh).count(-1) > 1:
        raise InputError("config.mesh has more than one -1; only one axis can be filled.")
    if config.data.frames > (most := config.data.limits.max_frames):
        reason = f"config.data.limits.max_frames is {most}; take as many frames at most"
        refuse(config, "data.frames", reason)
    if model.width % model.heads:
        refuse(config, "model.heads", f"it takes a divisor of config.model.width = {model.width}")
    if model.rotary and (size := model.width // model.heads) % 4:
        reason = f"config.model.width / config.model.heads = {size} is no multiple of 4, and rows"
        advice = "take fewer heads or another width"
        refuse(config, "model.rotary", f"{reason} and columns each rotate pairs; {advice}")
    if model.class_tokens and model.start_per_variant:
        reason = "start_per_variant=True needs the start vectors for variants"
        advice = "set class_tokens=0 or start_per_variant=False"
        refuse(config, "model.class_tokens", f"{reason}; {advice}")
    if model.objective == "bert":
        _check_bert(config)
    tables = model.target_positions and (model.learned_positions or model.axial_positions)
    if model.random_order and not (model.rotary or tables):
        reason = "the network would not know both the position of its input token and of its target"
        advice = (
            "config.model.rotary, or target_positions with learned_positions or axial_positions"
        )
        refuse(config, "model.random_order", f"{reason}; set {advice}")
    pretraining_rules.check_model(config)
    if model.code_head == "levels" and not config.tokens.levelled:
        reason = "only codes of config.tokens.kind=learned with tokens.autoencoder.quantizer=fsq"
        refuse(config, "model.code_head", f"{reason} have levels; take flat, or such tokens")
    if config.tokens.kind == "learned":
        _check_autoencoder(config)
    elif config.tokens.kind == "none":
        _check_pixels(config)
    elif config.tokens.kind == "grey":
        _check_patch(config)


def check_classes(config: Config, classes: int) -> None:
    """Checks the network's class tokens against the classes of the data; 0: unlabelled."""
    if config.model.class_tokens not in (0, classes):
        found = f"{classes} classes" if classes else "no labels"
        reason = f"the images of config.data.name={config.data.name} have {found}; take {classes}"
        refuse(config, "model.class_tokens", reason)


def _check_bert(config: Config) -> None:
    """Refuses fields that need tokens to be predicted one after the other."""
    model, bert = config.model, "config.model.objective=bert"
    for name, other, reason in (
        ("class_tokens", 0, f"{bert} has no start token"),
        ("start_per_variant", False, f"{bert} has no start token"),
        ("target_positions", False, f"with {bert} input and target have the same position"),
        ("random_order", (), f"{bert} has no order"),
        ("context_masking", 0.0, f"{bert} hides masked_share of all tokens"),
    ):
        if getattr(model, name):
            advice = f"set {name}={other} or objective=autoregressive"
            refuse(config, f"model.{name}", f"{reason}; {advice}")
    if not (model.learned_positions or model.axial_positions):
        reason = f"{bert} needs an added position to tell masked tokens apart"
        advice = "set learned_positions or axial_positions"
        refuse(config, "model.learned_positions", f"{reason}; {advice}")


def _check_autoencoder(config: Config) -> None:
    network, prefix = config.tokens.autoencoder, "tokens.autoencoder"
    down = network.downsample
    _check_multiple(config, down, f"a token stands for config.{prefix}.downsample = {down} pixels")
    if network.patch < 1:
        raise InputError(
            f"config.{prefix}.widths has {len(network.widths)} resolutions, each half the one "
            f"before, but config.{prefix}.downsample = {down} leaves room for {down.bit_length()}; "
            "take fewer, or a larger downsample."
        )
    span, frames = network.frames, config.data.frames
    if span > 1 and network.groups:
        reason = f"config.{prefix}.groups={network.groups} is a tokenizer of images; take 1"
        refuse(config, f"{prefix}.frames", reason)
    if frames and (frames - 1) % span:
        reason = f"a token stands for config.{prefix}.frames = {span} frames after the first one"
        near = 1 - (1 - frames) // span * span
        refuse(config, "data.frames", f"{reason}; take 1 more than a multiple of {span}, as {near}")
    if network.vocabulary > MOST_CODES:
        reason = f"that makes {network.vocabulary} codes, the product"
        refuse(config, f"{prefix}.levels", f"{reason}; take at most {MOST_CODES} codes")


def _check_multiple(config: Config, side: int, reason: str) -> None:
    """Refuses an image size whose height or width `side` does not divide."""
    if any(pixels % side for pixels in config.data.size):
        near = image_size(*(-(-pixels // side) * side for pixels in config.data.size))
        refuse(config, "data.image_size", f"{reason} a side; take a multiple of {side}, as {near}")


def _check_patch(config: Config) -> None:
    """Checks that patches of grey levels fill the image or clip, and have few enough tokens."""
    (frames, *sides), data = config.tokens.cell, config.data
    if len(config.tokens.patch) == 3 and not data.frames:
        refuse(config, "tokens.patch", "config.data.frames is 0; take height and width alone")
    if data.frames % frames or any(n % side for n, side in zip(data.size, sides, strict=True)):
        pixels = " x ".join(map(str, (*(data.frames,) * (data.frames > 0), *data.size)))
        refuse(config, "tokens.patch", f"it does not divide {pixels} pixels; take divisors")
    if config.tokens.vocabulary > MOST_CODES:
        made = f"{config.tokens.levels} levels make {config.tokens.vocabulary} tokens of a patch"
        refuse(config, "tokens.patch", f"{made}; take at most {MOST_CODES}")


def _check_pixels(config: Config) -> None:
    """Checks that the stem of the task's network ends at the grid of the image's positions."""
    task, kind, side = config.task, config.tokens.kind, 2 ** len(config.task.stem)
    if task.image_input != "pixels":
        if kind == "none":
            reason = "images without tokens are read by a task from pixels alone"
            advice = f"set config.task.image_input=pixels, which is {task.image_input!r}"
            refuse(config, "tokens.kind", f"{reason}; {advice}, or take grey, palette or learned")
        return
    if kind == "none":
        if not task.stem:
            refuse(config, "task.stem", "config.task.image_input=pixels needs one; take (64,), say")
        reason = f"config.task.stem halves it {len(task.stem)} times: a position is {side} pixels"
        _check_multiple(config, side, reason)
        return
    cell = config.tokens.cell
    positions, tokens = (
        " x ".join(str(n // each) for n, each in zip(config.data.size, sides, strict=True))
        for sides in ((side, side), cell[1:])
    )
    if cell == (1, 1, 1):
        reason = f"config.tokens.kind={kind} makes {tokens} tokens, one a pixel"
        reason += f", and the stem leaves {positions} positions; take tokens"
        refuse(config, "task.image_input", reason)
    if kind == "learned" and cell[0] > 1:
        reason = "the stem leaves positions for every frame; take 1, or task.image_input=tokens"
        refuse(config, "tokens.autoencoder.frames", reason)
    if cell[0] > 1 or cell[1] != cell[2] or cell[1].bit_count() > 1:
        reason = f"config.tokens.patch={config.tokens.patch} is no square of 2, 4, 8, ... pixels"
        refuse(config, "task.image_input", f"{reason}; take tokens")
    if cell != (1, side, side):
        needed = cell[1].bit_length() - 1
        fitting = (task.stem + (task.stem[-1:] or (64,)) * needed)[:needed]
        source = f"config.tokens.patch={config.tokens.patch}"
        if kind == "learned":
            source = f"config.tokens.autoencoder.downsample={cell[1]}"
        reason = f"it leaves {positions} positions, and {source} makes {tokens} tokens"
        refuse(config, "task.stem", f"{reason}; take {fitting}")


def _check_training(config: Config, name: str) -> None:
    """Checks one training, whose settings are the section `config.<name>`."""
    train = operator.attrgetter(name)(config)
    optimizer, prefix = train.optimizer, f"{name}.optimizer"
    if train.batch_size % train.microbatches:
        reason = f"it takes a divisor of config.{name}.batch_size = {train.batch_size}"
        refuse(config, f"{name}.microbatches", reason)
    if optimizer.name == "adam" and optimizer.weight_decay:
        reason = f"adam has no decay; take config.{prefix}.name=adamw or weight_decay=0"
        refuse(config, f"{prefix}.weight_decay", reason)
    if optimizer.name != "muon" and optimizer.rest_learning_rate is not None:
        advice = f"take config.{prefix}.name=muon or rest_learning_rate=None"
        reason = f"only muon has a second learning rate; {advice}"
        refuse(config, f"{prefix}.rest_learning_rate", reason)


def _check_pretraining(config: Config) -> None:
    _check_training(config, "train")
    data, model = config.data, config.model
    if not data.still_share:
        if data.stills:
            reason = "config.data.still_share is 0, so no image is read; take a share, 0.3, say"
            refuse(config, "data.stills", reason)
        return
    needed = (
        ("data.frames", data.frames > 0, "take the number of frames of a clip"),
        ("data.stills", data.stills, "name the folder of images"),
        ("data.name", data.name != "tokens", "take a data set of videos"),
        ("model.objective", model.objective == "autoregressive", "take autoregressive"),
        ("model.random_order", not model.random_order, "take ()"),
    )
    for name, fits, advice in needed:
        if not fits:
            reason = f"config.data.still_share={data.still_share} mixes clips with images"
            refuse(config, name, f"{reason}; {advice}, or still_share=0")


def _check_tokenizer(config: Config) -> None:
    network, settings, data = config.tokens.autoencoder, config.tokenizer, config.data
    _check_training(config, "tokenizer.train")
    if network.groups:
        reason = "only a tokenizer that another program has trained has group norms"
        advice = "name the tokenizer by config.tokens.tokenizer, or take 0"
        refuse(config, "tokens.autoencoder.groups", f"{reason}; {advice}")
    if settings.train.microbatches > 1:
        reason = "the tokenizer is trained on whole batches; take 1"
        refuse(config, "tokenizer.train.microbatches", reason)
    if settings.lpips:
        if not settings.lpips_weights:
            reason = "config.tokenizer.lpips_weights names no file of weights; name one"
            refuse(config, "tokenizer.lpips", f"{reason}, or take lpips=0")
        if network.channels != 3:
            reason = (
                f"config.tokens.autoencoder.channels is {network.channels}, and VGG-16 takes RGB"
            )
            refuse(config, "tokenizer.lpips", f"{reason}; take lpips=0")
        if min(data.size) < 16:
            reason = f"config.data.image_size is {data.image_size}, and VGG-16 halves it four times"
            refuse(config, "tokenizer.lpips", f"{reason}; take 16 pixels or more, or lpips=0")
    if not any(getattr(settings, name) for name in RESTORING):
        raise InputError(
            f"config.tokenizer has {', '.join(f'{name}=0' for name in RESTORING)}, so that no loss "
            "compares images with restored images; take l2=1, say."
        )
    parts = 2**settings.discriminator_layers
    if settings.adversarial and any(pixels % parts for pixels in data.size):
        reason = f"each layer halves the image, and {parts} does not divide config.data.image_size"
        refuse(
            config, "tokenizer.discriminator_layers", f"{reason} = {data.image_size}; take fewer"
        )


def _check_profile(config: Config) -> None:
    window, steps = config.profile.window, config.train.steps
    if window and window[1] > steps:
        reason = f"pretraining ends at step config.train.steps = {steps}; take earlier steps"
        refuse(config, "profile.steps", reason)


def _check_detect(config: Config) -> None:
    """Checks the settings of the task `detect` against each other."""
    settings = config.task.detect
    if settings.samples > 1 and settings.top_p == 0:
        reason = "samples above 1 takes config.task.detect.top_p above 0, or all are equal; take .5"
        refuse(config, "task.detect.samples", reason)
    if settings.noise_among and not settings.noise:
        reason = "config.task.detect.noise=False makes no noise objects; take 0, or noise=True"
        refuse(config, "task.detect.noise_among", reason)


def _check_distill(config: Config, section: str = "distill") -> None:
    """Checks the teachers' settings, the section `config.<section>`."""
    settings, layers = operator.attrgetter(section)(config), config.model.layers
    if settings.cached:
        check_cached(config, section)
    if not settings.teacher:
        return
    if not settings.weight and not settings.features:
        reason = f"config.{section}.features is 0 too, so a teacher would teach nothing"
        refuse(config, f"{section}.weight", f"{reason}; take 1, or teacher=()")
    if (settings.student_layer or 0) > layers:
        reason = f"the network has config.model.layers = {layers}; take at most {layers}, or None"
        refuse(config, f"{section}.student_layer", reason)


def _check_matching(config: Config) -> None:
    """Checks the teachers' settings of fine-tuning."""
    section, settings = "finetune.distill", config.finetune.distill
    _check_distill(config, section)
    if settings.teacher and config.task.name != "classify":
        reason = f"config.task.name is {config.task.name}, and teachers teach classes alone"
        refuse(config, f"{section}.teacher", f"{reason}; take ()")
    if settings.teacher and settings.mixup and config.data.name == "tokens":
        reason = "config.data.name=tokens is a token cache, which has no pixels to mix"
        refuse(config, f"{section}.mixup", f"{reason}; take 0, or a data set of images")


def _check_finetune(config: Config) -> None:
    _check_matching(config)
    reading_rules.check_reading(config, "finetune")
    _check_training(config, "finetune.train")
    _check_pixels(config)
    if config.task.name == "detect":
        _check_detect(config)


SECTIONS = {
    "tokenizer": _check_tokenizer,
    "train": _check_pretraining,
    "distill": _check_distill,
    "profile": _check_profile,
    "probe": reading_rules.check_probe,
    "finetune": _check_finetune,
}
