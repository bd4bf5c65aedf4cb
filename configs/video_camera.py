"""Motion read from frozen features: a camera pans and zooms over a folder of photographs.

A GPT learns to predict clips of 8 frames of 16 x 16 pixels, token by token, and is never told how
the camera moves. A linear probe then reads the motion, one of six, from the frozen features.

Command:    python -m gptv_jax.main --config=configs/video_camera.py --workdir=runs/video_camera
            --config.data.path=FOLDER --stages=pretrain,probe
Hardware:   two CPU cores, 3 min 20 s.
Expect:     with 1,000 photographs of 128 pixels the probe is right in 0.79 of the clips (three
            seeds, 0.76 to 0.82; random weights 0.23, raw pixels 0.25; docs/results.md); with
            --config.train.steps=700 and --config.probe.train_images=2400 in 0.88 (seed 0).
Reproduces: nothing published.
Changes:    photographs are stretched to the whole range of grey before they become 4 levels, as
            windows without contrast show no motion; the probe reads the means of every frame.
"""

from gptv_jax import config as config_lib


def get_config():
    c = config_lib.default()
    c.data.name = "camera_motions"
    c.data.train_split = "train[:80%]"  # no image is in two splits
    c.data.validation_split = "train[80%:85%]"
    c.data.test_split = "train[85%:]"
    c.data.image_size = 16
    c.data.frames = 8
    entries = "decode(channels=1)", "normalize(0.02)", "quantize(4)"
    c.data.train_transforms = c.data.eval_transforms = entries
    c.tokens.kind, c.tokens.levels, c.tokens.patch = "grey", 4, (2, 2)
    m = c.model
    m.layers, m.width, m.heads = 4, 64, 2
    m.learned_positions, m.axial_positions = False, True
    _muon(c.train, steps=520, batch_size=16)
    _muon(c.finetune.train, steps=100, batch_size=16)
    c.probe.pooling = c.finetune.pooling = "frames"
    c.probe.train_images = 2000
    c.probe.refine = 2
    c.probe.c = (0.1, 0.3, 1.0)
    c.finetune.scratch = False
    c.sample.count = 16
    c.sample.completions = 8
    return c


def _muon(train, steps: int, batch_size: int):
    train.steps, train.batch_size = steps, batch_size
    train.log_every, train.checkpoint_every, train.eval_every = 50, 1000, 0
    o = train.optimizer
    o.name, o.learning_rate, o.rest_learning_rate = "muon", 1e-2, 4e-3
    o.weight_decay, o.warmup_steps, o.clip_norm = 0.01, 30, 1.0
