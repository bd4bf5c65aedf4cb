"""The stages of a run, one file each, and the only list of them."""

import dataclasses
import importlib
from collections.abc import Callable

from etils import epy

from gptv_jax import config as config_lib
from gptv_jax.config import rules

with epy.lazy_imports():  # see `command`
    import jax

    from gptv_jax import sharding

PICTURED = (".png", ".webp")  # endings of a picture and, of clips, of its animation
PICTURES = ("unconditional", "classes", "completions", "inpainted", "surprise")  # of `sample`


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage; its modules are imported when they are needed, as some imports take seconds."""

    name: str  # of the module too
    sections: tuple[str, ...]  # of the config that the stage needs, and that are checked for it
    trains_network: bool = False  # its checkpoints hold weights of the network, for `gptv_jax.load`
    on_request: bool = False  # runs only where --stages names it, and then each time
    feeds_later: bool = False  # every later stage reads what the stage trains
    training: str | None = None  # section with the `steps` of its training
    measures: str | None = None  # an earlier stage whose weights it measures, not pretraining's
    files: tuple[str, ...] = ()  # what it writes in the run folder, beside numbers and checkpoints
    partial: str | None = None  # a file or folder among `files` that is there before it finishes
    own_transforms: str | None = None  # section with `train_transforms` in place of config.data's
    planning: str | None = None  # module and class in `planning` that plan its training
    heading: str | None = None  # of the section of report.html that has its part

    @property
    def run(self) -> Callable:
        """`run(context)`, which returns the summary's numbers: `run_stage` of the module."""
        return importlib.import_module(f"{__name__}.{self.name}").run_stage

    @property
    def report(self) -> Callable:
        """`report(results)`, the stage's part of the page: its function in `stages.reports`."""
        return getattr(importlib.import_module(f"{__name__}.reports"), self.name)

    @property
    def plan(self) -> type:
        """The `Training` that plans the stage."""
        module, _, name = self.planning.partition(".")
        return getattr(importlib.import_module(f"gptv_jax.planning.{module}"), name)

    def check(
        self,
        config: config_lib.Config,
        mesh: "jax.sharding.Mesh | None" = None,
        length: int | None = None,
    ) -> None:
        """Checks the sections that the stage needs, and that the mesh, if given, divides them.

        `length` is the number of positions of a sequence, see `sharding.check`.
        """
        for section in self.sections:
            if section in rules.SECTIONS:
                rules.SECTIONS[section](config)
        if mesh is not None:
            sharding.check(config, mesh, self.sections, length)


STAGES = {
    stage.name: stage
    for stage in (  # in the order in which they run
        Stage(
            "tokenizer",
            ("tokenizer",),
            feeds_later=True,
            training="tokenizer.train",
            files=("tokenizer.safetensors", *(f"samples/reconstructions{end}" for end in PICTURED)),
            own_transforms="tokenizer",
            planning="tokenizing.TokenizerTraining",
            heading="Tokenizer",
        ),
        Stage(
            "pretrain",
            ("model", "train", "distill", "profile"),
            trains_network=True,
            feeds_later=True,
            training="train",
            files=("profile",),
            planning="training.Pretraining",
            heading="Training",
        ),
        Stage(
            "probe",
            ("model", "probe"),
            training="probe.sgd",
            files=("probe",),
            partial="probe",
            own_transforms="probe.sgd",
            heading="Linear probe by layer",
        ),
        Stage(
            "finetune",
            ("model", "task", "finetune"),
            trains_network=True,
            training="finetune.train",
            files=("finetune",),
            own_transforms="finetune",
            planning="finetuning.Finetuning",
            heading="Training",
        ),
        Stage(
            "sample",
            ("model", "sample"),
            files=tuple(f"samples/{name}{end}" for name in PICTURES for end in PICTURED),
            heading="Samples",
        ),
        Stage(
            "generate",
            ("model", "sample", "generate"),
            on_request=True,
            files=("generated",),
            partial="generated",
        ),
        Stage(
            "robustness",
            ("model", "task", "finetune", "robustness"),
            on_request=True,
            measures="finetune",
            files=(
                "robustness.json",
                "robustness.unfinished.json",
                "samples/corruptions.png",
                "samples/attacked.png",
            ),
            heading="Robustness",
        ),
        Stage(
            "typicality",
            ("model",),
            on_request=True,
            measures="finetune",
            files=("typicality", "samples/unusual.png", "samples/unusual.webp"),
            heading="Typicality",
        ),
    )
}
