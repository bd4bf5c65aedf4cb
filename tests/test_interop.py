"""Weights that are read and written: every format, and errors for faulty input."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import safetensors.numpy
from conftest import MODERN, generator, make_mesh, random_image, random_params, tiny_network

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax import weights
from gptv_jax.errors import InputError
from gptv_jax.runs.record import config_of
from gptv_jax.tokens.palette import Palette
from gptv_jax.weights import huggingface, native, openai
from gptv_jax.weights.native import WeightsFile
from gptv_jax.weights.strict_reader import StrictReader

SHAPE = {"layers": 3, "width": 24, "heads": 3, "vocabulary": 13, "length": 16}
COLORS = Palette(generator(5).uniform(-1, 1, (13, 3)).astype(np.float32), {"made": "at random"})
TOKENS = generator(6).integers(13, size=(2, 16), dtype=np.int32)


def of_openai(variables: dict) -> WeightsFile:
    return openai.convert(StrictReader.of_arrays(variables), pathlib.Path("model.ckpt-7"), COLORS)


@pytest.fixture(scope="module")
def variables():
    return oracle.variables(generator(), **SHAPE, classes=5)


@pytest.fixture(scope="module")
def weights_file(variables):
    return of_openai(variables)


@pytest.fixture(scope="module")
def model(weights_file):
    mesh = make_mesh((1, 1, 1))
    with jax.set_mesh(mesh):
        return gptv_jax.Model(weights_file, weights_file.on_mesh(), mesh)


def test_the_network_computes_what_openai_released(variables, weights_file):
    """Reads OpenAI's variables, and compares with openai/image-gpt in NumPy, in float64."""
    logits, _, normed, classes = oracle.forward(variables, TOKENS)
    config = dataclasses.replace(weights_file.model, dtype="float64")
    params = {name: array.astype(np.float64) for name, array in weights_file.params.items()}
    exact = dataclasses.replace(weights_file, model=config, params=params)
    with jax.enable_x64(True), jax.set_mesh(make_mesh((1, 1, 1))):
        output = jax.jit(lambda params: exact.network.bind(params)(jnp.asarray(TOKENS)))(
            exact.on_mesh()
        )
    assert output.logits.dtype == np.float64
    np.testing.assert_allclose(output.logits, logits, rtol=0, atol=1e-10)
    pooled = np.stack([n.mean(axis=1) for n in normed])
    np.testing.assert_allclose(output.pooled, pooled, rtol=0, atol=1e-10)
    np.testing.assert_allclose(output.class_logits, classes, rtol=0, atol=1e-10)


def test_the_log_likelihood_is_that_of_the_released_network(variables, model):
    images = random_image(3, 4, 4, 3)
    tokens = model.tokenize(images)
    nats = -model.log_likelihood(images).sum() / tokens.size
    assert nats == pytest.approx(oracle.loss(variables, tokens), rel=1e-5)


# Weights that are written and read again are equal.


def assert_equal(found: WeightsFile, expected: WeightsFile):
    assert set(found.params) == set(expected.params)
    for name, array in expected.params.items():
        np.testing.assert_array_equal(found.params[name], array, err_msg=name)
    for name in ("model", "tokens", "image_size", "starts", "classes", "step", "best_layer"):
        assert getattr(found, name) == getattr(expected, name), name
    if expected.definition is None:
        assert found.definition is None
    else:
        np.testing.assert_array_equal(found.definition.centers, expected.definition.centers)
        assert found.definition.provenance == expected.definition.provenance


def test_a_file_of_this_project_gives_back_everything(weights_file, tmp_path):
    path = tmp_path / "deep" / "x.safetensors"
    # The last of the L + 1 layers that can be read.
    weights_file = dataclasses.replace(weights_file, best_layer=weights_file.model.layers)
    native.write(weights_file, path)
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]
    assert_equal(weights.read(path), weights_file)
    with pytest.raises(InputError, match=r"cannot be written"):
        native.write(weights_file, path / "below.safetensors")


