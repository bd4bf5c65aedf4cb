"""Rules of what changes the inputs of pretraining: hidden tokens, and pixels in their place."""

from gptv_jax.config.fields import refuse
from gptv_jax.config.stages import Config


def check_model(config: Config) -> None:
    """Checks fields of `config.model`, whatever stages run; see `rules`."""
    model, frames = config.model, config.data.frames
    if model.context_masking and (frames == 1 or model.random_order):
        reason = "it hides tokens before the last frame of clips, or of images, in raster order"
        advice = "set config.data.frames=0 or 2 or more frames, and random_order=(), or take 0"
        refuse(config, "model.context_masking", f"{reason}; {advice}")

    if model.image_input == "pixels":
        _check_pixels(config)


def _check_pixels(config: Config) -> None:
    kind, frames = config.tokens.kind, config.data.frames
    if kind not in ("palette", "learned") or frames:
        reason = f"config.tokens.kind is {kind}, and config.data.frames {frames}"
        advice = "take palette or learned, and images (frames=0), or image_input=tokens"
        refuse(config, "model.image_input", f"{reason}; {advice}")
    for name, plain in (("objective", "autoregressive"), ("random_order", ())):
        if (value := getattr(config.model, name)) != plain:
            reason = f"config.model.{name} is {value}, whose inputs are tokens"
            refuse(config, "model.image_input", f"{reason}; take tokens, or {name}={plain}")
    if config.data.name == "tokens":
        reason = "the data are tokens without images (config.data.name=tokens)"
        refuse(config, "model.image_input", f"{reason}; take tokens, or data with images")
    taught = config.distill.teacher or config.distill.cached or config.finetune.distill.teacher
    if taught:
        refuse(config, "model.image_input", "teachers read tokens; take tokens, or no teacher")
