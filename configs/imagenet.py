"""ImageNet at 32x32 or 48x48 pixels: iGPT-S, -M and -L (Chen et al. 2020).

    s, m, l   76, 455 and 1,362 million parameters, 1,024 tokens of 512 colours
    l48       iGPT-L at 48x48 pixels, 2,304 tokens
    s_bert .. the same with the BERT objective: 15% of the pixels are hidden and told from the rest

Data: TFDS's `imagenet2012`, whose tar files you get from image-net.org yourself; docs/data.md has
the steps. Training needs the images, as the paper's random resizes and crops act on pixels; a token
cache (`python -m gptv_jax.prepare`) holds their centre crops, as OpenAI's files do. Take the
published colours, `--config.tokens.palette=kmeans_centers.npy`, for losses that compare.

Command:    python -m gptv_jax.main --config=configs/imagenet.py:s --workdir=...
                --config.data.dir=... --config.mesh.data=1 --config.mesh.fsdp=-1
Hardware:   a TPU slice or GPU nodes. By arithmetic, at 40% of peak, a million steps of 128 images
            take s 55, m 290 and l 830 hours of one device of 989 TFLOP/s; not run.
Expect:     test loss 2.0895 (s), 2.0614 (m), 2.0466 (l) nats per token (openai/image-gpt's README,
            at a million steps, its palette); ImageNet linear probe 41.9, 54.5, 60.3 and 65.2 (l48),
            6 points less for l_bert; fine-tuned l 66.3, l48 72.6, l_bert 66.5.
Reproduces: the paper's recipe: Adam (0.9, 0.95), no decay, no dropout, batch 128, a million steps,
            one epoch of warm-up, cosine to 0; peak rates from its table 5. Shorter side random in
            256..384, random crop of 224, resized to the network's pixels; no flip.
Changes:    bfloat16 compute with float32 weights, where the paper found float32 slightly better.
"""

from gptv_jax import config as config_lib

EPOCH = 1_229_920 // 128  # steps; 96% of 1,281,167 images

# layers, width, heads, pixels, peak learning rate
SIZES = {
    "s": (24, 512, 8, 32, 3e-3),
    "m": (36, 1024, 8, 32, 3e-3),
    "l": (48, 1536, 16, 32, 1e-3),
    "l48": (48, 1536, 16, 48, 1e-2),
}
BERT = {f"{size}_bert": shape for size, shape in SIZES.items()}


def get_config(size: str = "s"):
    layers, width, heads, pixels, rate = config_lib.choose(size, SIZES | BERT)
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
    c.tokens.name = "palette"
    c.tokens.colors = 512

    c.model.layers, c.model.width, c.model.heads = layers, width, heads
    c.model.dtype = "bfloat16"
    c.model.remat = "dots"

    c.train.steps = 1_000_000
    c.train.batch_size = 128
    c.train.eval_every = c.train.checkpoint_every = EPOCH
    c.train.log_every = 100
    c.train.optimizer.learning_rate = rate
    c.train.optimizer.warmup_steps = EPOCH

    # A quick look: L-BFGS holds all features in memory. The paper's is configs/probe_imagenet.py.
    c.probe.train_images = 50_000
    c.probe.c = (0.001, 0.01, 0.1)

    train = c.finetune.train
    train.batch_size = 128
    train.steps = 18 * EPOCH
    train.eval_every = train.checkpoint_every = EPOCH
    train.optimizer.learning_rate = rate / 10
    train.optimizer.schedule = "constant"
    c.finetune.patience = 3
    return c
