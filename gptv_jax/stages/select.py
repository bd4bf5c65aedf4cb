"""Chooses the stages of a run: all that its configuration and data allow, or some of them."""

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.errors import InputError
from gptv_jax.stages import STAGES


def choose_stages(
    config: config_lib.Config, classes: int, wanted: list[str] | None = None
) -> list[str]:
    """Names of the stages to run, in order.

    Args:
      config: of the run.
      classes: of the data; 0: unlabelled.
      wanted: names of stages; None: all possible stages except those on request.

    Raises:
      InputError: a name that is no stage, or a stage that is impossible for this run.
    """
    if unknown := set(wanted or ()) - set(STAGES):
        raise InputError(
            f"--stages has {', '.join(sorted(unknown))}; it takes some of {', '.join(STAGES)}."
        )
    refused = _impossible(config, classes)
    for name in wanted or ():
        if name in refused:
            raise InputError(f"--stages has {name}, but {refused[name]}.")
    usual = [name for name, stage in STAGES.items() if not stage.on_request]
    chosen = [name for name in STAGES if name in (wanted or usual) and name not in refused]
    if config.probe.every and not classes and "pretrain" in chosen:
        raise InputError(
            f"config.probe.every is {config.probe.every}, but the images of "
            f"config.data.name={config.data.name} have no labels; take 0."
        )
    return chosen


def _impossible(config: config_lib.Config, classes: int) -> dict[str, str]:
    """Stages that this run cannot have, each with the reason and what to do."""
    given, kind, refused = config.init_from, config.tokens.kind, {}
    cached = sources.open_data_set(config.data).stored_as == "tokens"
    if kind != "learned":
        refused["tokenizer"] = f"config.tokens.kind={kind} has nothing to train"
    elif config.tokens.tokenizer or given or cached:
        refused["tokenizer"] = "the tokens come with their tokenizer; leave it out"
    if given:
        refused["pretrain"] = (
            f"config.init_from={given} gives the pretrained weights; leave one of them out"
        )
    if not classes:
        reason = f"the images of config.data.name={config.data.name} have no labels"
        refused |= dict.fromkeys(("probe", "finetune"), f"{reason}; take pretrain and sample")
    if config.model.objective == "bert":
        reason = (
            "config.model.objective=bert draws no images; it takes pretrain, probe and finetune"
        )
        refused |= dict.fromkeys(("sample", "generate"), reason)
    return refused
