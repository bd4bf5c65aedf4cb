import dataclasses
import math
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from gptv_jax import config as config_lib
from gptv_jax.config import fields
from gptv_jax.errors import InputError
from gptv_jax.stages import STAGES

FREE = {
    "wandb",
    "checkpoint_dir", "mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor",
    "data.workers", "data.dir", "data.path", "data.labels_file", "tokens.palette",
    "data.annotations", "data.images", "data.maps",
    "model.scan_layers", "model.remat",
    "train.microbatches", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every",
    "finetune.train.microbatches", "finetune.train.checkpoint_every",
    "finetune.train.keep_checkpoints", "finetune.train.log_every",
    "generate.count", "generate.batch_size", "generate.features", "generate.split",
    "generate.reference", "generate.i3d_resize",
    "robustness.images", "robustness.corruptions", "robustness.compare",
    "robustness.attack_tokens", "robustness.attack_calls", "robustness.attack_images",
    "data.stills", "tokens.tokenizer",
    "tokenizer.train.microbatches", "tokenizer.train.checkpoint_every",
    "tokenizer.train.keep_checkpoints", "tokenizer.train.log_every", "tokenizer.lpips_weights",
    "probe.batch_size", "probe.every",
    "probe.sgd.checkpoint_every", "probe.sgd.log_every",
    "profile.steps",
}  # fmt: skip

