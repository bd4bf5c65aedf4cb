"""Detection without a download: scenes of scikit-learn's handwritten digits, found as tokens.

A tokenizer learns 240 codes of 4 x 4 pixels, a GPT learns to predict the codes of a scene, and
fine-tuning teaches the GPT to write the boxes and classes of the digits after the scene, which the
GPT reads both as codes and, by a small convolutional stem, as pixels.

Command:    python -m gptv_jax.main --config=configs/detect_digits.py --workdir=runs/detect_digits
            The same network from random weights beside it: --config.finetune.scratch=True
Hardware:   two CPU cores, five and a half minutes.
Expect:     test AP 0.74, 0.91 at an IoU of 0.5 (three seeds); from random weights 0.78, 0.92;
            ceiling 0.98, wrong image 0.00002 (docs/results.md).
Reproduces: nothing published. Pix2seq (Chen et al. 2022) is the recipe: noise objects without loss
            on their coordinates; the most likely real class of every object, with its probability.
Changes:    objects in order of position and Gaussian targets of coordinates, with which a small
            network learns sooner; no corruption of classes; the most likely coordinates.
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
    c.task.name = "detect"
    c.task.image_input = "pixels"
    c.task.stem = (32, 64)
    d = c.task.detect
    d.objects, d.bins = 6, 49
    d.order = "position"
    d.soft = 0.7
    d.class_weight = 1.0
    d.class_corruption = 0.0
    d.top_p = 0.0
    d.validation_images = 200
    _muon(c.tokenizer.train, steps=400, batch_size=32, rate=4e-3, rest=4e-3)
    _muon(c.train, steps=600, batch_size=16, rate=1e-2, rest=4e-3)
    _muon(c.finetune.train, steps=4200, batch_size=16, rate=7e-3, rest=3e-3)
    c.finetune.train.eval_every = 700
    c.finetune.patience = 0
    c.finetune.scratch = False
    c.sample.count = 16
    c.sample.completions = 4
    return c


def _muon(train, steps: int, batch_size: int, rate: float, rest: float):
    train.steps, train.batch_size = steps, batch_size
    train.log_every = 50
    train.checkpoint_every = 500
    train.eval_every = 0
    o = train.optimizer
    o.name, o.learning_rate, o.rest_learning_rate = "muon", rate, rest
    o.weight_decay, o.warmup_steps, o.clip_norm = 0.01, 30, 1.0
