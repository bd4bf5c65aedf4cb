"""The stages of a run, one file each, and the only list of them."""

import dataclasses
import importlib
from types import ModuleType


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage; its module is imported when it is needed, as some take seconds."""

    name: str  # of the module too, which has `run_stage(context)` and, for the report, `report`
    trains_network: bool = False  # its checkpoints hold the network's weights, as models load them
    on_request: bool = False  # runs only where --stages names it, and then each time
    planning: str | None = None  # module and class of `planning` that plan its training

    @property
    def module(self) -> ModuleType:
        """Imports the module where no other code has done so."""
        return importlib.import_module(f"{__name__}.{self.name}")

    @property
    def plan(self) -> type:
        """The class that plans the training of this stage, a `planning.training.Training`."""
        module, name = self.planning.split(":")
        return getattr(importlib.import_module(f"gptv_jax.planning.{module}"), name)


STAGES = {
    stage.name: stage
    for stage in (  # in the order in which they run
        Stage("tokenizer", planning="tokenizer:TokenizerTraining"),
        Stage("pretrain", trains_network=True, planning="pretrain:Pretraining"),
        Stage("probe"),
        Stage("finetune", trains_network=True),
        Stage("sample"),
        Stage("generate", on_request=True),
    )
}
