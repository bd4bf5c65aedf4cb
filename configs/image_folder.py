"""Your own images: a folder of JPEGs, PNGs or whatever Pillow reads.

    python -m gptv_jax.main --config=configs/image_folder.py --workdir=runs/mine
        --config.data.path=FOLDER

FOLDER holds a sub-folder for each class, or images alone (then it is pretrained and sampled from,
and there is no probe and no fine-tuning). With sub-folders train, validation and test those are the
splits; then set `--config.data.train_split=train` and so on. docs/data.md goes through it.

Hardware:   as it stands a CPU will do for a try: 32x32 pixels, as much work
            as `configs/cifar10.py:tiny`. Give a GPU or TPU more:
            `--config=configs/cifar10.py:10m` shows what.
Expect:     a loss that falls from ln 64 = 4.16 nats per token; how far depends on the images.
Reproduces: nothing published.
Changes:    64 colours of its own, which a small network learns sooner than 512. Images that cannot
            be read are left out and named, up to 5% of them.
"""

from gptv_jax import config as config_lib


def get_config():
    c = config_lib.default()
    c.data.name = "folder"
    c.data.image_size = 32
    c.data.train_split = "train[:90%]"
    c.data.validation_split = "train[90%:95%]"
    c.data.test_split = "train[95%:]"
    c.data.train_transforms = (
        "decode()",
        "resize_short(40)",
        "random_crop(32)",
        "flip()",
    )
    c.data.eval_transforms = ("decode()", "resize_short(32)", "center_crop(32)")
    c.tokens.kind = "palette"
    c.tokens.colors = 64

    c.model.layers, c.model.width, c.model.heads = 4, 64, 2
    c.model.axial_positions = True
    for train in (c.train, c.finetune.train):
        train.batch_size = 16
        train.log_every = 20
        train.optimizer.name = "muon"
        train.optimizer.learning_rate = 1e-2
        train.optimizer.weight_decay = 0.01
        train.optimizer.clip_norm = 1.0
        train.optimizer.warmup_steps = 30
    c.train.steps = 800
    c.train.eval_every = 200
    c.train.checkpoint_every = 100
    c.probe.train_images = 5000
    c.finetune.train.steps = 150
    c.finetune.train.eval_every = 50
    c.finetune.train.checkpoint_every = 50
    c.finetune.train.optimizer.learning_rate = 3e-3
    c.finetune.standardize = True
    c.sample.count = 36
    return c
