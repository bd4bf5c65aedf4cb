"""Every file of configs/, with each of its arguments."""

import importlib.util
import pathlib

import pytest

from gptv_jax import config as config_lib
from gptv_jax import sharding, tasks
from gptv_jax.data import transforms
from gptv_jax.errors import InputError
from gptv_jax.model import autoencoder
from gptv_jax.model.gpt import parameter_count
from gptv_jax.tasks.network import network_of

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
# Names of what the task tells apart, where it is all that a configuration trains.
ALONE = {
    "detect_bccd": {"object_names": ("platelet", "red cell", "white cell")},
    "segment_camvid": {"map_names": tuple(map(str, range(11)))},
    "video_camvid": {"map_names": tuple(map(str, range(11)))},
}
# File and argument: weights of the pretrained network, without a class head, or of the task's.
WEIGHTS = {
    ("digits", None): 803_328,
    ("digits_distill", "teacher"): 803_328,
    ("digits_distill", None): 61_440,
    ("cifar10_distill", "teacher"): 1_218_304,
    ("cifar10_distill", None): 314_240,
    ("image_folder", None): 275_072,
    ("video_digits", None): 231_040,
    ("video_camera", None): 231_552,
    ("video_codes", "steps"): 263_488,
    ("video_codes", "frames"): 263_872,
    ("video_codes", "frames_8"): 263_616,
    ("video_ucf101", "s"): 92_748_288,
    ("video_ucf101", "m"): 489_086_976,
    ("video_ucf101", "l"): 1_409_601_024,
    ("video_k600", "s"): 92_696_576,
    ("video_k600", "m"): 488_983_552,
    ("video_k600", "l"): 1_409_445_888,
    ("detect_digits", None): 184_832,
    ("detect_bccd", None): 463_168,
    ("detect_coco", "s"): 110_120_448,
    ("detect_coco", "m"): 337_168_384,
    ("detect_coco", "l"): 751_301_120,
    ("detect_coco", "subset"): 129_920,
    ("detect_coco", "subset_masks"): 129_920,
    ("instances_digits", None): 184_832,
    ("segment_digits", None): 184_832,
    ("segment_camvid", None): 810_352,
    ("video_camvid", None): 804_784,
    ("segment_ade20k", None): 110_120_448,
    ("features_cifar10", None): 1_272_960,
    ("cifar10", "tiny"): 332_416,
    ("cifar10", "tiny_modern"): 329_600,
    ("cifar10", "10m"): 9_968_128,
    ("cifar10", "10m_modern"): 10_018_048,
    ("cifar10", "s"): 76_571_648,
    ("cifar10", "m"): 455_157_760,
    ("cifar10", "l"): 1_362_250_752,
    ("imagenet", "s"): 76_571_648,
    ("imagenet", "m"): 455_157_760,
    ("imagenet", "l"): 1_362_250_752,
    ("imagenet", "l48"): 1_364_216_832,
    ("imagenet", "xl"): 6_810_875_904,
    ("imagenet", "l_bert"): 1_362_250_752 - 1536,  # which has no start vector
    ("probe_cifar10", "tiny"): 332_416,
    ("probe_cifar10", "10m"): 9_968_128,
    ("probe_cifar10", "s"): 76_571_648,
    ("probe_cifar10", "m"): 455_157_760,
    ("probe_cifar10", "l"): 1_362_250_752,
    ("probe_imagenet", "s"): 76_571_648,
    ("probe_imagenet", "m"): 455_157_760,
    ("probe_imagenet", "l"): 1_362_250_752,
    ("probe_imagenet", "l48"): 1_364_216_832,
    ("tokenizer_cifar10", "tiny"): 1_841_920,
    ("tokenizer_cifar10", "tiny_16k"): 4_987_648,
    ("tokenizer_cifar10", "tiny_vq"): 1_841_920,
    ("tokenizer_cifar10", "tiny_levels"): 1_396_480,
    ("tokenizer_cifar10", "tiny_16k_levels"): 3_494_144,
    ("tokenizer_imagenet", "fsq"): 92_431_360,
    ("tokenizer_imagenet", "fsq_64k"): 141_190_144,
    ("tokenizer_imagenet", "vq"): 92_431_360,
    ("imagenet_codes", "b"): 110_888_448,
    ("imagenet_codes", "l"): 338_192_384,
    ("imagenet_codes", "xl"): 752_581_120,
    ("imagenet_codes", "b_rar"): 111_283_968,
    ("imagenet_codes", "l_rar"): 338_720_768,
    ("imagenet_codes", "xl_rar"): 753_242_368,
}
# Of the encoder and decoder, and codes.
OF_IMAGENET = (35_072_657, 16_384)
OF_FRAMES = (27_728_273, 16_384)
TOKENIZERS = {
    ("video_codes", "steps"): (1_095_251, 512),
    ("video_codes", "frames"): (225_939, 512),
    ("video_codes", "frames_8"): (281_283, 512),
    ("detect_digits", None): (30_867, 240),
    **{("detect_coco", size): OF_IMAGENET for size in ("s", "m", "l")},
    ("detect_coco", "subset"): (185_423, 240),
    ("detect_coco", "subset_masks"): (185_423, 240),
    ("instances_digits", None): (30_867, 240),
    ("segment_digits", None): (30_867, 240),
    ("segment_ade20k", None): OF_IMAGENET,
    ("tokenizer_cifar10", "tiny"): (263_476, 4_096),
    ("features_cifar10", None): (263_476, 4_096),
    ("tokenizer_cifar10", "tiny_16k"): (264_117, 16_384),
    ("tokenizer_cifar10", "tiny_vq"): (298_808, 4_096),
    ("tokenizer_cifar10", "tiny_levels"): (263_476, 4_096),
    ("tokenizer_cifar10", "tiny_16k_levels"): (264_117, 16_384),
    ("tokenizer_imagenet", "fsq"): OF_IMAGENET,
    ("tokenizer_imagenet", "fsq_64k"): (35_077_778, 64_000),
    ("tokenizer_imagenet", "vq"): (35_219_092, 16_384),
    **{key: OF_IMAGENET for key in WEIGHTS if key[0] == "imagenet_codes"},
    **{key: OF_FRAMES for key in WEIGHTS if key[0] in ("video_ucf101", "video_k600")},
}


