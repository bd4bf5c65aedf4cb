"""Segmentation without a download: which digit, if any, each pixel of a scene belongs to.

A tokenizer learns 240 codes of 4 x 4 pixels, a GPT learns to predict the codes of a scene, and
fine-tuning teaches the GPT both ways of segmentation: a head reads the 4 x 4 pixels of every
position of the image, and 96 tokens, each one of 1,024 squares of 4 x 4 pixels, write the label map
after the image. (Ceilings of other label tokens: 512 squares 0.88, 1,024 0.91, 2,048 0.94; 512
squares of 3 x 3 pixels 0.94, with 176 tokens; 160 of 2 x 2 pixels 0.98, with 384 tokens.)

Command:    python -m gptv_jax.main --config=configs/segment_digits.py --workdir=runs/segment_digits
            Reading alone, in half the time: --config.task.segment.write=False
Hardware:   two CPU cores, five minutes.
Expect:     test mean IoU 0.875 read and 0.825 written (three seeds); ceiling of the label tokens
            0.91, class prior of each position and map of another scene 0.08 (docs/results.md).
Reproduces: nothing published.
Changes:    the network reads the scene as codes and, by a small stem, as pixels; the head also
            reads the stem's features (layer 0), which know the borders of a digit to the pixel.
"""

from gptv_jax import config as config_lib


def get_config():
    c = config_lib.default()
    c.data.name = "digit_scenes"
    c.data.image_size = (32, 48)
    c.tokens.kind = "learned"
    a = c.tokens.autoencoder
    a.channels, a.downsample, a.widths = 1, 4, (32,)
    a.encoder_blocks, a.decoder_blocks = 1, 1
    a.levels = (8, 6, 5)
    m = c.model
    m.layers, m.width, m.heads = 3, 64, 4
    m.rotary = True
    c.task.name = "segment"
    c.task.image_input = "pixels"
    c.task.stem = (32, 64)
    s = c.task.segment
    s.layers = (0, m.layers)
    s.cell, s.codes = 4, 1024
    s.measured = 1500
    s.samples = 4
    s.validation_images = 100
    _muon(c.tokenizer.train, steps=300, batch_size=32, rate=4e-3)
    _muon(c.train, steps=400, batch_size=16, rate=1e-2)
    _muon(c.finetune.train, steps=2200, batch_size=16, rate=1e-2)
    c.finetune.train.eval_every = 1100
    c.probe.train_images = 2000
    c.finetune.patience = 0
    c.finetune.scratch = False
    c.sample.count = 16
    c.sample.completions = 4
    return c


def _muon(train, steps: int, batch_size: int, rate: float):
    train.steps, train.batch_size = steps, batch_size
    train.log_every = 50
    train.checkpoint_every = 500
    train.eval_every = 0
    o = train.optimizer
    o.name, o.learning_rate, o.rest_learning_rate = "muon", rate, 4e-3
    o.weight_decay, o.warmup_steps, o.clip_norm = 0.01, 30, 1.0
