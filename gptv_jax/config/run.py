"""A whole run: every section of settings together."""

import dataclasses

from gptv_jax.config.autoencoder import Tokenizer
from gptv_jax.config.data import Data, Tokens
from gptv_jax.config.fields import NOT_NEGATIVE, field
from gptv_jax.config.model import Model
from gptv_jax.config.stages import Finetune, Generate, Probe, Sample
from gptv_jax.config.train import Mesh, Profile, Train

PLACE = (
    "an absolute path or an address such as gs://bucket/path",
    lambda v: v.startswith("/") or "://" in v,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    # Of initialisation, data order, augmentation, dropout and sampling.
    seed: int = field(0, NOT_NEGATIVE)
    # Pretrained weights in place of this run's own: a run folder, or what docs/weights.md lists.
    init_from: str | None = None
    # Where checkpoints are, of this run alone; None: checkpoints/ in the run folder.
    checkpoint_dir: str | None = field(None, PLACE, free=True)
    data: Data = dataclasses.field(default_factory=Data)
    tokens: Tokens = dataclasses.field(default_factory=Tokens)
    model: Model = dataclasses.field(default_factory=Model)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    tokenizer: Tokenizer = dataclasses.field(default_factory=Tokenizer)
    train: Train = dataclasses.field(default_factory=Train)
    probe: Probe = dataclasses.field(default_factory=Probe)
    finetune: Finetune = dataclasses.field(default_factory=Finetune)
    sample: Sample = dataclasses.field(default_factory=Sample)
    generate: Generate = dataclasses.field(default_factory=Generate)
    profile: Profile = dataclasses.field(default_factory=Profile)
