"""The weights that stages begin with: this run's own pretraining, or `config.init_from`."""

import dataclasses
import logging
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptv_jax import config as config_lib
from gptv_jax import files, hosts, sharding, tokens, weights
from gptv_jax.checkpoint import Checkpoints
from gptv_jax.decode import speculative
from gptv_jax.decode.speculative import Draft
from gptv_jax.errors import InputError, shorten
from gptv_jax.model.gpt import Network
from gptv_jax.runs import record
from gptv_jax.runs.context import Context
from gptv_jax.tasks.network import network_of, start_vectors
from gptv_jax.tokens import Codec, learned
from gptv_jax.weights.native import WeightsFile

LOG = logging.getLogger(__name__)


class Pretrained(NamedTuple):
    """Pretrained weights."""

    params: dict
    numbers: dict[str, int]  # for the summary of the stage: the step, where it is not the last one


def load(context: Context, training: str = "pretrain") -> Pretrained:
    """The pretrained weights, from the newest checkpoint that can be read.

    `training` is the one of this run's pretraining stage whose weights are read.

    InputError: pretraining has not finished, the weights are of another shape, or none of the
    checkpoints can be read.
    """
    config, path = context.config, context.folder.path
    own = hosts.from_first(lambda: has_own(config, path))
    if own and config.init_from:
        LOG.info("Takes the weights that %s has adapted from %s.", path, config.init_from)
    return _load(context, path if own or not config.init_from else None, training)


def load_given(context: Context) -> Pretrained:
    """The weights of `config.init_from`, for pretraining to go on from; errors as of `load`.

    Where the network has another number of start vectors, for the classes of the data or for
    variants, each begins as the weights' vector for no class, or as the mean of the given start
    vectors.
    """
    found, network = _load(context, None), context.network()
    if "start" not in found.params or len(found.params["start"]) == network.starts:
        return found
    shape = sharding.abstract(network.init)["start"]
    classes, count = context.config.model.class_tokens, len(found.params["start"])
    LOG.info("The %d start vector(s) of these weights become %d.", count, network.starts)

    def spread(start):
        start = jax.sharding.reshard(start, jax.P())
        one = start.mean(axis=0) if not classes or count == 1 else start[-1]
        return jnp.broadcast_to(one, (network.starts, *one.shape))

    start = jax.device_put(jax.jit(spread)(found.params["start"]), shape.sharding)
    return found._replace(params=found.params | {"start": start})


def has_own(config: config_lib.Config, folder: pathlib.Path) -> bool:
    """Whether the run in the folder has finished its own pretraining; for process 0."""
    return record.has_finished(files.read_json(folder / "summary.json", {}), "pretrain")


def _load(context: Context, own: pathlib.Path | None, training: str = "pretrain") -> Pretrained:
    """The weights in the run folder `own`, or the weights that `config.init_from` names."""
    config = context.config
    if not own and weights.is_weights_path(config.init_from):
        found = _imported(config, context.codec, adapt=True)
        return Pretrained(_with_frames(context.network(), found.on_mesh()), {})

    made_by, folder, last = hosts.from_first(lambda: _finished(config, own))
    place = record.checkpoint_folder(made_by, folder) / training
    part = record.trained_part(made_by, "pretrain")
    network = context.network()
    given = dataclasses.replace(
        network, starts=start_vectors(made_by), layout=network_of(made_by).layout
    )
    with Checkpoints(place, read_only=True) as checkpoints:
        restored = checkpoints.restore_latest({part: sharding.abstract(given.init)})
    if restored is None:
        raise InputError(
            f"{place} holds no checkpoint, though pretraining has finished; restore it, or "
            "pretrain anew in another --workdir."
        )
    state, step = restored[0], restored[1]["position"]
    # Where the newest checkpoint is damaged, numbers are of an earlier one.
    numbers = {} if not own or step == last else {"pretrain_steps": step}
    return Pretrained(_with_frames(network, state[part]), numbers)


def _with_frames(network: Network, params: dict) -> dict:
    """Weights of images for a network of clips: each frame begins as an image does."""
    shapes = sharding.abstract(network.init)
    if "frame" not in shapes or "frame" in params:
        return params
    frame = jnp.zeros(shapes["frame"].shape, jnp.float32)
    return params | {"frame": jax.device_put(frame, shapes["frame"].sharding)}


