"""CIFAR-10 as 64 learned codes, 8x8 for 32x32 pixels, and a GPT that draws images class by class.

    tiny        4,096 codes, (8, 8, 8, 8) levels
    tiny_16k    16,384 codes, (8, 8, 8, 8, 4) levels
    tiny_vq     4,096 vectors of 8 dimensions that follow what they stand for
    tiny_levels, tiny_16k_levels
                the codes of tiny and tiny_16k, whose levels the GPT predicts one after the other

Data: `--config.data.dir` names the folder of prepared TFDS sets; without one, the error says how to
prepare it.

Command:    python -m gptv_jax.main --config=configs/tokenizer_cifar10.py:tiny
                --workdir=runs/tokenizer --config.data.dir=...
            The stage `tokenizer` alone: --stages=tokenizer. Another run takes what it trained by
            --config.tokens.kind=learned --config.tokens.tokenizer=runs/tokenizer and the same
            config.tokens.autoencoder.
Hardware:   two CPU cores: the tokenizer in five and a half minutes, the GPT in ten, the rest in
            ten.
Expect:     tiny, means of three seeds: PSNR 25.87 dB, SSIM 0.8575, 99.8% of the codes in use on the
            test images; 6.09 nats a code, classes told; probe 0.473 (0.460 to 0.481). On one
            tokenizer, seed 0: tiny 6.075 nats a code, tiny_levels 6.034 (docs/results.md).
Reproduces: nothing published. Floors on the same test images: 4,096 patches of 4x4 pixels by
            k-means, 24.3 dB; the 512 colours of iGPT's palette, 35.1 dB at 16 times the tokens.
Changes:    the encoder and decoder work at the resolution of the codes, behind patches of 4x4
            pixels: at the same time convolutions of pixels came out worse. The mean squared error
            alone, and Muon, which is what PSNR asks for; no discriminator.
"""

from gptv_jax import config as config_lib

CODES = {
    "tiny": {"levels": (8, 8, 8, 8)},
    "tiny_16k": {"levels": (8, 8, 8, 8, 4)},
    "tiny_vq": {"quantizer": "vq", "codes": 4096, "code_size": 8},
}
CODES |= {f"{codes}_levels": CODES[codes] for codes in ("tiny", "tiny_16k")}


def get_config(codes: str = "tiny"):
    c = config_lib.default()
    c.data.name = "cifar10"
    c.data.image_size = 32
    c.data.train_split = "train[:98%]"
    c.data.validation_split = "train[98%:]"
    c.data.train_transforms = ("decode()", "flip()")
    c.data.eval_transforms = ("decode()",)
    c.tokens.kind = "learned"
    c.tokens.autoencoder.widths = (64,)
    c.tokens.autoencoder.update(config_lib.choose(codes, CODES))
    _muon(c.tokenizer.train, steps=3500, rate=4e-3, warmup=100)
    c.tokenizer.train.eval_every = 1000  # the codebook's health on the way
    c.tokenizer.train.optimizer.final_fraction = 0.01

    m = c.model
    m.layers, m.width, m.heads = 4, 128, 4
    m.rotary, m.learned_positions = True, False
    m.qk_norm = True
    m.mlp = "swiglu"
    m.class_tokens = 10
    m.code_head = "levels" if codes.endswith("_levels") else "flat"
    _muon(c.train, steps=900, rate=1e-2, warmup=30)
    c.train.batch_size = 64
    c.train.optimizer.clip_norm = 1.0
    c.train.optimizer.schedule = "wsd"
    c.train.optimizer.decay_share = 0.35
    c.probe.train_images = 5000
    c.probe.c = (0.001, 0.01, 0.1)
    c.finetune.train.steps = 200
    c.finetune.train.batch_size = 64
    c.finetune.train.eval_every = 100
    c.finetune.train.optimizer.learning_rate = 1e-3
    c.finetune.standardize = True
    c.sample.count = 80
    c.sample.guidance = 2.0
    return c


def _muon(train, steps: int, rate: float, warmup: int):
    train.steps = steps
    train.batch_size = 32
    train.eval_every = 0
    train.checkpoint_every = 500
    train.log_every = 50
    train.optimizer.name = "muon"
    train.optimizer.learning_rate = rate
    train.optimizer.weight_decay = 0.01
    train.optimizer.warmup_steps = warmup
