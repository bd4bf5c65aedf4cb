"""Handwritten digits: the whole path in minutes on a laptop, with nothing to download.

Data: scikit-learn's digits, 1,797 real 8x8 images with 17 grey levels (lossless tokens), split
1,197 / 200 / 400 stratified with seed 0.

Command:    python -m gptv_jax.main --config=configs/digits.py --workdir=runs/digits
Hardware:   two CPU cores, 1.2 GiB of memory, three and a quarter to five and a half
            minutes for all stages.
Expect:     test loss about 1.23 nats per token (uniform: ln 17 = 2.833), probe about 0.96,
            fine-tune about 0.97; docs/results.md has the numbers of three seeds.
Reproduces: no published run. Logistic regression on the raw pixels reaches about 0.97 on this easy
            set, so it shows that everything works, not that pretraining wins.

Changes:    from iGPT, because 1,197 images are few: distribution augmentation (one-pixel
shifts, each with a start vector of its own; Jun et al. 2020), row and column tables beside the
learned positions, dropout, and Muon, which here learns several times faster than Adam.
"""

from gptv_jax import config as config_lib


def get_config():
    c = config_lib.default()
    c.data.name = "digits"
    c.data.image_size = 8
    c.data.train_transforms = ("shift(pixels=1, keep=0.3)",)
    c.tokens.levels = 17

    c.model.layers = 4
    c.model.width = 128
    c.model.heads = 4
    c.model.axial_positions = True
    c.model.start_per_variant = True
    c.model.dropout = 0.1

    for train in (c.train, c.finetune.train):
        train.batch_size = 32
        train.log_every = 20
        train.optimizer.name = "muon"
        train.optimizer.weight_decay = 0.01
        train.optimizer.clip_norm = 1.0
        train.optimizer.final_fraction = 0.02

    c.train.steps = 800
    c.train.eval_every = 100
    c.train.checkpoint_every = 100
    c.train.optimizer.learning_rate = 1.5e-2
    c.train.optimizer.rest_learning_rate = 1e-2
    c.train.optimizer.warmup_steps = 40

    c.finetune.train.steps = 240
    c.finetune.train.eval_every = 20
    c.finetune.train.checkpoint_every = 20
    c.finetune.train.optimizer.learning_rate = 6e-3
    c.finetune.train.optimizer.rest_learning_rate = 2e-3
    c.finetune.train.optimizer.warmup_steps = 20
    c.finetune.patience = 6  # of 12 evaluations; from scratch as well
    c.finetune.standardize = True

    c.probe.c = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    return c
