"""Distillation: what a training learns from frozen teachers, networks that are trained already."""

import dataclasses

from gptv_jax.config.fields import ABOVE_ZERO, FROM_ZERO, field

NAMES = (
    "the name of a run or of weights, or a tuple of such names",
    lambda v: all(name.strip() for name in ((v,) if isinstance(v, str) else v)),
)


@dataclasses.dataclass(frozen=True)
class Distill:
    """The teachers of pretraining, and the weights of the losses; see docs/distillation.md.

    Without a teacher, no other field counts.
    """

    # A run folder, a file or folder of weights, or hf://user/model, as `init_from` takes it; or a
    # tuple of several, the mean of whose distributions is learned. (): nothing is distilled.
    teacher: str | tuple[str, ...] = field((), NAMES)
    # Reads what teachers drew at every position from the token cache of config.data, which
    # gptv_jax.prepare --teacher has made, so that no teacher is in memory; for pretraining alone.
    cached: bool = False
    # Weight of the Kullback-Leibler divergence of the student's distribution from the teacher's,
    # in nats per token, times temperature ** 2.
    weight: float = field(1.0, FROM_ZERO)
    # Weight of the loss of the training without a teacher.
    data_weight: float = field(1.0, FROM_ZERO)
    temperature: float = field(1.0, ABOVE_ZERO)  # divides the logits of teacher and student
    # Weight of 1 - cosine between features at each position: the student's at `student_layer`,
    # after a linear map that is trained beside the student and then dropped, and the teacher's at
    # `teacher_layer`. 0: features are not compared.
    features: float = field(0.0, FROM_ZERO)
    # 0 (the embeddings) up to the network's layers; None: the middle one. The layer that the probe
    # reads best (probe/best_layer of the summary) is a good choice.
    student_layer: int | None = field(None, FROM_ZERO)
    teacher_layer: int | None = field(None, FROM_ZERO)
    # Trains the student without a teacher as well: for as many steps, and for as many steps as take
    # as long as the distillation, by the measured times of a step.
    compare: bool = False

    def __post_init__(self):
        """One name becomes a tuple of one."""
        if isinstance(self.teacher, str):
            object.__setattr__(self, "teacher", (self.teacher,))


@dataclasses.dataclass(frozen=True)
class Matching(Distill):
    """The teachers of fine-tuning, whose class probabilities are learned by function matching.

    Teacher and student see one augmented view of every image, mixed with another image, and the
    labels are not used (Beyer et al. 2022, arXiv:2106.05237). `weight` is of the divergence between
    the class distributions, in nats per image.
    """

    data_weight: float = field(0.0, FROM_ZERO)
    # Images are mixed in pairs, with shares from Beta(mixup, mixup): 1 draws them uniformly. 0:
    # images are not mixed.
    mixup: float = field(1.0, FROM_ZERO)
