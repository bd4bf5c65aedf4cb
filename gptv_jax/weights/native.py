"""One .safetensors file whose header says what the weights are: the form to keep and share."""

import dataclasses
import json
import pathlib

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.config import fields
from gptv_jax.config.fields import NOT_NEGATIVE, POSITIVE, field
from gptv_jax.errors import InputError, first_line
from gptv_jax.tokens import Palette, TokenDefinition, Tokenizer, learned
from gptv_jax.tokens import palette as palettes
from gptv_jax.weights.file import WeightsFile, agreed

FORMAT = 1
HEADER = "gptv_jax"  # the key of the file's metadata
# Tensors that are no weights of the network: a palette's colours, and those of a tokenizer.
CENTERS, TOKENIZER = "palette.centers", "tokenizer."


def found(path: pathlib.Path) -> bool:
    """Whether `path` is meant to be such a file."""
    return path.suffix == ".safetensors" and path.is_file()


def describe(weights_file: WeightsFile) -> dict:
    """All but the arrays, as JSON."""
    definition = weights_file.definition
    return {
        "format": FORMAT,
        "model": fields.flatten(weights_file.model),
        "tokens": fields.flatten(weights_file.tokens) | {"palette": None, "tokenizer": None},
        "palette": definition.provenance if isinstance(definition, Palette) else None,
        "tokenizer": definition.description() if isinstance(definition, Tokenizer) else None,
        **{name: getattr(weights_file, name) for name in FACTS},
    }


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a header says beside the settings; the fields of `WeightsFile` of these names."""

    image_size: int = field(accepted=POSITIVE)
    starts: int = field(accepted=POSITIVE)
    classes: int = field(accepted=NOT_NEGATIVE)
    step: int | None = field(accepted=NOT_NEGATIVE)
    best_layer: int | None = field(accepted=NOT_NEGATIVE)


FACTS = [each.name for each in dataclasses.fields(Facts)]


def described(
    header: dict,
    params: dict[str, np.ndarray],
    definition: TokenDefinition | None,
    where: pathlib.Path,
) -> WeightsFile:
    """The inverse of `describe`, the palette with the provenance that the header has.

    Raises:
      InputError: the header is not one of ours, or of another version.
    """
    try:
        if header["format"] != FORMAT:
            raise InputError(
                f"{where} is of format {header['format']}; this version reads {FORMAT}."
            )
        facts = fields.from_dict(Facts, {name: header[name] for name in FACTS}, "header")
        if isinstance(definition, Palette):
            definition = dataclasses.replace(definition, provenance=dict(header["palette"]))
        return WeightsFile(
            model=_settings(config_lib.Model, header["model"], "model"),
            tokens=_settings(config_lib.Tokens, header["tokens"], "tokens"),
            params=params,
            definition=definition,
            **fields.flatten(facts),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the header of {where} is damaged ({first_line(error)}).") from error


def _settings(cls: type, given: dict, where: str):
    """A section of the configuration; fields that the file is older than have their defaults."""
    return fields.from_dict(cls, config_lib.recorded(cls, given, where), where)


def read(path: pathlib.Path, palette: Palette | None = None) -> WeightsFile:
    """See `interop.read`."""
    arrays, metadata = files.read_safetensors(path)
    if HEADER not in metadata:
        raise InputError(
            f"{path} has no {HEADER} header; to read Hugging Face's weights name their folder, "
            "with its config.json."
        )
    centers, said = arrays.pop(CENTERS, None), header(metadata, path)
    odd = [
        f"{name} {array.dtype}" for name, array in arrays.items() if not files.is_floating(array)
    ]
    if odd:
        raise InputError(f"{path} holds weights that are not floating-point: {', '.join(odd)}.")
    params = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    own = None if centers is None else palettes.checked(centers, {}, f"{CENTERS} of {path}")
    of_tokenizer = {n: params.pop(n) for n in list(params) if n.startswith(TOKENIZER)}
    if uses_colours(said):
        own = agreed(palette, own, str(path))
    if said.get("tokenizer") is not None:
        weights = {n.removeprefix(TOKENIZER): array for n, array in of_tokenizer.items()}
        own = learned.from_description(said["tokenizer"], weights, str(path))
    return described(said, params, own, path).checked(str(path))


def uses_colours(header: dict) -> bool:
    """Whether the tokens that a header describes are colours of a palette."""
    return header.get("palette") is not None


def read_definition(path: pathlib.Path) -> TokenDefinition | None:
    """See `interop.read_definition`."""
    with files.open_safetensors(path) as file:
        said, names = header(file.metadata() or {}, path), set(file.keys())
        if said.get("tokenizer") is not None:
            own = [n for n in names if n.startswith(TOKENIZER)]
            weights = {n.removeprefix(TOKENIZER): file.get_tensor(n) for n in own}
            return learned.from_description(said["tokenizer"], weights, str(path))
        if CENTERS not in names:
            return None
        centers = file.get_tensor(CENTERS)
    return palettes.checked(centers, said.get("palette") or {}, f"{CENTERS} of {path}")


def arrays(weights_file: WeightsFile) -> dict[str, np.ndarray]:
    """The weights, and those of what the tokens stand for."""
    found = {name: np.ascontiguousarray(array) for name, array in weights_file.params.items()}
    if isinstance(weights_file.definition, Palette):
        found[CENTERS] = weights_file.definition.centers
    if isinstance(weights_file.definition, Tokenizer):
        found |= {f"{TOKENIZER}{n}": array for n, array in weights_file.definition.params.items()}
    return found


def write(weights_file: WeightsFile, path: pathlib.Path) -> None:
    """Writes the file, whole or not at all.

    Raises:
      InputError: it cannot be written, or would not be known as one by its name.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"{path} does not end in .safetensors, by which such a file is known.")
    files.write_safetensors(
        arrays(weights_file), path, {HEADER: json.dumps(describe(weights_file))}
    )


def header(metadata: dict[str, str], path: pathlib.Path) -> dict:
    """What the metadata of a file of ours say.

    Raises:
      InputError: nothing, or it is damaged.
    """
    try:
        return json.loads(metadata[HEADER])
    except (KeyError, ValueError) as error:
        raise InputError(f"the header of {path} is damaged ({first_line(error)}).") from error
