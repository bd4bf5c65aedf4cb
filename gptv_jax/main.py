"""The one command: pretrain, probe, fine-tune and sample, from a config file into a run folder.

python -m gptv_jax.main --config=configs/digits.py --workdir=runs/digits
python -m gptv_jax.main --config=runs/digits --workdir=runs/wider --config.model.width=192
"""

import json
import os

from absl import flags
from etils import epy

from gptv_jax import command, config
from gptv_jax.errors import InputError
from gptv_jax.hosts import cores, distributed, runtime, stopping
from gptv_jax.stages import STAGES

with epy.lazy_imports():  # see `command`
    import jax

    from gptv_jax.stages import changes, run

REQUESTED = [name for name, stage in STAGES.items() if stage.on_request]
DEFAULT = f"every possible stage but those on request, {', '.join(REQUESTED)}"
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; the same folder continues its run.")
WANTED = flags.DEFINE_list("stages", None, f"Some of {','.join(STAGES)}; default: {DEFAULT}.")
DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    distributed.WAYS,
    "How several processes meet: auto takes the flags below, the environment, Slurm or Cloud TPU; "
    "off is one process.",
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where all meet.")
COUNT = flags.DEFINE_integer("num_processes", None, "Number of processes.")
INDEX = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")


def main(settings: config.Config) -> None:
    """Runs the stages that are wanted and not finished, in order."""
    if not flags.FLAGS.is_parsed() or WORKDIR.value is None:
        raise InputError(
            "gptv_jax.main takes its settings from the command line; in Python or in a notebook, "
            "call gptv_jax.train(config, workdir)."
        )
    meeting = DISTRIBUTED.value, COORDINATOR.value, COUNT.value, INDEX.value
    if distributed.decide(meeting[0], meeting[1:], os.environ) is None:  # one process
        cores.split(settings, changes.begun_run(WORKDIR.value))
    distributed.start(*meeting)
    runtime.cache_programs()
    summary = run.run_stages(settings, WORKDIR.value, WANTED.value)
    if jax.process_index() == 0:
        print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    command.start(main, [run], again=stopping.CONTINUES)
