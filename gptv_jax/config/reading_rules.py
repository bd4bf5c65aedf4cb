"""Rules of how features are read: by the probe, and by the class head of fine-tuning."""

from gptv_jax.config.fields import refuse
from gptv_jax.config.stages import Config

ONE_CLIP = ("moving_digits", "two_moving_digits", "camera_motions", "tokens")  # of every video


def check_probe(config: Config) -> None:
    """Checks `config.probe`."""
    probe, layers = config.probe, config.model.layers + 1
    for name in ("concatenate", "refine"):
        if (getattr(probe, name) or 0) > layers:
            reason = f"it takes at most config.model.layers + 1 = {layers}, the layers to be read"
            refuse(config, f"probe.{name}", reason)
    if probe.regions > 1:
        if probe.pooling != "mean":
            reason = f"config.probe.pooling={probe.pooling} has no regions; take 1, or pooling=mean"
            refuse(config, "probe.regions", reason)
        if any(side % probe.regions for side in config.grid[-2:]):
            rows, columns = config.grid[-2:]
            reason = f"it does not divide the {rows} x {columns} tokens; take a divisor of both"
            refuse(config, "probe.regions", reason)
    check_reading(config, "probe")
    needs = [("labels_per_class", (), "lbfgs")]
    needs += [("pooling", "mean", "sgd")] * (probe.pooling == "attentive")
    for name, plain, method in needs:
        if getattr(probe, name) != plain and probe.method != method:
            reason = (
                f"only config.probe.method={method} reads this; take {method}, or {name}={plain}"
            )
            refuse(config, f"probe.{name}", reason)


def check_reading(config: Config, section: str) -> None:
    """Checks how the features of images and clips are read, by `config.<section>`."""
    for name, plain in (("pooling", "mean"), ("attention", "causal")):
        if getattr(getattr(config, section), name) == "frames" and not config.data.frames:
            reason = f"config.data.frames is 0, so there are no frames; take {plain}"
            refuse(config, f"{section}.{name}", reason)
    attention = getattr(config, section).attention
    if attention != "causal" and config.model.objective == "bert":
        reason = "with config.model.objective=bert every position sees all others; take causal"
        refuse(config, f"{section}.attention", reason)
    if section == "probe":
        return
    classifies = config.task.name == "classify"
    if config.finetune.clips > 1 and not (config.data.frames and classifies):
        reason = "only the class of a video (config.data.frames above 0) is read from several clips"
        refuse(config, "finetune.clips", f"{reason}; take 1")
    if config.finetune.clips > 1 and config.data.name in ONE_CLIP:
        reason = f"config.data.name={config.data.name} has one clip of every video; take 1"
        refuse(config, "finetune.clips", reason)
    if attention != "causal" and not classifies:
        reason = f"it is for classes alone, and config.task.name is {config.task.name}; take causal"
        refuse(config, "finetune.attention", reason)
    if attention != "causal" and config.finetune.generative_coefficient:
        reason = f"config.finetune.attention={attention} shows positions their own tokens"
        refuse(config, "finetune.generative_coefficient", f"{reason}, so take 0")
