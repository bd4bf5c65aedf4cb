"""Kinetics-600 at 128x128 pixels: 5 given frames are continued by 11.

    s, m, l      93, 489 and 1,409 million parameters, of iGPT's shapes; 4,096 tokens a clip

The tokens and the networks are those of configs/video_ucf101.py, without classes.

Data: a folder of the videos that you have of Kinetics-600, split into train, validation and test,
becomes a folder of frames once. 392,000 clips of 10 seconds are about 100 million small files, so
take a file system that bears them, or a part of the videos.

Command:    python -m gptv_jax.prepare --videos=kinetics600 --out=frames --short_side=128
            python -m gptv_jax.main --config=configs/video_k600.py:l --workdir=runs/k600
                --stages=pretrain,sample --config.data.path=frames
                --config.tokens.tokenizer=runs/tokenizer (as configs/video_ucf101.py trains it)
            and then --stages=generate --config.generate.count=50000
                --config.generate.features=i3d.safetensors (docs/generation_quality.md)
Hardware:   planned, not run (docs/scaling.md, A plan of clips): l on v5e-64, with the flags there.
Expect:     not known of these tokens. FVD of 50,000 continued clips: LARP 5.1, MAGVIT-v2 4.3.
Reproduces: nothing published: the task of those systems, 5 frames given and 11 drawn.
Changes:    as configs/video_ucf101.py; a share of the earlier frames' tokens is hidden in
            training, which makes better features and leaves every target (NExT-Vid, 2025,
            arXiv:2512.21004).
"""

from gptv_jax import config as config_lib

# layers, width, heads
SIZES = {"s": (24, 512, 8), "m": (36, 1024, 8), "l": (48, 1536, 16)}
EPOCH = 392_000 // 256  # steps


def get_config(size: str = "s"):
    layers, width, heads = config_lib.choose(size, SIZES)
    c = config_lib.default()
    c.data.name = "folder"
    c.data.labels = False
    c.data.image_size = 128
    c.data.frames = 16
    c.data.train_transforms = ("decode()", "resize_short(128)", "random_crop(128)", "flip()")
    c.data.eval_transforms = ("decode()", "resize_short(128)", "center_crop(128)")
    c.data.workers = 8

    c.tokens.kind = "learned"
    network = c.tokens.autoencoder
    network.downsample = 8
    network.widths = (128, 256, 512)
    network.encoder_blocks = network.decoder_blocks = 2
    network.norm = network.attention = True
    network.dtype = "bfloat16"
    network.levels = (8, 8, 8, 8, 4)

    m = c.model
    m.layers, m.width, m.heads = layers, width, heads
    m.mlp = "swiglu"
    m.rotary, m.learned_positions = True, False
    m.qk_norm = True
    m.context_masking = 0.5
    m.dtype = "bfloat16"
    m.remat = "dots"
    c.train.batch_size = 256
    c.train.steps = 75 * EPOCH
    c.train.eval_every = c.train.checkpoint_every = EPOCH
    c.train.log_every = 50
    c.train.optimizer.name = "adamw"
    c.train.optimizer.learning_rate = 1e-4
    c.train.optimizer.weight_decay = 0.05
    c.train.optimizer.clip_norm = 1.0
    c.train.optimizer.warmup_steps = 1000
    c.sample.keep = c.generate.keep = 5 / 16
    c.generate.split = "test"
    c.generate.batch_size = 64
    return c
