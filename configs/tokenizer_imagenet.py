"""A tokenizer for ImageNet at 256x256 pixels: 16x16 codes of 16,384, each for 16x16 pixels.

    fsq       finite scalar quantization, (8, 8, 8, 8, 4) levels: nothing to collapse
    vq        16,384 vectors of 8 dimensions, l2-normalised, as LlamaGen's
    fsq_64k   64,000 codes, (8, 8, 8, 5, 5, 5) levels, as Cosmos' discrete tokenizers

Data: TFDS's `imagenet2012`, as for configs/imagenet.py.

Command:    python -m gptv_jax.main --config=configs/tokenizer_imagenet.py --workdir=...
                --stages=tokenizer --config.data.dir=... --config.mesh.data=-1
                --config.tokenizer.lpips=1.0 --config.tokenizer.lpips_weights=lpips_vgg.safetensors
Hardware:   planned, not run (docs/results.md, Plans of learned tokens): v5e:4x4 or gpu:8xh100 with
            --config.mesh.data=-1; 2 and 5 GiB a chip. No ImageNet and no accelerator were at hand.
Expect:     not known of this network. Of LlamaGen's, of 72 million parameters trained likewise for
            40 epochs: rFID 2.19 at 256 codes of 16,384.
Reproduces: LlamaGen's recipe (Sun et al. 2024, arXiv:2406.06525): AdamW (0.9, 0.95) at 1e-4,
            decay 0.05, clipped at 1, batch 128, 40 epochs; L2 1, LPIPS 1, a patch discriminator of
            weight 0.5 from step 20,000 on; random crops of 256 of a shorter side of 256 or more.
Changes:    residual blocks of one 3x3 and one 1x1 convolution, RMS norm; FSQ by default; a
            constant rate falls to nothing at the end; the discriminator's optimizer is Adam (0.5,
            0.9), whose rate stays. Without LPIPS's weights, which are yours to bring
            (docs/tokenizer.md), differences between neighbours and SSIM stand in for them.
"""

from gptv_jax import config as config_lib

IMAGES = 1_229_920  # 96% of 1,281,167
EPOCHS = 40
SIZE = 256  # pixels

CODES = {
    "fsq": {"levels": (8, 8, 8, 8, 4)},
    "fsq_64k": {"levels": (8, 8, 8, 5, 5, 5)},
    "vq": {"quantizer": "vq", "codes": 16_384, "code_size": 8},
}


def get_config(codes: str = "fsq"):
    c = config_lib.default()
    c.data.name = "imagenet2012"
    c.data.image_size = SIZE
    c.data.train_split = "train[:96%]"
    c.data.validation_split = "train[96%:]"
    c.data.test_split = "validation"  # the labels of ImageNet's own test split are not published
    crop = (f"random_resize_short({SIZE}, {SIZE * 5 // 4})", f"random_crop({SIZE})")
    c.data.train_transforms = ("decode()", *crop, "flip()")
    c.data.eval_transforms = ("decode()", f"resize_short({SIZE})", f"center_crop({SIZE})")
    c.data.workers = 16

    c.tokens.kind = "learned"
    network = c.tokens.autoencoder
    network.downsample = 16
    network.widths = (128, 256, 256, 512)  # at 128, 64, 32 and 16 positions a side
    network.encoder_blocks = network.decoder_blocks = 2
    network.norm = network.attention = True
    network.dtype = "bfloat16"
    network.update(config_lib.choose(codes, CODES))

    t = c.tokenizer
    t.train.batch_size = 128
    t.train.steps = EPOCHS * IMAGES // t.train.batch_size
    t.train.eval_every = t.train.checkpoint_every = IMAGES // t.train.batch_size
    t.train.log_every = 100
    t.train.ema = 0.9999
    t.train.optimizer.name = "adamw"
    t.train.optimizer.learning_rate = 1e-4
    t.train.optimizer.weight_decay = 0.05
    t.train.optimizer.clip_norm = 1.0
    t.train.optimizer.warmup_steps = 1000
    t.train.optimizer.schedule = "wsd"
    t.gradient, t.ssim = 0.5, 0.1
    t.adversarial = 0.5
    t.adversarial_from = 20_000 / t.train.steps
    return c
