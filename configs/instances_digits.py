"""Instances without a download: boxes, classes and masks of handwritten digits, as tokens.

The network of configs/detect_digits.py writes 16 more tokens after the class of an object: codes
of the object's mask in its box. An autoencoder of masks of 64 x 64 pixels, which training begins
with, has 128 codes.

Command:    python -m gptv_jax.main --config=configs/instances_digits.py --workdir=runs/instances
Hardware:   one CPU core, 35 minutes beside other programs.
Expect:     test AP 0.73 of boxes; of masks 0.52 in detected boxes, 0.61 in true boxes, 0.99 as
            tokens and back; panoptic quality 0.75; masks of wrong images 0.000003
            (docs/results.md).
Reproduces: nothing published. The mask tokens are after PaliGemma (Beyer et al. 2024).
Changes:    a mask token weighs a quarter of a coordinate, as there are about four times as many.
"""

import pathlib
import runpy

DETECT = pathlib.Path(__file__).with_name("detect_digits.py")


def get_config():
    c = runpy.run_path(str(DETECT))["get_config"]()
    d = c.task.detect
    d.masks, d.mask_weight = 16, 0.25
    d.mask_steps, d.masks_measured = 500, 1000
    return c