TRAINING = {
    "steps": 0,
    "batch_size": 0,
    "microbatches": 0,
    "eval_every": -1,
    "checkpoint_every": 0,
    "keep_checkpoints": 0,
    "log_every": 0,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.0,
    "optimizer.rest_learning_rate": -0.1,
    "optimizer.beta1": 1.0,
    "optimizer.beta2": -0.1,
    "optimizer.weight_decay": -0.1,
    "optimizer.clip_norm": 0.0,
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": -1,
    "optimizer.final_fraction": 1.1,
    "optimizer.decay_share": -0.1,
    "ema": 1.0,
}
DISTILL = {
    "teacher": (" ",),
    "weight": -1.0,
    "data_weight": -1.0,
    "temperature": 0.0,
    "features": -1.0,
    "student_layer": -1,
    "teacher_layer": -1,
}
OUT_OF_RANGE = {
    "seed": -1,
    "checkpoint_dir": "checkpoints",
    "data.image_size": 0,
    "data.frames": -1,
    "data.frame_stride": 0,
    "data.workers": -1,
    "tokens.levels": 257,
    "tokens.patch": (2,),
    "model.context_masking": 1.5,
    "finetune.pooling": "max",
    "finetune.attention": "rows",
    "finetune.clips": 0,
    "model.layers": 0,
    "model.width": -512,
    "model.heads": 0,
    "model.mlp_ratio": 0,
    "model.dropout": 1.0,
    "model.dtype": "float16",
    "model.mlp": "relu",
    "model.base_width": 0,
    "model.remat": "some",
    "model.objective": "gpt",
    "model.code_head": "tree",
    "model.image_input": "codes",
    "model.masked_share": 1.5,
    "model.votes": 0,
    "mesh.data": 0,
    "mesh.fsdp": -2,
    "mesh.sequence": 0,
    "mesh.tensor": 0,
    **{f"tokenizer.train.{name}": value for name, value in TRAINING.items()},
    **{f"train.{name}": value for name, value in TRAINING.items()},
    **{f"finetune.train.{name}": value for name, value in TRAINING.items()},
    "finetune.generative_coefficient": -1.0,
    "finetune.classification_coefficient": -1.0,
    "finetune.patience": -1,
    "finetune.layer_decay": 1.1,
    "task.image_input": "frames",
    "task.stem": (0,),
    "task.detect.objects": 0,
    "task.detect.bins": 1,
    "task.detect.order": "size",
    "task.detect.noise_among": -0.1,
    "task.detect.noise_kinds": (0.5, 0.25, 0.5),
    "task.detect.class_corruption": 1.5,
    "task.detect.soft": -1.0,
    "task.detect.class_weight": -1.0,
    "task.detect.top_p": 1.5,
    "task.detect.samples": 0,
    "task.detect.most": 0,
    "task.detect.validation_images": -1,
    "task.detect.masks": -1,
    "task.detect.mask_size": 0,
    "task.detect.mask_levels": (1,),
    "task.detect.mask_weight": -1.0,
    "task.detect.mask_steps": 0,
    "task.detect.masks_measured": 0,
    "task.segment.read_weight": -1.0,
    "task.segment.write_weight": -1.0,
    "task.segment.layers": (-1,),
    "task.segment.read_cell": 0,
    "task.segment.labels": "polygons",
    "task.segment.cell": 0,
    "task.segment.codes": 1,
    "task.segment.levels": (1,),
    "task.segment.widths": (0,),
    "task.segment.steps": 0,
    "task.segment.corruption": 1.5,
    "task.segment.balance": -1.0,
    "task.segment.measured": 0,
    "task.segment.samples": -1,
    "task.segment.validation_images": -1,
    "probe.c": (),
    "probe.max_iterations": 0,
    "probe.batch_size": 0,
    "probe.train_images": 0,
    "probe.method": "adam",
    "probe.features": "post-norm",
    "probe.pooling": "max",
    "probe.regions": 0,
    "probe.attention": "rows",
    "probe.concatenate": 2,
    "probe.refine": 0,
    "probe.ridge": (0.0,),
    "probe.every": -1,
    "probe.labels_per_class": (4, 0),
    "probe.draws": 0,
    "probe.sgd.steps": 0,
    "probe.sgd.batch_size": 0,
    "probe.sgd.learning_rates": (),
    "probe.sgd.momentum": 1.0,
    "probe.sgd.eval_every": -1,
    "probe.sgd.checkpoint_every": 0,
    "probe.sgd.log_every": 0,
    "data.damaged": "ignore",
    "data.max_damaged": 1.5,
    "data.map_channel": -1,
    "data.train_transforms": ("",),
    "data.still_transforms": ("flip(), flip()",),
    "data.still_share": 1.5,
    "data.limits.formats": ("png",),
    "data.limits.max_bytes": 0,
    "data.limits.max_pixels": 0,
    "data.limits.max_side": 0,
    "data.limits.min_side": 0,
    "data.limits.max_ratio": 0.5,
    "data.limits.max_channels": 0,
    "data.limits.max_bits": 0,
    "data.limits.max_frames": 0,
    "data.limits.max_work": 0,
    "task.segment.videos": -1,
    "data.eval_transforms": ("decode(),resize((48,64))",),
    "finetune.train_transforms": ("flip(), flip()",),
    "tokenizer.train_transforms": ("flip(),",),
    "probe.sgd.train_transforms": (" ",),
    "task.detect.votes": ("",),
    "tokens.kind": "gray",
    "model.class_tokens": -1,
    "model.label_dropout": 1.5,
    "model.random_order": (0.5,),
    "tokens.colors": 1,
    "sample.count": 0,
    "sample.completions": -1,
    "sample.continuations": -1,
    "sample.keep": 1.5,
    "sample.temperature": -0.5,
    "sample.top_k": 0,
    "sample.top_p": 0.0,
    "sample.guidance": -1.0,
    "sample.guidance_schedule": "linear",
    "sample.guidance_power": 0.0,
    "sample.draft_tokens": 0,
    "profile.steps": "15:10",
    "robustness.images": 0,
    "robustness.corruptions": ("noise", "fog"),
    "robustness.attack_tokens": -1,
    "robustness.attack_calls": 0,
    "robustness.attack_images": 0,
    "generate.count": 9,
    "generate.keep": 1.5,
    "generate.i3d_resize": "area",
    "generate.batch_size": 0,
    "tokens.autoencoder.channels": 2,
    "tokens.autoencoder.frames": 0,
    "tokens.autoencoder.downsample": 5,
    "tokens.autoencoder.widths": (),
    "tokens.autoencoder.encoder_blocks": -1,
    "tokens.autoencoder.decoder_blocks": -1,
    "tokens.autoencoder.quantizer": "rvq",
    "tokens.autoencoder.levels": (8, 1),
    "tokens.autoencoder.codes": 1,
    "tokens.autoencoder.code_size": 0,
    "tokens.autoencoder.dtype": "float16",
    "tokens.autoencoder.groups": -1,
    "tokenizer.l1": -1.0,
    "tokenizer.l2": -1.0,
    "tokenizer.gradient": -1.0,
    "tokenizer.ssim": -1.0,
    "tokenizer.lpips": -1.0,
    "tokenizer.commitment": -1.0,
    "tokenizer.codebook_decay": 1.0,
    "tokenizer.restart_below": 1.0,
    "tokenizer.adversarial": -1.0,
    "tokenizer.adversarial_from": 1.5,
    "tokenizer.discriminator_width": 0,
    "tokenizer.discriminator_layers": 0,
    "tokenizer.discriminator_rate": -1.0,
    "tokenizer.discriminator_betas": (0.5, 1.0),
    "tokenizer.least_used": 1.5,
    **{f"distill.{name}": value for name, value in DISTILL.items()},
    **{f"finetune.distill.{name}": value for name, value in DISTILL.items()},
    "finetune.distill.mixup": -1.0,
}
# What any value of the type is good for, or what is judged where data sets and codecs are known.
UNBOUNDED = {
    "init_from", "tokenizer.init_from", "data.stills", "wandb",
    "data.name", "data.dir", "data.path", "data.labels", "data.labels_file",
    "data.ignore_label", "data.annotations", "data.images",
    "data.maps", "data.map_names", "data.map_ignore", "data.label",
    "data.train_split", "data.validation_split", "data.test_split",
    "data.train_transforms", "data.eval_transforms", "finetune.train_transforms",
    "tokens.palette", "tokens.tokenizer", "tokens.autoencoder.norm", "tokens.autoencoder.attention",
    "sample.draft", "robustness.compare",
    "generate.features", "generate.split", "generate.reference",
    "tokenizer.train_transforms", "tokenizer.lpips_weights",
    "model.axial_positions", "model.start_per_variant", "model.scan_layers",
    "model.learned_positions", "model.rotary", "model.qk_norm",
    "model.target_positions", "model.bfloat16_on_cpu",
    "finetune.standardize", "finetune.scratch", "distill.compare", "finetune.distill.compare",
    "distill.cached", "finetune.distill.cached",
    "task.name", "task.prefix", "task.detect.noise", "task.detect.votes",
    "task.segment.read", "task.segment.write",
    "probe.sgd.train_transforms", "probe.sgd.standardize",
}  # fmt: skip


