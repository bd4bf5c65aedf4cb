"""The stages of a run, one file each, and the only list of them."""

import dataclasses

from jax.sharding import Mesh

from gptv_jax import config as config_lib
from gptv_jax import sharding
from gptv_jax.config import rules


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, whose module has `run_stage(context)`, which returns the summary's numbers."""

    name: str  # of the module too
    sections: tuple[str, ...]  # of the config that the stage needs, and that are checked for it
    trains_network: bool = False  # its checkpoints hold weights of the network, for `gptv_jax.load`
    on_request: bool = False  # runs only where --stages names it, and then each time
    own_transforms: str | None = None  # section with `train_transforms` in place of config.data's

    def check(self, config: config_lib.Config, mesh: Mesh | None = None) -> None:
        """Checks the sections that the stage needs, and that the mesh, if given, divides them."""
        for section in self.sections:
            if section in rules.SECTIONS:
                rules.SECTIONS[section](config)
        if mesh is not None:
            sharding.check(config, mesh, self.sections)


STAGES = {
    stage.name: stage
    for stage in (  # in the order in which they run
        Stage("tokenizer", ("tokenizer",), own_transforms="tokenizer"),
        Stage("pretrain", ("model", "train", "profile"), trains_network=True),
        Stage("probe", ("model", "probe"), own_transforms="probe.sgd"),
        Stage("finetune", ("model", "finetune"), trains_network=True, own_transforms="finetune"),
        Stage("sample", ("model", "sample")),
        Stage("generate", ("model", "sample", "generate"), on_request=True),
    )
}
