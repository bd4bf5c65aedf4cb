"""Blood cells (BCCD): red cells, white cells and platelets in 364 photographs, found as tokens.

Data: `--config.data.path` names a folder with images/ and instances_train.json, instances_val.json
and instances_test.json in COCO's format (github.com/Shenggan/BCCD_Dataset, 205, 87 and 72 images).

Command:    JAX_NUM_CPU_DEVICES=2 python -m gptv_jax.main --config=configs/detect_bccd.py
                --workdir=runs/bccd --config.data.path=...
Hardware:   two CPU cores, 11 minutes of training (by the speed of 300 steps); the whole command
            took 21 minutes of one core that other programs shared.
Expect:     test AP 0.38 (0.65 at an IoU of 0.5) by the vote of eight sequences that are drawn of
            each image, 0.33 (0.57) by one sequence, and 0.46 by the vote of four views; ceiling
            0.89 (docs/results.md).
Reproduces: nothing published.
Changes:    trained from scratch on pixels alone, without image tokens and without pretraining. Each
            of the 192 positions of the image stands for 8 x 8 pixels of 96 x 128. Half of the
            images have their noise objects among the real ones, and most noise objects are real
            boxes elsewhere, so that the network looks at a box to tell whether it holds a cell.
"""

from gptv_jax import config as config_lib

SIZE = (96, 128)


def get_config():
    c = config_lib.default()
    c.data.name = "coco"
    c.data.image_size = SIZE
    c.data.train_transforms = (
        "decode()",
        f"random_scale((0.8, 1.25), {SIZE})",
        "flip()",
        "flip_vertical()",
        "brightness(0.2)",
        "color_balance(0.2)",
    )
    c.data.eval_transforms = ("decode()", f"resize({SIZE})")
    c.tokens.kind = "none"
    c.task.name = "detect"
    c.task.image_input = "pixels"
    c.task.stem = (32, 64, 64)
    d = c.task.detect
    d.objects = 24
    d.bins = 97
    d.order = "position"
    d.noise_among = 0.5
    d.noise_kinds = (0.0, 0.7, 0.3)
    d.soft = 1.0
    d.class_weight = 1.0
    d.class_corruption = 0.0
    d.top_p = 0.5
    d.samples = 8
    d.votes = ("flip(1.0)", "flip_vertical(1.0)", "flip(1.0)|flip_vertical(1.0)")
    m = c.model
    m.layers, m.width, m.heads = 3, 96, 3
    m.learned_positions = True
    t = c.finetune.train
    t.steps = 3400
    t.batch_size = 12
    t.eval_every = 1700
    t.checkpoint_every = 500
    t.log_every = 50
    t.optimizer.name = "muon"
    t.optimizer.learning_rate = 7e-3
    t.optimizer.rest_learning_rate = 3e-3
    t.optimizer.weight_decay = 0.01
    t.optimizer.clip_norm = 1.0
    t.optimizer.warmup_steps = 50
    c.finetune.patience = 0
    return c