def changed(**values):
    """The defaults as nested dicts with other values; `a__b` is the field a.b."""
    flat = fields.flatten(config_lib.Config())
    flat.update({name.replace("__", "."): value for name, value in values.items()})
    return fields.unflatten(flat)


def change(name, value):
    return changed(**{name: value})


def error_of(settings):
    """What `resolve`, or else the check of a stage, says of settings that do not fit."""
    with pytest.raises(InputError) as error:
        config = config_lib.resolve(settings)
        for stage in STAGES.values():
            stage.check(config)
    return str(error.value)


# What is accepted


def test_the_defaults_resolve_to_themselves():
    assert config_lib.resolve(config_lib.default()) == config_lib.Config()


def test_flatten_and_unflatten_are_inverses_and_keep_every_value():
    settings = changed(train__steps=7, sample__top_k=3, data__train_transforms=("a",))
    config = config_lib.resolve(settings)
    flat = fields.flatten(config)
    assert flat["train.steps"] == 7 and flat["finetune.train.steps"] == 1000
    assert flat["sample.top_k"] == 3 and flat["data.train_transforms"] == ("a",)
    nested = fields.unflatten(flat)
    assert nested["finetune"]["train"]["optimizer"]["beta2"] == 0.95
    assert config_lib.resolve(nested) == config
    assert fields.flatten(config_lib.resolve(nested)) == flat


