"""Rules of distillation from a token cache, which holds what teachers drew."""

from gptv_jax.config.fields import refuse
from gptv_jax.config.stages import Config


def check_cached(config: Config, section: str) -> None:
    """Checks what `config.<section>.cached` needs; see `rules`."""
    model, settings, cached = config.model, config.distill, f"config.{section}.cached=True"
    if section != "distill":
        reason = "fine-tuning augments every image anew, and a cache knows stored images alone"
        refuse(config, f"{section}.cached", f"{reason}; take False, and name teachers")
    # Targets are of whole images, in raster order, and of the distributions alone.
    for name, fits, advice in (
        ("distill.teacher", not settings.teacher, "take ()"),
        ("distill.weight", settings.weight > 0, "take 1"),
        ("distill.features", not settings.features, "take 0"),
        ("distill.compare", not settings.compare, "take False"),
        ("data.name", config.data.name == "tokens", "take tokens"),
        ("model.objective", model.objective == "autoregressive", "take autoregressive"),
        ("model.random_order", not model.random_order, "take ()"),
        ("model.context_masking", not model.context_masking, "take 0"),
    ):
        if not fits:
            reason = f"{cached} reads what teachers drew for whole images from a token cache"
            refuse(config, name, f"{reason}; {advice}, or cached=False")
