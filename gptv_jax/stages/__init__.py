"""The stages of a run, one file each, and the only list of them."""

import dataclasses
import importlib
from collections.abc import Callable
from types import ModuleType

from jax.sharding import Mesh

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.config import rules


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage; its module is imported when it is needed, as some take seconds."""

    name: str  # of the module too, which has `run_stage(context)`
    sections: tuple[str, ...]  # of the config that the stage needs, and that are checked for it
    trains_network: bool = False  # its checkpoints hold weights of the network, for `gptv_jax.load`
    on_request: bool = False  # runs only where --stages names it, and then each time
    own_transforms: str | None = None  # section with `train_transforms` in place of config.data's
    planning: str | None = None  # the class of `planning.training` for the stage's training
    in_report: bool = True  # `stages.reports` has a function of the stage's name

    @property
    def module(self) -> ModuleType:
        """Imports the module where no other code has done so."""
        return importlib.import_module(f"{__name__}.{self.name}")

    @property
    def plan(self) -> type:
        """The class that plans the training of this stage, a `planning.training.Training`."""
        return getattr(importlib.import_module("gptv_jax.planning.training"), self.planning)

    @property
    def report(self) -> Callable | None:
        """`report(run)`, the stage's part of the page, a `runs.report.Part`; None: it has none."""
        if not self.in_report:
            return None
        return getattr(importlib.import_module(f"{__name__}.reports"), self.name)

    def check(self, config: config_lib.Config, mesh: Mesh | None = None) -> None:
        """Checks the sections that the stage needs, and that the mesh, if given, divides them.

        Raises:
          InputError: names the fields, their values and what would be accepted.
        """
        rules.check_sections(config, self.sections)
        if mesh is not None:
            sharding.check(config, mesh, self.sections)


STAGES = {
    stage.name: stage
    for stage in (  # in the order in which they run
        Stage(
            "tokenizer", ("tokenizer",), own_transforms="tokenizer", planning="TokenizerTraining"
        ),
        Stage(
            "pretrain", ("model", "train", "profile"), trains_network=True, planning="Pretraining"
        ),
        Stage("probe", ("model", "probe"), own_transforms="probe.sgd"),
        Stage("finetune", ("model", "finetune"), trains_network=True, own_transforms="finetune"),
        Stage("sample", ("model", "sample")),
        Stage("generate", ("model", "sample", "generate"), on_request=True, in_report=False),
    )
}