def given_tokenizer(config: config_lib.Config) -> tokens.Tokenizer:
    """The tokenizer `config.tokenizer.init_from`, for process 0.

    InputError: no tokenizer is found, or its weights do not fit `config.tokens.autoencoder`.
    """
    field, wanted = "config.tokenizer.init_from", config.tokens.autoencoder
    named = f"{field}={config.tokenizer.init_from}"
    found = learned.load(weights.locate(config.tokenizer.init_from, f"there is no {named}"))
    if found.config.frames == 1:  # of images, which begins one of clips
        wanted = dataclasses.replace(wanted, frames=1)
    if differing := found.differing(wanted):
        raise InputError(
            f"{named} has other settings: {shorten(differing, '; ')}. Set these fields to its "
            "values."
        )
    return found


def check(
    config: config_lib.Config, folder: pathlib.Path, codec: Codec | None, *, adapt: bool
) -> None:
    """Checks before any work that a run finds pretrained weights of its network; for process 0.

    `adapt`: pretraining goes on from the weights of `config.init_from`, see `load_given`.

    InputError: there are no pretrained weights, or they are of another network.
    """
    own = folder if has_own(config, folder) or not config.init_from else None
    if not own and weights.is_weights_path(config.init_from):
        _imported(config, codec, adapt=adapt)
        return
    made_by, *_ = _finished(config, own)
    shape, starts = (made_by.data.image_size, {}, made_by.data.frames), start_vectors(made_by)
    found = WeightsFile(made_by.model, made_by.tokens, *shape, starts=starts)
    _must_fit(config, found, adapt=adapt)


def load_draft(context: Context) -> Draft | None:
    """The network that `config.sample.draft` names; None: the field names none."""
    if not context.config.sample.draft:
        return None
    return Draft(*_draft(context.config, context.codec, with_params=True))


def check_draft(config: config_lib.Config, codec: Codec | None) -> None:
    """InputError: `config.sample.draft` names no weights, or weights of other tokens."""
    _draft(config, codec, with_params=False)


def _draft(config, codec, with_params: bool) -> tuple[Network, dict]:
    name = f"config.sample.draft={config.sample.draft}"
    path = weights.locate(config.sample.draft, f"{name} does not exist")
    found, params = weights.read_stage(path, "pretrain", palette_of(codec), with_params=with_params)
    kinds = found.tokens.kind, config.tokens.kind
    speculative.check_draft(found.network, found.codec, network_of(config), codec, name, kinds)
    return found.network, params


def _finished(
    config: config_lib.Config, own: pathlib.Path | None
) -> tuple[config_lib.Config, pathlib.Path, int | None]:
    """Settings, folder and steps of the pretraining in `own` or in the run `config.init_from`."""
    given = None if own else config.init_from
    found = weights.locate(given) if given else own.absolute()
    summary = files.read_json(found / "summary.json", {})
    if not record.has_finished(summary, "pretrain"):
        where = f"config.init_from={found}" if given else found
        advice = "name a run folder that does" if given else "run --stages=pretrain first"
        raise InputError(f"{where} holds no finished pretraining; {advice}.")
    return record.config_of(found), found, summary.get("pretrain/steps")


def _imported(config: config_lib.Config, codec: Codec | None, *, adapt: bool) -> WeightsFile:
    """The weights of `config.init_from` that are no run folder, without their class head."""
    found = weights.read(config.init_from, palette_of(codec)).headless()
    _must_fit(config, found, adapt=adapt)
    return found


def palette_of(codec: Codec | None) -> tokens.Palette | None:
    """The codec's palette, if it has one."""
    definition = codec and codec.definition
    return definition if isinstance(definition, tokens.Palette) else None


def _must_fit(config: config_lib.Config, found: WeightsFile, *, adapt: bool) -> None:
    starts = start_vectors(config)
    if adapt:  # start vectors can be made of the start vectors in the file
        model = dataclasses.replace(found.model, class_tokens=config.model.class_tokens)
        found = dataclasses.replace(found, model=model, starts=starts)
    if differing := found.differing(config, starts):
        raise InputError(
            f"config.init_from={config.init_from} holds another network: "
            f"{shorten(differing, '; ')}. Set these fields to its values."
        )
