"""CIFAR-10 at 16x16 in 16 colours: a student of a quarter of its teacher's parameters, on a CPU.

    teacher  6 layers of width 128, 1,218,304 parameters, 400 steps
    student  (the default) 6 layers of width 64, 314,240 parameters, 150 steps

The images and the recipe are those of benchmarks/ablations.py: 256 tokens of 16 colours, which are
k-means of training pixels; the student takes the teacher's. The student is trained without the
teacher as well: for as many steps, and for as long by the measured times of a step.

Command:    python -m gptv_jax.main --config=configs/cifar10_distill.py:teacher --stages=pretrain
                --workdir=runs/cifar10_teacher --config.data.dir=...
            python -m gptv_jax.main --config=configs/cifar10_distill.py --stages=pretrain
                --workdir=runs/cifar10_student --config.data.dir=...
Hardware:   two CPU cores: the teacher in four minutes, the student and its comparisons in four.
Expect:     teacher 0.97 nats per token; student 1.05 with the teacher, 1.08 to 1.09 without at
            equal steps, 1.02 without at equal time (docs/results.md).
Reproduces: no published run.
Changes:    from benchmarks/ablations.py: rotary positions, which won there, and longer trainings.
"""

import pathlib
import runpy

from gptv_jax import config as config_lib

CIFAR10 = pathlib.Path(__file__).with_name("cifar10.py")


def get_config(which: str = "student"):
    c = runpy.run_path(str(CIFAR10))["get_config"]("tiny")
    c.data.image_size = 16
    c.data.eval_transforms = ("decode()", "resize(16)")
    c.data.train_transforms = ("decode()", "resize(16)", "flip()")
    c.finetune.train_transforms = ()
    c.data.validation_split = "train[90%:90.4%]"
    c.data.test_split = "test[:10%]"
    c.tokens.colors = 16
    c.model.layers, c.model.heads = 6, 4
    c.model.axial_positions, c.model.rotary = False, True
    c.train.batch_size = 16
    c.train.checkpoint_every = 100
    c.train.optimizer.warmup_steps = 20
    config_lib.choose(which, {"teacher": _teacher, "student": _student})(c)
    return c


def _teacher(c):
    c.model.width = 128
    c.train.steps = 400


def _student(c):
    c.model.width = 64
    c.train.steps = 150
    c.distill.teacher = "runs/cifar10_teacher"
    c.distill.compare = True
