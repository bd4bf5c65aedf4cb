"""Plans of the fine-tuning of tasks."""

import dataclasses
import functools
import math

import pytest

from gptv_jax import config as config_lib
from gptv_jax import tasks
from gptv_jax.errors import InputError
from gptv_jax.model import flops
from gptv_jax.planning import plan, search, table, topology
from gptv_jax.planning.finetuning import Finetuning

DETECT = config_lib.Config(
    data=config_lib.Data(image_size=(64, 128)),
    tokens=config_lib.Tokens(kind="learned", autoencoder=config_lib.Autoencoder(levels=(8, 6, 5))),
    model=config_lib.Model(layers=2, width=256, heads=2, dtype="bfloat16"),
    task=config_lib.Task(
        name="detect",
        image_input="pixels",
        stem=(16, 32),
        detect=config_lib.Detect(objects=24, bins=100),
    ),
    finetune=config_lib.Finetune(train=config_lib.Train(batch_size=32)),
    mesh=config_lib.Mesh(data=4, fsdp=4),
)
of_seven = functools.partial(Finetuning, names=7)


def test_a_task_with_parts_and_a_stem_is_compiled_for_a_tpu_slice():
    found = plan.make(of_seven(DETECT), topology.parse("v5e:4x4"))
    network = found.training.network
    assert found.compiled and found.fits and len(network.layout.parts) == 2 and network.stem
    length = 16 * 32 + 5 * 24
    assert found.flops_per_step == flops.training(network).total * length * 32
    assert found.training.flops["stem"] > 0 and 0 < found.mfu <= 1
    assert ("all-gather", ("fsdp",)) in {(each.kind, each.axes) for each in found.traffic}
    # Rows of 632 positions: image tokens, targets and inputs, four bytes each, weights, pixels.
    assert found.memory.batch == 2 * (4 * (512 + 3 * 120 + 1) + 64 * 128 * 3)
    assert "--config.finetune.train.microbatches=1" in found.flags
    assert "in the stem of pixels" in table.show(found, None)


def test_more_objects_and_more_classes_cost_more():
    gpu = topology.parse("gpu:16xh100")
    few = plan.make(of_seven(DETECT), gpu, compiling=False)
    many = plan.make(Finetuning(DETECT, names=80), gpu, compiling=False)
    detect = dataclasses.replace(DETECT.task.detect, objects=100)
    task = dataclasses.replace(DETECT.task, detect=detect)
    long = plan.make(of_seven(dataclasses.replace(DETECT, task=task)), gpu, compiling=False)
    assert many.params - few.params == 2 * 73 * 256  # of the embedding and of the head
    assert long.flops_per_step > 1.5 * few.flops_per_step and many.fits
    assert long.memory.activations > 1.5 * few.memory.activations
    mesh = config_lib.Mesh(data=2, fsdp=1, sequence=8)
    rows = dataclasses.replace(DETECT.finetune.train, batch_size=30)
    odd = dataclasses.replace(DETECT, mesh=mesh, finetune=config_lib.Finetune(train=rows))
    assert plan.make(of_seven(odd), gpu, compiling=False).fits
    detect = dataclasses.replace(detect, objects=25)
    odd = dataclasses.replace(odd, task=dataclasses.replace(task, detect=detect))
    with pytest.raises(
        InputError, match=r"positions .* is 637, which 8 \(config\.mesh\.sequence\)"
    ):
        plan.make(of_seven(odd), gpu, compiling=False)
    narrow = dataclasses.replace(DETECT.task, stem=(16, 36))
    with pytest.raises(InputError, match=r"config\.task\.stem\[1\] is 36, which 16 "):
        odd = dataclasses.replace(DETECT, task=narrow, mesh=config_lib.Mesh(data=1, fsdp=16))
        plan.make(of_seven(odd), gpu, compiling=False)


def test_classes_are_those_of_the_data_and_the_search_keeps_the_task():
    config = config_lib.Config(
        model=config_lib.Model(layers=1, width=32, heads=2),
        finetune=config_lib.Finetune(train=config_lib.Train(batch_size=4)),
    )
    found = search.smallest(Finetuning(config), topology.parse("gpu:4xh100"))
    assert found.training.network == tasks.make(config, tuple("0123456789")).network()
    assert math.prod(found.sizes.values()) == 1 and found.training.train.microbatches == 1
    missing = dataclasses.replace(config, data=config_lib.Data(name="folder", path="/nowhere"))
    with pytest.raises(InputError, match=r"Without the data, give --classes=NUMBER\."):
        plan.make(Finetuning(missing), topology.parse("gpu:4xh100"))


def test_segmentation_is_planned_with_its_label_tokens_and_its_head():
    gpu, plans = topology.parse("gpu:16xh100"), []
    for read in (True, False):
        settings = config_lib.Segment(cell=8, codes=64, layers=(0, 2), read=read)
        task = dataclasses.replace(DETECT.task, name="segment", segment=settings)
        config = dataclasses.replace(DETECT, task=task)
        plans.append(plan.make(of_seven(config), gpu, compiling=False))
    both, alone = plans
    network = both.training.network
    assert network.length == 16 * 32 + 8 * 16 and both.fits
    assert both.flops_per_step == flops.training(network).total * network.length * 32
    outputs = 7 * 4 * 4  # of a position: seven classes of 4 x 4 pixels
    assert both.params - alone.params == outputs * (2 * 256 + 1)