def test_a_file_of_this_project_holds_every_part_of_a_network(weights_file, tmp_path):
    config = config_lib.Model(layers=2, width=32, heads=4, **MODERN)
    modern = dataclasses.replace(weights_file, model=config, params={}, classes=0)
    mesh, path = make_mesh((1, 1, 1)), tmp_path / "x.safetensors"
    with jax.set_mesh(mesh):
        saved = gptv_jax.Model(modern, random_params(modern.network), mesh)
    saved.save(path)
    loaded = gptv_jax.load(path)
    assert_equal(loaded.weights_file(), saved.weights_file())
    np.testing.assert_array_equal(loaded.logits(TOKENS), saved.logits(TOKENS))


def test_a_folder_of_hugging_face_gives_back_everything(weights_file, tmp_path):
    huggingface.write(weights_file, tmp_path / "generation", "generation")
    assert_equal(weights.read(tmp_path / "generation"), weights_file.headless())
    huggingface.write(weights_file, tmp_path / "classification", "classification")
    without_token_head = weights_file.params | {"head": np.zeros((13, 24), np.float32)}
    expected = dataclasses.replace(weights_file, params=without_token_head)
    assert_equal(weights.read(tmp_path / "classification"), expected)


def test_class_names_come_back_from_every_format(weights_file, tmp_path):
    names = ("cat", "dog", "a bird", "fish", "LABEL_4")
    named = dataclasses.replace(weights_file, class_names=names)
    native.write(named, tmp_path / "x.safetensors")
    huggingface.write(named, tmp_path / "hf", "classification")
    for path in (tmp_path / "x.safetensors", tmp_path / "hf"):
        assert weights.read(path).class_names == gptv_jax.load(path).classes == names
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["id2label"] == dict(zip("01234", names, strict=True))
    assert config["label2id"] == {name: i for i, name in enumerate(names)}
    huggingface.write(weights_file, tmp_path / "unnamed", "classification")
    assert weights.read(tmp_path / "unnamed").class_names == ()
    assert gptv_jax.load(tmp_path / "unnamed").classes == tuple("01234")
    native.write(
        dataclasses.replace(weights_file, class_names=names[:4]), tmp_path / "y.safetensors"
    )
    with pytest.raises(InputError, match="4 class names for 5 classes"):
        weights.read(tmp_path / "y.safetensors")


def test_names_of_classes_are_labels(weights_file):
    config = config_lib.Model(layers=1, width=32, heads=4, class_tokens=3)
    names = ("cat", "dog", "bird")
    described = dataclasses.replace(
        weights_file.headless(), model=config, starts=4, class_names=names
    )
    mesh = make_mesh((1, 1, 1))
    with jax.set_mesh(mesh):
        model = gptv_jax.Model(described, random_params(described.network), mesh)
    assert model.classes == names and described.headless().class_names == names
    for given, numbers in (("dog", 1), (["bird", "cat"], [2, 0])):
        found, wanted = (model.logits(TOKENS, labels=each) for each in (given, numbers))
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(InputError, match="labels name 'cow'; classes are cat, dog, bird"):
        model.logits(TOKENS, labels=["cow", "cat"])