def load(name: str, *arguments: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


def test_the_modern_recipe_is_of_the_same_size_and_sees_as_much():
    plain, modern = (config_lib.resolve(load("cifar10", size)) for size in ("10m", "10m_modern"))
    sizes = [WEIGHTS["cifar10", size] for size in ("10m", "10m_modern")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert (modern.data, modern.tokens) == (plain.data, plain.tokens)
    for name in ("steps", "batch_size"):
        assert getattr(modern.train, name) == getattr(plain.train, name)


def test_every_file_is_listed():
    assert {path.stem for path in FOLDER.glob("*.py")} == {name for name, _ in WEIGHTS}


@pytest.mark.parametrize(("name", "argument"), WEIGHTS)
def test_a_configuration_is_accepted_and_has_its_number_of_weights(name, argument, one_device):
    config = config_lib.resolve(load(name, *([argument] if argument else [])))
    task = tasks.make(config, **ALONE.get(name, {}))
    network = task.network() if config.tokens.kind == "none" else network_of(config)
    assert parameter_count(sharding.abstract(network.init)) == WEIGHTS[name, argument]
    own = (config.finetune.train_transforms, config.probe.sgd.train_transforms)
    if config.tokens.kind == "learned":
        own = (*own, config.tokenizer.train_transforms)
        coder = config.tokens.autoencoder
        made = sharding.abstract(lambda key: autoencoder.init(coder, key))
        assert (parameter_count(made), coder.vocabulary) == TOKENIZERS[name, argument]
    for entries in (config.data.train_transforms, *own):
        transforms.check(entries, config.data.eval_transforms)


@pytest.mark.parametrize("name", ["cifar10", "imagenet", "probe_cifar10", "probe_imagenet"])
def test_an_unknown_argument_is_an_error_that_names_the_known_ones(name):
    with pytest.raises(InputError, match=r"argument is 'xxl'; it takes one of .*s"):
        load(name, "xxl")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_header_says_what_where_how_long_and_what_to_expect(path):
    text = path.read_text().split('"""')[1]
    assert all(word in text for word in ("Hardware:", "Expect:", "Reproduces:", "Changes:"))
    assert f"--config=configs/{path.name}" in text
