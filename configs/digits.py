"""placeholder"""

from gptv_jax import config as config_lib


def get_config():
    c = config_lib.default()
    c.data.name = "digits"
    c.data.image_size = 8
    c.data.augmentation = ("shift(pixels=1, keep=0.3)",)
    c.tokens.levels = 17
    c.model.layers = 4
    c.model.width = 96
    c.model.heads = 4
    c.model.axial_positions = True
    c.model.start_per_variant = True
    c.model.scan_layers = False
    for train, rate, rest in ((c.train, 1.5e-2, 1e-2), (c.finetune.train, 3e-3, 3e-3)):
        train.batch_size = 32
        train.optimizer.name = "muon"
        train.optimizer.learning_rate = rate
        train.optimizer.rest_learning_rate = rest
        train.optimizer.weight_decay = 0.01
        train.optimizer.clip_norm = 1.0
        train.optimizer.final_fraction = 0.02
        train.log_every = 20
    c.train.steps = 500
    c.train.optimizer.warmup_steps = 25
    c.train.eval_every = 50
    c.train.checkpoint_every = 50
    c.finetune.train.steps = 200
    c.finetune.train.optimizer.warmup_steps = 20
    c.finetune.train.eval_every = 20
    c.finetune.train.checkpoint_every = 20
    c.finetune.standardize = True
    c.probe.c = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    return c
