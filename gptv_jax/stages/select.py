"""Which stages a run has: all that its configuration and data allow, or those that are wanted."""

from gptv_jax import config as config_lib
from gptv_jax.data import sources
from gptv_jax.errors import InputError
from gptv_jax.stages import STAGES


def choose_stages(
    config: config_lib.Config, classes: int, wanted: list[str] | None = None
) -> list[str]:
    """Stages to run, in order.

    Args:
      config: of the run.
      classes: of the data; 0: unlabelled.
      wanted: some of STAGES; None: all but those that only run when they are asked for.

    Raises:
      InputError: an unknown stage, or a wanted one that this run cannot have.
    """
    named = set(wanted or ())
    if unknown := named - set(STAGES):
        raise InputError(
            f"--stages has {', '.join(sorted(unknown))}; it takes some of {', '.join(STAGES)}."
        )
    given, name = config.init_from, config.data.name
    trains_tokens = config.tokens.kind == "learned" and not _has_tokenizer(config)
    if "tokenizer" in named and not trains_tokens:
        why = f"config.tokens.kind={config.tokens.kind} has nothing to train"
        if config.tokens.kind == "learned":
            why = "the tokens come with their tokenizer; leave it out"
        raise InputError(f"--stages has tokenizer, but {why}.")
    if given and "pretrain" in named:
        raise InputError(
            f"--stages has pretrain, but config.init_from={given} gives the pretrained weights;"
            " leave one of them out."
        )
    draws = {"sample", "generate"}
    bert = config.model.objective == "bert"
    if bert and named & draws:
        raise InputError(
            f"--stages has {', '.join(sorted(named & draws))}, but config.model.objective=bert "
            "draws no images; it takes pretrain, probe and finetune."
        )
    unlabelled = {"probe", "finetune"} if not classes else set()
    if named & unlabelled:
        shown = ", ".join(s for s in STAGES if s in named & unlabelled)
        raise InputError(
            f"--stages has {shown}, but the images of config.data.name={name} have no labels; take "
            "pretrain and sample."
        )
    if config.probe.every and not classes and (not named or "pretrain" in named) and not given:
        raise InputError(
            f"config.probe.every is {config.probe.every}, but the images of "
            f"config.data.name={name} have no labels; take 0."
        )
    left_out = unlabelled | ({"pretrain"} if given else set()) | (draws if bert else set())
    left_out |= set() if trains_tokens else {"tokenizer"}
    chosen = (named or {stage.name for stage in STAGES.values() if not stage.on_request}) - left_out
    return [stage for stage in STAGES if stage in chosen]


def _has_tokenizer(config: config_lib.Config) -> bool:
    """Whether learned tokens come with their tokenizer, from wherever."""
    cached = sources.open_data_set(config.data).stored_as == "tokens"
    return bool(config.tokens.tokenizer or config.init_from or cached)
