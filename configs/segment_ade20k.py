"""ADE20K (SceneParse150): 150 classes of every pixel, read and written after the codes of an image.

Data: `--config.data.path` names the folder ADEChallengeData2016 of MIT's scene parsing benchmark
(20,210 training and 2,000 validation images; validation during training is the last 5% of the
training images). TFDS's scene_parse150 will not do: its maps are those of 100 kinds of objects.

Command:    python -m gptv_jax.main --config=configs/segment_ade20k.py --workdir=runs/ade20k
                --stages=finetune,sample --config.data.path=...
                --config.tokens.tokenizer=runs/tokenizer --config.init_from=runs/imagenet
            runs/tokenizer is of configs/tokenizer_imagenet.py; runs/imagenet of
            configs/imagenet_codes.py:b, whose layers have the same shapes.
Hardware:   planned, not run, with --config.mesh.data=1 --config.mesh.fsdp=-1 and
                python -m gptv_jax.plan --config=configs/segment_ade20k.py --stage=finetune
                    --classes=150 --topology=v5e:4x4
            114M parameters; compiled for 16 chips: 7.9 GiB each, which fits; a step takes 69 ms at
            least.
Expect:     not known. Painter (ViT-L) has a mean IoU of 0.50; BEiT and other networks of the size
            used here 0.45 to 0.53, after pretraining on ImageNet-1k.
Reproduces: the usual fine-tuning on ADE20K: 512 x 512 pixels, scales of .5 to 2, flips, 80,000
            steps of 16 images (here 9,834 of 128).
Changes:    one decoder reads the image's codes and pixels as a prefix, in place of an encoder and a
            pyramid of features. The head reads four layers. Images are squeezed to squares. 1,024
            label tokens of 16 x 16 pixels: the sequence of 2,048 is a multiple of 128, as a TPU's
            attention wants.
"""

from gptv_jax import config as config_lib

IMAGES = 19_199  # 95% of the training images
SIZE = (512, 512)
# The classes of the values 1 to 150; 0 is no class.
NAMES = """
wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,earth,door,
table,mountain,plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,field,
armchair,seat,fence,desk,rock,wardrobe,lamp,bathtub,railing,cushion,base,box,column,signboard,
chest of drawers,counter,sand,sink,skyscraper,fireplace,refrigerator,grandstand,path,stairs,runway,
case,pool table,pillow,screen door,stairway,river,bridge,bookcase,blind,coffee table,toilet,flower,
book,hill,bench,countertop,stove,palm,kitchen island,computer,swivel chair,boat,bar,arcade machine,
hovel,bus,towel,light,truck,tower,chandelier,awning,streetlight,booth,television receiver,airplane,
dirt track,apparel,pole,land,bannister,escalator,ottoman,bottle,buffet,poster,stage,van,ship,
fountain,conveyer belt,canopy,washer,plaything,swimming pool,stool,barrel,basket,waterfall,tent,bag,
minibike,cradle,oven,ball,food,step,tank,trade name,microwave,pot,animal,bicycle,lake,dishwasher,
screen,blanket,sculpture,hood,sconce,vase,traffic light,tray,ashcan,fan,pier,crt screen,plate,
monitor,bulletin board,shower,radiator,glass,clock,flag
"""


def get_config():
    c = config_lib.default()
    c.data.name = "folder"
    c.data.images, c.data.maps = "images/{split}", "annotations/{split}"
    names = NAMES.replace("\n", "").split(",")
    c.data.map_names = ",".join(f"{value} {name}" for value, name in enumerate(names, start=1))
    c.data.image_size = SIZE
    c.data.train_split, c.data.validation_split = "train[:95%]", "train[95%:]"
    c.data.test_split = "validation"
    c.data.train_transforms = ("decode()", f"resize({SIZE})", "flip()")  # of pretraining
    c.data.eval_transforms = ("decode()", f"resize({SIZE})")
    c.finetune.train_transforms = (
        "decode()",
        f"random_scale((0.5, 2.0), {SIZE})",
        "flip()",
        "brightness(0.3)",
        "contrast(0.3)",
        "color_balance(0.3)",
    )
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
    m.layers, m.width, m.heads = 12, 768, 12
    m.mlp = "swiglu"
    m.rotary, m.learned_positions = True, False
    m.dropout = 0.1
    m.dtype = "bfloat16"
    m.remat = "dots"

    c.task.name = "segment"
    c.task.image_input = "pixels"
    c.task.stem = (64, 128, 256, 512)
    s = c.task.segment
    s.layers = (3, 6, 9, 12)
    s.read_cell = 4
    s.cell, s.codes = 16, 4096
    s.validation_images = 200
    for train, batch_size, epochs in ((c.train, 256, 100), (c.finetune.train, 128, 66)):
        epoch = IMAGES // batch_size
        train.batch_size, train.steps = batch_size, epochs * epoch
        train.eval_every = train.checkpoint_every = 4 * epoch
        train.log_every = 100
        o = train.optimizer
        o.name, o.learning_rate, o.weight_decay = "adamw", 1e-4, 0.05
        o.warmup_steps, o.clip_norm, o.final_fraction = 4 * epoch, 1.0, 0.01
    c.finetune.patience = 0
    c.finetune.scratch = False
    return c