def from_hugging_face(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """OpenAI's variables from a folder of Hugging Face, by the layout of `transformers`.

    A layer's `c_attn` holds q, k and v side by side, each with the columns of one head after
    another. The last row of the token embedding is the start vector.
    """
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    heads = json.loads((folder / "config.json").read_text())["n_head"]
    layer = "transformer.h.{}.{}.weight".format
    *embedding, start = arrays["transformer.wte.weight"]
    found = {"wte": np.stack(embedding), "sos": start, "wpe": arrays["transformer.wpe.weight"]}
    found["wtet"] = arrays.get("lm_head.weight", found["wte"])
    found["ln_f/g"] = arrays["transformer.ln_f.weight"]
    if "score.weight" in arrays:
        found["clf/wclf"] = arrays["score.weight"]
    for i in range(SHAPE["layers"]):
        for j, name in enumerate("qkv"):
            columns = np.split(arrays[layer(i, "attn.c_attn")], 3, axis=1)[j]
            found[f"h{i}/attn/{name}_proj"] = np.stack(np.split(columns.T, heads))
        found[f"h{i}/attn/c_proj"] = np.stack(np.split(arrays[layer(i, "attn.c_proj")], heads))
        for name, theirs in (("ln_1/g", "ln_1"), ("ln_2/g", "ln_2")):
            found[f"h{i}/{name}"] = arrays[layer(i, theirs)]
        for name in ("c_fc", "c_proj"):
            found[f"h{i}/mlp/{name}/w"] = arrays[layer(i, f"mlp.{name}")]
    return {name: array.astype(np.float64) for name, array in found.items()}


def test_exported_tensors_lie_where_transformers_expects_them(variables, weights_file, tmp_path):
    """Reading alone would not show tensors that are displaced in writing and in reading alike."""
    for task in huggingface.ARCHITECTURES:
        huggingface.write(weights_file, tmp_path / task, task)
    found = from_hugging_face(tmp_path / "generation")
    found["clf/wclf"] = from_hugging_face(tmp_path / "classification")["clf/wclf"]
    assert found.keys() == variables.keys()
    for name, array in variables.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_an_export_computes_the_same_as_the_richer_network(weights_file, tmp_path):
    """Tables of rows and columns, start vectors and the class head's scale are folded in."""
    rng = generator(9)
    params = weights_file.params | {
        "row": rng.standard_normal((4, 24)).astype(np.float32),
        "column": rng.standard_normal((4, 24)).astype(np.float32),
        "start": rng.standard_normal((3, 24)).astype(np.float32),
        "classifier.class_scale": rng.uniform(1, 2, 24).astype(np.float32),
    }
    config = dataclasses.replace(weights_file.model, axial_positions=True, start_per_variant=True)
    rich = dataclasses.replace(weights_file, params=params, starts=3, model=config)
    native.write(rich.checked("memory"), tmp_path / "x.safetensors")
    ours = gptv_jax.load(tmp_path / "x.safetensors")
    for task in huggingface.ARCHITECTURES:
        gptv_jax.to_huggingface(ours, tmp_path / task, task)
    logits = oracle.forward(from_hugging_face(tmp_path / "generation"), TOKENS)[0]
    np.testing.assert_allclose(ours.logits(TOKENS), logits, atol=2e-5)
    images = random_image(2, 4, 4, 3)
    exported = from_hugging_face(tmp_path / "classification")
    classes = np.exp(oracle.forward(exported, ours.tokenize(images))[3])
    classes /= classes.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(ours.classify(images), classes, atol=2e-5)


INEXPRESSIBLE = {"mlp": "swiglu", "learned_positions": False, "rotary": True, "qk_norm": True}
INEXPRESSIBLE |= {"objective": "bert", "target_positions": True}
INEXPRESSIBLE |= {"class_tokens": 5, "code_head": "levels", "image_input": "pixels"}


def test_what_hugging_faces_format_cannot_express_is_refused_by_name(weights_file, tmp_path):
    centred = weights_file.params | {"classifier.class_center": np.ones(24, np.float32)}
    other = dataclasses.replace(weights_file, params=centred)
    with pytest.raises(InputError, match=r"cannot express a class head whose input is centred"):
        huggingface.write(other, tmp_path / "x", "classification")
    huggingface.write(other, tmp_path / "y", "generation")
    with pytest.raises(InputError, match=r"no class head"):
        huggingface.write(weights_file.headless(), tmp_path / "x", "classification")
    for field, value in INEXPRESSIBLE.items():
        model = dataclasses.replace(weights_file.model, **{field: value})
        with pytest.raises(InputError, match=rf"cannot express model.{field}={value}\."):
            huggingface.write(
                dataclasses.replace(weights_file, model=model), tmp_path / "x", "generation"
            )
    assert not (tmp_path / "x").exists()


def test_an_export_overwrites_only_an_export(weights_file, tmp_path):
    huggingface.write(weights_file, tmp_path / "hf", "generation")
    huggingface.write(weights_file, tmp_path / "hf", "classification")
    assert weights.read(tmp_path / "hf").classes == 5
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"config": {}}')
    for folder in (tmp_path / "run", tmp_path):
        with pytest.raises(InputError, match=r"holds something else; name a new folder"):
            huggingface.write(weights_file, folder, "generation")
    assert (tmp_path / "run" / "config.json").read_text() == '{"config": {}}'
    with pytest.raises(InputError, match=r"does not end in .safetensors"):
        native.write(weights_file, tmp_path / "nameless")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


