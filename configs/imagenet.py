"""ImageNet at 32x32, 48x48 or 64x64 pixels: iGPT-S, -M, -L and -XL (Chen et al. 2020).

    s, m, l   76, 455 and 1,362 million parameters, 1,024 tokens of 512 colours
    l48       iGPT-L at 48x48 pixels, 2,304 tokens
    xl        6,811 million parameters at 64x64 pixels, 4,096 tokens
    s_bert .. the same with the BERT objective: 15% of the pixels are hidden and told from the rest

Data: TFDS's `imagenet2012`, whose tar files you get from image-net.org yourself; docs/data.md has
the steps. Training needs the images, as the paper's random resizes and crops act on pixels; a token
cache (`python -m gptv_jax.prepare`) holds their centre crops, as OpenAI's files do. Take the
published colours, `--config.tokens.palette=kmeans_centers.npy`, for losses that compare.

Command:    python -m gptv_jax.main --config=configs/imagenet.py:s --workdir=...
                --config.data.dir=... --config.mesh.data=1 --config.mesh.fsdp=-1
Hardware:   a TPU slice or GPU nodes. By arithmetic, at 40% of peak, a million steps of 128 images
            take s 55, m 290 and l 830 hours of one device of 989 TFLOP/s, and xl's two million of
            64 images 18,300; not run. `python -m gptv_jax.plan` says what fits where.
Expect:     test loss 2.0895 (s), 2.0614 (m), 2.0466 (l) nats per token (openai/image-gpt's README,
            at a million steps, its palette); ImageNet linear probe 41.9, 54.5, 60.3, 65.2 (l48) and
            68.7 (xl, which also saw 100 million images from the web); 6 points less for l_bert;
            fine-tuned l 66.3, l48 72.6, l_bert 66.5. Of xl no loss was published.
Reproduces: the paper's recipe: Adam (0.9, 0.95), no decay, no dropout, batch 128, a million steps
            (xl: 64, two million), one epoch of warm-up, cosine to 0; peak rates from its table 5.
            The heads of xl are not published; 16 make a head size of 192. Shorter side random in
            256..384, random crop of 224, resized to the network's pixels; no flip.
Changes:    bfloat16 compute with float32 weights, where the paper found float32 slightly better.
"""

from gptv_jax import config as config_lib

IMAGES = 1_229_920  # 96% of 1,281,167
SEEN = 128_000_000  # images in a training, about 104 epochs

# layers, width, heads, pixels, peak learning rate, batch
SIZES = {
    "s": (24, 512, 8, 32, 3e-3, 128),
    "m": (36, 1024, 8, 32, 3e-3, 128),
    "l": (48, 1536, 16, 32, 1e-3, 128),
    "l48": (48, 1536, 16, 48, 1e-2, 128),
    "xl": (60, 3072, 16, 64, 3e-4, 64),
}
BERT = {f"{size}_bert": shape for size, shape in SIZES.items()}


def get_config(size: str = "s"):
    layers, width, heads, pixels, rate, batch = config_lib.choose(size, SIZES | BERT)
    epoch = IMAGES // batch  # steps
    c = config_lib.default()
    c.model.objective = "bert" if size in BERT else "autoregressive"
    c.data.name = "imagenet2012"
    c.data.image_size = pixels
    c.data.train_split = "train[:96%]"
    c.data.validation_split = "train[96%:]"
    c.data.test_split = "validation"  # the labels of ImageNet's own test split are not published
    c.data.train_transforms = (
        "decode()",
        "random_resize_short(256, 384)",
        "random_crop(224)",
        f"resize({pixels})",
    )
    c.data.eval_transforms = (
        "decode()",
        "resize_short(224)",
        "center_crop(224)",
        f"resize({pixels})",
    )
    c.data.workers = 16
    c.tokens.kind = "palette"
    c.tokens.colors = 512

    c.model.layers, c.model.width, c.model.heads = layers, width, heads
    c.model.dtype = "bfloat16"
    c.model.remat = "full" if size.startswith("xl") else "dots"

    c.train.steps = SEEN // batch
    c.train.batch_size = batch
    c.train.eval_every = c.train.checkpoint_every = epoch
    c.train.log_every = 100
    c.train.optimizer.learning_rate = rate
    c.train.optimizer.warmup_steps = epoch

    # A quick look: L-BFGS holds all features in memory. The paper's is configs/probe_imagenet.py.
    c.probe.train_images = 50_000
    c.probe.c = (0.001, 0.01, 0.1)

    train = c.finetune.train
    train.batch_size = batch
    train.steps = 18 * epoch
    train.eval_every = train.checkpoint_every = epoch
    train.optimizer.learning_rate = rate / 10
    train.optimizer.schedule = "constant"
    c.finetune.patience = 3
    return c
