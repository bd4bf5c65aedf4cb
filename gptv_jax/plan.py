"""Plans a training for hardware that need not be there: does it fit, and how long will it take?

python -m gptv_jax.plan --config=configs/imagenet.py:l --topology=v5e:16x16 --config.mesh.fsdp=16
python -m gptv_jax.plan --config=configs/digits.py --topology=cpu:8 --search
"""

import json

from absl import flags
from etils import epy

from gptv_jax import command, config
from gptv_jax.errors import InputError
from gptv_jax.planning import topology
from gptv_jax.stages import STAGES

with epy.lazy_imports():  # see `command`
    import jax

    from gptv_jax.planning import plan, search, table, training

PLANNED = [name for name, stage in STAGES.items() if stage.planning]
TOPOLOGY = flags.DEFINE_string("topology", None, f"Devices: {topology.FORMS}.")
STAGE = flags.DEFINE_enum("stage", "pretrain", PLANNED, "The stage that is planned.")
CLASSES = flags.DEFINE_integer(
    "classes", None, "finetune: classes of the task; default: those of the data.", lower_bound=0
)
SLICES = flags.DEFINE_integer("num_slices", 1, "TPU slices, or GPU nodes.", lower_bound=1)
SEARCH = flags.DEFINE_bool("search", False, "Tries meshes, remat and microbatches, and ranks them.")
JSON = flags.DEFINE_bool("json", False, "Prints the numbers as JSON, and nothing else.")


def main(settings: config.Config) -> None:
    """Prints the plan; exit code 1 where it does not fit."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator that is there is left alone
    devices = topology.parse(TOPOLOGY.value, SLICES.value)
    if devices.platform == "cpu":  # simulated; JAX has not been used before
        jax.config.update("jax_num_cpu_devices", devices.count)
    STAGES[STAGE.value].check(settings)
    if settings.tokens.kind == "none" and STAGE.value != "finetune":
        raise InputError(
            f"--stage is {STAGE.value}, but with config.tokens.kind=none there are no tokens; "
            "take --stage=finetune."
        )
    if CLASSES.value is not None and STAGE.value != "finetune":
        raise InputError(f"--classes is for --stage=finetune, and --stage is {STAGE.value}.")
    names = {} if CLASSES.value is None else {"names": CLASSES.value}
    planned = STAGES[STAGE.value].plan(settings, **names), devices
    plans = search.search(*planned) if SEARCH.value else [_make(*planned)]
    best, smallest = plans[0], search.smallest(*planned)
    if JSON.value:
        numbers = best.numbers() | {"smallest": smallest and smallest.numbers()}
        if SEARCH.value:
            numbers["search"] = [each.numbers() for each in plans]
        print(json.dumps(numbers, indent=2))
    else:
        if SEARCH.value:
            print(f"{table.ranking(plans[: search.SHOWN])}\n")
        print(table.show(best, smallest))
    if not best.fits:
        raise SystemExit(1)


def _make(wanted: "training.Training", devices: topology.Topology) -> "plan.Plan":
    """The plan of a training on the mesh of the config.

    InputError: the mesh does not divide the batch or the network (the message names a mesh that
    does, if there is one), or the devices are not known to the compiler.
    """
    try:  # by arithmetic, so that only the mesh can be refused
        found = plan.make(wanted, devices, compiling=False)
    except InputError as error:
        for each in search.choices(wanted, devices):
            if each.training.train.microbatches == wanted.train.microbatches:
                mesh = " ".join(f"--config.mesh.{axis}={n}" for axis, n in each.sizes.items())
                example = f"For example, take {mesh}; --search ranks all."
                raise InputError(f"{error} {example}") from error
        raise
    return plan.make(wanted, devices) if devices.compiles else found


if __name__ == "__main__":
    flags.mark_flag_as_required("topology")
    command.start(main, [plan, search, table])
