"""CIFAR-10."""

from gptv_jax import config as config_lib


def get_config(size: str = "tiny"):
    c = config_lib.default()
    c.data.name = "cifar10"
    c.data.image_size = 32
    c.data.train_split = "train[:96%]"
    c.data.validation_split = "train[96%:]"
    c.data.train_transforms = ("decode()", "flip()")
    c.data.eval_transforms = ("decode()",)
    c.tokens.kind = "learned"
    c.tokens.autoencoder.widths = (64,)
    t = c.tokenizer.train
    t.steps = 2500
    t.batch_size = 32
    t.eval_every = 0
    t.checkpoint_every = 500
    t.optimizer.name = "muon"
    t.optimizer.learning_rate = 7e-3
    t.optimizer.weight_decay = 0.01
    t.optimizer.warmup_steps = 100
    t.optimizer.final_fraction = 0.01
    c.model.layers, c.model.width, c.model.heads = 4, 128, 4
    c.model.rotary = True
    c.model.learned_positions = False
    c.model.qk_norm = True
    c.model.mlp = "swiglu"
    c.train.steps = 1000
    c.train.batch_size = 32
    c.train.optimizer.name = "muon"
    c.train.optimizer.learning_rate = 1e-2
    c.train.optimizer.weight_decay = 0.01
    c.train.optimizer.clip_norm = 1.0
    c.train.optimizer.warmup_steps = 50
    c.train.optimizer.schedule = "wsd"
    c.train.optimizer.decay_share = 0.35
    c.train.eval_every = 0
    return c
