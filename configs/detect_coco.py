"""COCO 2017: boxes and classes of 80 kinds of objects as tokens after the codes of an image.

    s       256 pixels, 16x16 codes, 12 layers of width 768
    m       512 pixels, 32x32 codes, 24 layers of width 1,024
    l       640 pixels, 40x40 codes, 36 layers of width 1,280
    subset  every stage on a CPU in minutes; tokenizer and network are too small to detect well
    subset_masks  subset with 16 mask tokens for each object

Data: `--config.data.path` names COCO's folder, with train2017/, val2017/ and
annotations/instances_train2017.json and instances_val2017.json. Validation is the last 2% of the
training images, test is val2017.

Command:    python -m gptv_jax.main --config=configs/detect_coco.py:s --workdir=runs/coco-s
                --stages=finetune,sample --config.data.path=...
                --config.tokens.tokenizer=runs/tokenizer --config.init_from=runs/imagenet
            runs/tokenizer is of configs/tokenizer_imagenet.py; runs/imagenet of
            configs/imagenet_codes.py:b (m: l, l: xl), whose layers have the same shapes: rotary
            positions serve grids of any size. Without init_from, --stages=pretrain,finetune
            pretrains on COCO's own images, which are few.
            subset: --config=configs/detect_coco.py:subset --config.data.path=...
Hardware:   planned, not run, with --config.mesh.data=1 --config.mesh.fsdp=-1 and
                python -m gptv_jax.plan --config=configs/detect_coco.py:s --stage=finetune
                    --config.data.path=... --topology=v5e:4x4
            memory of a device, and the least time of each of the 54,300 steps, on v5e:4x4 and
            gpu:8xh100: s 2.8 GiB, 23 ms and 3.7 GiB, 10 ms; m 12.1 GiB, 162 ms and 15.3 GiB,
            69 ms; l on v5e:8x8 and gpu:8xh100 8.2 GiB, 158 ms and 42 GiB, 266 ms.
            subset: two CPU cores, two minutes (a minute and a half of one core).
Expect:     not known. Pix2seq (ViT-B, 640 pixels, pretrained on Objects365) reaches an AP of about
            44, PaliGemma 2 3B 30 at 224 pixels and 39 at 448: resolution is worth more than width.
            Networks that have seen no boxes before COCO's stay below. subset: an AP of 0.
Reproduces: Pix2seq's fine-tuning (Chen et al. 2022, arXiv:2109.10852): 1,000 bins, noise objects,
            class inputs that are never the true class, scale jitter of .3 to 2 and flips, AdamW
            (0.9, 0.95), decay 0.05, nucleus 0.4, 60 epochs.
Changes:    one decoder reads the image's codes and pixels as a prefix, in place of an encoder on
            patches. Images are squeezed to squares, not padded. 128 or 192 objects in place of 100:
            the sequence is then a multiple of 128, as a TPU's attention wants. The rate is 1e-4,
            as the head and the stem begin anew.
"""

from gptv_jax import config as config_lib

IMAGES = 115_921  # 98% of train2017

# pixels, objects, (layers, width, heads), channels of the stem
SIZES = {
    "s": (256, 128, (12, 768, 12), (64, 128, 256, 512)),
    "m": (512, 128, (24, 1024, 16), (64, 128, 256, 512)),
    "l": (640, 192, (36, 1280, 20), (64, 128, 256, 512)),
    "subset": (64, 16, (2, 64, 2), (16, 32, 32, 64)),
}
SIZES["subset_masks"] = SIZES["subset"]


def get_config(size: str = "s"):
    pixels, objects, shape, stem = config_lib.choose(size, SIZES)
    c = config_lib.default()
    c.data.name = "coco"
    c.data.image_size = pixels
    c.data.train_split, c.data.validation_split = "train[:98%]", "train[98%:]"
    c.data.test_split = (
        "validation"  # val2017; the boxes of COCO's own test split are not published
    )
    resize = f"resize({pixels})"
    c.data.train_transforms = ("decode()", resize, "flip()")  # of pretraining
    c.data.eval_transforms = ("decode()", resize)
    c.finetune.train_transforms = ("decode()", f"random_scale((0.5, 3.3), {pixels})", "flip()")
    c.data.workers = 16

    c.tokens.kind = "learned"  # as configs/tokenizer_imagenet.py has it
    a = c.tokens.autoencoder
    a.downsample = 16
    a.widths = (128, 256, 256, 512)
    a.encoder_blocks = a.decoder_blocks = 2
    a.norm = a.attention = True
    a.dtype = "bfloat16"
    a.levels = (8, 8, 8, 8, 4)

    m = c.model
    m.layers, m.width, m.heads = shape
    m.mlp = "swiglu"
    m.rotary, m.learned_positions = True, False
    m.dropout = 0.1
    m.dtype = "bfloat16"
    m.remat = "dots"

    c.task.name = "detect"
    c.task.image_input = "pixels"
    c.task.stem = stem
    c.task.detect.objects = objects
    c.task.detect.validation_images = 1000

    for train, batch_size, epochs in ((c.train, 256, 100), (c.finetune.train, 128, 60)):
        epoch = IMAGES // batch_size
        train.batch_size, train.steps = batch_size, epochs * epoch
        train.eval_every = train.checkpoint_every = 2 * epoch
        train.log_every = 100
        o = train.optimizer
        o.name, o.learning_rate, o.weight_decay = "adamw", 1e-4, 0.05
        o.warmup_steps, o.clip_norm, o.final_fraction = 2 * epoch, 1.0, 0.01
    c.finetune.patience = 0
    c.finetune.scratch = False
    if size.startswith("subset"):
        _subset(c)
    if size == "subset_masks":
        c.data.maps = "masks"
        c.task.detect.masks, c.task.detect.mask_steps = 16, 300
    return c


def _subset(c):
    """A tokenizer, too, and a few steps of every stage."""
    c.data.train_split, c.data.validation_split = "train[:90%]", "train[90%:]"
    c.data.workers = 0
    a = c.tokens.autoencoder
    a.widths = (16, 16, 32, 32)
    a.encoder_blocks = a.decoder_blocks = 1
    a.levels = (8, 6, 5)
    a.norm = a.attention = False
    a.dtype = c.model.dtype = "float32"
    c.model.remat = "none"
    c.task.detect.bins = 65
    for train in (c.tokenizer.train, c.train, c.finetune.train):
        train.steps, train.batch_size = 100, 8
        train.eval_every, train.checkpoint_every, train.log_every = 0, 100, 20
        train.optimizer.learning_rate, train.optimizer.warmup_steps = 1e-3, 10
    c.sample.count = 16
    c.sample.completions = 4
