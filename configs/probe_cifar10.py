"""Linear probe on CIFAR-10, L-BFGS without augmentation: what a pretrained network has learned.

    tiny, 10m   the networks of `configs/cifar10.py`
    s, m, l     iGPT-S, -M and -L at 32x32 pixels

The network comes from `--config.init_from`: a run folder of that size, or imported weights
(OpenAI's checkpoints, a folder of safetensors). CIFAR-100 is `--config.data.name=cifar100`; STL-10
is `--config.data.name=stl10` with `resize(32)` after `decode()` in both lists of transforms.
docs/linear_probe.md says what is chosen on what.

Command:    python -m gptv_jax.main --config=configs/probe_cifar10.py:s --workdir=runs/probe-cifar10
                --stages=probe --config.init_from=... --config.data.dir=...
Hardware:   one pass over 60,000 images for the pretrained network and one for random weights, then
            L-BFGS on the CPU. By arithmetic, not run: tiny on two CPU cores most of an hour; s on
            one H100-class GPU a few minutes for the passes, an hour or two for L-BFGS on 25 layers,
            of which `--config.probe.refine=5` leaves the 5 best by ridge.
Expect:     iGPT-L, pretrained on ImageNet: 0.963 (Chen et al. 2020), CIFAR-100 0.828, STL-10 0.955.
            With 4, 25 and 400 labels a class: 0.732, 0.876 and 0.943, means of 5 draws. S and M:
            only a figure is published. A 76-million network pretrained on CIFAR-10 alone: about
            0.67 (one public project). Floors: raw pixels about 0.4.
Reproduces: the paper's protocol: means over positions of the normed inputs n^l, logistic regression
            by L-BFGS, no augmentation, a tenth of the training images held out to choose the layer
            and the strength, then folded back in; low-label subsets drawn 5 times.
Changes:    the strengths tried are not published: 7 of them here. `init_from` and the size must
            agree; `init_from` brings its palette.
"""

from gptv_jax import config as config_lib

# layers, width, heads
SIZES = {
    "tiny": (4, 64, 2),
    "10m": (12, 256, 8),
    "s": (24, 512, 8),
    "m": (36, 1024, 8),
    "l": (48, 1536, 16),
}


def get_config(size: str = "s"):
    layers, width, heads = config_lib.choose(size, SIZES)
    c = config_lib.default()
    c.data.name = "cifar10"
    c.data.image_size = 32
    c.data.train_split = "train[:90%]"
    c.data.validation_split = "train[90%:]"
    c.data.train_transforms = ("decode()",)
    c.data.eval_transforms = ("decode()",)
    c.tokens.kind = "palette"
    c.tokens.colors = 512

    c.model.layers, c.model.width, c.model.heads = layers, width, heads
    c.model.axial_positions = size == "tiny"
    c.model.dtype = "float32" if size == "tiny" else "bfloat16"

    c.probe.method = "lbfgs"
    c.probe.features = "normed"
    c.probe.c = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    c.probe.labels_per_class = (4, 25, 400)
    c.probe.draws = 5
    return c
