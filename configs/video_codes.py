"""Clips as learned codes: two digits that move and bounce, and a GPT that continues them.

    steps       one frame alone, then 16 codes for each four frames: 48 codes a clip of 9 frames
    frames      16 codes a frame, each encoded as an image: 144 codes
    frames_8    4 codes a frame, of 8 x 8 pixels in place of 4 x 4: 36 codes

Command:    python -m gptv_jax.main --config=configs/video_codes.py:steps --workdir=runs/codes
            The stage `tokenizer` alone: --stages=tokenizer.
Hardware:   one CPU core: the tokenizer in about five minutes of processor time.
Expect:     PSNR of test clips 17.40 dB (steps), 22.71 (frames), 16.64 (frames_8); the GPT was not
            trained to the end (docs/results.md).
Reproduces: nothing published. Steps that are causal in time are those of MAGVIT-v2 (Yu et al. 2023,
            arXiv:2310.05737).
Changes:    512 codes; the mean squared error alone, and Muon.
"""

from gptv_jax import config as config_lib

CODES = {
    "steps": {"frames": 4, "downsample": 4},
    "frames": {"frames": 1, "downsample": 4},
    "frames_8": {"frames": 1, "downsample": 8},
}


def get_config(codes: str = "steps"):
    c = config_lib.default()
    c.data.name = "two_moving_digits"
    c.data.image_size = 16
    c.data.frames = 9
    c.tokens.kind = "learned"
    c.tokens.autoencoder.channels = 1
    c.tokens.autoencoder.widths = (64,)
    c.tokens.autoencoder.levels = (8, 8, 8)
    c.tokens.autoencoder.update(config_lib.choose(codes, CODES))
    _muon(c.tokenizer.train, steps=1500, rate=4e-3)
    c.tokenizer.train.optimizer.final_fraction = 0.01

    m = c.model
    m.layers, m.width, m.heads = 4, 64, 2
    m.learned_positions, m.axial_positions = False, True
    _muon(c.train, steps=1400, rate=1e-2)
    c.train.optimizer.rest_learning_rate = 4e-3
    c.train.optimizer.clip_norm = 1.0
    c.sample.count = 16
    c.sample.completions = 8
    c.sample.keep = 0.6
    return c


def _muon(train, steps: int, rate: float):
    train.steps, train.batch_size = steps, 16
    train.eval_every = 500
    train.checkpoint_every = 500
    train.log_every = 50
    train.optimizer.name = "muon"
    train.optimizer.learning_rate = rate
    train.optimizer.weight_decay = 0.01
    train.optimizer.warmup_steps = 30