def test_flat_names_are_those_of_the_fields():
    assert list(fields.flatten(config_lib.Config())) == list(fields.by_name(config_lib.Config))


def test_the_network_and_the_numbers_are_fixed_when_a_run_goes_on_and_the_rest_is_free():
    assert fields.free(config_lib.Config) == FREE


def test_a_resolved_configuration_cannot_be_changed():
    config = config_lib.resolve(config_lib.default())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3


def test_a_misspelt_field_of_a_config_file_is_refused_where_it_is_set():
    settings = config_lib.default()
    with pytest.raises(AttributeError, match="setps"):
        settings.train.setps = 3


def test_fields_that_are_none_by_default_take_values_of_their_type_and_none():
    settings = config_lib.default()
    settings.init_from = "runs/a"
    settings.train.optimizer.clip_norm = 1.0
    settings.sample.top_k = 5
    config = config_lib.resolve(settings)
    assert (config.init_from, config.sample.top_k) == ("runs/a", 5)
    assert config.train.optimizer.clip_norm == 1.0
    assert config.finetune.train.optimizer.clip_norm is None
    settings.sample.top_k = None
    assert config_lib.resolve(settings).sample.top_k is None
    with pytest.raises(TypeError):
        settings.sample.top_k = "five"


def test_the_command_line_overrides_fields_of_every_type(monkeypatch):
    overrides = {
        "train.steps": ("7", 7),
        "seed": ("3", 3),
        "init_from": ("runs/a", "runs/a"),
        "data.train_transforms": ("('shift(pixels=1)',)", ("shift(pixels=1)",)),
        "model.scan_layers": ("False", False),
        "train.optimizer.learning_rate": ("1", 1.0),
        "train.optimizer.clip_norm": ("1.5", 1.5),
        "finetune.train.optimizer.clip_norm": ("2", 2.0),
        "probe.c": ("(0.5, 1.0)", (0.5, 1.0)),
        "sample.top_k": ("5", 5),
        "sample.top_p": ("0.9", 0.9),
    }
    line = ["program", *(f"--config.{name}={text}" for name, (text, _) in overrides.items())]
    monkeypatch.setattr(sys, "argv", line)  # which config_flags reads itself
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config_lib.default(), flag_values=values)
    values(line)
    flat = fields.flatten(config_lib.resolve(values.config))
    wanted = fields.flatten(config_lib.Config()) | {k: v for k, (_, v) in overrides.items()}
    assert flat == wanted
    assert {k: type(v) for k, v in flat.items()} == {k: type(v) for k, v in wanted.items()}


def test_whole_numbers_pass_as_floats_and_lists_as_tuples():
    settings = changed(train__optimizer__learning_rate=1, probe__c=[1, 0.5])
    config = config_lib.resolve(settings)
    assert config.train.optimizer.learning_rate == 1.0 and config.probe.c == (1.0, 0.5)
    kinds = {type(v) for v in (config.train.optimizer.learning_rate, *config.probe.c)}
    assert kinds == {float} and type(config.probe.c) is tuple


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokens.levels", (2, 256)),
        ("model.dropout", (0.0, 0.99)),
        ("sample.keep", (0.0, 1.0)),
        ("sample.top_p", (0.01, 1.0, None)),
        ("sample.top_k", (1, None)),
        ("sample.temperature", (0.0,)),
        ("train.eval_every", (0,)),
        ("finetune.patience", (0,)),
        ("mesh.fsdp", (1,)),
    ],
)
def test_values_at_the_ends_of_a_range_are_accepted(name, values):
    for value in values:
        resolved = config_lib.resolve(change(name, value))
        assert fields.flatten(resolved)[name] == value


# What is not


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE.items())
def test_a_value_out_of_range_is_an_error_that_names_field_and_value(name, value):
    settings = change(name, value)
    if name.endswith("rest_learning_rate"):
        prefix = name.removesuffix("rest_learning_rate")
        settings = changed(**{name: value, f"{prefix}name": "muon"})
    message = error_of(settings)
    assert message.startswith(f"config.{name} is {value!r}; it takes ")


