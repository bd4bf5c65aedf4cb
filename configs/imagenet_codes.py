"""ImageNet at 256x256 pixels, class by class, as 256 codes of a learned tokenizer (LlamaGen).

    b, l, xl         111, 338 and 753 million parameters, raster order (LlamaGen: 111, 343, 775)
    b_rar, ...       the same from random orders that become raster (RAR), with target positions

Data: train the tokenizer first (configs/tokenizer_imagenet.py), write the codes down once, and
train on those; the tokenizer comes with the cache. A cache holds one view of each image, its
centre crop, never flipped; LlamaGen's ten crops are ten caches' worth, and training on images
(`--config.data.name=imagenet2012 --config.tokens.tokenizer=...`) draws new ones and pays for the
encoder in every step.

Command:    python -m gptv_jax.prepare --config=configs/imagenet_codes.py --out=caches/codes
                --config.data.dir=... --config.tokens.tokenizer=runs/tokenizer
            python -m gptv_jax.main --config=configs/imagenet_codes.py:l --workdir=...
                --stages=pretrain,sample --config.data.name=tokens --config.data.path=caches/codes
            and then --stages=generate --config.generate.count=50000
                --config.generate.features=inception.safetensors (docs/generation_quality.md)
Hardware:   planned, not run (docs/results.md, Plans of learned tokens): every size fits v5e:4x4 and
            gpu:8xh100 with --config.mesh.data=1 --config.mesh.fsdp=-1; xl takes 7 and 9 GiB a chip.
Expect:     not known of this tokenizer. LlamaGen's at 256 pixels: FID-50k 5.46 (b), 3.80 (l), 2.62
            (xl), losses around 7.3 to 7.9 nats a token of its 16,384. RAR's: 1.95 (b), 1.70 (l),
            1.50 (xl), with another tokenizer (1,024 codes) and networks conditioned otherwise.
Reproduces: LlamaGen's networks and recipe (Sun et al. 2024, arXiv:2406.06525): RMSNorm, SwiGLU, 2D
            rotary positions, a class token, dropout 0.1, no class for a tenth of the images; AdamW
            (0.9, 0.95) at a constant 1e-4, decay 0.05, clipped at 1, batch 256, 300 epochs;
            guidance 2, 2 and 1.75. The rar ones: order random until half of the training, raster
            from three quarters on (Yu et al. 2024, arXiv:2411.00776), cosine guidance.
Changes:    the SwiGLU's width is 2/3 of four widths up to a smaller multiple (l 2,752 in place of
            2,816, xl 3,424 in place of 3,584): 1 to 3% fewer parameters. The class token's place is
            the one before the first code, and it is turned as any other is.
"""

from gptv_jax import config as config_lib

EPOCH = 1_229_920 // 256  # steps, over 96% of the images

# layers, width, heads; scale of constant guidance; scale and power of RAR's
SIZES = {
    "b": (12, 768, 12, 2.0, (16.0, 2.75)),
    "l": (24, 1024, 16, 2.0, (15.5, 2.5)),
    "xl": (36, 1280, 20, 1.75, (6.9, 1.5)),
}
RAR = {f"{size}_rar": shape for size, shape in SIZES.items()}


def get_config(size: str = "b"):
    layers, width, heads, scale, of_rar = config_lib.choose(size, SIZES | RAR)
    c = config_lib.default()
    c.data.name = "imagenet2012"
    c.data.image_size = 256
    c.data.train_split = "train[:96%]"
    c.data.validation_split = "train[96%:]"
    c.data.test_split = "validation"  # the labels of ImageNet's own test split are not published
    crop = ("random_resize_short(256, 320)", "random_crop(256)")
    c.data.train_transforms = ("decode()", *crop, "flip()")
    c.data.eval_transforms = ("decode()", "resize_short(256)", "center_crop(256)")
    c.data.workers = 16

    c.tokens.kind = "learned"  # as configs/tokenizer_imagenet.py has it
    network = c.tokens.autoencoder
    network.downsample = 16
    network.widths = (128, 256, 256, 512)
    network.encoder_blocks = network.decoder_blocks = 2
    network.norm = network.attention = True
    network.dtype = "bfloat16"
    network.levels = (8, 8, 8, 8, 4)

    m = c.model
    m.layers, m.width, m.heads = layers, width, heads
    m.mlp = "swiglu"
    m.rotary, m.learned_positions = True, False
    m.class_tokens = 1000
    m.dropout = 0.1
    m.dtype = "bfloat16"
    m.remat = "dots"
    c.train.batch_size = 256
    c.train.steps = 300 * EPOCH
    c.train.eval_every = c.train.checkpoint_every = EPOCH
    c.train.log_every = 100
    c.train.optimizer.name = "adamw"
    c.train.optimizer.learning_rate = 1e-4
    c.train.optimizer.weight_decay = 0.05
    c.train.optimizer.clip_norm = 1.0
    c.train.optimizer.schedule = "constant"
    c.probe.train_images = 50_000
    c.probe.c = (0.001, 0.01, 0.1)
    c.sample.guidance = scale
    c.generate.batch_size = 256
    c.generate.split = "train"
    if size in RAR:
        m.target_positions = m.learned_positions = True
        m.qk_norm = True
        m.random_order = (0.5, 0.75)
        c.sample.guidance, c.sample.guidance_power = of_rar
        c.sample.guidance_schedule = "cosine"
    return c
