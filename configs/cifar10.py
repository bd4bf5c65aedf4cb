"""CIFAR-10 as 1,024 tokens of 512 colours: what Image GPT does, from a smoke test to its own sizes.

    tiny  330 thousand parameters, for a CPU: everything works, in minutes.
    10m   12 layers, width 256: minGPT's published CIFAR-10 run (Karpathy 2020, play_image.ipynb).
    tiny_modern, 10m_modern
          the same with a better recipe: as large a network, and 10m_modern as many epochs.
    s     iGPT-S, 24 layers, width 512; m and l are iGPT-M and -L, to fine-tune imported weights
          (`--stages=finetune --config.init_from=...`, docs/weights.md).

Data: `--config.data.dir` names the folder of prepared TFDS sets; without one, the error says how to
prepare it. `python -m gptv_jax.prepare` writes it once as tokens (49 MB), for training with
`--config.data.name=tokens --config.data.path=...`. The colours are k-means over training pixels;
with the published ones, `--config.tokens.palette=kmeans_centers.npy`, losses compare with iGPT's.

Command:    python -m gptv_jax.main --config=configs/cifar10.py:tiny --workdir=runs/cifar10-tiny
                --config.data.dir=...
Hardware:   tiny: two CPU cores, ten minutes of pretraining; the other stages have taken thirteen.
            tiny_modern: the same pretraining. 10m: one H100-class GPU, or a TPU slice; at half of
            an H200's peak three minutes, s forty (`gptv_jax.plan`): neither has been run.
Expect:     tiny: 2.35 nats per token on all test images after ten minutes, tiny_modern 2.18
            (docs/results.md).
            10m: about 2.04 (minGPT: 2.0378 after 16 of 20 epochs, with a palette of its own, so
            +-0.02 says nothing); not run yet. s: no published number; not run. l, pretrained on
            ImageNet and fine-tuned here: 0.990 (Chen et al. 2020); not run, for want of weights.
Reproduces: 10m: minGPT's run, which has LayerNorm, biases, no token at the start, no flips and all
            50,000 images for training, where an epoch here is 45,000: batch 128, Adam (0.9, 0.95)
            at 3e-3, one epoch of warm-up, cosine to a tenth, 20 epochs.
            s: the recipe of Chen et al. 2020 on this set. Fine-tuning is the paper's: joint loss,
            reflect-pad-4 crop and flip, constant rate of a tenth, early stop on validation.
Changes:    tiny: row and column tables, and Muon, which learn several times faster in ten minutes
            than Adam does. The modern ones: 2D rotary positions, QK norm, SwiGLU, Muon, and a rate
            that stays at its peak and falls in a line at the end: what won in the ablations
            (docs/results.md). The peak of 10m_modern is 10m's, and not tuned. It has 10,018,048
            parameters (10m: 9,968,128); tiny_modern 329,600 (tiny: 332,416).
"""

from gptv_jax import config as config_lib

EPOCH = 45_000 // 128  # steps


def get_config(size: str = "10m"):
    c = config_lib.default()
    c.data.name = "cifar10"
    c.data.image_size = 32
    # As in the paper, a tenth of the training images is held out; 1,000 of them do here.
    c.data.train_split = "train[:90%]"
    c.data.validation_split = "train[90%:92%]"
    c.data.test_split = "test"
    c.data.train_transforms = ("decode()", "flip()")
    c.data.eval_transforms = ("decode()",)
    c.finetune.train_transforms = ("decode()", "random_crop(32, padding=4)", "flip()")
    c.tokens.kind = "palette"
    c.tokens.colors = 512
    c.probe.c = (0.001, 0.01, 0.1, 1.0)
    config_lib.choose(size, SIZES)(c)
    return c


def _tiny(c):
    c.model.layers, c.model.width, c.model.heads = 4, 64, 2
    c.model.axial_positions = True
    c.data.train_transforms = ("decode()",)  # a quarter of an epoch needs no augmentation
    c.train.steps = 1400
    for train in (c.train, c.finetune.train):
        train.batch_size = 8
        train.log_every = 20
        train.optimizer.name = "muon"
        train.optimizer.learning_rate = 1e-2
        train.optimizer.weight_decay = 0.01
        train.optimizer.clip_norm = 1.0
        train.optimizer.warmup_steps = 30
    c.train.optimizer.schedule = "wsd"
    c.train.optimizer.decay_share = 0.35
    c.train.eval_every = 0
    c.train.checkpoint_every = 350
    # Less to measure on, so that measuring does not take longer than training.
    c.data.validation_split = "train[90%:91%]"
    c.data.test_split = "test[:20%]"
    c.probe.train_images = 3000
    c.probe.c = (0.001, 0.01, 0.1)
    c.probe.batch_size = 64
    c.finetune.train.steps = 200
    c.finetune.train.eval_every = 100
    c.finetune.train.checkpoint_every = 100
    c.finetune.train.optimizer.learning_rate = 3e-3
    c.finetune.standardize = True
    c.finetune.patience = 0
    c.sample.count = 36


def _10m(c):
    c.model.layers, c.model.width, c.model.heads = 12, 256, 8
    _paper(c, epochs=20, rate=3e-3)
    c.train.optimizer.final_fraction = 0.1


def _modern(of, steps: int | None = None):
    def change(c):
        of(c)
        c.train.steps = steps or c.train.steps
        c.model.rotary, c.model.axial_positions = True, False
        c.model.qk_norm = True
        c.model.mlp = "swiglu"
        c.train.optimizer.name = "muon"
        c.train.optimizer.weight_decay = 0.01
        c.train.optimizer.clip_norm = 1.0
        c.train.optimizer.schedule = "wsd"
        c.train.optimizer.decay_share = 0.35
        c.train.optimizer.final_fraction = 0.0

    return change


def _igpt(layers: int, width: int, heads: int, rate: float):
    def change(c):
        c.model.layers, c.model.width, c.model.heads = layers, width, heads
        c.model.remat = "dots"
        _paper(c, epochs=40, rate=rate)

    return change


def _paper(c, epochs: int, rate: float):
    """Adam, a warm-up of an epoch, then cosine; fine-tuning at a tenth, constant, early stop."""
    c.model.dtype = "bfloat16"
    for train in (c.train, c.finetune.train):
        train.batch_size = 128
        train.eval_every = train.checkpoint_every = EPOCH
    c.train.steps = epochs * EPOCH
    c.train.optimizer.learning_rate = rate
    c.train.optimizer.warmup_steps = EPOCH
    c.finetune.train.steps = 20 * EPOCH
    c.finetune.train.optimizer.learning_rate = rate / 10
    c.finetune.train.optimizer.schedule = "constant"
    c.finetune.patience = 5


SIZES = {
    "tiny": _tiny,
    "tiny_modern": _modern(_tiny, steps=1180),  # which take it as long as tiny's 1,400
    "10m": _10m,
    "10m_modern": _modern(_10m),
    "s": _igpt(24, 512, 8, rate=1e-3),
    "m": _igpt(36, 1024, 8, rate=1e-3),
    "l": _igpt(48, 1536, 16, rate=1e-3),
}
