"""The one command: pretrain, probe, fine-tune and sample, from a config file into a run folder.

python -m gptv_jax.main --config=configs/digits.py --workdir=runs/digits
"""

import json
import logging
import sys

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from gptv_jax import config, report
from gptv_jax.run import STAGES, Run
from gptv_jax.stages import finetune, pretrain, probe, sample

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, FILE[:ARG].")
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; the same one continues a run.")
WANTED = flags.DEFINE_list("stages", None, f"Some of {','.join(STAGES)}; default: all of them.")
LOG = logging.getLogger("gptv_jax.main")
MODULES = {"pretrain": pretrain, "probe": probe, "finetune": finetune, "sample": sample}


def main(_) -> None:
    """Runs the stages that are wanted and not finished, in order."""
    logging.getLogger("gptv_jax").setLevel(logging.INFO)
    if not flags.FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.ERROR)  # of libraries: Orbax tells its every move
    run = Run(config.resolve(CONFIG.value), WORKDIR.value)
    settings = (f"{name} = {value}" for name, value in config.flatten(run.config).items())
    LOG.info(
        "%s on %d %s device(s)\n%s",
        run.folder,
        jax.device_count(),
        jax.default_backend(),
        "\n".join(settings),
    )
    report.write(run)  # a kill may have come between a stage's numbers and their page
    with jax.set_mesh(run.mesh):
        for stage in run.stages(WANTED.value):
            if not run.finished(stage):
                run.finish(stage, MODULES[stage].run_stage(run))
                report.write(run)
    print(json.dumps(run.summary(), indent=2))


def run() -> None:
    """Entry point: what the user can mend is one sentence and exit code 2, not a traceback."""
    try:
        flags.mark_flags_as_required(["config", "workdir"])
        app.run(main)
    except config.InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
