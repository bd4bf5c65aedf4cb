"""This project's weights: `WeightsFile`, its .safetensors file, and the weights in a run folder.

The header is a JSON document in the file's metadata: the settings of model and tokens, and the
fields named in `FACTS`.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files, sharding, tasks, tokens
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.config import fields
from gptv_jax.config.data import PIXELS
from gptv_jax.config.fields import FROM_ZERO, POSITIVE, field, one_of
from gptv_jax.decode.typicality import Calibration
from gptv_jax.errors import InputError, as_input_error, list_differences
from gptv_jax.model.gpt import Network
from gptv_jax.runs import record
from gptv_jax.tasks.network import images_layout, network_of, patch_of
from gptv_jax.tokens import Palette, TokenDefinition, Tokenizer, learned
from gptv_jax.tokens import palette as palettes

FORMAT = 1
HEADER = "gptv_jax"  # key of the file's metadata
# Fields that a header holds; files of before the class names have none.
FACTS = (
    "image_size", "frames", "starts", "classes", "class_names", "pool", "attention", "step",
    "best_layer",
)  # fmt: skip
TASK_FACTS = ("object_names", "map_names", "eval_transforms")  # beside the task, if it has parts
# Names of the tensors of a token definition: the colours of a palette, the prefix of a tokenizer's.
CENTERS, TOKENIZER = "palette.centers", "tokenizer."
MEASURED = "task.measured"  # the bytes of `Task.measured`, as float32 like all arrays
# Fields of config.model that decide what the weights mean. Users may choose the other fields
# (dropout, dtype, scan_layers, base_width, ...) each time they use the weights.
DEFINING_FIELDS = (
    "layers", "width", "heads", "mlp_ratio", "mlp", "qk_norm", "objective", "learned_positions",
    "axial_positions", "rotary", "target_positions", "class_tokens", "code_head",
    "image_input",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class WeightsFile:
    """Weights outside of a run folder, and the settings that they belong to."""

    model: config_lib.Model
    tokens: config_lib.Tokens
    image_size: int | tuple[int, ...] = field(accepted=PIXELS)  # as config.data.image_size
    params: dict[str, np.ndarray]  # float32, by flat name such as "blocks.qkv"
    frames: int = field(0, FROM_ZERO)  # of a clip, as config.data.frames
    definition: TokenDefinition | None = None  # what the tokens stand for
    starts: int = field(1, POSITIVE)  # number of start vectors
    classes: int = field(0, FROM_ZERO)  # number of classes of the class head; 0 without one
    # In the order of the labels, of the class head or of `model.class_tokens`; empty: no names.
    class_names: tuple[str, ...] = field(())
    pool: int = field(1, POSITIVE)  # parts of the sequence that the class head reads apart
    attention: str = field("causal", one_of("causal", "frames", "whole"))  # as finetune.attention
    step: int | None = field(None, FROM_ZERO)  # training step of the weights, where known
    best_layer: int | None = field(None, FROM_ZERO)  # of the probe, where it has run
    # Of a network with parts after the image: the task with the parts, the names of the classes of
    # objects and label maps, how images became the network's pixels, what the task measured.
    task: config_lib.Task | None = None
    object_names: tuple[str, ...] = field(())
    map_names: tuple[str, ...] = field(())
    eval_transforms: tuple[str, ...] = field(())
    measured: bytes = b""
    limits: config_lib.Limits = dataclasses.field(default_factory=config_lib.Limits)  # of data
    typicality: Calibration | None = None  # what is usual for the weights, where it was measured

    @property
    def codec(self) -> tokens.Codec | None:
        return tokens.make_codec(self.tokens, self.image_size, self.definition, self.frames)

    @functools.cached_property
    def learned_task(self) -> tasks.Task | None:
        """The task of a network with parts after the image; None for other networks."""
        if self.task is None:
            return None
        named = ("image_size", "frames", "eval_transforms", "limits")
        data = config_lib.Data(**{name: getattr(self, name) for name in named})
        config = config_lib.Config(data=data, tokens=self.tokens, model=self.model, task=self.task)
        names = self.class_names, self.object_names, self.map_names
        return tasks.make(config, *names, self.measured)

    @property
    def network(self) -> Network:
        if task := self.learned_task:
            return dataclasses.replace(task.network(), starts=self.starts)
        layout = images_layout(self.model, self.tokens, self.codec.grid, self.attention)
        given = self.model, layout, self.starts, self.classes
        return Network(*given, patch=patch_of(self.model, self.tokens), pool=self.pool)

    def checked(self, where: str) -> "WeightsFile":
        """Returns the weights, after checking them against the network.

        InputError lists weights in `where` that are missing, left over, misshapen or not finite.
        """
        described = as_input_error(f"the settings in {where} describe no network")
        with described, jax.set_mesh(sharding.make_mesh(config_lib.Mesh())):
            expected = sharding.by_name(sharding.abstract(self.network.init))
        shapes, found = ({n: a.shape for n, a in each.items()} for each in (expected, self.params))
        wrong = [name for name, array in self.params.items() if not np.isfinite(array).all()]
        faults = list_differences(shapes, found)
        faults += [f"{name} holds values that are not finite" for name in wrong]
        if self.best_layer is not None and self.best_layer > self.model.layers:
            faults.append(f"best_layer {self.best_layer} is none of {self.model.layers} layers")
        if (given := self.model.class_tokens) and self.starts != given + 1:
            faults.append(f"there are {self.starts} start vectors for {given} classes and none")
        count = self.classes or self.model.class_tokens
        if count and self.class_names and len(self.class_names) != count:
            faults.append(f"there are {len(self.class_names)} class names for {count} classes")
        if faults:
            raise InputError(f"the weights in {where} do not fit: {'; '.join(faults)}.")
        return self

    def headless(self) -> "WeightsFile":
        """The weights without the class head; InputError: they do not predict the image alone."""
        if self.task:
            raise InputError(
                f"these weights are fine-tuned for config.task.name={self.task.name}, and do not "
                "predict images any more; take the weights that the fine-tuning began with."
            )
        params = {n: a for n, a in self.params.items() if not n.startswith("classifier.")}
        names = self.class_names if self.model.class_tokens else ()
        return dataclasses.replace(
            self, params=params, classes=0, class_names=names, pool=1, attention="causal"
        )

    def on_mesh(self) -> dict:
        """The nested parameters as arrays on the current mesh, sharded as for training."""
        abstract = sharding.abstract(self.network.init)
        arrays = [
            jax.make_array_from_callback(leaf.shape, leaf.sharding, self.params[name].__getitem__)
            for name, leaf in sharding.by_name(abstract).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract), arrays)

    def differing(self, config: config_lib.Config, starts: int) -> list[str]:
        """One phrase for every field of `config` that describes another network than the weights.

        `starts` is the number of start vectors that `config` asks for.
        """
        pairs = [
            *((f"model.{n}", getattr(config.model, n), getattr(self.model, n))
              for n in DEFINING_FIELDS),
            ("model.start_per_variant (start vectors)", starts, self.starts),
            *config.tokens.pairs(self.tokens),
        ]  # fmt: skip
        tables = ("learned_positions", "axial_positions", "target_positions")
        if any(getattr(self.model, name) for name in tables):  # which have a row for each position
            pairs.append(("data.image_size", config.data.image_size, self.image_size))
        if self.frames and not self.model.rotary:  # each frame has a row; images have no frames
            pairs.append(("data.frames", config.data.frames, self.frames))
        expected = {f"config.{name}": stored for name, _, stored in pairs}
        return list_differences(expected, {f"config.{name}": given for name, given, _ in pairs})


def choose_palette(named: Palette | None, stored: Palette | None, where: str) -> Palette:
    """The palette that the user names or that `where` stores; InputError: none, or they differ."""
    if named is None and stored is None:
        raise InputError(
            f"{where} has no colours for its tokens; name the palette (kmeans_centers.npy) as well."
        )
    if named and stored and not named.equivalent(stored):
        raise InputError(f"the palette that you name differs from the palette in {where}.")
    return named or stored


def recognizes(path: pathlib.Path) -> bool:
    """See `weights.is_weights_path`."""
    return path.suffix == ".safetensors" and path.is_file()


def make_header(weights_file: WeightsFile) -> dict:
    """Everything but the arrays, as JSON."""
    definition, task = weights_file.definition, weights_file.task
    header = {
        "format": FORMAT,
        "model": fields.flatten(weights_file.model),
        "tokens": fields.flatten(weights_file.tokens) | {"palette": None, "tokenizer": None},
        "palette": definition.provenance if isinstance(definition, Palette) else None,
        "tokenizer": definition.description() if isinstance(definition, Tokenizer) else None,
        **{name: getattr(weights_file, name) for name in FACTS},
    }
    if weights_file.typicality:
        header["typicality"] = weights_file.typicality.to_json()
    if task:
        header |= {"task": fields.flatten(task)} | {n: getattr(weights_file, n) for n in TASK_FACTS}
    return header


def parse_header(metadata: dict[str, str], path: pathlib.Path) -> dict:
    """The header in the metadata of the file at `path`; InputError where the header is damaged."""
    with as_input_error(f"the header of {path} is damaged"):
        header = json.loads(metadata[HEADER])
        if not isinstance(header.get("palette"), dict | None):
            raise ValueError(f"palette is {header['palette']!r}")
        return header


def from_header(
    header: dict, params: dict, definition: TokenDefinition | None, where: pathlib.Path
) -> WeightsFile:
    """The weights that a header describes; a palette gets the provenance in the header.

    InputError: the header is damaged or of another version.
    """
    with as_input_error(f"the header of {where} is damaged"):
        if header["format"] != FORMAT:
            raise InputError(
                f"{where} has format {header['format']}; this version reads format {FORMAT}."
            )
        known = {each.name: each for each in dataclasses.fields(WeightsFile)}
        older = {"class_names": [], "frames": 0, "pool": 1, "attention": "causal"}
        header = older | {name: [] for name in TASK_FACTS} | header
        facts = {n: fields.checked(header[n], known[n], f"header.{n}") for n in FACTS + TASK_FACTS}
        if isinstance(definition, Palette):
            definition = dataclasses.replace(definition, provenance=dict(header["palette"]))
        settings = {}
        sections = {"model": config_lib.Model, "tokens": config_lib.Tokens, "task": config_lib.Task}
        for name, cls in sections.items():
            if header.get(name) is not None:  # fields that are newer than the file: defaults
                given = config_lib.recorded(cls, header[name], name)
                settings[name] = fields.from_dict(cls, given, name)
        if header.get("typicality") is not None:
            settings["typicality"] = Calibration.from_json(header["typicality"], str(where))
        return WeightsFile(**settings, **facts, params=params, definition=definition)


def read(path: pathlib.Path, palette: Palette | None = None) -> WeightsFile:
    """See `weights.read`."""
    arrays, metadata = files.read_weights(path)
    if HEADER not in metadata:
        raise InputError(
            f"{path} has no {HEADER} header; to read Hugging Face's weights name their folder, "
            "with its config.json."
        )
    header = parse_header(metadata, path)
    definition = _definition(header, arrays, path)
    measured = np.asarray(arrays.pop(MEASURED, ()), np.uint8).tobytes()
    if header.get("palette") is not None:
        definition = choose_palette(palette, definition, str(path))
    params = {n: a for n, a in arrays.items() if not n.startswith((CENTERS, TOKENIZER))}
    found = from_header(header, params, definition, path)
    return dataclasses.replace(found, measured=measured).checked(str(path))


def read_definition(path: pathlib.Path) -> TokenDefinition | None:
    """See `weights.read_definition`."""
    with files.open_safetensors(path) as file:
        names = [name for name in file.keys() if name.startswith((CENTERS, TOKENIZER))]  # noqa: SIM118
        header = parse_header(file.metadata() or {}, path)
        return _definition(header, {name: file.get_tensor(name) for name in names}, path)


def _definition(header: dict, arrays: dict, path: pathlib.Path) -> TokenDefinition | None:
    if header.get("tokenizer") is not None:
        params = {
            name.removeprefix(TOKENIZER): np.asarray(array, np.float32)
            for name, array in arrays.items()
            if name.startswith(TOKENIZER)
        }
        return learned.from_description(header["tokenizer"], params, str(path))
    if CENTERS in arrays:
        provenance = header.get("palette") or {}
        return palettes.checked(arrays[CENTERS], provenance, f"{CENTERS} of {path}")
    return None


def arrays(weights_file: WeightsFile) -> dict[str, np.ndarray]:
    """The arrays of a file: of the parameters and of the token definition."""
    found = {name: np.ascontiguousarray(array) for name, array in weights_file.params.items()}
    if isinstance(weights_file.definition, Palette):
        found[CENTERS] = weights_file.definition.centers
    if isinstance(weights_file.definition, Tokenizer):
        found |= {f"{TOKENIZER}{n}": array for n, array in weights_file.definition.params.items()}
    if weights_file.measured:
        found[MEASURED] = np.frombuffer(weights_file.measured, np.uint8).astype(np.float32)
    return found


def write(weights_file: WeightsFile, path: pathlib.Path) -> None:
    """Writes the file atomically; InputError where it cannot be written or is named otherwise."""
    if path.suffix != ".safetensors":
        raise InputError(f"{path} does not end in .safetensors, by which weights are recognized.")
    header = {HEADER: json.dumps(make_header(weights_file))}
    files.write_safetensors(arrays(weights_file), path, header)


def read_run(
    folder: pathlib.Path, stage: str | None = None, with_params: bool = True
) -> tuple[WeightsFile, dict]:
    """A description of a stage's weights, without arrays, and its parameters on the current mesh.

    `stage` is "pretrain" or "finetune"; None: the latest of the two that has finished. The dict of
    parameters is empty without `with_params`.
    """
    config, summary = record.config_of(folder), files.read_json(folder / "summary.json", {})
    finished = record.stages_with_weights(summary)
    if stage is None and finished:
        stage = finished[-1]
    if stage not in finished:
        raise InputError(
            f"{folder} has no finished stage {stage or 'with weights'}; finished stages with "
            f"weights: {', '.join(finished) or 'none'}."
        )
    made = files.read_json(folder / "config.json", {})
    names, network, of_task = made.get("classes"), network_of(config), {}
    names = tuple(names) if isinstance(names, list) else ()  # else it is their number
    if stage == "finetune":
        path = folder / tasks.MEASURED
        facts = {f"{each}_names": tuple(made.get(f"{each}s", ())) for each in ("object", "map")}
        facts["measured"] = path.read_bytes() if path.exists() else b""
        known = names or tuple(map(str, range(summary.get("finetune/classes", 0))))
        network = tasks.make(config, known, **facts).network()
        if network.several:
            of_task = facts | {"task": config.task, "limits": config.data.limits}
            of_task["eval_transforms"] = config.data.eval_transforms
    described = WeightsFile(
        model=config.model,
        tokens=config.tokens,
        image_size=config.data.image_size,
        frames=config.data.frames,
        params={},
        definition=tokens.load_definition(config.tokens.kind, folder),
        starts=network.starts,
        classes=network.classes,
        pool=network.pool,
        attention=config.finetune.attention if network.classes else "causal",
        class_names=names if network.classes or config.model.class_tokens or of_task else (),
        step=summary[f"{stage}/steps"],
        best_layer=summary.get("probe/best_layer"),
        typicality=record.typicality(folder, stage, summary[f"{stage}/steps"]),
        **of_task,
    )
    if not with_params:
        return described, {}
    place = record.checkpoint_folder(config, folder) / stage
    name = record.trained_part(config, stage)
    with Checkpoints(place, read_only=True) as saved:
        state, _ = saved.restore(described.step, {name: sharding.abstract(network.init)})
    return described, state[name]
