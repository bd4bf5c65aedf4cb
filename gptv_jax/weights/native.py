"""This project's format: one .safetensors file whose header describes the network.

The header is a JSON document in the file's metadata: the settings of model and tokens, and the
fields of `Facts`.
"""

import dataclasses
import json
import pathlib

import numpy as np

from gptv_jax import config as config_lib
from gptv_jax import files
from gptv_jax.config import fields
from gptv_jax.config.fields import FROM_ZERO, POSITIVE, field
from gptv_jax.errors import InputError, first_line
from gptv_jax.tokens import Palette, TokenDefinition, Tokenizer, learned
from gptv_jax.tokens import palette as palettes
from gptv_jax.weights.file import WeightsFile, choose_palette

FORMAT = 1
HEADER = "gptv_jax"  # key of the file's metadata
# Names of the tensors of a token definition: the colours of a palette, the prefix of a tokenizer's.
CENTERS, TOKENIZER = "palette.centers", "tokenizer."


@dataclasses.dataclass(frozen=True)
class Facts:
    """Fields of `WeightsFile` that a header holds beside the settings."""

    image_size: int = field(accepted=POSITIVE)
    starts: int = field(accepted=POSITIVE)
    classes: int = field(accepted=FROM_ZERO)
    step: int | None = field(accepted=FROM_ZERO)
    best_layer: int | None = field(accepted=FROM_ZERO)


FACTS = [each.name for each in dataclasses.fields(Facts)]


def recognizes(path: pathlib.Path) -> bool:
    """See `weights.is_weights_path`."""
    return path.suffix == ".safetensors" and path.is_file()


def make_header(weights_file: WeightsFile) -> dict:
    """Everything but the arrays, as JSON."""
    definition = weights_file.definition
    return {
        "format": FORMAT,
        "model": fields.flatten(weights_file.model),
        "tokens": fields.flatten(weights_file.tokens) | {"palette": None, "tokenizer": None},
        "palette": definition.provenance if isinstance(definition, Palette) else None,
        "tokenizer": definition.description() if isinstance(definition, Tokenizer) else None,
        **{name: getattr(weights_file, name) for name in FACTS},
    }


def parse_header(metadata: dict[str, str], path: pathlib.Path) -> dict:
    """The header in the metadata of the file at `path`; InputError where the header is damaged."""
    try:
        header = json.loads(metadata[HEADER])
        if not isinstance(header.get("palette"), dict | None):
            raise ValueError(f"palette is {header['palette']!r}")
        return header
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(f"the header of {path} is damaged ({first_line(error)}).") from error


def from_header(
    header: dict,
    params: dict[str, np.ndarray],
    definition: TokenDefinition | None,
    where: pathlib.Path,
) -> WeightsFile:
    """The weights that a header describes; a palette gets the provenance in the header.

    Raises:
      InputError: the header is damaged or of another version.
    """
    try:
        if header["format"] != FORMAT:
            raise InputError(
                f"{where} has format {header['format']}; this version reads format {FORMAT}."
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
    """A section of the configuration; fields that are newer than the file get their defaults."""
    return fields.from_dict(cls, config_lib.recorded(cls, given, where), where)


def uses_palette(header: dict) -> bool:
    """Whether the tokens that a header describes are colours of a palette."""
    return header.get("palette") is not None


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
    if uses_palette(header):
        definition = choose_palette(palette, definition, str(path))
    params = {n: a for n, a in arrays.items() if not n.startswith((CENTERS, TOKENIZER))}
    return from_header(header, params, definition, path).checked(str(path))


def read_definition(path: pathlib.Path) -> TokenDefinition | None:
    """See `weights.read_definition`."""
    with files.open_safetensors(path) as file:
        names = [name for name in file.keys() if name.startswith((CENTERS, TOKENIZER))]  # noqa: SIM118
        header = parse_header(file.metadata() or {}, path)
        return _definition(header, {name: file.get_tensor(name) for name in names}, path)


def _definition(
    header: dict, arrays: dict[str, np.ndarray], path: pathlib.Path
) -> TokenDefinition | None:
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
    """The arrays of a file: the parameters, and those of the token definition."""
    found = {name: np.ascontiguousarray(array) for name, array in weights_file.params.items()}
    if isinstance(weights_file.definition, Palette):
        found[CENTERS] = weights_file.definition.centers
    if isinstance(weights_file.definition, Tokenizer):
        found |= {f"{TOKENIZER}{n}": array for n, array in weights_file.definition.params.items()}
    return found


def write(weights_file: WeightsFile, path: pathlib.Path) -> None:
    """Writes the file atomically.

    Raises:
      InputError: the file cannot be written, or the name does not end in .safetensors.
    """
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path} does not end in .safetensors; weights are recognized by this ending."
        )
    header = {HEADER: json.dumps(make_header(weights_file))}
    files.write_safetensors(arrays(weights_file), path, header)