@pytest.mark.parametrize(
    ("field", "value"),
    {
        "layers": 4,
        "width": 48,
        "heads": 2,
        "mlp_ratio": 2,
        "axial_positions": True,
        **INEXPRESSIBLE,
    }.items(),
)
def test_a_field_that_describes_another_network_is_named(weights_file, field, value):
    config = config_lib.Config(
        model=weights_file.model,
        tokens=weights_file.tokens,
        data=config_lib.Data(image_size=weights_file.image_size),
    )
    assert weights_file.differing(config, starts=1) == []
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, **{field: value}))
    [fault] = weights_file.differing(other, starts=1)
    assert fault.startswith(f"config.model.{field} is {value!r}, expected ")
    [fault] = weights_file.differing(config, starts=9)
    assert "start vectors" in fault


def test_rotary_weights_fit_images_of_any_size_and_tables_of_positions_one_size():
    data, model = config_lib.Data(image_size=16), tiny_network().config
    for tables, faults in ((False, 0), (True, 1)):
        changed = dataclasses.replace(
            model, rotary=True, learned_positions=tables, axial_positions=False
        )
        weights_file = WeightsFile(changed, config_lib.Tokens(), image_size=8, params={})
        found = weights_file.differing(config_lib.Config(data=data, model=changed), starts=1)
        assert len(found) == faults and all("data.image_size is 16" in each for each in found)


# Weights of a run.


def test_the_weights_of_a_run_can_be_exported(finished_run, tmp_path):
    for stage in ("finetune", "pretrain"):
        ours, path = (
            gptv_jax.load(finished_run.folder, stage=stage),
            tmp_path / f"{stage}.safetensors",
        )
        ours.save(path)
        assert_equal(gptv_jax.load(path).weights_file(), ours.weights_file())
    gptv_jax.to_huggingface(ours, tmp_path / "hf")
    theirs = gptv_jax.from_huggingface(tmp_path / "hf")
    images = generator().integers(17, size=(5, 8, 8, 1), dtype=np.uint8)
    tokens = ours.tokenize(images)
    np.testing.assert_array_equal(theirs.tokenize(images), tokens)  # grey levels, no palette
    np.testing.assert_allclose(theirs.logits(tokens), ours.logits(tokens), atol=2e-5)


# Errors.


def changed_folder(weights_file: WeightsFile, folder: pathlib.Path, **changes) -> pathlib.Path:
    """A folder of Hugging Face's format with changed tensors or fields; None removes one."""
    huggingface.write(weights_file, folder, "generation")
    config, path = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    for name, value in changes.items():
        target = arrays if "." in name else config
        target.pop(name, None)
        if value is not None:
            target[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})
    return folder


