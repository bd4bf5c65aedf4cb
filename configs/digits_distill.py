"""A small network of digits that learns from a large one: distillation in two commands.

    teacher  the network of configs/digits.py, 803,328 parameters, pretrained and fine-tuned
    student  (the default) 2 layers of width 48, 61,440 parameters, which learns from the teacher's
             distribution of every token, and then by function matching from its classes

The data are those of configs/digits.py. The student is trained without the teacher as well: for
as many steps, and for as long by the measured times of a step.

Command:    python -m gptv_jax.main --config=configs/digits_distill.py:teacher
                --workdir=runs/digits_teacher --stages=pretrain,finetune
            python -m gptv_jax.main --config=configs/digits_distill.py
                --workdir=runs/digits_student --stages=pretrain,finetune
            Another teacher, such as a finished run of configs/digits.py:
                --config.distill.teacher=runs/digits --config.finetune.distill.teacher=runs/digits
Hardware:   two CPU cores: the teacher in 2 min 35 s, the student and its comparisons in 3 to 4
            minutes.
Expect:     test loss of the student 1.285 nats per token; without the teacher 1.304 at equal steps
            and 1.248 at equal time, as the teacher is 13 times as large; teacher 1.228. Test
            accuracy 0.965 by function matching, teacher 0.968; 0.978 by labels without a teacher
            (docs/results.md).
Reproduces: no published run. The recipe of the classes is function matching (Beyer et al. 2022,
            arXiv:2106.05237): teacher and student see one view, mixed with another image, and no
            label is used.
Changes:    from configs/digits.py: the student is small, its training is short, so that there is a
            gap to close.
"""

import pathlib
import runpy

from gptv_jax import config as config_lib

DIGITS = pathlib.Path(__file__).with_name("digits.py")


def get_config(which: str = "student"):
    c = runpy.run_path(str(DIGITS))["get_config"]()
    c.finetune.scratch = False
    config_lib.choose(which, {"teacher": lambda c: None, "student": _student})(c)
    return c


def _student(c):
    c.model.layers, c.model.width, c.model.heads = 2, 48, 2
    c.model.dropout = 0.0
    c.distill.teacher = "runs/digits_teacher"
    c.distill.compare = True
    c.train.steps = 400
    c.finetune.distill.teacher = "runs/digits_teacher"
    c.finetune.distill.compare = True
    c.finetune.train.steps = 800  # function matching learns slowly, and goes on learning
    c.finetune.patience = 0
