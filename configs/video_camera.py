"""Motion read from frozen features: a camera pans and zooms over a folder of photographs.

A GPT learns to predict clips of 8 frames of 16 x 16 pixels, token by token, and is never told how
the camera moves. A linear probe then reads the motion, one of six, from the frozen features.
"""

from gptv_jax import config as config_lib


def get_config():
    c = config_lib.default()
    c.data.name = "camera_motions"
    c.data.train_split = "train[:80%]"
    c.data.validation_split = "train[80%:85%]"
    c.data.test_split = "train[85%:]"
    c.data.image_size = 16
    c.data.frames = 8
    c.data.train_transforms = c.data.eval_transforms = (
        "decode(channels=1)",
        "normalize(0.02)",
        "quantize(4)",
    )
    c.tokens.kind, c.tokens.levels, c.tokens.patch = "grey", 4, (2, 2)
    m = c.model
    m.layers, m.width, m.heads = 4, 64, 2
    m.learned_positions, m.axial_positions = False, True
    t = c.train
    t.steps, t.batch_size = 600, 16
    t.log_every, t.checkpoint_every, t.eval_every = 50, 1000, 0
    o = t.optimizer
    o.name, o.learning_rate, o.rest_learning_rate = "muon", 1e-2, 4e-3
    o.weight_decay, o.warmup_steps, o.clip_norm = 0.01, 30, 1.0
    p = c.probe
    p.pooling = "frames"
    p.train_images = 2400
    p.refine = 2
    p.c = (0.001, 0.01, 0.1)
    return c
