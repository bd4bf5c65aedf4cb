"""UCF-101 at 128x128 pixels, class by class: clips of 16 frames as codes of a learned tokenizer.

    s, m, l      93, 489 and 1,410 million parameters, of iGPT's shapes; 4,096 tokens a clip

Each frame is 16x16 codes, made by a tokenizer of images. A tokenizer that also takes several frames
together needs one more line after `network.downsample`.

Data: TFDS's `ucf101`, prepared with ffmpeg: 13,320 videos at 25 frames a second, split as UCF-101's
first list has them, 9,537 for training. TFDS's default squeezes frames to 256x256;
`--config.data.dir` may name the folder of `ucf101/ucf101_1`, whose frames are 320x240 and are
cropped. Clips of 16 neighbouring frames begin at random.

Command:    python -m gptv_jax.main --config=configs/tokenizer_imagenet.py --workdir=runs/tokenizer
                --stages=tokenizer --config.data.dir=... --config.tokens.autoencoder.downsample=8
                --config.tokens.autoencoder.widths=128,256,512
            python -m gptv_jax.main --config=configs/video_ucf101.py:l --workdir=runs/ucf101
                --stages=pretrain,sample --config.data.dir=...
                --config.tokens.tokenizer=runs/tokenizer
            and then --stages=generate --config.generate.count=10000
                --config.generate.features=i3d.safetensors (docs/generation_quality.md)
Hardware:   planned, not run (docs/scaling.md, A plan of clips): l on v5e-64, with the flags there.
Expect:     not known of these tokens. FVD of 10,000 clips against the training set: LARP's
            autoregressive network of 632M parameters 57 (its tokenizer alone: 20), MAGVIT-v2 58,
            VideoAR 88.6. FVD depends on frames, stride, resizing and reference; the report says
            which ones are used.
Reproduces: nothing published: the task, the resolution and the clips of those systems, with the
            networks of Image GPT and the optimizer of LlamaGen (Sun et al. 2024, arXiv:2406.06525).
Changes:    tokens are of single frames in raster order, 4,096 a clip in place of LARP's 1,024;
            rotary positions of three axes; guidance 1.25 as LARP's.
"""

from gptv_jax import config as config_lib

# layers, width, heads
SIZES = {"s": (24, 512, 8), "m": (36, 1024, 8), "l": (48, 1536, 16)}
EPOCH = 9155 // 64  # steps, over 96% of 9,537 videos


def get_config(size: str = "s"):
    layers, width, heads = config_lib.choose(size, SIZES)
    c = config_lib.default()
    c.data.name = "ucf101"
    c.data.image_size = 128
    c.data.frames = 16
    c.data.train_split = "train[:96%]"
    c.data.validation_split = "train[96%:]"
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
    m.class_tokens = 101
    m.dropout = 0.1
    m.dtype = "bfloat16"
    m.remat = "dots"
    c.train.batch_size = 64
    c.train.steps = 1000 * EPOCH
    c.train.eval_every = c.train.checkpoint_every = 10 * EPOCH
    c.train.log_every = 50
    c.train.optimizer.name = "adamw"
    c.train.optimizer.learning_rate = 1e-4
    c.train.optimizer.weight_decay = 0.05
    c.train.optimizer.clip_norm = 1.0
    c.train.optimizer.warmup_steps = 1000
    c.probe.batch_size = c.finetune.train.batch_size = 64
    c.probe.pooling = c.finetune.pooling = "frames"
    c.sample.count = 101
    c.sample.guidance = 1.25
    c.sample.keep = 5 / 16
    c.generate.batch_size = 64
    return c
