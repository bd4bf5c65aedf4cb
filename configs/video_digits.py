"""Video without a download: scikit-learn's digits move over a canvas and bounce.

A GPT learns to predict clips of 8 frames of 16 x 16 pixels, token by token. From the third frame on
the motion is known, so that a network which understands motion predicts frames nearly for free.

Command:    python -m gptv_jax.main --config=configs/video_digits.py --workdir=runs/video_digits
Hardware:   two CPU cores, six minutes.
Expect:     nats per token 0.65, 0.35, 0.006 and 0.005 in frames 1 to 4; the direction read by the
            probe from frozen features 0.98 (raw pixels 0.83); frames continued without a wrong
            pixel 0.90 (the third) to 0.75 (the eighth); three seeds (docs/results.md).
Reproduces: nothing published. The clips are after Moving MNIST (Srivastava et al. 2015).
Changes:    tokens are 256 lossless patches of 2 x 2 pixels of 4 grey levels; the probe and the
            class head read the means of every frame side by side, which keep the direction.
"""

from gptv_jax import config as config_lib


def get_config():
    c = config_lib.default()
    c.data.name = "moving_digits"
    c.data.label = "direction"
    c.data.image_size = 16
    c.data.frames = 8
    c.data.train_transforms = c.data.eval_transforms = ("quantize(4)",)
    c.tokens.kind, c.tokens.levels, c.tokens.patch = "grey", 4, (2, 2)
    m = c.model
    m.layers, m.width, m.heads = 4, 64, 2
    m.learned_positions, m.axial_positions, m.rotary = False, True, True
    _muon(c.train, steps=1000, batch_size=16)
    _muon(c.finetune.train, steps=100, batch_size=16)
    c.probe.pooling = c.finetune.pooling = "frames"
    c.probe.train_images = 2000
    c.finetune.scratch = False
    c.sample.count = 16
    c.sample.completions = 8
    c.sample.keep = 0.25
    c.sample.continuations = 200
    return c


def _muon(train, steps: int, batch_size: int):
    train.steps, train.batch_size = steps, batch_size
    train.log_every = 50
    train.checkpoint_every = 500
    train.eval_every = 500
    o = train.optimizer
    o.name, o.learning_rate, o.rest_learning_rate = "muon", 1e-2, 4e-3
    o.weight_decay, o.warmup_steps, o.clip_norm = 0.01, 30, 1.0