ONES = np.ones(24, np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lm_head.weight": None}, r"lm_head.weight \(13, 24\) is missing"),
        (
            {"lm_head.weight": np.ones((12, 24))},
            r"lm_head.weight is \(12, 24\), expected \(13, 24\)",
        ),
        ({"transformer.h.1.attn.c_attn.weight": None}, r"h.1.attn.c_attn.weight .* is missing"),
        ({"transformer.h.1.attn.c_proj.bias": ONES}, r"h.1.attn.c_proj.bias is not zero"),
        ({"transformer.h.3.ln_1.weight": ONES}, r"h.3.ln_1.weight \(24,\) is left over"),
        ({"transformer.ln_f.bias": ONES}, r"ln_f.bias \(24,\) is left over"),
        ({"transformer.ln_f.weight": ONES * np.nan}, r"final_norm holds values that are not fin"),
        ({"n_layer": 2}, r"h.2.ln_1.weight \(24,\) is left over"),
        ({"n_layer": 4}, r"h.3.ln_1.weight \(24,\) is missing"),
        ({"vocab_size": 13}, r"wte.weight is \(14, 24\), expected \(13, 24\)"),
        ({"vocab_size": "13"}, r"vocab_size='13', no whole number"),
        ({"n_positions": 15}, r"n_positions=15, which is no square"),
        ({"n_positions": 9}, r"wpe.weight is \(16, 24\), expected \(9, 24\)"),
        ({"n_head": 5}, r"n_head=5"),
        ({"n_inner": 50}, r"n_inner=50"),
        ({"n_inner": "96"}, r"n_inner='96', no whole number"),
        ({"n_layer": 10**9}, r"h.3.ln_1.weight \(24,\) is missing"),
        ({"n_positions": 10**12}, r"wpe.weight is \(16, 24\), expected"),
        ({"lm_head.weight": np.ones((13, 24), np.int32)}, r"lm_head.weight is of type int32"),
        ({"score.weight": np.ones((), np.float32)}, r"score.weight is \(\), expected \(0, 24\)"),
        ({"n_head": None}, r"n_head=None, no whole number"),
        ({"activation_function": "relu"}, r"activation_function='relu'; this network has 'quick"),
        ({"layer_norm_epsilon": 1e-6}, r"layer_norm_epsilon=1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx=True"),
        ({"model_type": "gpt2"}, r"model_type='gpt2'; it must be 'imagegpt'"),
    ],
)
def test_tensors_and_fields_that_do_not_fit_are_named(weights_file, tmp_path, changes, words):
    folder = changed_folder(weights_file, tmp_path / "hf", **changes)
    with pytest.raises(InputError, match=words):
        gptv_jax.from_huggingface(folder)


def test_attention_masks_of_old_versions_are_ignored(weights_file, tmp_path):
    masks = {"transformer.h.0.attn.bias": np.ones((1, 1, 16, 16), bool)}
    masks |= {"transformer.h.0.attn.masked_bias": np.float32(-1e4).reshape(1)}
    found = weights.read(changed_folder(weights_file, tmp_path / "hf", **masks))
    np.testing.assert_array_equal(found.params["blocks.qkv"], weights_file.params["blocks.qkv"])


def test_a_missing_palette_is_an_error_that_says_how_to_name_one(weights_file, tmp_path):
    folder = changed_folder(weights_file, tmp_path / "hf")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"no colours for its tokens; name the palette"):
        gptv_jax.from_huggingface(folder)
    COLORS.save(tmp_path / "colors.npz")
    model = gptv_jax.from_huggingface(folder, palette=tmp_path / "colors.npz")
    np.testing.assert_array_equal(model.codec.definition.centers, COLORS.centers)
    (folder / "preprocessor_config.json").write_text('{"clusters": [[1, 2], [3, "x"]]}')
    with pytest.raises(InputError, match=r"no list of colours"):
        gptv_jax.from_huggingface(folder)
    (folder / "preprocessor_config.json").write_text('{"clusters": [[1, 2, 3], [3, 2, 1]]}')
    with pytest.raises(InputError, match=r"clusters of .* a palette is .* from -1 to 1"):
        gptv_jax.from_huggingface(folder)


