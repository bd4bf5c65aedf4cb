"""What a stage reads: the configuration, the data, the devices and the run folder."""

import dataclasses

import jax
from jax.sharding import Mesh

from gptv_jax import config as config_lib
from gptv_jax import files, hosts, tasks, tokens
from gptv_jax.data.pipeline import Pipeline
from gptv_jax.model.gpt import Network
from gptv_jax.runs import accuracy
from gptv_jax.runs.record import RunFolder
from gptv_jax.tasks.network import network_of
from gptv_jax.tokens import Codec, TokenDefinition
from gptv_jax.train.metrics import MetricWriter

SHARED = ("model/params",)  # numbers of a stage that are not of the stage alone


@dataclasses.dataclass(frozen=True)
class Context:
    """A run with everything open and checked; `stages.setup.open_run` makes one."""

    config: config_lib.Config
    mesh: Mesh
    folder: RunFolder
    log: MetricWriter
    images: Pipeline  # the data as images, before they become tokens
    task: tasks.Task  # that fine-tuning teaches; it knows the names of the data's classes
    stages: tuple[str, ...]  # names of the stages to run, in order
    # None without tokens, and while the tokenizer is still to be trained
    codec: Codec | None = None
    # The data as the network reads them; None while the tokenizer is still to be trained.
    data: Pipeline | None = None

    @property
    def classes(self) -> int:
        """Number of classes of the data's images; 0: unlabelled."""
        return len(self.task.classes)

    def network(self) -> Network:
        """The network of the config, before a task adds its parts."""
        return network_of(self.config)

    def with_definition(self, definition: TokenDefinition | None) -> "Context":
        """This context with the codec of a palette or tokenizer (grey levels need neither)."""
        codec = tokens.codec_of(self.config, definition)
        pixels = self.config.model.image_input == "pixels"
        data = dataclasses.replace(self.images, codec=codec, pixels=pixels)
        return dataclasses.replace(self, codec=codec, data=data)

    def finish(self, stage: str, numbers: dict) -> None:
        """Writes a stage's numbers to summary.json, as <stage>/<name>, in place of earlier ones.

        Names of `SHARED` are unchanged. The number of damaged images becomes data/skipped,
        of images that filters leave out data/dropped.
        Accuracies get standard errors; what a reader may miss about them is logged, see
        `accuracy.cautions`.
        """
        log = self.images.damage_log
        damaged, dropped = zip(*hosts.from_all((log.names, log.dropped)), strict=True)
        if jax.process_index() == 0:
            numbers, before = accuracy.with_standard_errors(numbers), self.folder.summary()
            before = {n: x for n, x in before.items() if not n.startswith(f"{stage}/")}
            named = {n if n in SHARED else f"{stage}/{n}": value for n, value in numbers.items()}
            summary = before | named | {"data/skipped": len(set().union(*damaged))}
            if any(dropped):
                summary["data/dropped"] = len(set().union(*dropped))
            files.write_json(self.folder.path / "summary.json", summary)
            accuracy.tell(stage, before, summary, self.folder.path)
