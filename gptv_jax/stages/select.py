"""Which stages a run takes, and why it cannot take others."""

from collections.abc import Collection

from gptv_jax import config as config_lib
from gptv_jax import tasks
from gptv_jax.config import rules
from gptv_jax.data import sources
from gptv_jax.data.cache import TokenCache
from gptv_jax.errors import InputError
from gptv_jax.stages import STAGES

# Keys of records in messages.
WORDS = {"label": "labels", "box_labels": "classes of boxes", "segmentation": "label maps"}


def choose_stages(
    config: config_lib.Config,
    held: Collection[str],
    wanted: list[str] | None = None,
    begun: Collection[str] = (),
) -> list[str]:
    """Names of the stages to run, in order; None: all possible stages except those on request.

    `held` are the keys of the data's records, see `sources.Selected.keys`. With
    `config.init_from`, pretraining must be named, or have begun in the run folder.

    InputError: a stage that is wanted is unknown or impossible, or the data lack what the task
    needs that the user has chosen.
    """
    if wanted is not None and (not wanted or set(wanted) - set(STAGES)):
        given = ", ".join(sorted(set(wanted) - set(STAGES)))
        problem = f"has {given}" if given else "is empty"
        raise InputError(f"--stages {problem}; it takes some of {', '.join(STAGES)}.")
    usual = [name for name, stage in STAGES.items() if not stage.on_request]
    refused = _impossible(config, held, wanted or usual)
    if config.init_from and "pretrain" not in {*begun, *(wanted or ())}:
        reason = f"config.init_from={config.init_from} gives the pretrained weights"
        refused["pretrain"] = f"{reason}; name pretrain in --stages to adapt them"
    for name in wanted or ():
        if name in refused:
            raise InputError(f"--stages has {name}, but {refused[name]}.")
    if wanted is None and "finetune" in refused and config.task != config_lib.Task():
        rules.refuse(config, "task.name", refused["finetune"])
    chosen = [name for name in STAGES if name in (wanted or usual) and name not in refused]
    if config.probe.every and "label" not in held and "pretrain" in chosen:
        reason = f"the images of config.data.name={config.data.name} have no labels; take 0"
        rules.refuse(config, "probe.every", reason)
    return chosen


def _impossible(
    config: config_lib.Config, held: Collection[str], wanted: Collection[str]
) -> dict[str, str]:
    """Stages that this run cannot have beside `wanted`, each with the reason and what to do."""
    kind, refused = config.tokens.kind, {}
    cached = isinstance(sources.open_data_set(config.data), TokenCache)
    # A student takes the tokenizer of its teachers, in fine-tuning too.
    taught = "finetune" in wanted and config.finetune.distill.teacher
    if kind != "learned":
        refused["tokenizer"] = f"config.tokens.kind={kind} has nothing to train"
    elif taught or not config.trains_tokenizer:
        refused["tokenizer"] = "the tokens come with their tokenizer; leave the stage tokenizer out"
    images = f"the images of config.data.name={config.data.name}"
    task = config.task
    # Label maps are probed where they are the task: digit scenes have some for detection, too.
    if not {"label", *{"segmentation"} & {*tasks.kind(task.name).needs}} & {*held}:
        refused["probe"] = f"{images} have no labels; take pretrain and sample"
    if not tasks.kind(task.name).reads_pixels and (task.image_input == "pixels" or kind == "none"):
        advice = "config.task.image_input=tokens and config.tokens.kind=grey, palette or learned"
        refused["finetune"] = f"the task {task.name} reads tokens alone; take {advice}"
    if lacking := _lacking(config.task.name, held):
        able = [f"config.task.name={name}" for name in tasks.TASKS if not _lacking(name, held)]
        advice = f"{' or '.join(able) or 'pretrain and sample'}"
        needed = f"{lacking}, which config.task.name={config.task.name} needs"
        refused["finetune"] = f"{images} have no {needed}; take {advice}"
    if config.model.objective == "bert":
        reason = (
            "config.model.objective=bert draws no images; it takes pretrain, probe and finetune"
        )
        refused |= dict.fromkeys(("sample", "generate"), reason)
        refused["typicality"] = "config.model.objective=bert gives no likelihoods of images"
    if config.model.image_input == "pixels":
        reason = "config.model.image_input=pixels reads pixels, and tokens alone can be drawn"
        advice = "it takes pretrain, probe and finetune"
        drawing = ("sample", "generate", "typicality")
        refused |= dict.fromkeys(drawing, f"{reason}; {advice}")
    if kind == "none":
        reason = "config.tokens.kind=none has no tokens to predict or to read; take finetune"
        able = ("finetune", "robustness")
        refused |= dict.fromkeys((name for name in STAGES if name not in able), reason)
    if cached:
        place = f"config.data.path={config.data.path} is a token cache"
        refused["robustness"] = (
            f"{place}, which has no pixels to corrupt; name a data set of images"
        )
    if "finetune" in refused:
        refused["robustness"] = refused["finetune"]
    return refused


def _lacking(task: str, held: Collection[str]) -> str:
    """What a task needs of the records and they do not have, in words."""
    lacking = [key for key in tasks.kind(task).needs if key not in held]
    return " and no ".join(WORDS.get(key, key) for key in lacking)