@pytest.mark.parametrize("form", ["huggingface", "export", "ours"])
def test_a_missing_palette_is_taken_from_the_file_that_is_named(weights_file, tmp_path, form):
    other = Palette(COLORS.centers[::-1], {})
    for name, palette in (("colors.npz", COLORS), ("other.npz", other)):
        palette.save(tmp_path / name)
    if form == "ours":
        source = tmp_path / "x.safetensors"
        native.write(weights_file, source)
    elif form == "export":
        source = tmp_path / "hf"
        huggingface.write(weights_file, source, "generation")
    else:
        source = changed_folder(weights_file, tmp_path / "hf")
    with pytest.raises(InputError, match=r"palette that you name differs from the palette in"):
        gptv_jax.load(source, palette=tmp_path / "other.npz")
    if form == "ours":
        header = {"gptv_jax": json.dumps(native.make_header(weights_file))}
        safetensors.numpy.save_file(dict(weights_file.params), source, header)
    else:
        (source / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"has no colours for its tokens; name the palette"):
        gptv_jax.load(source)
    found = gptv_jax.load(source, palette=tmp_path / "colors.npz")
    np.testing.assert_array_equal(found.codec.definition.centers, COLORS.centers)


@pytest.mark.parametrize("form", ["ours", "huggingface"])
@pytest.mark.parametrize("harm", ["cut", "empty", "text", "header"])
def test_a_damaged_file_is_an_error_that_names_it(weights_file, tmp_path, form, harm):
    if form == "ours":
        source = path = tmp_path / "model.safetensors"
        native.write(weights_file, path)
    else:
        source, path = tmp_path / "hf", tmp_path / "hf" / "model.safetensors"
        huggingface.write(weights_file, source, "generation")
    whole = path.read_bytes()
    harmed = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello" * 20}
    path.write_bytes(harmed.get(harm, whole[:8] + b"{" * 50 + whole[58:]))
    with pytest.raises(InputError, match=r"model.safetensors .*damaged"):
        gptv_jax.load(source)


