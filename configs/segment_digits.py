from gptv_jax import config as config_lib


def get_config():
    c = config_lib.default()
    c.data.name = "digit_scenes"
    c.data.image_size = (32, 48)
    c.tokens.kind = "none"
    m = c.model
    m.layers, m.width, m.heads = 3, 64, 4
    c.task.name = "segment"
    c.task.image_input = "pixels"
    c.task.stem = (32, 64)
    s = c.task.segment
    s.write = False
    s.validation_images = 200
    t = c.finetune.train
    t.steps, t.batch_size = 1500, 16
    t.eval_every, t.log_every, t.checkpoint_every = 300, 50, 500
    o = t.optimizer
    o.name, o.learning_rate, o.rest_learning_rate = "muon", 1e-2, 4e-3
    o.weight_decay, o.warmup_steps, o.clip_norm = 0.01, 30, 1.0
    c.finetune.patience = 0
    c.finetune.scratch = False
    return c