def test_every_field_has_its_range_tested_or_has_none():
    assert set(fields.flatten(config_lib.Config())) == {*OUT_OF_RANGE, *UNBOUNDED}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.optimizer.learning_rate", math.nan),
        ("train.optimizer.learning_rate", math.inf),
        ("model.dropout", math.nan),
        ("sample.temperature", math.nan),
        ("probe.c", (1.0, math.nan)),
        ("probe.c", (1.0, 0.0)),
    ],
)
def test_numbers_that_are_not_finite_or_not_positive_are_errors(name, value):
    assert error_of(change(name, value)).startswith(f"config.{name} is {value!r}; it takes ")


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("train.steps", 1.5, "int"),
        ("train.steps", "7", "int"),
        ("train.steps", None, "int"),
        ("train.steps", True, "int"),
        ("model.dropout", "0.1", "float"),
        ("model.dropout", False, "float"),
        ("model.dtype", 32, "str"),
        ("model.scan_layers", 1, "bool"),
        ("data.train_transforms", "shift()", "tuple of str"),
        ("data.train_transforms", (1,), "tuple of str"),
        ("probe.c", ("1",), "tuple of float"),
        ("sample.top_k", 2.0, "int or None"),
        ("train.optimizer.clip_norm", "1", "float or None"),
        ("init_from", 3, "str or None"),
    ],
)
def test_a_wrong_type_is_an_error_that_names_field_value_and_type(name, value, accepted):
    message = error_of(change(name, value))
    assert message.startswith(f"config.{name} is {value!r}") and accepted in message


@pytest.mark.parametrize("value", [5, None, "adam", [1, 2]])
def test_a_value_in_the_place_of_a_section_is_an_error(value):
    settings = changed()
    settings["finetune"]["train"]["optimizer"] = value
    assert f"config.finetune.train.optimizer is {value!r}" in error_of(settings)


def test_an_unknown_field_is_an_error_that_names_a_near_one():
    message = error_of(change("train.optimizer.learning_rat", 0.1))
    assert "config.train.optimizer.learning_rat is not a field" in message
    assert "did you mean config.train.optimizer.learning_rate?" in message
    assert "config.colour is not a field; config takes: seed, " in error_of(change("colour", 1))


def test_a_missing_field_is_an_error_that_names_it():
    settings = changed()
    del settings["finetune"]["train"]["optimizer"]["beta1"]
    assert "config.finetune.train.optimizer.beta1 is missing" in error_of(settings)


@pytest.mark.parametrize("train", ["tokenizer.train", "train", "finetune.train"])
@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"microbatches": 3}, ["microbatches is 3", "batch_size = 128"]),
        ({"optimizer.weight_decay": 0.1}, ["optimizer.weight_decay is 0.1", "adamw"]),
        ({"optimizer.rest_learning_rate": 0.1}, ["optimizer.rest_learning_rate is 0.1", "muon"]),
    ],
)
def test_fields_of_a_training_that_do_not_fit_each_other_are_errors(train, values, named):
    message = error_of(changed(**{f"{train}.{name}": value for name, value in values.items()}))
    assert f"config.{train}.{named[0]}" in message and named[1] in message


LEARNED = {"tokens.kind": "learned", "data.image_size": 32}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"data.image_size": 34}, ["image_size is 34", "downsample = 4", "multiple of 4"]),
        ({"tokens.autoencoder.widths": (8, 8, 8, 8)}, ["widths has 4", "downsample = 4", "for 3"]),
        ({"tokens.autoencoder.levels": (8,) * 6}, ["levels is", "262144 codes", "65536"]),
        ({"tokenizer.train.microbatches": 2}, ["microbatches is 2", "whole batches"]),
        ({"tokenizer.lpips": 1.0}, ["tokenizer.lpips is 1.0", "lpips_weights"]),
        ({"tokenizer.l2": 0.0}, ["l1=0, l2=0", "compares images with restored images"]),
        (
            {"tokenizer.lpips": 1.0, "tokenizer.lpips_weights": "x", "data.image_size": 8},
            ["image_size is 8", "16 pixels or more"],
        ),
        (
            {"tokenizer.adversarial": 1.0, "tokenizer.discriminator_layers": 6},
            ["discriminator_layers is 6", "64 does not divide"],
        ),
    ],
)
def test_what_learned_tokens_cannot_be_is_refused(values, named):
    message = error_of(changed(**(LEARNED | values)))
    assert all(words in message for words in named)
    assert config_lib.resolve(changed(**LEARNED))