def test_a_faulty_header_is_named(weights_file, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": ONES}, path)
    with pytest.raises(InputError, match=r"has no gptv_jax header"):
        gptv_jax.load(path)
    header = native.make_header(weights_file)
    arrays = weights_file.params | {"palette.centers": COLORS.centers}
    for change, words in (
        ({"image_size": "4"}, r"header.image_size is '4'"),
        ({"image_size": -4}, r"header.image_size is -4"),
        ({"starts": 0}, r"header.starts is 0"),
        ({"best_layer": 99}, r"best_layer 99 is none of 3 layers"),
        ({"palette": 3}, r"is damaged"),
        ({"format": 99}, r"has format 99"),
        ({"model": header["model"] | {"width": "wide"}}, r"model.width is 'wide'"),
        ({"model": header["model"] | {"wide": 3}}, r"model.wide is not a field"),
        ({"classes": None}, r"header.classes is None"),
    ):
        metadata = {"gptv_jax": json.dumps(header | change)}
        safetensors.numpy.save_file(arrays, path, metadata)
        with pytest.raises(InputError, match=words):
            gptv_jax.load(path)
    for change, words in (
        ({"head": weights_file.params["head"].astype(np.int32)}, r"not floating-point: head int32"),
        ({"palette.centers": COLORS.centers * 9}, r"palette.centers of .* from -1 to 1"),
        ({"palette.centers": COLORS.centers[:, :2].copy()}, r"palette.centers of .*\[13, 2\]"),
    ):
        safetensors.numpy.save_file(arrays | change, path, {"gptv_jax": json.dumps(header)})
        with pytest.raises(InputError, match=words):
            gptv_jax.load(path)
    half = {name: array.astype(np.float16) for name, array in weights_file.params.items()}
    half |= {"palette.centers": COLORS.centers}
    safetensors.numpy.save_file(half, path, {"gptv_jax": json.dumps(header)})
    assert {a.dtype for a in weights.read(path).params.values()} == {np.dtype(np.float32)}
    with pytest.raises(InputError, match=r"is not a run folder, nor a .safetensors file"):
        gptv_jax.load(tmp_path / "nothing.safetensors")


def test_fields_newer_than_a_file_get_their_defaults(weights_file, finished_run, tmp_path):
    header, path = native.make_header(weights_file), tmp_path / "x.safetensors"
    del header["model"]["objective"], header["model"]["votes"], header["class_names"]
    arrays = weights_file.params | {"palette.centers": COLORS.centers}
    safetensors.numpy.save_file(arrays, path, {"gptv_jax": json.dumps(header)})
    assert_equal(weights.read(path), weights_file)
    record = json.loads((finished_run.folder / "config.json").read_text())
    del record["config"]["model.objective"], record["config"]["finetune.layer_decay"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert config_of(tmp_path) == config_of(finished_run.folder)


def test_missing_and_additional_variables_of_openai_are_named(variables):
    for changes, words in (
        ({"wtet": None}, r"wtet \(13, 24\) is missing"),
        ({"h1/attn/v_proj": None}, r"h1/attn/v_proj \(3, 8, 24\) is missing"),
        ({"h1/attn/b": ONES}, r"h1/attn/b \(24,\) is left over"),
        ({"wte": None}, r"holds no Image GPT"),
        ({"sos": np.ones((1, 24))}, r"sos is \(1, 24\), expected \(24,\)"),
    ):
        left = {n: a for n, a in (variables | changes).items() if a is not None}
        with pytest.raises(InputError, match=words):
            of_openai(left)


def test_bert_is_recognized_by_openais_folder_names_only(variables):
    there = StrictReader.of_arrays(variables)
    path = pathlib.Path("/home/robert/bert/igpt-s/131000/model.ckpt-131000")
    assert openai.convert(there, path, COLORS).model.objective == "autoregressive"


def test_a_variable_that_cannot_be_read_is_named(variables):
    def read(name):
        if name == "h1/attn/v_proj":
            raise IndexError("Read less bytes than requested")
        return variables[name]

    there = StrictReader({n: a.shape for n, a in variables.items()}, read)
    with pytest.raises(InputError, match=r"h1/attn/v_proj cannot be read \(Read less bytes"):
        openai.convert(there, pathlib.Path("model.ckpt-7"), COLORS)


def test_a_tensor_in_two_files_is_an_error(weights_file, tmp_path):
    folder = changed_folder(weights_file, tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    safetensors.numpy.save_file({"lm_head.weight": ONES}, folder / "b.safetensors")
    index = {"weight_map": {"lm_head.weight": "a.safetensors", "x": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"has lm_head.weight in two of its files"):
        gptv_jax.from_huggingface(folder)
    for wrong in ([], {"a": 3}):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(InputError, match=r"weight_map names no files|has no model.safetensors"):
            gptv_jax.from_huggingface(folder)


def test_without_tensorflow_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "model.ckpt-7.index").touch()
    COLORS.save(tmp_path / "colors.npz")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(InputError, match=r"pip install -e '.\[prepare\]'"):
        gptv_jax.from_openai(tmp_path / "model.ckpt-7", tmp_path / "colors.npz")
    with pytest.raises(
        InputError, match=r"TensorFlow checkpoint, has no colours for .* name the palette"
    ):
        gptv_jax.load(tmp_path / "model.ckpt-7")


def test_a_checkpoint_is_read_by_tensorflow(variables, tmp_path):
    tf = pytest.importorskip("tensorflow", reason="the prepare extra is not installed")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, array in variables.items():
            tf.compat.v1.get_variable(f"model/{name}", initializer=np.float32(array))
        tf.compat.v1.get_variable("global_step", initializer=7)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(tmp_path / "model.ckpt"), global_step=7)
    COLORS.save(tmp_path / "colors.npz")
    model = gptv_jax.from_openai(tmp_path / "model.ckpt-7", tmp_path / "colors.npz")
    np.testing.assert_allclose(
        model.logits(TOKENS), oracle.forward(variables, TOKENS)[0], atol=2e-5
    )
    assert model.weights_file().step == 7
