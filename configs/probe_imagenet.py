"""Linear probe on ImageNet, SGD with augmentation: what a pretrained network has learned.

    s, m, l   iGPT-S, -M and -L at 32x32 pixels
    l48       iGPT-L at 48x48 pixels

The network comes from `--config.init_from`: a run folder of `configs/imagenet.py` of that size, or
imported weights (OpenAI's checkpoints, a folder of safetensors). A ridge table of all layers, from
one pass over the images, says which layers get heads of their own. docs/linear_probe.md says what
is chosen on what; docs/data.md how to get ImageNet.

Command:    python -m gptv_jax.main --config=configs/probe_imagenet.py:s --workdir=...
                --stages=probe --config.init_from=... --config.data.dir=...
Hardware:   a TPU slice or GPU nodes. By arithmetic, at 40% of peak, a million steps of 128 images
            take s 18, m 97 and l 280 hours of one device of 989 TFLOP/s, a third of pretraining,
            as nothing goes backward through the network; the two ridge tables 2% more. Not run.
Expect:     0.419 (s), 0.545 (m), 0.603 (l) and 0.652 (l48) from one layer (Chen et al. 2020). Five
            layers together: published for iGPT-XL alone, 0.720 where one layer has 0.687.
Reproduces: the paper's protocol: SGD, momentum 0.9, a million steps, a cosine to 0, peaks of 30,
            10, 3 and so on, augmentation as in pretraining, 5 layers centred on the best one.
Changes:    the batch size is not published: 128, as in pretraining. 4% of the training images
            choose the layer and the rate, and are not folded back in, which would take a second
            training. Heads for 3 layers, for 5 together and for 5 rates learn in one pass.
            `--config.probe.sgd.standardize=True`, with rates of 1 and less, needs fewer steps.
"""

from gptv_jax import config as config_lib

EPOCH = 1_229_920 // 128  # steps; 96% of 1,281,167 images

# layers, width, heads, pixels
SIZES = {
    "s": (24, 512, 8, 32),
    "m": (36, 1024, 8, 32),
    "l": (48, 1536, 16, 32),
    "l48": (48, 1536, 16, 48),
}


def get_config(size: str = "s"):
    layers, width, heads, pixels = config_lib.choose(size, SIZES)
    c = config_lib.default()
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

    c.probe.method = "sgd"
    c.probe.features = "normed"
    c.probe.refine = 3
    c.probe.concatenate = 5
    c.probe.ridge = (1e-4, 1e-3, 1e-2)
    c.probe.sgd.steps = 1_000_000
    c.probe.sgd.batch_size = 128
    c.probe.sgd.learning_rates = (30.0, 10.0, 3.0, 1.0, 0.3)
    c.probe.sgd.eval_every = 5 * EPOCH
    c.probe.sgd.checkpoint_every = EPOCH
    c.probe.sgd.log_every = 100
    return c