def test_heads_must_divide_the_width():
    message = error_of(change("model.heads", 7))
    assert "config.model.heads is 7" in message and "config.model.width = 512" in message


def test_rows_and_columns_each_turn_pairs_of_channels():
    assert config_lib.resolve(changed(model__rotary=True)).model.rotary
    message = error_of(changed(model__rotary=True, model__width=48))
    assert "config.model.rotary is True" in message and "config.model.heads = 6" in message


@pytest.mark.parametrize("field", ["start_per_variant", "learned_positions"])
def test_what_makes_no_sense_of_hidden_tokens_is_refused(field):
    value = field != "learned_positions"
    settings = changed(**{"model.objective": "bert", f"model.{field}": value})
    message = error_of(settings)
    assert message.startswith(f"config.model.{field} is {value}, but config.model.objective=bert")
    assert config_lib.resolve(changed(**{f"model.{field}": value}))
    rotary = changed(model__objective="bert", model__rotary=True, model__axial_positions=True)
    assert config_lib.resolve(rotary)


@pytest.mark.parametrize("width", [64, 96, 128, 256, 512, 768, 1024, 1536, 3072])
def test_a_gated_mlp_is_as_large_as_a_plain_one_and_divides_as_well(width):
    plain, gated = (config_lib.Model(width=width, mlp=mlp) for mlp in ("gelu", "swiglu"))
    assert plain.mlp_width == 4 * width
    assert 3 * gated.mlp_width == pytest.approx(2 * plain.mlp_width, rel=0.01)
    assert gated.mlp_width % 2 ** int(math.log2(width / 32)) == 0


def test_only_one_axis_of_the_mesh_can_fill_what_is_left():
    assert config_lib.resolve(changed(mesh__data=1, mesh__fsdp=-1)).mesh.fsdp == -1
    assert "config.mesh has more than one -1" in error_of(change("mesh.fsdp", -1))


def test_an_older_file_is_read_by_this_versions_names():
    flat = fields.flatten(config_lib.Config())
    older = {name: value for name, value in flat.items() if name not in ("tokens.kind", "seed")}
    read = config_lib.recorded(config_lib.Config, older | {"tokens.name": "palette"})
    assert config_lib.resolve(read) == config_lib.resolve(changed(tokens__kind="palette"))
    section = config_lib.recorded(config_lib.Tokens, {"name": "palette", "colors": 7}, "tokens")
    wanted = config_lib.Tokens("palette", colors=7)
    assert fields.from_dict(config_lib.Tokens, section, "tokens") == wanted


def test_a_file_with_a_field_that_is_gone_is_read_unless_it_used_the_field():
    flat = fields.flatten(config_lib.Config())
    gone = {"model.above_embedding": False, "model.block": [], "model.prefixes": []}
    gone |= {"model.next_embedding": 0.0, "model.next_embedding_map": True}
    read = config_lib.recorded(config_lib.Config, flat | gone)
    assert config_lib.resolve(read) == config_lib.Config()
    of_model = fields.flatten(config_lib.Model())
    section = config_lib.recorded(config_lib.Model, of_model | {"above_embedding": False}, "model")
    assert fields.from_dict(config_lib.Model, section, "model") == config_lib.Model()
    words = r"config\.model\.above_embedding is True in this file\. .* reads only False"
    with pytest.raises(InputError, match=words):
        config_lib.recorded(config_lib.Config, flat | {"model.above_embedding": True})
